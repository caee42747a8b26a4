"""T5: what padding, later outputs and the batch do not change; and folders that cannot be read."""

from __future__ import annotations

import functools

import jax
import jax.flatten_util
import numpy as np
import pytest
import tiny

from jaxtok.decoding.sampling import Sampling
from jaxtok.interop.huggingface import params_to, read_folder, write_folder
from jaxtok.interop.t5 import read_config
from jaxtok.lm.t5 import T5, SequenceToSequence, T5Config, byt5, init_params, shift_right

TASKS = {
    "t5": lambda: tiny.pairs(
        SequenceToSequence(model=T5Config(**tiny.SIZES, head_size=4, mlp_dim=32, gated=True, tie_embeddings=False))
    )
}

EVIDENCE = {"t5": {"generate, cached": "lm/test_t5_parity.py::test_generation"}}


def generator():
    model = byt5(16, 24, 1, 1, 2)
    return SequenceToSequence(model=model), lambda key: init_params(model, key)


TEXT_GENERATORS = {"t5": generator}

CONFIG = T5Config(
    num_layers=2,
    decoder_layers=1,
    d_model=16,
    num_heads=2,
    head_size=6,
    mlp_dim=24,
    vocab_size=40,
    relative_buckets=8,
    relative_distance=12,
)


@pytest.fixture(scope="module")
def params():
    @jax.jit
    def make():
        flat, unflatten = jax.flatten_util.ravel_pytree(init_params(CONFIG, jax.random.key(0)))
        return unflatten(flat + 0.2 * jax.random.normal(jax.random.key(1), flat.shape))

    return make()


@pytest.fixture(scope="module")
def logits(params):
    return jax.jit(functools.partial(T5(CONFIG).apply, {"params": params}))


def test_padding_on_either_side_is_the_same(logits):
    """Positions are relative, and the content of the padding has no effect."""
    text, outputs = np.arange(2, 22)[None], np.arange(5, 12)[None]
    padding = np.zeros((1, 4), int)
    right = logits(np.concatenate([text, padding], 1), outputs)
    left = logits(np.concatenate([padding, text], 1), outputs)
    mask = np.arange(24)[None] < 20
    masked = logits(np.concatenate([text, padding + 7], 1), outputs, mask)
    np.testing.assert_allclose(left, right, atol=2e-5 * float(np.abs(right).max()))
    np.testing.assert_allclose(masked, right, atol=1e-6)


def test_later_outputs_change_nothing(logits):
    inputs, outputs = np.arange(2, 26)[None], np.arange(5, 12)[None]
    changed = outputs.copy()
    changed[0, 4:] = 30
    before, after = logits(inputs, outputs), logits(inputs, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_greedy_with_a_cache_is_greedy_without(params, logits):
    """A row of a batch is generated as if it were alone."""
    task, inputs = SequenceToSequence(model=CONFIG), [[5, 6, 7, 8, 9, 1], [20, 1]]
    options = {"max_new_tokens": 5, "stop_tokens": ()}
    new = task.generate(params, inputs, **options).tokens
    assert new == [task.generate(params, [row], **options).tokens[0] for row in inputs]
    tokens = np.zeros((2, 24), int)
    for row, text in zip(tokens, inputs):
        row[: len(text)] = text
    outputs = shift_right(np.pad(new, ((0, 0), (0, 2))))
    np.testing.assert_array_equal(logits(tokens, outputs)[:, :5].argmax(-1), new)
    with pytest.raises(ValueError, match="vocab_size is 40, which does not fit the tokenizer byt5"):
        task.continue_text(params, [b"x"], max_bytes=2, sampling=Sampling(), rng=jax.random.key(0))


def test_whose_scale_the_head_has():
    """The keys of either version of their library decide, whatever tensors of a head there are."""
    head = {"shared.weight": np.zeros((2, 2)), "lm_head.weight": np.ones((2, 2))}
    tied = {"shared.weight": np.zeros((2, 2))}
    for options, tensors, expected in [
        ({}, tied, (True, True)),
        ({"tie_word_embeddings": True}, head, (False, True)),
        ({"tie_word_embeddings": False}, head, (False, False)),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, head, (False, False)),
        ({"model_type": "mt5"}, head, (False, False)),
    ]:
        config = read_config({"model_type": "t5"} | options, tensors)
        assert (config.tie_embeddings, config.scale_outputs) == expected, options
    with pytest.raises(ValueError, match=r"no tensor lm_head\.weight"):
        read_config({"model_type": "t5", "tie_word_embeddings": False}, tied)


def test_folders_that_cannot_be_read(params, tmp_path):
    import safetensors.numpy

    for options, message in (
        ({"feed_forward_proj": "gated-selu"}, "feed_forward_proj is 'gated-selu'"),
        ({"decoder_start_token_id": 5}, "decoder_start_token_id is 5"),
        ({"delete_gate_layer": 1, "deletion_type": "none"}, "deletion_type is 'none'"),
        ({"has_absolute_position_embeddings": True}, "has_absolute_position_embeddings"),
    ):
        with pytest.raises(ValueError, match=message):
            read_config(options, {})
    folder = write_folder(tmp_path / "folder", CONFIG, params)
    tensors = params_to(CONFIG, params)
    for copy in (tensors["shared.weight"].copy(), np.zeros((40, 16), np.float32)):
        tensors["encoder.embed_tokens.weight"] = copy
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        if copy.any():
            assert read_folder(folder)[0] == CONFIG
        else:
            with pytest.raises(ValueError, match=r"encoder\.embed_tokens\.weight is not shared\.weight"):
                read_folder(folder)
    del tensors["encoder.embed_tokens.weight"]
    del tensors["decoder.block.0.layer.1.EncDecAttention.k.weight"]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"EncDecAttention\.k\.weight is missing.*extra\.weight is unknown"):
        read_folder(folder)

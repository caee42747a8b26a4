"""T5, its version 1.1 and ByT5 against Hugging Face's numbers, for whatever sizes and options a file has."""

from __future__ import annotations

import functools

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decoding import Sampling, generate
from jaxtok.interop.huggingface import params_from, params_to, read_folder, write_folder
from jaxtok.interop.t5 import read_config
from jaxtok.lm.t5 import PUBLISHED, T5, Conditioned, T5Config, condition, init_params, shift_right
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.nn.relative import RelativeBias
from jaxtok.tokenizers import ByT5Tokenizer

FILES = [
    *(f"llama_gpt2_bricks/{kind}*.npz" for kind in ("t5_v", "byt5")),
    *(f"mrt5/{kind}*.npz" for kind in ("byt5_hf", "byt5_softmax1", "t5v10")),
]


def load(golden):
    tensors = golden.under("params")
    config = read_config(golden.config, tensors)
    return config, params_from(config, tensors)


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, arrays):
    """Loss, gradients, logits, and the states of both sides: the embedding, after each block, after the norm."""
    module, labels = T5(config), arrays["labels"]
    outputs = shift_right(jnp.maximum(labels, 0))

    def loss(params):
        apply = functools.partial(module.apply, {"params": params}, mutable="intermediates")
        encoded, inside = apply(arrays["input_ids"], arrays["attention_mask"], method="encode")
        (logits, _), state = apply(outputs, encoded, method="decode")
        hidden = {"encoder": inside["intermediates"]["encoder"], "decoder": state["intermediates"]["decoder"]}
        hidden = {side: part["stack"]["blocks"]["hidden"][0] for side, part in hidden.items()}
        nats = cross_entropy(logits, jnp.maximum(labels, 0))
        return masked_mean(nats, labels >= 0), (logits, encoded.states, hidden)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parity(*FILES)
def test_model(golden, parity):
    config, params = load(golden)
    arrays = {name: golden[f"in/{name}"] for name in ("input_ids", "attention_mask", "labels")}
    (loss, (logits, states, hidden)), gradient = run(config, params, arrays)
    real, wanted = arrays["attention_mask"].astype(bool), arrays["labels"] >= 0
    if "in/decoder_input_ids" in golden.arrays:
        outputs = shift_right(np.maximum(arrays["labels"], 0))
        np.testing.assert_array_equal(outputs, golden["in/decoder_input_ids"])
    parity("logits", logits[wanted], golden["out/logits"][wanted])
    parity("loss", loss, golden["out/loss"], rtol=1e-5)
    for side, short in (("encoder", "enc"), ("decoder", "dec")):
        for k, ours in enumerate(hidden[side][:-1], 1):  # the last is given after the norm
            name = next((n for n in (f"mid/{side}_hidden_{k}", f"mid/{short}_hidden_{k}") if n in golden.arrays), None)
            if name:
                at = real if side == "encoder" else wanted
                parity("hidden states", ours[at], golden[name][at])
    for name in ("out/encoder_last_hidden_state", f"mid/enc_hidden_{config.num_layers}"):
        if name in golden.arrays:
            parity("encoder", states[real], golden[name][real])
    theirs = golden.under("grad")
    if theirs:
        parity("gradient", {name: params_to(config, gradient)[name] for name in theirs}, theirs, rtol=1e-3)


@functools.partial(jax.jit, static_argnames="config")
def encode(config, params, inputs, mask):
    return T5(config).apply({"params": params}, inputs, mask, method="encode")


@pytest.mark.parity(*FILES)
def test_generation(golden, parity):
    """Decoding with a cache, in steps of one and of more tokens, and greedily, from an input that is encoded once."""
    config, params = load(golden)
    inputs = golden["in/input_ids"]
    encoded = encode(config, params, inputs, golden["in/attention_mask"])
    model, given = Conditioned(T5(config)), condition(T5(config), params, encoded)
    outputs = shift_right(np.maximum(golden["in/labels"], 0))
    cache, parts, done = model.init_cache(*outputs.shape), [], 0
    apply = jax.jit(lambda tokens, cache: model.apply({"params": given}, tokens, cache=cache))
    for new in [3, *[1] * (outputs.shape[1] - 3)]:
        logits, cache = apply(outputs[:, done : done + new], cache)
        parts, done = [*parts, logits], done + new
    wanted = golden["in/labels"] >= 0
    parity("cached logits", np.concatenate(parts, 1)[wanted], golden["out/logits"][wanted])
    for name, stops in (("greedy_ids", [1]), ("gen_ids", [1]), ("gen_ids_no_eos", [])):
        if f"out/{name}" not in golden.arrays:
            continue
        theirs = golden[f"out/{name}"][:, 1:]
        stops = stops and golden.arrays.get("in/gen_eos_token_id", np.array(stops)).tolist()
        count = theirs.shape[1]
        new = generate(
            model, given, [[0]] * len(inputs), max_new_tokens=count, chooser=Sampling(temperature=0), stop_tokens=stops
        )
        np.testing.assert_array_equal([row + [0] * (count - len(row)) for row in new.tokens], theirs)


@pytest.mark.parity("llama_gpt2_bricks/t5_buckets*.npz")
def test_buckets(golden):
    """A table of 0, 1, 2, ... makes the bias the bucket."""
    places = golden["in/relative_position"]
    for name, case in golden.config.items():
        module = RelativeBias(1, case["num_buckets"], case["max_distance"], not case["bidirectional"])
        table = jnp.arange(case["num_buckets"], dtype=jnp.float32)[:, None]
        ours = module.apply({"params": {"table": table}}, np.zeros((1, 1), int), places[None])
        np.testing.assert_array_equal(ours[0, 0, 0], golden[f"out/{name}"], err_msg=name)


@pytest.mark.parity("llama_gpt2_bricks/byt5*.npz")
def test_texts_are_read_as_theirs(golden):
    import json

    tokenizer = ByT5Tokenizer("ids")
    for row, (source, target) in enumerate(json.loads(str(golden["in/texts"]))):
        for text, name in ((source, "in/input_ids"), (target, "in/labels")):
            ids = tokenizer.encode_text(text)
            np.testing.assert_array_equal(golden[name][row][: len(ids)], ids[: golden[name].shape[1]])


TINY = {
    "num_layers": 3,
    "decoder_layers": 2,
    "d_model": 16,
    "num_heads": 2,
    "head_size": 6,
    "mlp_dim": 24,
    "vocab_size": 40,
}
SMALL_BUCKETS = {"relative_buckets": 8, "relative_distance": 12}
V1_1 = {"gated": True, "tie_embeddings": False, "scale_outputs": False}
CONFIGS = {
    "version 1": T5Config(**TINY),
    "version 1.1": T5Config(**TINY, **SMALL_BUCKETS, **V1_1, activation="gelu_tanh"),
    "gated silu, tied, not scaled": T5Config(**TINY, activation="silu", gated=True, scale_outputs=False),
    "untied and scaled": T5Config(**TINY | {"decoder_layers": 4}, **SMALL_BUCKETS, tie_embeddings=False),
}


@functools.partial(jax.jit, static_argnames="config")
def loud_params(config):
    """Parameters that are far from their initial values, those of norms too."""
    flat, unflatten = jax.flatten_util.ravel_pytree(init_params(config, jax.random.key(0)))
    return unflatten(flat + 0.2 * jax.random.normal(jax.random.key(7), flat.shape))


@pytest.mark.parametrize("name", CONFIGS)
def test_written_then_read_is_the_same(name, tmp_path):
    config = CONFIGS[name]
    params = loud_params(config)
    again, tree = read_folder(write_folder(tmp_path / "folder", config, params))
    assert again == config
    chex.assert_trees_all_equal(tree, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_with_the_library_itself(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    params = loud_params(config)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(write_folder(tmp_path, config, params)).eval()
    rng = np.random.default_rng(1)
    inputs, outputs = rng.integers(2, 40, (2, 30)), rng.integers(2, 40, (2, 9))
    inputs[0, 20:] = 0
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.from_numpy(inputs),
            attention_mask=torch.from_numpy((inputs != 0).astype(np.int64)),
            decoder_input_ids=torch.from_numpy(outputs),
        ).logits.numpy()
    ours = jax.jit(T5(config).apply)({"params": params}, inputs, outputs)
    np.testing.assert_allclose(ours, logits, atol=1e-4 * np.abs(logits).max())


COUNTS = {
    **dict(zip(("t5-small", "t5-base", "t5-large"), (60_506_624, 222_903_552, 737_668_096))),
    **{"t5-3b": 2_851_598_336, "t5-11b": 11_307_321_344},
    **{"t5-v1_1-small": 76_961_152, "t5-v1_1-base": 247_577_856, "t5-v1_1-large": 783_150_080},
    **{"t5-v1_1-xl": 2_849_757_184, "t5-v1_1-xxl": 11_135_332_352},
    **{"mt5-small": 300_176_768, "mt5-base": 582_401_280, "mt5-large": 1_229_581_312},
    **{"mt5-xl": 3_742_619_648, "mt5-xxl": 12_921_057_280},
    **{"byt5-small": 299_637_760, "byt5-base": 581_653_248, "byt5-large": 1_228_183_552},
    **{"byt5-xl": 3_737_801_728, "byt5-xxl": 12_906_899_328},
}


def test_published_sizes():
    assert COUNTS.keys() == PUBLISHED.keys()
    for name, config in PUBLISHED.items():
        shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
        assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == COUNTS[name], name

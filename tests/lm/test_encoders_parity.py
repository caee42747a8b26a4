"""BERT, RoBERTa and XLM-R against Hugging Face's numbers, for whatever sizes and options a file has."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtok import verbs
from jaxtok.data.encoders import EncoderData
from jaxtok.interop.encoders import read_encoder_config
from jaxtok.interop.formats import format_named
from jaxtok.interop.huggingface import params_from, params_to, read_folder, write_folder
from jaxtok.lm.bert import PUBLISHED, Bert, BertConfig, init_params
from jaxtok.lm.masked_words import MaskedWords, Masking
from jaxtok.model import Model
from jaxtok.nn.losses import cross_entropy, masked_mean

TASKS = {
    "masked_words": lambda: tiny.encoder(
        MaskedWords(
            model=dataclasses.replace(tiny.ENCODER, mask_head=True, replaced_head=False),
            masking=Masking(mask_id=3, kept_ids=(1, 2)),
        )
    )
}

EVIDENCE = {"bert": {"task": "masked_words", "formats": ("bert", "roberta, classes")}}

FIXTURES = [f"llama_gpt2_bricks/{kind}*.npz" for kind in ("bert", "roberta", "xlmr")]


def load(golden):
    tensors = golden.under("params")
    config = read_encoder_config(golden.config, tensors)
    return config, params_from(config, tensors)


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, arrays):
    """Losses of masked words (and of the next sentence), their gradients, each head, hidden states."""

    def loss(params):
        heads, state = Bert(config).apply(
            {"params": params},
            arrays["input_ids"],
            arrays["attention_mask"],
            arrays.get("token_type_ids"),
            method="everything",
            mutable="intermediates",
        )
        labels = arrays["mlm_labels"]
        nats = cross_entropy(heads["masked_words"], jnp.maximum(labels, 0))
        words = masked_mean(nats, labels >= 0)
        total = words
        if "next_sentence_label" in arrays:
            total += cross_entropy(heads["next_sentence"], arrays["next_sentence_label"]).mean()
        return total, (words, heads, state["intermediates"]["stack"]["blocks"]["hidden"][0])

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="config")
def class_gradient(config, params, arrays):
    def loss(params):
        hidden = Bert(config).apply({"params": params}, arrays["input_ids"], arrays["attention_mask"])
        logits = Bert(config).apply({"params": params}, hidden, method="classes")
        return cross_entropy(logits, arrays["labels"]).mean()

    return jax.value_and_grad(loss)(params)


@pytest.mark.parity(*FIXTURES)
def test_encoder(golden, parity):
    config, params = load(golden)
    arrays = golden.under("in")
    (loss, (words, heads, hidden)), gradient = run(config, params, arrays)
    real = arrays["attention_mask"].astype(bool)
    parity("logits", heads["masked_words"][real], golden["out/logits"][real])
    parity("loss", loss, golden["out/loss"], rtol=1e-5)
    for k, ours in enumerate(hidden, 1):
        parity("hidden states", ours[real], golden[f"mid/hidden_{k}"][real])
    for ours, theirs in {"next_sentence": "nsp_logits", "pooled": "pooled", "classes": "class_logits"}.items():
        if f"out/{theirs}" in golden.arrays:
            parity(ours, heads[ours], golden[f"out/{theirs}"])
    if "out/mlm_loss" in golden.arrays:
        parity("loss of masked words", words, golden["out/mlm_loss"], rtol=1e-5)
    compare_gradients(config, gradient, golden.under("grad"), parity, "gradient")
    if "in/labels" in golden.arrays:
        loss, gradient = class_gradient(config, params, arrays)
        parity("loss of classes", loss, golden["out/class_loss"], rtol=1e-5)
        compare_gradients(config, gradient, golden.under("grad_classifier"), parity, "gradient of classes")


def compare_gradients(config, gradient, theirs, parity, what):
    ours = params_to(config, gradient)
    assert theirs and theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        mine = np.array(ours[name])
        if name.endswith("self.key.bias"):  # softmax does not depend on it, so theirs is rounding
            assert np.abs(mine - expected).max() < 1e-6
            continue
        expected = np.array(expected)
        if name.endswith("word_embeddings.weight") or (
            config.positions_from_ids and name.endswith("position_embeddings.weight")
        ):  # PyTorch's lookup gives the padding's row no gradient
            mine[config.pad_id] = expected[config.pad_id] = 0
        parity(what, mine, expected, rtol=1e-3)


@pytest.mark.parity("llama_gpt2_bricks/bert*.npz")
def test_types_default_to_the_first(golden, parity):
    config, params = load(golden)
    arrays = golden.under("in")
    apply = jax.jit(Bert(config).apply, static_argnames="method")
    hidden = apply({"params": params}, arrays["input_ids"], arrays["attention_mask"])
    logits = apply({"params": params}, hidden, method="masked_words")
    real = arrays["attention_mask"].astype(bool)
    parity("logits without types", logits[real], golden["out/logits_no_token_types"][real])


TINY = {"num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 24, "vocab_size": 40, "max_positions": 20}
ROBERTA = BertConfig(**TINY, type_vocab_size=1, pad_id=1, positions_from_ids=True, pooler=False, next_sentence=False)
CONFIGS = {
    "bert": BertConfig(**TINY),
    "bert without heads": BertConfig(**TINY, mask_head=False, next_sentence=False, pooler=False),
    "roberta": ROBERTA,
    "roberta classifier": dataclasses.replace(ROBERTA, mask_head=False, num_classes=3),
}


new_params = jax.jit(lambda config: init_params(config, jax.random.key(0)), static_argnames="config")


@pytest.mark.parametrize("name", CONFIGS)
def test_written_then_read_is_the_same(name, tmp_path):
    config = CONFIGS[name]
    params = new_params(config)
    write_folder(tmp_path / "folder", config, params)
    again, tree = read_folder(tmp_path / "folder")
    assert again == config
    chex.assert_trees_all_equal(tree, params)


def test_with_the_library_itself(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kinds = {"bert": transformers.BertForPreTraining, "roberta": transformers.RobertaForMaskedLM}
    for name, kind in kinds.items():
        config = CONFIGS[name]
        params = jax.tree.map(lambda x: 10 * x, new_params(config))
        theirs = kind.from_pretrained(write_folder(tmp_path / name, config, params)).eval()
        tokens = np.random.default_rng(1).integers(2, config.vocab_size, (2, 12))
        tokens[0, 9:] = config.pad_id
        mask = tokens != config.pad_id
        with torch.no_grad():
            output = theirs(input_ids=torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask.astype(np.int64)))
        expected = (output.logits if name == "roberta" else output.prediction_logits).numpy()[mask]
        ours = Bert(config).apply({"params": params}, tokens, method="everything")["masked_words"][mask]
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("bert-base-uncased", 109_482_240),
        ("bert-base-cased", 108_310_272),
        ("bert-base-multilingual-cased", 177_853_440),
        ("bert-large-uncased", 335_141_888),
        ("roberta-base", 124_645_632),
        ("roberta-large", 355_359_744),
        ("xlm-roberta-base", 278_043_648),
        ("xlm-roberta-large", 559_890_432),
    ],
)
def test_published_sizes(name, parameters):
    """The counts of Hugging Face's models without heads, which have a pooler."""
    config = dataclasses.replace(PUBLISHED[name], mask_head=False, next_sentence=False, pooler=True)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == parameters


def test_padding_at_the_end_changes_nothing():
    config = CONFIGS["roberta"]
    params = new_params(config)
    tokens = np.arange(5, 15)[None]
    padded = np.concatenate([tokens, np.full((1, 4), config.pad_id)], 1)
    apply = jax.jit(Bert(config).apply)
    alone = apply({"params": params}, tokens)
    np.testing.assert_allclose(apply({"params": params}, padded)[:, :10], alone, atol=1e-6)


def test_verbs_for_language_models_refuse_an_encoder(tmp_path):
    config = BertConfig(vocab_size=384, num_layers=1, d_model=8, num_heads=1, mlp_dim=8, max_positions=8)
    task = MaskedWords(model=config, masking=Masking(mask_id=260, kept_ids=(258, 259)))
    data = EncoderData(cls_id=258, sep_id=259)
    model = Model(task=task, params=new_params(config), data=data)
    format_named("bert").write(tmp_path / "bert", model)
    with pytest.raises(ValueError, match="is a model of MaskedWords, which does not generate text"):
        verbs.generate(tmp_path / "bert")


def test_too_long_a_text_is_refused():
    for name, longest in (("bert", 20), ("roberta", 18)):
        config = CONFIGS[name]
        with pytest.raises(ValueError, match=f"max_length is {longest}"):
            Bert(config).init(jax.random.key(0), np.ones((1, longest + 1), int))
    with pytest.raises(ValueError, match="position_embedding_type is 'relative_key'"):
        read_encoder_config({"model_type": "bert", "position_embedding_type": "relative_key"}, {})

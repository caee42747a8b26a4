"""ELECTRA against the authors' code (TensorFlow) and Hugging Face's, for whatever sizes and options a file has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.interop.electra import from_official, to_official
from jaxtok.interop.encoders import read_encoder_config
from jaxtok.interop.huggingface import params_from, params_to
from jaxtok.lm.electra import Choices, ElectraConfig, ReplacedTokens
from jaxtok.lm.masked_words import MaskedWords, Masking, Slots, slot_logits, take, weighted_mean
from jaxtok.nn.linear import ACTIVATIONS
from jaxtok.nn.losses import cross_entropy, masked_mean

THEIR_NAMES = {"gelu": "gelu", "relu": "relu", "swish": "silu", "gelu_new": "gelu_tanh"}


def task_of(options):
    """The authors' options (`configure_pretraining.py`) as a Task; options that a file lacks have their default."""
    sizes = options["model_hparam_overrides"]
    names = {
        "hidden_size": "d_model",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "max_position_embeddings": "max_positions",
        "type_vocab_size": "type_vocab_size",
    }
    ours = {names[name]: value for name, value in sizes.items() if name in names}
    words_only = not options.get("electra_objective", True) and not options.get("electric_objective", False)
    model = ElectraConfig(
        **ours,
        activation=THEIR_NAMES[sizes.get("hidden_act", "gelu")],
        vocab_size=options["vocab_size"],
        embedding_size=options.get("embedding_size") or ours["d_model"],
        pad_id=options["pad_id"],
        mask_head=words_only,
        replaced_head=not words_only,
    )
    masking = Masking(
        rate=options.get("mask_prob", 0.15),
        mask_id=options["mask_id"],
        kept_ids=(options["cls_id"], options["sep_id"]),
        with_replacement=True,
    )
    if model.mask_head:
        return MaskedWords(model=model, masking=masking)
    untied = options.get("untied_generator", True), options.get("untied_generator_embeddings", False)
    return ReplacedTokens(
        model=model,
        masking=masking,
        generator="uniform"
        if options.get("uniform_generator", False)
        else "towers"
        if options.get("two_tower_generator", False)
        else "encoder",
        objective="electric" if options.get("electric_objective", False) else "replaced",
        generator_width=options.get("generator_hidden_size", 0.25),
        generator_depth=options.get("generator_layers", 1.0),
        sharing="everything" if not untied[0] else "nothing" if untied[1] else "embeddings",
        temperature=options.get("temperature", 1.0),
        disallow_correct=options.get("disallow_correct", False),
        generator_weight=options.get("gen_weight", 1.0),
        discriminator_weight=options.get("disc_weight", 50.0),
    )


@functools.partial(jax.jit, static_argnames="task")
def joint(task, params, batch, choices):
    def loss(params):
        result = task.run(params, batch, choices)
        return result["loss"], result

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="task")
def masked_only(task, params, batch, choices):
    slots = choices.slots

    def loss(params):
        masked = task.masking.hide(batch["tokens"], slots, choices.draws)
        logits = slot_logits(task.model, params, masked, batch["mask"], batch["types"], slots, None)
        nats = cross_entropy(logits, take(batch["tokens"], slots.places))
        mean = weighted_mean(jnp.sum(nats * slots.weights), jnp.sum(slots.weights))
        return mean, {"words": logits, "nats": nats, "masked": masked}

    return jax.value_and_grad(loss, has_aux=True)(params)


def close(parity, what, ours, theirs, kind="key/bias"):
    """Compares gradients; those of the keys' biases are 0 but for rounding, as softmax does not depend on them."""
    assert theirs and theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        if name.endswith(kind):
            np.testing.assert_allclose(ours[name], expected, atol=1e-5)
        else:
            parity(what, ours[name], expected, rtol=1e-3)


@pytest.mark.parity("electra/tf_*.npz")
def test_authors_code(golden, parity):
    task = task_of(golden.config)
    params = from_official(task, golden.under("params"))
    batch = {"tokens": golden["in/input_ids"], "mask": golden["in/input_mask"], "types": golden["in/segment_ids"]}
    slots = Slots(golden["in/masked_lm_positions"], golden["in/masked_lm_weights"])
    choices = Choices(slots, golden["in/uniform_noise_0"], golden["in/uniform_noise_1"])
    assert slots.places.shape[1] == task.masking.slots(batch["tokens"].shape[1])
    np.testing.assert_array_equal(
        take(jnp.asarray(batch["tokens"]), slots.places) * (slots.weights > 0), golden["in/masked_lm_ids"]
    )
    joined = isinstance(task, ReplacedTokens)
    (loss, result), gradient = (joint if joined else masked_only)(task, params, batch, choices)
    np.testing.assert_array_equal(result["masked"], golden["in/masked_input_ids"])
    real = slots.weights > 0
    parity("logits of words", result["words"][real], golden["out/mlm_logits"][real])
    parity("nats of words", result["nats"][real], golden["out/mlm_per_token_loss"][real])
    np.testing.assert_allclose(loss, golden["out/total_loss"], atol=1e-3)
    if joined:
        np.testing.assert_array_equal(
            np.where(real, result["samples"], 0), np.where(real, golden["out/sampled_ids"], 0)
        )
        np.testing.assert_array_equal(result["corrupted"], golden["out/corrupted_input_ids"])
        np.testing.assert_array_equal(result["labels"], golden["out/is_fake"])
        mask = batch["mask"]
        parity("probabilities", jax.nn.sigmoid(result["replaced"]) * mask, golden["out/disc_probs"] * mask)
        np.testing.assert_array_equal((result["replaced"] > 0) * mask, golden["out/disc_preds"] * mask)
        nats = optax.sigmoid_binary_cross_entropy(result["replaced"], result["labels"]) * mask
        parity("loss of each row", nats.sum(1) / (mask.sum(1) + 1e-6), golden["out/disc_per_example_loss"])
        parity("discriminator's loss", result["discriminator_loss"], golden["out/disc_loss"], rtol=1e-5)
        parity("generator's loss", result["generator_loss"], golden["out/mlm_loss"], rtol=1e-5)
    else:
        parity("loss of words", loss, golden["out/mlm_loss"], rtol=1e-5)
    close(parity, "gradient", to_official(task, gradient), golden.under("grad"))
    again = to_official(task, params)
    assert again.keys() == golden.under("params").keys()
    for name, expected in golden.under("params").items():
        np.testing.assert_array_equal(again[name], expected)


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, arrays):
    """The loss, each head, hidden states, and gradients."""

    def loss(params):
        module = config.module()
        heads, state = module.apply(
            {"params": params},
            arrays["input_ids"],
            arrays["attention_mask"],
            arrays.get("token_type_ids"),
            method="everything",
            mutable="intermediates",
        )
        total = 0.0
        if "is_replaced" in arrays:
            nats = optax.sigmoid_binary_cross_entropy(heads["replaced"], arrays["is_replaced"])
            total = masked_mean(nats, arrays["attention_mask"] == 1)
        elif "mlm_labels" in arrays:
            labels = arrays["mlm_labels"]
            total = masked_mean(cross_entropy(heads["masked_words"], jnp.maximum(labels, 0)), labels >= 0)
        return total, (heads, state["intermediates"]["stack"]["blocks"]["hidden"][0])

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parity("electra/hf_*.npz")
def test_hugging_face(golden, parity):
    tensors, arrays = golden.under("params"), golden.under("in")
    config = read_encoder_config(golden.config | {"model_type": "electra"}, tensors)
    params = params_from(config, tensors)
    (loss, (heads, hidden)), gradient = run(config, params, arrays)
    head = "replaced" if config.replaced_head else "masked_words" if config.mask_head else "classes"
    real = arrays["attention_mask"].astype(bool) if head != "classes" else slice(None)
    parity(head, heads[head][real], golden["out/logits"][real])
    for k, ours in enumerate(hidden, 1):
        if f"mid/hidden_{k}" in golden.arrays:
            parity("hidden states", ours[real], golden[f"mid/hidden_{k}"][real])
    if "out/loss" in golden.arrays:
        parity("loss", loss, golden["out/loss"], rtol=1e-5)
        ours, theirs = params_to(config, gradient), golden.under("grad")
        row = "electra.embeddings.word_embeddings.weight"
        if row in theirs:  # PyTorch's lookup gives the padding's row no gradient; our tensor of it is read-only
            ours[row] = np.array(ours[row])
            ours[row][config.pad_id] = theirs[row][config.pad_id]
        close(parity, "gradient", ours, theirs, "key.bias")
    assert params_to(config, params).keys() == tensors.keys()


def test_activations_have_the_authors_names():
    assert set(THEIR_NAMES.values()) == set(ACTIVATIONS)

"""ELM against the authors' numbers, for whatever sizes and options a file has."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.elm import config_from, params_from, params_to
from jaxtok.nn.bits import pack_bits, unpack_bits
from jaxtok.training.optimizer import OptimizerConfig, learning_rate
from jaxtok.vision import elm_masked, elm_sampling
from jaxtok.vision.elm import Elm, ElmModeling
from jaxtok.vision.elm_masked import MaskedElm, MaskedElmModeling, MaskedSampling, hamming_weights
from jaxtok.vision.elm_sampling import ElmSampling
from jaxtok.vision.token_statistics import attention_locality, token_statistics


def load(golden):
    """Model and parameters of a file; the sizes of its tensors are checked against its config."""
    theirs, tensors = golden.config, golden.under("params")
    config = config_from(
        tensors,
        head_size=theirs["dim"] // theirs["n_head"],
        sub_codes=theirs["token_each"],
        grid=theirs["grid"],
        rotary_base=float(theirs.get("rotary_base", 10000)),
        norm_eps=theirs.get("norm_eps", 1e-5),
        cosine_scores=theirs.get("attn_type") == "cs",
    )
    kv_heads = theirs.get("n_kv_head") or theirs["n_head"]
    assert (config.kv_heads, config.code_bits, config.modulation) == (
        kv_heads,
        theirs["code_dim"],
        theirs.get("adaLN", False),
    )
    return config, params_from(config, tensors)


def check_tensors(golden, config, params):
    """The tensors that are written are those that were read."""
    theirs, ours = golden.under("params"), params_to(config, params)
    assert set(ours) == set(theirs)
    for name, array in theirs.items():
        if name == "mlm_layer.bias":  # the last, of the mask as a target, is not used
            array = np.where(np.arange(array.shape[-1]) < config.codebook, array, 0)
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, codes, labels, valid):
    """Loss, gradient, and what is on the way."""
    task, batch = ElmModeling(model=config), {"codes": codes, "labels": labels, "mask": jnp.ones(len(codes))}

    def loss(params):
        logits, state = Elm(config).apply({"params": params}, codes, labels, mutable="intermediates")
        images = task.image_nats(params, batch)
        return images.mean(), (logits, state["intermediates"]["stack"]["blocks"]["hidden"][0], images)

    (value, (logits, hidden, images)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    of_valid = jnp.sum(images * valid) / jnp.maximum(valid.sum(), 1)
    embeddings = [
        Elm(config).apply({"params": params}, x, method=name)
        for name, x in (("embed_class", labels), ("embed", codes[:, :-1]))
    ]
    return value, gradient, logits, hidden, of_valid, embeddings


@pytest.mark.parity("elm/ar_*.npz")
def test_autoregressive(golden, parity):
    config, params = load(golden)
    check_tensors(golden, config, params)
    if "out/logits" not in golden.arrays:
        pytest.skip("a file of generation only")
    valid = golden.arrays.get("in/valid", np.ones(len(golden["in/labels"])))
    loss, gradient, logits, hidden, of_valid, (classes, tokens) = run(
        config, params, golden["in/indices"], golden["in/labels"], valid
    )
    parity("rotation", config.rotation(), golden["mid/freqs_cis"])
    parity("class embedding", classes, golden["mid/cls_embedding"])
    parity("token embeddings", tokens, golden["mid/token_embeddings"])
    for k in range(config.num_layers):
        parity("blocks", hidden[k], golden[f"mid/block_{k}"])
    batch, places, vocab = golden["out/logits"].shape
    parity("logits", logits.reshape(batch, places, vocab), golden["out/logits"])
    parity("loss", loss, golden["out/loss"], rtol=1e-5)
    if "out/loss_valid" in golden.arrays:
        parity("loss of valid images", of_valid, golden["out/loss_valid"], rtol=1e-5)
    parity("gradient", params_to(config, gradient), golden.under("grad"), rtol=1e-3)


@pytest.mark.parity("elm/ar_*.npz")
def test_generation(golden, parity):
    config, params = load(golden)
    if not golden.config["gen"]:
        pytest.skip("a file without generation")
    for number, options in enumerate(golden.config["gen"]):
        sampling = ElmSampling(
            guidance=options["cfg_scale"],
            schedule=options["schedule"],
            top_k=options["top_k"] or 0,
            temperature=options["temperature"],
        )
        given = {name: golden[f"in/gen{number}_{name}"] for name in ("labels", "u")}
        labels = [None if label == config.num_classes else int(label) for label in given["labels"]]
        nothing = np.zeros((len(labels), 0, config.sub_codes), np.int32)
        prefix = golden.arrays.get(f"in/gen{number}_prefix", nothing)
        codes = elm_sampling.generate(
            config, params, labels, sampling=sampling, prefix=prefix, new=len(given["u"]), uniforms=given["u"]
        )
        np.testing.assert_array_equal(codes, golden[f"out/gen{number}_indices"])
        ids, weights = elm_sampling.class_ids(config, labels), sampling.weights(len(given["u"]))
        _, last = elm_sampling.draw(config, params, ids, prefix, sampling, weights, uniforms=given["u"])
        theirs = golden[f"out/inf_gen{number}_last_logits"]
        left_out = theirs <= -1e29
        np.testing.assert_array_equal(np.isneginf(last), left_out)
        parity("last logits of generation", *(np.where(left_out, 0, x) for x in (last, theirs)), rtol=1e-3)


@functools.partial(jax.jit, static_argnames=("task", "hamming"))
def run_masked(task, params, codes, labels, masked, hamming=0):
    batch = {"codes": codes, "labels": labels, "mask": jnp.ones(len(codes))}

    def loss(params):
        total, count = task.masked_nats(params, batch, masked)
        logits = MaskedElm(task.model).apply({"params": params}, codes, labels, masked)
        return total / count, logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def check_masked_generation(golden, parity, config, params):
    options = golden.config
    sampling = MaskedSampling(
        rounds=options["gen_iter"],
        guidance=options["cfg_scale"],
        schedule=options["cfg_schedule"],
        power=options.get("scale_pow", 1.0),
        noise=options["temperature"],
        mask_schedule=options["mask_schedule"],
    )
    labels = golden.arrays.get("in/gen_labels", golden["in/labels"])
    draws = golden["in/gen_u"], golden["in/gen_gumbel"]
    codes, logits = elm_masked.draw(config, params, labels, sampling, draws=draws)
    np.testing.assert_array_equal(codes, golden["out/gen_indices"])
    theirs = golden["out/gen_last_logits"]
    parity("last logits of generation", logits.reshape(theirs.shape), theirs, rtol=1e-3)


@pytest.mark.parity("elm/mlm_*.npz")
def test_masked(golden, parity):
    config, params = load(golden)
    check_tensors(golden, config, params)
    options = golden.config
    task = MaskedElmModeling(
        model=config,
        rounds=options["gen_iter"],
        mask_schedule=options["mask_schedule"],
        label_smoothing=options["smoothing"],
    )
    soft = MaskedElmModeling(model=config, hamming=options["hm_dist"]) if "hm_dist" in options else None
    codes, labels = golden["in/indices"], golden["in/labels"]
    if "in/mask" in golden.arrays:
        cases = {"": golden["in/mask"] > 0}
    else:
        cases = {}
        for k in range(sum(key.endswith("_step") for key in golden.arrays)):
            count = task.counts()[golden[f"in/mask{k}_step"]]
            assert count == golden[f"out/mask{k}_count"]
            cases[f"mask{k}_"] = elm_masked.mask_lowest(golden[f"in/mask{k}_noise"], count)
    for name, masked in cases.items():
        (loss, logits), gradient = run_masked(task, params, codes, labels, masked)
        parity("loss", loss, golden[f"out/{name}loss"], rtol=1e-5)
        if soft:
            (loss, _), _ = run_masked(soft, params, codes, labels, masked)
            parity("loss of soft labels", loss, golden[f"out/{name}loss_soft"], rtol=1e-5)
        if name in ("", "mask1_"):  # the one that the file has the gradient of
            parity("logits", logits.reshape(golden["out/logits"].shape), golden["out/logits"])
            ours, theirs = params_to(config, gradient), golden.under("grad")
            assert theirs["mlm_layer.bias"][..., -1] == 0
            parity("gradient", ours, theirs, rtol=1e-3)
    if soft:
        ours = hamming_weights(codes, config.code_bits, options["hm_dist"])
        parity("soft labels", ours.reshape(golden["in/soft_labels"].shape), golden["in/soft_labels"], rtol=1e-6)
    check_masked_generation(golden, parity, config, params)


@pytest.mark.parity("elm/vocab_decomposition*.npz")
def test_decomposition(golden, parity):
    t, k, grid = (golden.config[name] for name in ("token_each", "code_dim", "grid"))
    bits = np.moveaxis(golden["in/code"], 1, -1)
    codes = pack_bits(bits, t).reshape(len(bits), grid * grid, t)
    np.testing.assert_array_equal(codes, golden["out/indices"])
    back = unpack_bits(codes, t * k).reshape(bits.shape)
    np.testing.assert_array_equal(np.moveaxis(back, -1, 1), golden["out/codes_back"])
    for name, theirs in golden.under("out").items():
        if name.startswith("softlabels_dist"):
            ours = hamming_weights(codes[0, :4], k, int(name.removeprefix("softlabels_dist")))
            parity("soft labels", ours.reshape(theirs.shape), theirs, rtol=1e-6)


@pytest.mark.parity("elm/vocab_decomposition*.npz")
def test_the_authors_cosine_schedule(golden, parity):
    """In a run of 800,000 steps; theirs continues at the minimum, and a run here ends."""
    steps = 800_000
    schedule = OptimizerConfig(learning_rate=1e-4, min_learning_rate=1e-6, warmup=100 / steps)
    inside = golden["in/lr_steps"] <= steps
    ours = learning_rate(schedule, golden["in/lr_steps"][inside], steps)
    parity("learning rate", ours, golden["out/lr"][inside], rtol=1e-6)


@pytest.mark.parity("elm/numpy_token_statistics*.npz")
def test_statistics(golden, parity):
    tokens, options = golden["in/tokens"], golden.config
    ours = token_statistics(tokens, options["V"])
    names = ("kl_unigram", "kl_bigram", "entropy", "bigram_mutual_information", "usage", "perplexity")
    for name in names:
        parity(name.replace("_", " "), getattr(ours, name), golden[f"out/{name}"], rtol=1e-6)
    grid = math.isqrt(options["L"])
    cells = np.stack(np.divmod(np.arange(grid * grid), grid), -1)
    distance, mass = attention_locality(golden["in/attention"], cells)
    parity("attention distance", distance, golden["out/attn_mean_distance"], rtol=1e-6)
    parity("attention's local mass", mass, golden["out/attn_local_mass"], rtol=1e-6)

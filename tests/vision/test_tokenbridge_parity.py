"""TokenBridge against numbers made by the authors' code, and the order of channels against independent NumPy."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.tensors import write_params
from jaxtok.interop.tokenbridge import official_config, params_from, params_to, sources
from jaxtok.vision.tokenbridge import TokenBridge, TokenBridgeSampling, generate, guided_features
from jaxtok.vision.tokenbridge_heads import draw_channels
from jaxtok.vision.tokenbridge_tokenizer import DimensionwiseQuantizer, frequency_order, low_frequency_share

CONFIG = {*inspect.signature(official_config).parameters, "norm_eps"} - {"options"}


def config_of(golden, **options):
    given = {name: golden.config[name] for name in CONFIG if name in golden.config}
    return official_config(**given, **options)


def channels_last(x):
    """[batch, channel, row, column] to [batch, position, channel]."""
    x = np.asarray(x)
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


@pytest.mark.parity("tokenbridge/quantizer*.npz")
def test_quantizer(golden, parity):
    for case in golden.config["cases"]:
        out = golden.under(f"out/{case['key']}")
        quantizer = DimensionwiseQuantizer(
            levels=case["levels"], low=case["quant_min"], high=case["quant_max"], reach=case["std_range"]
        )
        close = 2e-5 if case["levels"] <= 64 else 3e-5
        assert np.max(np.abs(quantizer.boundaries - out["boundaries"])) < close
        assert np.max(np.abs(quantizer.values - out["reconstruction_values"])) < close
        codes = quantizer.quantize(jnp.asarray(golden["in/x"]))
        assert np.array_equal(codes, out["indices"])
        scale = (case["quant_max"] - case["quant_min"]) / (2 * case["std_range"])
        assert np.max(np.abs(quantizer.dequantize(codes) - out["dequant"])) < close * max(scale, 1)
        parity(case["key"], quantizer.dequantize(codes), out["dequant"], 2e-5)


@pytest.mark.parity("tokenbridge/frequency_order*.npz")
def test_frequency_order(golden, parity):
    latents, cutoff = golden["in/latents"].transpose(0, 2, 3, 1), golden.config["cutoff_cycles_per_pixel"]
    parity("share", low_frequency_share(latents, cutoff), golden["out/low_frequency_proportion"], 1e-6)
    assert frequency_order(latents, cutoff) == tuple(golden["out/channel_order"])


@pytest.mark.parity("tokenbridge/train*.npz")
def test_training(golden, parity):
    config = config_of(golden)
    tensors = golden.under("params")
    params = params_from(config, tensors)
    back = params_to(config, params)
    assert set(back) == set(tensors)
    for name in set(tensors) - {"boundaries", "reconstruction_values"}:
        assert np.array_equal(back[name], tensors[name]), name
    codes = config.quantizer.quantize(jnp.asarray(channels_last(golden["in/latents"])))
    assert np.array_equal(codes, golden["mid/quant_indices"])
    masked = np.argsort(golden["in/orders"], axis=1) < golden.config["num_masked"]
    assert np.array_equal(masked, golden["mid/mask"] > 0)
    labels, module = jnp.asarray(golden["in/labels"]), TokenBridge(config)
    kept = config.positions - golden.config["num_masked"]

    def objective(params):
        variables = {"params": params}
        encoded = module.apply(variables, codes, labels, masked, kept, method="encode")
        z = module.apply(variables, codes, labels, masked, kept, method="features")
        rows, ordered = z[masked], codes[masked][:, config.order]
        logits = module.apply(variables, rows, ordered, method="logits")
        losses = module.apply(variables, codes, labels, masked, kept=kept)
        loss = jnp.sum(losses * masked[..., None]) / (masked.sum() * config.channels)
        return loss, (encoded, z, logits, ordered)

    with jax.default_matmul_precision("highest"):
        (loss, (encoded, z, logits, ordered)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    given = golden["mid/gt_tokens_ordered"]  # of all positions, or of those that are masked
    assert np.array_equal(ordered, given[masked] if given.ndim == 3 else given)
    parity("encoder", encoded, golden["mid/encoder_out"], 2e-5)
    parity("z", z, golden["mid/z"], 2e-5)
    parity("logits", logits, golden["out/logits"], 2e-5)
    parity("loss", loss, golden["out/loss"], 1e-5)
    theirs, ours = golden.under("grad"), write_params(sources(config), grads)
    for name in [name for name in theirs if name.endswith("k_norm.bias")]:  # zero but for rounding
        assert np.max(np.abs(ours[name] - theirs.pop(name))) < 1e-6
    parity("gradients", {name: ours[name] for name in theirs}, theirs)


def parameters_of(golden, request):
    """A file of draws has the parameters of the file of training with the same ending, unless it has its own."""
    if own := golden.under("params"):
        return own
    folder = request.config.getoption("--goldens") / "tokenbridge"
    with np.load(folder / f"{golden.name.split('/')[-1].replace('sample', 'train')}.npz") as file:
        return {name.removeprefix("params/"): file[name] for name in file if name.startswith("params/")}


@pytest.mark.parity("tokenbridge/sample*.npz")
def test_drawing(golden, parity, request):
    config = config_of(golden, official_first_token=True)
    params = params_from(config, parameters_of(golden, request))
    if "in/head/features" in golden.arrays:
        features, out = jnp.asarray(golden["in/head/features"]), golden.under("out/head")
        tokens, logits = jax.jit(lambda p: draw_channels(config, p, features, None, 0.0))(params["head"])
        given = jnp.asarray(out["tokens"])
        ordered = given[:, config.order] if not np.array_equal(tokens, given) else given
        assert np.array_equal(tokens, ordered)
        parity("drawing", logits, out["logits_during_sampling"], 2e-5)
        forced = TokenBridge(config).apply({"params": params}, features, ordered, method="logits")
        parity("teacher forcing", forced, out["logits_teacher_forced"], 2e-5)
    for number, run in enumerate(golden.config["runs"]):
        out = golden.under(f"out/run{number}")
        sampling = TokenBridgeSampling(
            rounds=run["num_iter"], guidance=run["cfg"], schedule=run["cfg_schedule"], temperature=run["temperature"]
        )
        given = run["labels"] == "given"
        labels = golden["in/labels"].tolist() if given else [None] * len(golden["in/labels"])
        orders, n = golden["in/orders"], config.positions
        counts = sampling.counts(n)
        assert np.array_equal((counts[:-1] - counts[1:]) * len(orders), out["tokens_per_step"])
        codes = generate(config, params, labels, sampling=sampling, orders=orders)
        assert np.array_equal(codes, out["tokens"])
        values = config.quantizer.dequantize(codes)
        parity(f"run {number} levels", values, channels_last(out["continuous_tokens"]), 2e-5)
        ids = jnp.asarray(golden["in/labels"]) if given else jnp.full(len(orders), config.num_classes)
        z = guided_features(
            config,
            params,
            jnp.zeros_like(codes),
            ids,
            jnp.ones((len(orders), n), bool),
            sampling.weights(n)[0],
            run["cfg"] != 1,
        )
        first = np.argsort(orders, axis=1) >= counts[1]
        parity(f"run {number} z", np.asarray(z)[first], out["features_step0"], 2e-5)

"""Mamba against the authors' scan, Hugging Face's model and TokenUnify's module, for whatever sizes a file has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.mamba import config_from, params_from, params_to
from jaxtok.lm.mamba import Mamba
from jaxtok.nn.losses import cross_entropy
from jaxtok.nn.mamba import Mixer, MixerConfig, selective_scan

WAYS = {"one by one": ("scan", 64), "in parts": ("associative", 4), "at once": ("associative", 0)}


@pytest.mark.parity("mamba/selective_scan*.npz")
@pytest.mark.parametrize("way", WAYS)
def test_selective_scan(golden, parity, way):
    method, part = WAYS[way]
    last = lambda x: jnp.swapaxes(x, 1, 2) if x.ndim == 3 else x  # noqa: E731  (their arrays have the length last)
    arrays = {name: jnp.asarray(x) for name, x in golden.under("in").items()}
    cotangents = last(arrays.pop("cot")), arrays.pop("cot_last")

    def scan(x):
        x = {name: last(value) for name, value in x.items()}
        options = {"d": x["D"], "z": x["z"], "delta_bias": x["delta_bias"], "softplus": True}
        return selective_scan(x["u"], x["delta"], x["A"], x["B"], x["C"], method=method, part=part, **options)

    @jax.jit
    def run(x):
        found, pull = jax.vjp(scan, x)
        plain = [last(x[name]) for name in ("u", "delta", "A", "B", "C")]
        return found, pull(cotangents)[0], selective_scan(*plain, method=method, part=part)[0]

    (y, state), gradient, plain = run(arrays)
    parity("output", last(y), golden["out/out"], rtol=1e-5)
    parity("last state", state, golden["out/last_state"], rtol=1e-5)
    parity("plain", last(plain), golden["out/plain"], rtol=1e-5)
    parity("gradient", gradient, golden.under("grad"))


def load(golden):
    config = config_from({"model_type": "mamba", **golden.config})
    return config, params_from(config, golden.under("params"))


@functools.partial(jax.jit, static_argnames="config")
def apply(config, params, tokens, **options):
    return Mamba(config).apply({"params": params}, tokens, **options)


@pytest.mark.parity("mamba/hf_mamba*.npz")
def test_model(golden, parity):
    config, params = load(golden)
    ids = golden["in/ids"]

    @jax.jit
    def run(params):
        def loss(params):
            (logits, _), sown = Mamba(config).apply({"params": params}, ids, mutable="intermediates")
            return cross_entropy(logits[:, :-1], ids[:, 1:]).mean(), (logits, sown["intermediates"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (logits, sown)), gradient = run(params)
    parity("logits", logits, golden["out/logits"])
    parity("loss", loss, golden["out/loss"], rtol=1e-5)
    blocks = sown["stack"]["blocks"]
    for layer in range(config.num_layers):
        parity("hidden states", blocks["hidden"][0][layer], golden[f"mid/hidden_{layer}"])
    forward = blocks["mixer"]["forward"]
    parity("after the convolution", forward["convolved"][0][0], golden["mid/mixer0_conv"])
    parity("step sizes", forward["delta"][0][0], golden["mid/mixer0_delta"])
    parity("gradient", params_to(config, gradient), golden.under("grad"), rtol=1e-3)


@pytest.mark.parity("mamba/hf_mamba*.npz")
def test_cached_decoding(golden, parity):
    config, params = load(golden)
    ids, first, steps = golden["in/ids"], golden.config["prefill"], golden.config["steps"]
    _, cache = apply(config, params, ids[:, :first], cache=Mamba(config).init_cache(*ids.shape))
    found = []
    for step in range(first, first + steps):
        logits, cache = apply(config, params, ids[:, step : step + 1], cache=cache)
        found.append(logits)
    parity("logits of steps", jnp.concatenate(found, 1), golden["out/step_logits"])
    parity("convolution's inputs", jnp.swapaxes(cache.conv, 2, 3), golden["out/cache_conv_states"])
    parity("states", cache.states, golden["out/cache_ssm_states"])


@pytest.mark.parity("mamba/hf_mamba*.npz")
def test_left_padding(golden, parity):
    """At every position, padding included."""
    config, params = load(golden)
    ids, mask = golden["in/leftpad_ids"], golden["in/leftpad_mask"]
    positions = np.where(mask > 0, np.cumsum(mask, 1) - 1, -1)
    logits, _ = apply(config, params, ids, positions=positions, cache=Mamba(config).init_cache(*ids.shape))
    if config.use_bias:  # theirs lets the bias at padding into the convolution
        logits, theirs = logits[mask.min(1) > 0], golden["out/leftpad_logits"][mask.min(1) > 0]
        parity("padded logits", logits, theirs)
    else:
        parity("padded logits", logits, golden["out/leftpad_logits"])


DIRECTIONS = {"forward": "", "backward": "_b", "across": "_s"}


def mixer_params(arrays):
    """From the names of the authors' module."""
    value, gate = jnp.split(arrays["in_proj.weight"].T, 2, axis=1)
    found = {"value": value, "gate": gate, "output": arrays["out_proj.weight"].T}
    for name, own in DIRECTIONS.items():
        found[name] = {
            "conv": arrays[f"conv1d{own}.weight"][:, 0].T,
            "conv_bias": arrays[f"conv1d{own}.bias"],
            "selection": arrays[f"x_proj{own}.weight"].T,
            "steps": arrays[f"dt_proj{own}.weight"].T,
            "steps_bias": arrays[f"dt_proj{own}.bias"],
            "a_log": arrays[f"A{own}_log"],
            "skip": arrays[f"D{own}"],
        }
    return found


@pytest.mark.parity("mamba/bimamba*.npz", "tokenunify/bimamba*.npz")
def test_two_and_three_orders(golden, parity):
    sizes = golden.config
    config = MixerConfig(
        d_model=sizes["d_model"],
        state_size=sizes["d_state"],
        conv_kernel=sizes["d_conv"],
        expand=sizes["expand"],
        time_step_rank=sizes["dt_rank"],
    )
    arrays = {name: jnp.asarray(x) for name, x in golden.under("params").items()}

    @jax.jit
    def run(arrays, x):
        params = mixer_params(arrays)
        two = {name: params[name] for name in params if name != "across"}
        return [
            Mixer(config, orders, slices=sizes["nslices"]).apply({"params": own}, x)[0]
            for orders, own in ((3, params), (2, two))
        ]

    x = jnp.asarray(golden["in/x"])
    three, two = run(arrays, x)
    parity("three orders", three, golden["out/v3"], rtol=1e-5)
    parity("two orders", two, golden["out/v2"], rtol=1e-5)
    gradient, of_x = jax.jit(jax.grad(lambda *args: jnp.sum(run(*args)[0] * golden["in/cot"]), (0, 1)))(arrays, x)
    parity("gradient", {**gradient, "x": of_x}, golden.under("grad"))

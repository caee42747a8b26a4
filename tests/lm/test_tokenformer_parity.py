"""TokenFormer against the numbers of the authors' PyTorch and TPU code, for whatever sizes and options a file has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from jaxtok.interop.tokenformer import config_from_official, params_from_official, params_to_official
from jaxtok.lm.decoder import Decoder
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.nn.norms import Norm
from jaxtok.nn.parameter_attention import ParameterAttention, normalize_scores
from jaxtok.transfer.growth import grow, why_not_exact


def load(options, tensors):
    config = config_from_official(options, tensors)
    return config, params_from_official(config, tensors)


@functools.partial(jax.jit, static_argnames="config")
def logits_of(config, params, tokens):
    return Decoder(config).apply({"params": params}, tokens)[0]


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, tokens, labels, mask):
    """Loss, gradients, logits and the hidden states after each block."""

    def loss(params):
        (logits, _), state = Decoder(config).apply({"params": params}, tokens, mutable="intermediates")
        hidden = state["intermediates"]["stack"]["blocks"]["hidden"][0]
        return masked_mean(cross_entropy(logits, labels), mask), (logits, hidden)

    (loss, (logits, hidden)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return loss, gradient, logits, hidden


def inputs(golden):
    return [jnp.asarray(golden[f"in/{name}"]) for name in ("tokens", "labels", "loss_mask")]


@pytest.mark.parity("tokenformer/model_*.npz")
def test_model(golden, parity):
    config, params = load(golden.config, golden.under("params"))
    loss, gradient, logits, hidden = run(config, params, *inputs(golden))
    parity("logits", logits, golden["out/logits"])
    parity("loss", loss, golden["out/loss"])
    parity("hidden states", {f"hidden_{i}": h for i, h in enumerate(hidden)}, golden.under("mid"))
    parity("gradient", params_to_official(config, gradient), golden.under("grad"))


@pytest.mark.parity("tokenformer/model_*.npz")
def test_cached_decoding(golden, parity):
    config, params = load(golden.config, golden.under("params"))
    tokens, prefill = jnp.asarray(golden["in/tokens"]), golden.config["prefill"]
    model = Decoder(config)
    step = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache=cache))
    logits, cache = step(tokens[:, :prefill], model.init_cache(*tokens.shape))
    parts = [logits]
    for i in range(prefill, tokens.shape[1]):
        logits, cache = step(tokens[:, i : i + 1], cache)
        parts.append(logits)
    parity("cached logits", jnp.concatenate(parts, 1), golden["out/cached_logits"])


@pytest.mark.parity("tokenformer/growth*.npz")
def test_growth(golden, parity):
    base_config, base = load(golden.config["base"], golden.under("params_base"))
    config, grown = load(golden.config["grown"], golden.under("params_grown"))
    tokens, labels, mask = inputs(golden)
    key = jax.random.key(0)

    # The authors' loader puts the old rows first, as `grow` does.
    for name, old in golden.under("params_base").items():
        np.testing.assert_array_equal(golden[f"params_grown/{name}"][: len(old)], old)

    def with_zero_rows(*kinds):
        def leaf(path, x, old):
            return np.concatenate([x[:, : old.shape[1]], 0 * x[:, old.shape[1] :]], 1) if path[-1].key in kinds else x

        return jax.tree_util.tree_map_with_path(leaf, grown, base)

    copies = type(config.tokens)(**{g: 2 * n for g, n in vars(base_config.tokens).items()})
    duplicated = grow(base_config, base, to=copies, rng=key, init="copy", exact=not why_not_exact(base_config, "copy"))
    variants = {
        "base": (base_config, base),
        "random": (config, grown),
        "zero_keys": (config, with_zero_rows("keys")),
        "zero_both": (config, with_zero_rows("keys", "values")),
        "duplicated": (duplicated.config, duplicated.params),
    }
    recorded = [name.removesuffix("_logits") for name in golden.under("out") if name.endswith("_logits")]
    for variant in recorded:
        logits = logits_of(*variants[variant], tokens)
        parity(f"{variant} logits", logits, golden[f"out/{variant}_logits"])
        loss = masked_mean(cross_entropy(logits, labels), mask)
        parity(f"{variant} loss", loss, golden[f"out/{variant}_loss"])
        if reference := golden.under(f"grad/{variant}"):
            _, gradient, _, _ = run(*variants[variant], tokens, labels, mask)
            parity(f"{variant} gradient", params_to_official(variants[variant][0], gradient), reference)

    # The paper's growth, which the authors' code does not have: zero keys, and tau stays at its old value.
    reason = why_not_exact(base_config, "zero_keys")
    ours = grow(base_config, base, to=config.tokens, rng=key)
    logits = logits_of(ours.config, ours.params, tokens)
    if reason is None:
        parity("zero_keys with fixed tau, logits as base", logits, golden["out/base_logits"])
    else:
        assert relative_error(logits, golden["out/base_logits"]) > 1e-4
    # With tau recomputed from the new number of tokens, it is the authors' zero_keys variant but for the new values.
    ours = grow(base_config, base, to=config.tokens, rng=key, scale="current")
    assert ours.config == config

    def authors_values(path, ours, theirs):
        return jnp.asarray(theirs) if path[-1].key == "values" else ours

    params = jax.tree_util.tree_map_with_path(authors_values, ours.params, grown)
    logits = logits_of(ours.config, params, tokens)
    parity("zero_keys by grow with current tau", logits, golden["out/zero_keys_logits"])


@pytest.mark.parity("tokenformer/pattention*.npz")
def test_parameter_attention(golden, parity):
    x, keys, values, new_keys, new_values, cotangent = (
        jnp.asarray(golden[f"in/{name}"]) for name in ("x", "K", "V", "K_new", "V_new", "cotangent")
    )
    variants = {
        "": (keys, values),
        "_masked": (keys, values),
        "_scaled": (keys, values),
        "_grown_random": (jnp.concatenate([keys, new_keys]), jnp.concatenate([values, new_values])),
        "_grown_zero_keys": (jnp.concatenate([keys, 0 * new_keys]), jnp.concatenate([values, new_values])),
        "_grown_zero_both": (jnp.concatenate([keys, 0 * new_keys]), jnp.concatenate([values, 0 * new_values])),
        "_grown_copied_keys": (jnp.concatenate([keys, keys]), jnp.concatenate([values, 0 * values])),
    }
    scores = x @ keys.T
    parity("scores", scores, golden["mid/scores"])
    mask = jnp.asarray(golden["in/mask"])
    tags = {kind + variant: (kind, variant) for kind in golden.config["types"] for variant in variants}
    assert set(golden.under("out")) <= set(tags), "the file has a variant that is not compared"

    @jax.jit  # all at once: one compilation
    def run_all():
        result = {}
        for tag, (kind, variant) in tags.items():
            k, v = variants[variant]
            layer = ParameterAttention(
                features=v.shape[1],
                num_tokens=len(k),
                normalization=kind,
                scale=golden.config["scale"] if variant == "_scaled" else 1.0,
            )

            def apply(x, k, v, layer=layer, mask=mask if variant == "_masked" else None):
                return layer.apply({"params": {"keys": k, "values": v}}, x, mask)

            y, vjp = jax.vjp(apply, x, k, v)
            result[tag] = y, dict(zip(("x", "K", "V"), vjp(cotangent)))
        return result

    result = run_all()
    for tag, reference in golden.under("out").items():
        y, gradient = result[tag]
        parity("output", {tag: y}, {tag: reference})
        if reference := golden.under(f"grad/{tag}"):
            parity("gradient", gradient, reference)
    for kind in golden.config["types"]:
        if f"mid/{kind}/weights" in golden.arrays:
            parity("weights", {kind: normalize_scores(scores, kind)}, {kind: golden[f"mid/{kind}/weights"]})


@pytest.mark.parity("tokenformer/jax_normalize*.npz")
def test_tpu_normalization(golden, parity):
    scores, cotangent = jnp.asarray(golden["in/scores"]), jnp.asarray(golden["in/cotangent"])
    for tag, reference in golden.under("out").items():
        kind, _, zoom = tag.rpartition("_zoom")
        if not kind:
            continue
        eps = 1e-5 if kind == "l2_norm_gelu" else 1e-8
        theta = functools.partial(normalize_scores, kind=kind, norm_tokens=int(zoom), eps=eps, tanh_gelu=True)
        factor = golden.config.get("scale_factor", 1.0)  # their scale multiplies the weights: ours is in the values
        weights, vjp = jax.vjp(lambda a: factor * theta(a), scores)  # noqa: B023
        parity("weights", {tag: weights}, {tag: reference})
        parity("gradient", {tag: vjp(cotangent)[0]}, {tag: golden[f"grad/{tag}"]})
    layernorm = Norm("layernorm_nonparam").apply({}, jnp.asarray(golden["in/x_ln"]))
    parity("layernorm", layernorm, golden["out/layernorm_eps1e-5"])

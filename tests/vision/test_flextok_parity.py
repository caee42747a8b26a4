"""FlexTok and its bricks against numbers that the authors' code has computed."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxtok.interop.flextok import params_from, params_to
from jaxtok.interop.tensors import Source, read_params
from jaxtok.nn.flex_blocks import (
    FlexDecoderBlock,
    FlexHead,
    TimeEmbedding,
    flex_stack,
    grid_waves,
    time_waves,
)
from jaxtok.nn.quantizers import FiniteScalars
from jaxtok.nn.rectified_flow import Guidance, euler, noised, times_of, velocity_error
from jaxtok.nn.transformer import Stack
from jaxtok.vision.flextok import FlexTok, FlexTokConfig, FlowSampling, causal_last, draw_kept, sample_latents


def last(x):
    """[batch, channels, ...] to channels last."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def first(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def config_of(theirs) -> FlexTokConfig:
    grid, patch = (tuple(theirs[name]) for name in ("grid", "patch"))
    return FlexTokConfig(
        latent_size=tuple(n * p for n, p in zip(grid, patch)),
        channels=theirs["channels"],
        patch=patch,
        registers=theirs["registers"],
        levels=tuple(theirs["levels"]),
        encoder_width=theirs["enc_dim"],
        encoder_depth=theirs["enc_depth"],
        decoder_width=theirs["dec_dim"],
        decoder_depth=theirs["dec_depth"],
        head_dim=theirs["head_dim"],
        mlp_ratio=theirs["mlp_ratio"],
        norm_eps=theirs["norm_eps"],
        modulation_sets=theirs["adaLN_expansion"],
        head_modulation=theirs["head_adaln"],
        null=theirs["null"],
        time_channels=theirs["freq_dim"],
        max_time=theirs["max_timestep"],
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(config, layer, params, x, noise, t, keep):
    """Everything of one pass, with the gradient of the loss."""
    model, scalars = FlexTok(config), config.scalars
    none = jnp.zeros(len(x), bool)

    def loss(params):
        given = {"params": params}
        vectors, seen = model.apply(given, x, method="vectors", mutable="intermediates")
        codes = scalars.quantize(vectors)
        x_t = noised(x, noise, t)
        arguments = (x_t, t, codes, keep, none)
        v, features = model.apply(given, *arguments, features_of=layer, method="velocity")
        _, also = model.apply(given, *arguments, method="velocity", mutable="intermediates")
        seen, also = seen["intermediates"]["encoder"], also["intermediates"]["decoder"]
        found = {
            "encoder_in": seen["input"][0],
            "encoder_out": seen["output"][0],
            "latents_pre_fsq": vectors,
            "quant": codes,
            "tokens": scalars.ids(codes),
            "noised": x_t,
            "registers": also["register_tokens"][0],
            "patches": also["patch_tokens"][0],
            "temb": also["condition"][0],
            "repa": features,
            "velocity": v,
        }
        return velocity_error(v, x, noise).mean(), found

    (value, found), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    codes, x_t = found["quant"], found["noised"]
    for name, null in (("velocity_all_tokens", none), ("velocity_uncond", ~none)):
        found[name], _ = model.apply({"params": params}, x_t, t, codes, None, null, method="velocity")
    return value, gradient, found


@pytest.mark.parity("flextok/autoencoder*.npz")
def test_autoencoder(golden, parity):
    config, tensors = config_of(golden.config), golden.under("params")
    params = params_from(config, tensors)
    written = params_to(config, params)
    assert set(written) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_allclose(written[name], array, rtol=0, atol=1e-6 * name.endswith("posembs"), err_msg=name)
    x, noise = last(golden["in/vae_latents"]), last(golden["in/noise"])
    keep = jnp.asarray(golden["in/keep_k"])
    layer = golden.config["repa_layer_index"]
    loss, gradient, found = run(config, layer, params, x, noise, jnp.asarray(golden["in/timesteps"]), keep)

    mask = causal_last(config.patches, config.registers)
    np.testing.assert_array_equal(mask, golden["mid/encoder_mask_one_image"])
    rows = len(x) * (config.patches + config.registers)
    for ours, theirs in (("encoder_in", "encoder_in_packed"), ("encoder_out", "encoder_out_packed")):
        parity(ours, found[ours].reshape(rows, -1), golden[f"mid/{theirs}"][0, :rows], rtol=2e-5)
    parity("latents", found["latents_pre_fsq"], golden["out/latents_pre_fsq"], rtol=2e-5)
    np.testing.assert_array_equal(found["tokens"], golden["out/tokens"])
    np.testing.assert_array_equal(config.scalars.codes(found["tokens"]), found["quant"])
    parity("codes", found["quant"], golden["out/quant"], rtol=1e-6)
    parity("noised", first(found["noised"]), golden["mid/noised"], rtol=1e-6)
    parity("time embedding", found["temb"], golden["mid/temb"], rtol=5e-5)
    parity("registers", found["registers"], golden["mid/decoder_registers_in"], rtol=2e-5)
    theirs = golden["mid/decoder_patches_in"]
    parity("patches", found["patches"].reshape(theirs.shape), theirs, rtol=2e-5)
    parity("REPA features", found["repa"].reshape(golden["mid/repa_patches"].shape), golden["mid/repa_patches"], 5e-5)
    for name in ("velocity", "velocity_all_tokens", "velocity_uncond"):
        parity(name, first(found[name]), golden[f"out/{name}"], rtol=2e-4)
    parity("loss", loss, golden["out/flow_loss"], rtol=1e-4)
    ours, theirs = params_to(config, gradient, tables=False), golden.under("grad")
    assert theirs
    parity("gradient", {name: ours[name] for name in theirs}, theirs, rtol=1e-3)

    for number, options in enumerate(golden.config["runs"]):
        sampling = FlowSampling(
            steps=options["timesteps"],
            guidance=options["guidance_scale"],
            apg=options["perform_norm_guidance"],
            momentum=options["momentum"],
            eta=options["eta"],
            threshold=options["norm_threshold"],
        )
        drawn = sample(config, sampling, params, found["quant"], keep, noise)
        parity(f"sample {number}", first(drawn), golden[f"out/sample/run{number}"], rtol=2e-4)


sample = jax.jit(sample_latents, static_argnums=(0, 1))


@pytest.mark.parity("flextok/embeddings*.npz")
def test_embeddings(golden, parity):
    theirs = golden.config
    names = {
        (place, kind): Source(f"time.mlp.{n}.{name}", transpose=kind == "kernel")
        for place, n in (("in", 0), ("out", 2))
        for kind, name in (("kernel", "weight"), ("bias", "bias"))
    }
    dim, channels = theirs["dim"], theirs["freq_dim"]
    shapes = {("in", "kernel"): (channels, dim), ("out", "kernel"): (dim, dim)}
    params = read_params(names, shapes | {(p, "bias"): (dim,) for p in ("in", "out")}, golden.under("params"))
    t = jnp.asarray(golden["in/t"])
    waves = time_waves(t, channels, theirs["max_timestep"])
    assert np.abs(waves - golden["out/frequencies"]).max() <= 2e-4
    embedding = TimeEmbedding(dim, channels, theirs["max_timestep"])
    parity("time", embedding.apply({"params": params}, t), golden["out/time_embedding"], rtol=5e-5)
    assert theirs["max_period"] == 256
    parity("positions", grid_waves(*theirs["sincos"]).transpose(2, 0, 1)[None], golden["out/sincos_2d"], rtol=1e-6)


@pytest.mark.parity("flextok/guidance*.npz")
def test_guidance(golden, parity):
    cond, uncond = (jnp.asarray(golden[f"in/{name}"]) for name in ("cond", "uncond"))
    for number, options in enumerate(golden.config["apg"]):
        rule = Guidance(
            scale=options["guidance_scale"],
            apg=True,
            eta=options["eta"],
            threshold=options["norm_threshold"],
            momentum=options["momentum"],
        )
        memory, found = jnp.zeros(cond.shape[1:]), []
        for c, u in zip(cond, uncond):
            v, memory = rule.combine(c, u, rule.scale, memory)
            found.append(v)
        parity(f"APG {number}", jnp.stack(found), golden[f"out/apg{number}"], rtol=1e-6)
    plain = [Guidance().combine(c, u, golden.config["cfg_scale"], c)[0] for c, u in zip(cond, uncond)]
    parity("guidance", jnp.stack(plain), golden["out/cfg"], rtol=1e-6)


@pytest.mark.parity("flextok/noise*.npz")
def test_noise(golden, parity):
    for kind in ("logit_normal", "stratified", "uniform", "mode"):
        draws = golden[f"out/{kind}/{'normal' if kind == 'logit_normal' else 'uniform'}_draw"]
        t = times_of(kind, jnp.asarray(draws), mode_scale=golden.config["mode_scale"])
        parity(kind, t, golden[f"out/{kind}/sigmas"], rtol=1e-5)
        x_t = noised(jnp.asarray(golden["in/x"]), jnp.asarray(golden["in/noise"]), t)
        parity(f"{kind}, noised", x_t, golden[f"out/{kind}/noised"], rtol=1e-5)


@pytest.mark.parity("flextok/nested_dropout_sampler*.npz")
def test_nested_dropout(golden):
    registers, draws = golden.config["N"], golden.config["draws"]
    for number, kind in enumerate(("uniform", "pow2", "uniform_pow2")):
        values, counts = golden[f"out/{kind}/values"], golden[f"out/{kind}/counts"]
        ours = np.asarray(draw_kept(jax.random.key(number), draws, registers, kind))
        assert set(np.unique(ours)) <= set(values) and set(values) <= set(range(1, registers + 1))
        exact = {
            "uniform": np.ones(len(values)) / registers,
            "pow2": np.ones(len(values)) / (math.log2(registers) + 1),
            "uniform_pow2": np.where(values == 1, 1, values / 2) / registers,
        }[kind]
        for found in (counts, [np.sum(ours == value) for value in values]):
            assert scipy.stats.chisquare(found, exact * draws).pvalue > 1e-4


@functools.partial(jax.jit, static_argnums=0)
def quantized(scalars, z, cotangent, ids):
    codes, pull = jax.vjp(scalars.quantize, z)
    return scalars.bound(z), codes, pull(cotangent)[0], scalars.ids(codes), scalars.codes(ids)


@pytest.mark.parity("visual_bricks/fsq*.npz")
def test_finite_scalars(golden, parity):
    for levels in golden.config["levels"]:
        name, scalars = "x".join(map(str, levels)), FiniteScalars(tuple(levels))
        z, cotangent = jnp.asarray(golden[f"in/{name}/z"]), jnp.asarray(golden[f"in/{name}/cotangent"])
        theirs = {key.removeprefix(f"out/{name}/"): x for key, x in golden.arrays.items() if f"out/{name}/" in key}
        bound, codes, gradient, ids, of_ids = quantized(scalars, z, cotangent, jnp.asarray(golden[f"in/{name}/ids"]))
        # With two levels, tanh(z + atanh(0.999)) loses digits in float32.
        parity(f"bound {name}", bound, theirs["bounded"], rtol=2e-5 if 2 in levels else 2e-6)
        np.testing.assert_array_equal(codes, theirs["quant"])
        np.testing.assert_array_equal(ids, theirs["tokens"])
        np.testing.assert_array_equal(of_ids, theirs["codes_of_ids"])
        np.testing.assert_array_equal(scalars.basis, theirs["basis"])
        assert scalars.size == theirs["codebook_size"]
        parity(f"gradient {name}", gradient, golden[f"grad/{name}/z"], rtol=1e-4)


@pytest.mark.parity("visual_bricks/rf_euler*.npz")
def test_euler(golden, parity):
    a, u, b, k = (jnp.asarray(golden[f"params/{name}"]) for name in "AUbk")
    options = golden.config["apg"]

    def field(x, t, guided):
        def of(matrix):
            move = t[:, None, None, None] * b[:, None, None] + k[:, None, None]
            return jnp.tanh(jnp.einsum("ij,bjhw->bihw", matrix, x)) + move

        return of(a), of(u) if guided else None

    for number, theirs in enumerate(golden.config["runs"]):
        scale = theirs["guidance_scale"]
        rule = Guidance(
            scale=(lambda t: 1 + 2 * t) if scale == "1+2t" else scale,
            apg=theirs["norm_guidance"],
            momentum=options["momentum"],
            eta=options["eta"],
            threshold=options["norm_threshold"],
        )
        found = jax.jit(lambda x, n=theirs["timesteps"], rule=rule: euler(field, x, n, rule))(golden["in/noise"])
        parity(f"run {number}", found, golden[f"out/run{number}"], rtol=1e-5)


MATRICES = {"query": "wq", "key": "wk", "value": "wv", "output": "proj"}
MLP = {"gate": "fc1", "down": "fc2", "up": "fc3"}


def tensors_of(golden, name):
    given = golden.under("params")
    return {key.removeprefix(f"{name}."): x for key, x in given.items() if key.startswith(f"{name}.")}


def block_params(golden, name, attentions=(("attention", "attn"),), modulated=True):
    tensors = tensors_of(golden, name)
    params = {
        ours: {k: {"kernel": tensors[f"{theirs}.{v}.weight"].T} for k, v in MATRICES.items()}
        for ours, theirs in attentions
    }
    params["ffn"] = {k: {"kernel": tensors[f"mlp.{v}.weight"].T} for k, v in MLP.items()}
    if modulated:
        modulation = {k: tensors[f"adaLN_modulation.1.{v}"].T for k, v in (("kernel", "weight"), ("bias", "bias"))}
        params["modulation"] = modulation
    return params


@pytest.mark.parity("visual_bricks/adaln_blocks_flextok*.npz")
def test_blocks(golden, parity):
    theirs = golden.config
    assert theirs["attention_scale"] == 8 / theirs["head_dim"]

    def stack(*sets):
        return flex_stack(theirs["dim"], 1, theirs["head_dim"], theirs["mlp_ratio"], sets=sets)

    count = theirs["n"]
    mask = jnp.tri(count, dtype=bool)[None]
    for name, config in {
        "flex_block": stack(),
        "flex_block_adaln": stack(count),
        "flex_block_adaln_split": stack(count - 3, 3),
    }.items():
        if f"out/{name}/y" not in golden.arrays:
            continue
        x, c, cotangent = (jnp.asarray(golden[f"in/{name}/{part}"]) for part in ("x", "c", "cotangent"))
        params = jax.tree.map(lambda leaf: leaf[None], block_params(golden, name, modulated=bool(config.sets)))
        params = {"blocks": params}

        def run_block(x, config=config, params=params, c=c):
            return Stack(config).apply({"params": params}, x, jnp.arange(count)[None], condition=c, mask=mask)[0]

        y, pull = jax.vjp(jax.jit(run_block), x)
        parity(name, y, golden[f"out/{name}/y"], rtol=2e-5)
        parity(f"{name}, gradient", pull(cotangent)[0], golden[f"grad/{name}/x"], rtol=1e-4)
    if (name := "flex_decoder_block_adaln") and f"out/{name}/y" in golden.arrays:
        arguments = [jnp.asarray(golden[f"in/{name}/{part}"]) for part in ("x", "context", "c")]
        names = (("self_attention", "self_attn"), ("cross_attention", "cross_attn"))
        y = FlexDecoderBlock(stack(count)).apply({"params": block_params(golden, name, names)}, *arguments)
        parity(name, y, golden[f"out/{name}/y"], rtol=2e-5)
    if (name := "linear_head_adaln") and f"out/{name}/y" in golden.arrays:
        tensors = tensors_of(golden, name)
        params = {
            ours: {"kernel": tensors[f"{part}.weight"].T, "bias": tensors[f"{part}.bias"]}
            for ours, part in (("modulation", "adaLN_modulation.1"), ("proj", "proj"))
        }
        x, c = (jnp.asarray(golden[f"in/{name}/{part}"]) for part in ("x", "c"))
        head = FlexHead(golden[f"out/{name}/y"].shape[-1], modulated=True)
        parity(name, head.apply({"params": params}, x, c), golden[f"out/{name}/y"], rtol=2e-5)

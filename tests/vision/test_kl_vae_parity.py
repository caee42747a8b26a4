"""The KL-VAE against numbers made by TokenBridge's code (latent diffusion's layout) and by diffusers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.kl_vae import TOWERS, config_from, options_of, vae_params, vae_tensors
from jaxtok.vision.kl_vae import KLVAE, Posterior, ldm_vae


def nhwc(x):
    return jnp.asarray(np.asarray(x).transpose(0, 2, 3, 1))


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def towers_in(golden):
    """A file may hold one half only."""
    held = {"encoder": "encoder.", "generator": "decoder."}
    return tuple(t for t in TOWERS if any(name.startswith(held[t]) for name in golden.under("params")))


def check_posterior(parity, posterior, golden):
    """Every output of a posterior that the file has."""
    images = {"mean": posterior.mean, "logvar": posterior.logvar, "std": posterior.std}
    numbers = {"kl": posterior.kl()}
    if "in/eps" in golden.arrays:
        sample = posterior.sample(nhwc(golden["in/eps"]))
        images["sample"], numbers["nll_of_sample"] = sample, posterior.nll(sample)
    for name, value in images.items():
        if f"out/{name}" in golden.arrays:
            parity(name, nchw(value), golden[f"out/{name}"])
    for name, value in numbers.items():
        if f"out/{name}" in golden.arrays:
            parity(name, value, golden[f"out/{name}"], 1e-5)


@pytest.mark.parity("visual_bricks/kl_vae_ldm*.npz")
def test_latent_diffusion_layout(golden, parity):
    c = golden.config
    config = ldm_vae(
        resolution=c["resolution"],
        ch=c["ch"],
        ch_mult=tuple(c["ch_mult"]),
        num_res_blocks=c["num_res_blocks"],
        z_channels=c["z_channels"],
        attn_resolutions=tuple(c.get("attn_resolutions_encoder", ())),
        decoder_attention=tuple(c.get("attn_resolutions_decoder", ())),
        groups=c["groups"],
    )
    tensors, towers = golden.under("params"), towers_in(golden)
    params = vae_params(config, tensors, towers=towers)
    back = vae_tensors(config, params)
    assert set(back) == set(tensors) and all(np.array_equal(back[name], tensors[name]) for name in tensors)
    module, done = KLVAE(config), 0
    if "encoder" in towers:
        moments = module.apply({"params": params}, nhwc(golden["in/image"]), method="moments")
        parity("moments", nchw(moments), golden["out/moments"])
        posterior = Posterior.of(moments)
        check_posterior(parity, posterior, golden)
        if "in/moments_x40" in golden.arrays:
            limited = Posterior.of(nhwc(golden["in/moments_x40"]))
            parity("limited", nchw(limited.logvar), golden["out/logvar_clamped"])
        done += 1
    if "generator" in towers:
        for given, made in (("in/z", "out/decoded"), ("out/mean", "out/decoded_mode")):
            if made in golden.arrays:
                images = module.apply({"params": params}, nhwc(golden[given]), method="decode")
                parity("decoded", nchw(images), golden[made])
                done += 1
    assert done


@pytest.mark.parity("visual_bricks/kl_vae_diffusers*.npz")
def test_layout_of_diffusers(golden, parity):
    c = golden.config
    config = config_from(c | {"sample_size": golden["in/image"].shape[-1]})
    assert config_from(options_of(config)) == config
    tensors, towers = golden.under("params"), towers_in(golden)
    params = vae_params(config, tensors, "diffusers", towers)
    back = vae_tensors(config, params, "diffusers")
    assert set(back) == set(tensors) and all(np.array_equal(back[name], tensors[name]) for name in tensors)
    module = KLVAE(config)
    if "encoder" in towers:
        posterior = jax.jit(lambda p, x: module.apply({"params": p}, x, method="posterior"))(
            params, nhwc(golden["in/image"])
        )
        check_posterior(parity, posterior, golden)
        parity("scaled", nchw(posterior.mean) * config.scaling, golden["out/scaled_latent_mode"])
    if "generator" in towers and "out/decoded_mode" in golden.arrays:
        images = module.apply({"params": params}, nhwc(golden["out/mean"]), method="decode")
        parity("decoded", nchw(images), golden["out/decoded_mode"])

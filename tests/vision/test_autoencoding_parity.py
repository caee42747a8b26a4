"""VQGAN, BAE and what trains them, against numbers made by the authors' code."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.vqgan import (
    autoencoder_params,
    autoencoder_tensors,
    discriminator_params,
    discriminator_tensors,
)
from jaxtok.nn import convolution
from jaxtok.nn.bits import pack_bits, unpack_bits
from jaxtok.nn.quantizers import BinaryQuantizer, GumbelQuantizer, NearestQuantizer
from jaxtok.protocols import ArraySpec
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.loop import TrainState, make_train_step
from jaxtok.training.mesh import one_device
from jaxtok.training.optimizer import OptimizerConfig, PartOptimizer, make_optimizer
from jaxtok.vision.augmentation import AugmentationDraws, change_color, translate
from jaxtok.vision.autoencoding import Autoencoder, Autoencoding, Draws
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.discriminator import Discriminator, DiscriminatorConfig, hinge_loss
from jaxtok.vision.perceptual import LPIPS, lpips_params
from jaxtok.vision.vqgan import VQGANConfig


def nhwc(x):
    return np.asarray(x).transpose(0, 2, 3, 1)


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def floored(parity, what, ours, theirs, rtol=1e-3):
    """Gradients: those that are zero but for rounding are compared at 1e-5 of the largest."""
    floor = 1e-5 * max(np.linalg.norm(theirs[name]) for name in theirs)
    small = [name for name in theirs if np.linalg.norm(theirs[name]) < floor]
    for name in small:
        assert np.linalg.norm(ours[name]) < 3 * floor, name
    parity(what, *({n: np.asarray(x[n]) for n in theirs if n not in small} for x in (ours, theirs)), rtol)


def model_config(c) -> BAEConfig | VQGANConfig:
    """From the config of a fixture."""
    shared = {
        "image_size": c["img_size"],
        "channels": c["n_channels"],
        "width": c["nf"],
        "multipliers": tuple(c["ch_mult"]),
        "res_blocks": c["res_blocks"],
        "attention_resolutions": tuple(c["attn_resolutions"]),
        "embed_dim": c["emb_dim"],
        "norm_first": c["norm_first"],
        "generator_multiplier": c["gen_mul"],
    }
    if "quantizer" in c:
        return VQGANConfig(**shared, codebook_size=c["codebook_size"], quantizer_kind=c["quantizer"], beta=c["beta"])
    return BAEConfig(
        **shared,
        bits=c["codebook_size"],
        tanh=c["use_tanh"],
        deterministic=c["deterministic"],
        code_weight=c.get("code_weight", 0.0),
    )


BLOCKS = {
    "res": (convolution.Residual, {"conv_out": "shortcut"}),
    "attn": (convolution.Attention, {"q": "query", "k": "key", "v": "value", "proj_out": "output"}),
    "down": (convolution.Down, {}),
    "up": (convolution.Up, {}),
}


@pytest.mark.parity("vqgan_bae_bricks/blocks*.npz")
def test_blocks(golden, parity):
    for name, (block, renamed) in BLOCKS.items():
        widths = golden.config[name]
        module = block(widths[-1] if isinstance(widths, list) else widths)
        names, params = {}, {}
        for key, value in golden.under(f"params/{name}").items():
            layer, leaf = key.split(".")
            if key == "k.bias":
                continue
            ours = renamed.get(layer, layer), ("bias" if leaf == "bias" else "kernel" if value.ndim == 4 else "scale")
            params.setdefault(ours[0], {})[ours[1]] = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value
            names[key] = ours

        @jax.jit
        def run(params, x, cotangent, module=module):
            y, back = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
            return y, back(cotangent)

        y, (grads, dx) = run(params, nhwc(golden[f"in/{name}/x"]), nhwc(golden[f"in/{name}/cotangent"]))
        parity(name, nchw(y), golden[f"out/{name}/y"])
        found = {k: np.asarray(grads[a][b]) for k, (a, b) in names.items()}
        found = {k: g.transpose(3, 2, 0, 1) if g.ndim == 4 else g for k, g in found.items()}
        theirs = golden.under(f"grad/{name}")
        found = {
            k: np.zeros_like(g) for k, g in theirs.items() if k == "k.bias"
        } | found  # ours has none: see Attention
        floored(parity, f"{name} gradients", found | {"x": nchw(dx)}, theirs)


@pytest.mark.parity("vqgan_bae_bricks/bae_quantizer*.npz")
def test_binary_quantizer(golden, parity):
    c = golden.config
    kernel = golden["params/proj.0.weight"].transpose(2, 3, 1, 0)
    params = {
        "proj": {"kernel": kernel, "bias": golden["params/proj.0.bias"]},
        "embedding": golden["params/embed.weight"],
    }
    h, cotangent = nhwc(golden["in/h"]), nhwc(golden["in/cotangent"])
    for tanh in (False, True):
        module = BinaryQuantizer(c["codebook_size"], c["emb_dim"], tanh=tanh)
        name = "tanh" if tanh else "sigmoid"
        z, _ = module.apply({"params": params}, h, method="activations")
        parity(f"{name} z", nchw(z), golden[f"out/{name}/z"])
        for kind, u in (("det", None), ("bern", nhwc(golden["in/u"]))):

            def objective(params, h, u=u, module=module):
                q = module.apply({"params": params}, h, u)
                return jnp.sum(q.vectors * cotangent) + 7 * q.loss.mean(), q

            (_, q), (grads, dh) = jax.value_and_grad(objective, (0, 1), has_aux=True)(params, h)
            case = f"{name}_{kind}"
            bits = np.asarray(unpack_bits(q.codes, c["codebook_size"]))
            assert np.array_equal(nchw(2 * bits - 1 if tanh else bits), golden[f"out/{case}/code"])
            parity(f"{case} z_q", nchw(q.vectors), golden[f"out/{case}/z_q"])
            parity(f"{case} loss", q.loss.mean(), golden[f"out/{case}/code_loss"])
            ours = {
                "h": nchw(dh),
                "proj.0.weight": np.asarray(grads["proj"]["kernel"]).transpose(3, 2, 0, 1),
                "proj.0.bias": grads["proj"]["bias"],
                "embed.weight": grads["embedding"],
            }
            parity(f"{case} gradients", ours, golden.under(f"grad/{case}"), 1e-3)


@pytest.mark.parity("vqgan_bae_bricks/vq_gumbel*.npz")
def test_vector_quantizers(golden, parity):
    c, x, cotangent = golden.config, nhwc(golden["in/x"]), nhwc(golden["in/cotangent"])

    def run(module, params, draws, **options):
        def objective(params, x):
            q = module.apply({"params": params}, x, draws, **options)
            return jnp.sum(q.vectors * cotangent) + 3 * q.loss.mean(), q

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(params, x)

    nearest = NearestQuantizer(c["codebook_size"], c["emb_dim"], c["beta"])
    (_, q), (grads, dx) = run(nearest, {"embedding": golden["params/vq.embedding.weight"]}, None)
    assert np.array_equal(q.codes.reshape(-1), golden["out/vq.indices"])
    parity("z_q", nchw(q.vectors), golden["out/vq.z_q"])
    ours = {"loss": q.loss.mean(), **q.metrics}
    parity("vq", ours, {name: golden[f"out/vq.{name}"] for name in ours})
    ours = {"vq.embedding.weight": grads["embedding"], "vq.x": nchw(dx)}
    parity("vq gradients", ours, {name: golden[f"grad/{name}"] for name in ours}, 1e-3)

    proj = {
        "kernel": golden["params/gumbel.proj.weight"].transpose(2, 3, 1, 0),
        "bias": golden["params/gumbel.proj.bias"],
    }
    params = {"proj": proj, "embedding": golden["params/gumbel.embed.weight"]}
    module = GumbelQuantizer(c["codebook_size"], c["emb_dim"], kl_weight=c["kl_weight"])
    for name, train in (("gumbel_soft", True), ("gumbel_eval_hard", False)):
        options = {"temperature": c["gumbel_temperature"], "train": train}
        (_, q), (_, dx) = run(module, params, nhwc(golden["in/gumbel_noise"]), **options)
        assert np.array_equal(q.codes[..., 0], golden[f"out/{name}.indices"])
        parity(f"{name} z_q", nchw(q.vectors), golden[f"out/{name}.z_q"])
        parity(f"{name} kl", q.loss.mean(), golden[f"out/{name}.kl"])
        parity(f"{name} gradient", nchw(dx), golden[f"grad/{name}.x"], 1e-3)


@pytest.mark.parity("vqgan_bae_bricks/bae_autoencoder*.npz", "vqgan_bae_bricks/vqgan_autoencoder*.npz")
def test_autoencoders(golden, parity):
    model = model_config(golden.config)
    params = autoencoder_params(model, golden.under("params"))
    x, size = nhwc(golden["in/x"]), golden.config["codebook_size"]
    module = Autoencoder(model)

    @jax.jit
    def run(x, draws):
        encoded = module.apply({"params": params}, x, method=lambda m, x: m.encoder(x))
        fake, q = module.apply({"params": params}, x, draws)
        return encoded, fake, q, module.apply({"params": params}, q.codes, method="decode")

    encoded, fake, q, decoded = run(x, None)
    parity("encoded", nchw(encoded), golden["mid/encoded"])
    parity("reconstruction", nchw(fake), golden["out/x_hat"])
    parity("code loss", q.loss.mean(), golden["out/code_loss"])
    if isinstance(model, VQGANConfig):
        assert np.array_equal(q.codes.reshape(-1), golden["out/indices"])
        parity("decoded", decoded, fake)
        return
    code = golden["out/code"]
    bits = (code > 0).astype(np.int32)
    assert np.array_equal(unpack_bits(q.codes, size), nhwc(bits))
    parity("vectors", nchw(q.vectors), golden["out/quant"])
    parity("decoded", nchw(decoded), golden["out/decoded_from_code"])
    assert np.array_equal(decoded, fake)  # the code is exact in the straight-through estimator
    _, fake, q, _ = run(x, nhwc(golden["in/u"]))
    assert np.array_equal(q.codes, pack_bits(nhwc(golden["out/code_bern"] > 0)))
    parity("drawn reconstruction", nchw(fake), golden["out/x_hat_bern"])


@pytest.mark.parity("vqgan_bae_bricks/discriminator*.npz")
def test_discriminator(golden, parity):
    c = golden.config
    config = DiscriminatorConfig(width=c["ndf"], layers=c["n_layers"])
    params, statistics = discriminator_params(config, golden.under("params"))
    module, x = Discriminator(config), nhwc(golden["in/x"])
    apply = jax.jit(module.apply, static_argnames="train")
    logits, same = apply({"params": params}, x, statistics, train=False)
    parity("evaluation", logits[:, None], golden["out/eval"])
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, same, statistics)))
    logits, after = apply({"params": params}, x, statistics, train=True)
    parity("training", logits[:, None], golden["out/train"])
    parity("statistics", flat_statistics(after), golden.under("out/bn_after"))
    real, fake = golden["in/logits_real"][:, 0], golden["in/logits_fake"][:, 0]
    parity("hinge", hinge_loss(real, fake).mean(), golden["out/hinge"])


def flat_statistics(statistics):
    return {
        f"{name.replace('_', '.')}.running_{kind}": value
        for name, kinds in statistics.items()
        for kind, value in kinds.items()
    }


@pytest.mark.parity("vqgan_bae_bricks/lpips*.npz")
def test_lpips(golden, parity):
    widths = tuple(golden.config["widths"])
    params = lpips_params(golden.under("params"), widths, golden.name)
    module, x, y = LPIPS(widths), nhwc(golden["in/x"]), nhwc(golden["in/y"])
    features = jax.jit(lambda x: module.apply({"params": params}, x, method="features"))(x)
    for number, feature in enumerate(features):
        parity(f"features {number}", nchw(feature), golden[f"mid/feat{number}"])

    @jax.jit
    def run(y):
        distance, back = jax.vjp(lambda y: module.apply({"params": params}, x, y), y)
        return distance, *back(jnp.ones_like(distance))

    distance, slope = run(y)
    theirs = golden["out/lpips"].reshape(-1)
    parity("distance", distance, theirs)
    parity("gradient", nchw(slope), golden["grad/y"], 1e-3)


@pytest.mark.parity("vqgan_bae_bricks/diffaug*.npz")
def test_augmentation(golden, parity):
    names = ("u_brightness", "u_saturation", "u_contrast", "u_tx", "u_ty")
    draws, x = AugmentationDraws(*(golden[f"in/{name}"] for name in names)), nhwc(golden["in/x"])
    parity("color", nchw(change_color(x, draws)), golden["out/color"])
    parity("translation", nchw(translate(x, draws)), golden["out/translation"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded(Autoencoding):
    """Draws what is recorded, as JSON: a list for each name of the augmentations, a row for each step."""

    recorded: str = ""
    first: int = 0

    def draw(self, rng, batch, step):
        if not self.recorded:
            return Draws(None)
        rows = {name: jnp.asarray(value)[step - self.first] for name, value in json.loads(self.recorded).items()}
        names = ("u_brightness", "u_saturation", "u_contrast", "u_tx", "u_ty")
        return Draws(None, *(AugmentationDraws(*(rows[f"{who}_{name}"] for name in names)) for who in "gd"))


def adversarial(c, **options) -> Recorded:
    return Recorded(
        model=model_config(c),
        discriminator=DiscriminatorConfig(
            width=c["ndf"],
            layers=c["disc_layers"],
            start_step=c["disc_start_step"],
            max_weight=c["disc_weight_max"],
            augment=c["diff_aug"],
            augment_fakes="quantizer" in c,  # the authors' VQGAN augments both, their BAE the real ones
        ),
        perceptual="mse",
        perceptual_weight=c["perceptual_weight"],
        **options,
    )


def adversarial_params(task, arrays):
    params, statistics = discriminator_params(
        task.discriminator, {k.removeprefix("disc."): v for k, v in arrays.items() if k.startswith("disc.")}
    )
    own = {k.removeprefix("ae."): v for k, v in arrays.items() if k.startswith("ae.")}
    return {
        "autoencoder": autoencoder_params(task.model, own),
        "discriminator": params,
        "statistics": statistics,
    }


LOSSES = {
    "generator_loss": "loss",
    "l1": "l1",
    "perceptual": "perceptual",
    "nll": "nll_loss",
    "g_loss": "g_loss",
    "d_weight": "d_weight",
    "code_loss": "codebook_loss",
    "d_loss": "d_loss",
}
ABSOLUTE = ("g_loss", "d_loss")
"""Means near 0: within 1e-4."""


@pytest.mark.parity("vqgan_bae_bricks/gan_step*.npz")
def test_one_step_of_both_losses(golden, parity):
    """The gradient of the sum is, for each part, that of its own loss."""
    c = golden.config
    task = adversarial(c)
    params = adversarial_params(task, golden.under("params"))
    batch = {"images": nhwc(golden["in/x"]), "mask": np.ones(len(golden["in/x"]), np.float32)}

    @jax.jit
    def run(params, step):
        return jax.value_and_grad(task.loss, has_aux=True)(params, batch, jax.random.key(0), step)

    (_, metrics), grads = run(params, c["step"])
    for ours, theirs in LOSSES.items():
        if ours in ABSOLUTE:
            assert abs(float(metrics[ours]) - float(golden[f"out/{theirs}"])) < 1e-4, ours
        else:
            parity(ours, metrics[ours], golden[f"out/{theirs}"])
    found = {f"ae.{k}": v for k, v in autoencoder_tensors(task.model, grads["autoencoder"]).items()}
    whole = {k: v for k, v in golden.under("grad").items() if not k.startswith(("norm/", "d/"))}
    parity("gradients of L_G", {k: found[k] for k in whole}, whole, 1e-3)
    norms = golden.under("grad/norm")
    largest = max(norms.values())
    for name, norm in norms.items():
        ours = np.linalg.norm(found[name]) if not name.endswith("k.bias") else 0.0  # ours has none: see Attention
        assert abs(ours - norm) < 1e-3 * norm + 1e-5 * max(largest, 1), name
    own = discriminator_tensors(task.discriminator, grads["discriminator"], grads["statistics"])
    theirs = golden.under("grad/d")
    floored(parity, "gradients of L_D", {k: own[k.removeprefix("disc.")] for k in theirs}, theirs)
    # at the first step at which it moves the generator, the discriminator does not learn, as it has seen only fakes
    (_, metrics), grads = run(params, c["disc_start_step"])
    parity("statistics", flat_statistics(metrics["state"]), golden.under("out/bn_after_g_step"))
    assert float(metrics["d_loss"]) == 0 and float(metrics["d_weight"]) > 0
    assert not any(np.any(g) for g in jax.tree.leaves(grads["discriminator"]))
    (_, metrics), _ = run(params, c["disc_start_step"] - 1)
    assert float(metrics["d_weight"]) == 0


class Shapes:
    """A stand-in for the data."""

    def __init__(self, shape):
        self.batch_size, self._shape = shape[0], shape

    def batch_spec(self):
        return {
            "images": ArraySpec(self._shape, np.float32, ("batch", None, None, None)),
            "mask": ArraySpec((self.batch_size,), np.float32, ("batch",)),
        }


@pytest.mark.parity("vqgan_bae_bricks/gan_train*.npz")
def test_steps_of_both_optimizers(golden, parity, request):
    """The one loop, with one update, does what the authors' two optimizers do one after the other."""
    c = golden.config
    with np.load(request.config.getoption("--goldens") / golden.name.split("/")[0] / c["params_from"]) as file:
        arrays = {k.removeprefix("params/"): file[k] for k in file.files if k.startswith("params/")}
    recorded = {k: v.tolist() for k, v in golden.under("in").items() if k != "x"}
    task = adversarial(c, recorded=json.dumps(recorded), first=c["steps"][0])
    params = adversarial_params(task, arrays)
    adam = {
        "learning_rate": c["lr"],
        "min_learning_rate": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "b2": 0.999,
        "weight_decay": 0.0,
        "clip": 0.0,
    }
    part = PartOptimizer(**adam, part="discriminator", start=c["disc_start_step"] + 1)
    config = TrainConfig(optimizer=OptimizerConfig(**adam, parts=(part,)))
    images = [nhwc(x) for x in golden["in/x"]]
    data = Shapes(images[0].shape)
    params = jax.tree.map(jnp.asarray, params)
    first, zero = (jnp.asarray(step, jnp.int32) for step in (c["steps"][0], 0))
    state = TrainState(first, zero, params, make_optimizer(config.optimizer).init(params), jax.random.key(0))
    update = make_train_step(task, config, 1000, data, one_device())
    rows = []
    for x in images:
        state, metrics = update(state, {"images": x, "mask": np.ones(len(x), np.float32)})
        rows.append(metrics)
    for ours, theirs in LOSSES.items():
        found, expected = np.array([row[ours] for row in rows]), golden[f"out/{theirs}"]
        trained = np.isfinite(expected)
        assert np.all(found[~trained] == 0)
        if ours in ABSOLUTE:
            assert np.abs(found - expected)[trained].max() < 1e-3, ours
        else:
            parity(ours, found[trained], expected[trained], 1e-3)
    tensors = {f"ae.{k}": v for k, v in autoencoder_tensors(task.model, state.params["autoencoder"]).items()}
    theirs = discriminator_tensors(task.discriminator, state.params["discriminator"], state.params["statistics"])
    tensors |= {f"disc.{k}": v for k, v in theirs.items()}
    final = golden.under("out/final")
    parity("final", {k: tensors[k] for k in final}, final, 1e-3)
    assert int(state.opt_state[1]["discriminator"][0].count) == sum(s > c["disc_start_step"] for s in c["steps"])
    assert int(state.opt_state[0][0].count) == len(images)

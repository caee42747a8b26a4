"""TokenUnify against the authors' numbers, for whatever sizes and options a file has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.interop.tokenunify import params_from, params_to
from jaxtok.vision import segmentation
from jaxtok.vision.affinities import affinities, balance, widen_borders
from jaxtok.vision.segmamba import SegMambaConfig
from jaxtok.vision.tokenunify import (
    AffinityPrediction,
    VolumePretraining,
    next_all_error,
    phase_weights,
    replace_tokens,
    squared_error,
    tokenise,
)
from jaxtok.vision.windows import Windows, importance, slide


def load(golden, **options):
    """Model and parameters of a file; the tensors that are written are those that were read."""
    theirs, tensors = golden.config, golden.under("params")
    config = SegMambaConfig(
        crop=tuple(theirs["volume"]),
        patch=tuple(theirs.get("patch", (4, 16, 16))),
        features=tuple(theirs["feat_size"]),
        hidden=theirs["hidden_size"],
        depths=tuple(theirs["depths"]),
        kernel=theirs["kernel"][1],
        slices=theirs["nslices"],
        state_size=theirs.get("d_state", 16),
        conv_kernel=theirs.get("d_conv", 4),
        expand=float(theirs.get("expand", 2)),
        **options,
    )
    params = params_from(config, tensors)
    ours = params_to(config, params)
    assert set(ours) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    return config, params


def inside(x):
    """From NCDHW to NDHWC."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def outside(x):
    return np.moveaxis(np.asarray(x), -1, 1)


def check_gradients(golden, parity, config, gradient):
    """Arrays to 1e-2 of their largest, norms to 3e-2 (the fixtures' README says why), and zeros as zeros."""
    ours, theirs = params_to(config, gradient), golden.under("grad")
    zeros = [name for name in ours if "gscs" in name and name.endswith("bias")]  # they stand before a norm
    assert zeros and all(np.abs(ours[name]).max() < 1e-6 for name in zeros)
    arrays = [name for name in ours if name in theirs and name not in zeros]
    if arrays:  # some files have norms only
        parity("gradient", {name: ours[name] for name in arrays}, {name: theirs[name] for name in arrays}, rtol=1e-2)
    norms = {name: theirs[f"norm/{name}"] for name in ours if name not in zeros}
    parity("norms of gradients", {name: np.linalg.norm(ours[name]) for name in norms}, norms, rtol=3e-2)


@pytest.mark.parity("tokenunify/segmamba_ar*.npz")
def test_pretraining_network(golden, parity):
    config, params = load(golden, out_channels=1, next_head=True)
    x, gt = inside(golden["in/x"]), inside(golden["in/gt"])
    target = jnp.asarray(golden["in/next_token"])[:, 0]

    @jax.jit
    def run(params):
        def loss(params):
            found = config.module().apply({"params": params}, x, next_token=True, stages=True)
            recon, of_next = jax.nn.sigmoid(found[0]), jax.nn.sigmoid(found[1])
            errors = squared_error(recon, gt), squared_error(of_next, target)
            return sum(errors), (recon, of_next, found[2], errors)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, (recon, of_next, stages, errors)), gradient = run(params)
    for number, stage in enumerate(stages):
        assert np.abs(outside(stage) - golden[f"mid/vit_{number}"]).max() < 5e-4
    parity("voxels", outside(recon), golden["out/recon"], rtol=5e-4)
    parity("voxels when evaluated", outside(recon), golden["out/pred_eval"], rtol=5e-4)
    parity("next token", of_next[:, None], golden["out/next_token_pred"], rtol=5e-4)
    parity("loss", loss, golden["out/loss_joint"], rtol=1e-5)
    parity("loss of voxels", errors[0], golden["out/loss_mode0_epoch100"], rtol=1e-5)
    parity("loss of the next token", errors[1], golden["out/loss_mode0_epoch0"], rtol=1e-5)
    check_gradients(golden, parity, config, gradient)


def weighted_loss(golden, task, params):
    """The loss, and the affinities with their mean squared error."""
    x, target, weight = (inside(golden[f"in/{name}"]) for name in ("x", "target", "weight"))
    found = task.affinities(params, x)
    error = jnp.square(found - target)
    return jnp.sum(weight * error) / (error.size / 3), (found, error.mean())


@pytest.mark.parity("tokenunify/segmamba_finetune*.npz")
def test_affinity_network(golden, parity):
    config, params = load(golden, out_channels=3)
    task = AffinityPrediction(model=config)
    loss, (found, mse) = jax.jit(lambda params: weighted_loss(golden, task, params))(params)
    parity("affinities", outside(found), golden["out/affinity"], rtol=5e-4)
    parity("weighted loss", loss, golden["out/weighted_mse"], rtol=1e-5)
    parity("mean squared error", mse, golden["out/plain_mse"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parity("tokenunify/segmamba_finetune*.npz")
def test_gradient_of_the_affinity_network(golden, parity):
    """The gradient of a U-net takes half a minute to compile; by default that of the other network is tested."""
    config, params = load(golden, out_channels=3)
    task = AffinityPrediction(model=config)
    gradient = jax.jit(jax.grad(lambda params: weighted_loss(golden, task, params)[0]))(params)
    check_gradients(golden, parity, config, gradient)


@pytest.mark.parity("tokenunify/prediction_tasks*.npz")
def test_hidden_tokens(golden):
    patch = tuple(golden.config["patch"])
    image = jnp.asarray(golden["in/img"])[None, ..., None]
    tokens = tokenise(image[..., 0], patch)
    count = tokens.shape[1]

    def hide(hidden, fill):
        return np.asarray(replace_tokens(image, hidden[None], fill, patch))[0, ..., 0]

    for fill in (0, 1):
        kept = golden.config[f"num_preserved_fill{fill}"]
        noise = np.zeros(tokens.shape, np.float32)
        noise[0, kept:] = golden["in/prefix_noise"] if fill else 0
        theirs = golden[f"out/prefix_input_fill{fill}"]
        np.testing.assert_array_equal(hide(np.arange(count) >= kept, noise), theirs)
        np.testing.assert_array_equal(tokens[0, kept], golden[f"out/next_token_fill{fill}"])
        drawn = golden[f"in/masked_patches_fill{fill}"]
        assert len(drawn) == int(count * golden.config["mask_ratio"])
        noise = np.zeros(tokens.shape, np.float32)
        if fill:
            noise[0, drawn] = golden["in/random_noise"]
        np.testing.assert_array_equal(
            hide(np.isin(np.arange(count), drawn), noise), golden[f"out/random_input_fill{fill}"]
        )


@pytest.mark.parity("tokenunify/numpy_paper_losses*.npz")
def test_losses_of_the_paper(golden, parity):
    config, x = golden.config, jnp.asarray(golden["in/tokens"])
    of_random = squared_error(golden["in/pred_random"], x, jnp.asarray(golden["in/mask"]))
    of_next = squared_error(golden["in/pred_next"], x)
    of_all = next_all_error(jnp.asarray(golden["in/pred_all"]), x)
    for name, ours in (("random", of_random), ("next", of_next), ("next_all", of_all)):
        parity(f"L_{name}", ours, golden[f"out/L_{name}"], rtol=1e-6)
    assert (config["T1"], config["T2"]) == (0.3, 0.7)
    weights = phase_weights(jnp.asarray(golden["in/t"]))
    parity("weights", weights, golden["out/weights"], rtol=1e-6)
    parity("mixture", weights @ jnp.stack([of_random, of_next, of_all]), golden["out/mixture"], rtol=1e-6)


def same_partition(one, other):
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    return pairs.shape[1] == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))


@pytest.mark.parity("tokenunify/segmentation*.npz")
def test_targets(golden):
    label = jnp.asarray(golden["in/label"])[None]
    widened = widen_borders(label)
    np.testing.assert_array_equal(widened[0], golden["out/widened"])
    target = affinities(widened)
    np.testing.assert_array_equal(outside(target)[0], golden["out/affinity"])
    np.testing.assert_array_equal(outside(affinities(widened, "zero"))[0], golden["out/affinity_nopad"])
    np.testing.assert_array_equal(outside(balance(target))[0], golden["out/weight"])


@pytest.mark.parity("tokenunify/segmentation*.npz")
@pytest.mark.parametrize("backend", ["numpy", "libraries"])
def test_segments_and_their_scores(golden, backend):
    if backend == "libraries":
        pytest.importorskip("mahotas")
        pytest.importorskip("waterz")
    noisy, truth = golden["in/noisy_affinity"], golden["in/label"]
    fragments = segmentation.watershed(noisy, backend)
    np.testing.assert_array_equal(fragments, golden["out/fragments"])
    for threshold in golden.config["thresholds"]:
        theirs = golden[f"out/seg_{threshold}".replace(".", "_")]
        assert same_partition(segmentation.agglomerate(noisy, fragments, threshold, backend), theirs)
    pairs = {name: (truth, golden[f"out/seg_{name}"]) for name in ("0_3", "0_5", "0_7")}
    pairs["rand"] = golden["in/rand_gt"], golden["in/rand_seg"]
    for name, pair in pairs.items():
        theirs = golden[f"out/metrics_skimage_{name}"], golden[f"out/metrics_cremi_{name}"]
        np.testing.assert_allclose(segmentation.score(*pair), theirs[0], atol=1e-9)
        np.testing.assert_allclose(segmentation.score(*pair, form="cremi")[3:], theirs[1], atol=1e-9)


@pytest.mark.parity("tokenunify/blending*.npz")
def test_windows(golden, parity):
    crop, x = tuple(golden.config["crop"]), golden["in/x"][0, 0]

    def predict(batch):
        return np.concatenate([batch * batch, 1 - batch, batch - batch.mean((1, 2, 3), keepdims=True)], -1)

    np.testing.assert_allclose(importance(crop, "official"), golden["out/official_weight"][0], atol=1e-6)
    for kind in ("gaussian", "constant"):
        windows = Windows(crop=crop, overlap=golden.config["overlap"], weight=kind, batch_size=3)
        found = np.concatenate([part for _, part in slide(predict, x, windows)], 1)
        parity(kind, found[None], golden[f"out/monai_{kind}"], rtol=1e-5)


def test_the_network_is_shared():
    """A compiled step serves all tasks: the task is a number, and no branch."""
    model = SegMambaConfig(
        crop=(16, 80, 16), features=(4, 4, 4, 4), hidden=4, out_channels=1, next_head=True, depths=(1, 1, 1, 1)
    )
    task = VolumePretraining(model=model, steps=10)
    steps = np.array([np.asarray(functools.partial(task.weights)(step)) for step in range(40)])
    assert set(map(tuple, steps)) <= {(1, 0, 0), (0, 1, 0), (0, 0, 1)} and (steps.sum(0) > 0).all()

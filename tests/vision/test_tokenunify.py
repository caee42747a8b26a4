"""TokenUnify: tokens, tasks, targets, windows, segments, and what is refused. (Parity is in a file of its own.)"""

from __future__ import annotations

import dataclasses
import functools
import tracemalloc

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Case

from jaxtok.cli import main
from jaxtok.data.volumes import VolumeData, toy_volume
from jaxtok.door import open_model
from jaxtok.interop.tokenunify import params_from, params_to, shapes
from jaxtok.studies.tokenunify import predict_affinities
from jaxtok.training.checkpoints import begin
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.vision import segmentation
from jaxtok.vision.affinities import affinities, balance, widen_borders
from jaxtok.vision.segmamba import SegMambaConfig, instance_norm
from jaxtok.vision.tokenunify import (
    PUBLISHED,
    AffinityPrediction,
    PatchConfig,
    ToAffinities,
    VolumePretraining,
    adopt,
    phase_weights,
    random_set,
    replace_tokens,
    tokenise,
    untokenise,
)
from jaxtok.vision.windows import Windows, importance, slide

CROP, PATCH = (4, 16, 16), (2, 8, 8)
PATCHES = PatchConfig(crop=CROP, patch=PATCH, d_model=16, num_layers=2, slices=2, state_size=4, decoder_layers=1)
DATA = VolumeData(crop=CROP, batch_size=8, toy_volumes=1, toy_test_volumes=1, toy_shape=(6, 24, 24), eval_crops=6)
UNET = SegMambaConfig(
    crop=(16, 16, 16), patch=(4, 8, 8), features=(4,) * 4, hidden=4, depths=(1,) * 4, slices=1, kernel=3
)


def random_batch(seed=0, count=8):
    rng = np.random.default_rng(seed)
    clean = rng.random((count, *CROP, 1)).astype(np.float32)
    return {
        "images": clean,
        "clean": clean,
        "segments": rng.integers(0, 3, (count, *CROP)).astype(np.int32),
        "mask": (np.arange(count) < count - 1).astype(np.float32),
    }


def pretraining_case() -> Case:
    model = dataclasses.replace(PATCHES, decoder_layers=0)
    return Case(VolumePretraining(model=model, steps=10), DATA, random_batch(), drawn=True)


def affinities_case() -> Case:
    model = dataclasses.replace(PATCHES, out_channels=3, decoder_layers=0)
    return Case(AffinityPrediction(model=model), DATA, random_batch())


TASKS = {"tokenunify": pretraining_case, "tokenunify_affinities": affinities_case}
DATASETS = {"toy volumes": lambda texts, folder: dataclasses.replace(DATA, perturbations=("noise", "missing"))}


@functools.cache
def params_of(task):
    rng = np.random.default_rng(1)
    crop = jax.ShapeDtypeStruct((1, *task.model.crop, 1), np.float32)
    tree = nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0), {"images": crop}))
    return jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), tree)


# --------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_there_and_back():
    x = jnp.arange(2 * 4 * 16 * 16 * 3.0).reshape(2, 4, 16, 16, 3)
    tokens = tokenise(x, PATCH)
    assert tokens.shape == (2, 8, *PATCH, 3)
    np.testing.assert_array_equal(untokenise(tokens, CROP), x)
    np.testing.assert_array_equal(tokens[0, 1], x[0, :2, :8, 8:])  # x is fastest, z slowest
    np.testing.assert_array_equal(tokens[0, 4], x[0, 2:, :8, :8])


def test_hidden_voxels_do_not_reach_the_network():
    x = random_batch()["images"]
    other = np.array(x)
    tokens = np.array(tokenise(jnp.asarray(x)[..., 0], PATCH))
    tokens[:, 5:] = 0.5
    other = np.asarray(untokenise(jnp.asarray(tokens), CROP))[..., None]
    hidden = jnp.broadcast_to(jnp.arange(8) >= 5, (8, 8))
    one, two = (replace_tokens(jnp.asarray(v), hidden, 0.0, PATCH) for v in (x, other))
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(x, other)


def test_random_sets_have_their_sizes():
    counts = jnp.array([1, 3, 7])
    sets = random_set(jax.random.key(0), 3, 8, counts)
    np.testing.assert_array_equal(sets.sum(1), counts)
    several = {tuple(np.asarray(random_set(jax.random.key(n), 1, 8, counts[1:2])[0])) for n in range(20)}
    assert len(several) > 10


def test_phases():
    t = np.linspace(0, 1, 101)
    for blend in (0.0, 0.1):
        np.testing.assert_allclose(phase_weights(t, blend).sum(-1), 1, atol=1e-6)
    weights = np.asarray(phase_weights(jnp.array([0.0, 0.299, 0.3, 0.699, 0.7, 1.0])))
    np.testing.assert_allclose(weights[:, 0], [0.73, 0.73, 0.18, 0.18, 0.09, 0.09], rtol=1e-6)
    np.testing.assert_allclose(weights[:, 2], [0.09, 0.09, 0.09, 0.09, 0.73, 0.73], rtol=1e-6)
    middle = np.asarray(phase_weights(jnp.array([0.3]), 0.1))
    np.testing.assert_allclose(middle[0, :2], [0.455, 0.455], rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- tasks


@functools.partial(jax.jit, static_argnums=0)
def loss_of(task, params, batch, rng, step):
    return jax.value_and_grad(lambda p: task.loss(p, batch, rng, step), has_aux=True)(params)


@pytest.fixture(scope="module")
def masked():
    return VolumePretraining(model=PATCHES, schedule="next_all", loss_region="masked", fill="zero", steps=10)


def test_what_is_seen_does_not_count_where_only_hidden_tokens_do(masked):
    """The first token is always in the prefix. Its target is changed, and not the input."""
    batch, params = random_batch(), params_of(masked)
    changed = np.array(batch["clean"])
    changed[:, :2, :8, :8] = 0.9
    (one, _), _ = loss_of(masked, params, batch, jax.random.key(0), 0)
    (two, _), _ = loss_of(masked, params, {**batch, "clean": changed}, jax.random.key(0), 0)
    assert one == two
    changed[:, 2:, 8:, 8:] = 0.9  # the last token is always hidden
    (three, _), _ = loss_of(masked, params, {**batch, "clean": changed}, jax.random.key(0), 0)
    assert abs(three - one) > 1e-4


def test_crops_that_fill_a_batch_do_not_count(masked):
    batch, params = random_batch(), params_of(masked)
    changed = np.array(batch["clean"])
    changed[-1] = 0.0
    (one, _), _ = loss_of(masked, params, batch, jax.random.key(0), 0)
    (two, _), _ = loss_of(masked, params, {**batch, "clean": changed}, jax.random.key(0), 0)
    assert one == two


def test_one_program_serves_all_tasks_of_the_mixture():
    """The steps of a mixture differ in their task, and the loss is that task's term."""
    task = VolumePretraining(model=PATCHES, steps=30)
    params, batch, key = params_of(task), random_batch(), jax.random.key(3)
    seen = set()
    for step in range(30):
        (loss, errors), _ = loss_of(task, params, batch, key, step)
        which = int(np.argmax(task.weights(step)))
        seen.add(which)
        np.testing.assert_allclose(loss, errors["next"] if which == 1 else errors["next_all"], rtol=1e-6)
    assert seen == {0, 1, 2} and loss_of._cache_size() >= 1


def test_an_autoencoder_sees_nothing_of_hidden_tokens():
    task = VolumePretraining(model=PATCHES, objective="autoencoder", mask_ratio=(0.75, 0.75))
    params, batch = params_of(task), random_batch(count=1)
    seen = jnp.array([[1, 6]])
    run = jax.jit(lambda x: task.module().apply({"params": params}, x, seen, method="autoencode"))
    x = jnp.asarray(batch["images"])
    hidden = jnp.isin(jnp.arange(8), seen[0], invert=True)[None]
    np.testing.assert_array_equal(run(x), run(replace_tokens(x, hidden, 0.3, PATCH)))
    assert task.seen == 2


def test_the_papers_form_is_causal_and_its_pairs_are_weighted_fairly():
    model = dataclasses.replace(PATCHES, orders=1, pair_dim=8, decoder_layers=0)
    every = VolumePretraining(model=model, objective="paper", pairs=0, steps=10)
    some = dataclasses.replace(every, pairs=64)
    params, batch = params_of(every), random_batch()
    sums = jax.jit(lambda task, key: task.loss_sums(params, batch, key, 0), static_argnums=0)
    exact, drawn = sums(every, jax.random.key(0)), sums(some, jax.random.key(1))
    assert exact["next_all_entries"] == 7 * 36 * 128  # K (K + 1) / 2 pairs of the 7 crops that count
    np.testing.assert_allclose(drawn["next_all"], exact["next_all"], rtol=0.02)
    later = jnp.zeros((1, 8, 1), jnp.int32)
    run = jax.jit(lambda x: model.module().apply({"params": params}, x, later, method="causal")[0])
    x = jnp.asarray(batch["images"][:1])
    changed = replace_tokens(x, (jnp.arange(8) >= 3)[None], 0.3, PATCH)
    one, two = run(x), run(changed)
    np.testing.assert_array_equal(one[0, :4], two[0, :4])  # token 3 is predicted before it is seen
    assert np.abs(one - two)[0, 4:].max() > 1e-4


# -------------------------------------------------------------------------------------------------------------- targets


def test_labels_may_be_renumbered():
    labels = random_batch()["segments"]
    renamed = np.array([0, 70, 3], np.int32)[labels]
    for of in (lambda x: affinities(widen_borders(x)), lambda x: balance(affinities(x))):
        np.testing.assert_array_equal(of(labels), of(renamed))


def test_a_single_segment():
    labels = jnp.ones((1, 3, 4, 4), jnp.int32)
    assert (affinities(widen_borders(labels)) == 1).all()
    outside = affinities(labels, "zero")
    assert (outside[:, 0, :, :, 0] == 0).all() and (outside[:, 1:, :, :, 0] == 1).all()
    assert (balance(affinities(labels)) == 1).all()
    two = jnp.concatenate([labels, labels + 1], -1)
    assert not widen_borders(two)[..., 3:5].any() and widen_borders(two)[..., :3].all()


# ------------------------------------------------------------------------------------------------------------- segments


def squares():
    labels = np.zeros((1, 7, 15), np.int32)
    labels[:, 1:6, 1:6], labels[:, 1:6, 9:14] = 1, 2
    return labels, np.moveaxis(np.asarray(affinities(jnp.asarray(labels)[None], "zero"))[0], -1, 0)


def test_two_squares_with_a_gap_are_two_segments():
    labels, perfect = squares()
    fragments = segmentation.watershed(perfect, "numpy")
    assert len(np.unique(fragments[labels == 1])) == len(np.unique(fragments[labels == 2])) == 1
    assert len(np.unique(fragments[labels > 0])) == 2
    whole = segmentation.watershed(np.ones((3, 2, 5, 5), np.float32), "numpy")
    assert len(np.unique(whole[0])) == 1 and len(np.unique(whole)) == 2  # a slice without a boundary is one fragment


def test_nothing_is_merged_at_a_threshold_of_0():
    noisy = np.random.default_rng(0).random((3, 3, 12, 12)).astype(np.float32)
    fragments = segmentation.watershed(noisy, "numpy")
    segments = segmentation.agglomerate(noisy, fragments, 0.0, "numpy")
    assert segmentation.score(fragments, segments).voi == 0
    counts = [segmentation.agglomerate(noisy, fragments, t, "numpy").max() for t in (0.0, 0.2, 0.5, 0.9)]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2]


def test_background_stays():
    rng = np.random.default_rng(0)
    fragments = rng.integers(0, 4, (2, 6, 6))
    segments = segmentation.agglomerate(rng.random((3, 2, 6, 6)).astype(np.float32), fragments, 0.5, "numpy")
    np.testing.assert_array_equal(segments == 0, fragments == 0)


def test_scores():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (2, 3, 8, 8))
    for form in ("skimage", "cremi"):
        same = segmentation.score(a, a, form)
        assert same.voi == 0 and abs(same.arand) < 1e-12
        renamed = segmentation.score(a, np.array([9, 0, 4, 7])[b], form) if form == "skimage" else None
        assert renamed is None or np.allclose(renamed, segmentation.score(a, b, form))
    full = (a > 0) & (b > 0)
    one, two = segmentation.score(a[full], b[full]), segmentation.score(b[full], a[full])
    assert one.voi_split == pytest.approx(two.voi_merge) and one.voi_merge == pytest.approx(two.voi_split)


@pytest.mark.parametrize("seed", range(4))
def test_the_libraries_and_ours_agree(seed):
    pytest.importorskip("mahotas")
    pytest.importorskip("waterz")
    rng = np.random.default_rng(seed)
    volume = toy_volume(seed, (5, 48, 40), cells=20)
    labels = widen_borders(jnp.asarray(volume.segments)[None])
    exact = np.moveaxis(np.asarray(affinities(labels))[0], -1, 0)
    noisy = np.clip(exact * 0.6 + 0.2 + rng.normal(0, 0.15, exact.shape), 0, 1).astype(np.float32)
    noisy = np.round(noisy * 32) / 32 if seed % 2 else noisy  # many ties
    ours, theirs = (segmentation.watershed(noisy, backend) for backend in ("numpy", "libraries"))
    np.testing.assert_array_equal(ours, theirs)
    for threshold in (0.2, 0.5, 0.8):
        found = [segmentation.agglomerate(noisy, ours, threshold, backend) for backend in ("numpy", "libraries")]
        np.testing.assert_array_equal(*found)


# -------------------------------------------------------------------------------------------------------------- windows


def test_blending_a_pointwise_function_returns_it():
    x = np.random.default_rng(0).random((9, 21, 17)).astype(np.float32)
    for kind in ("gaussian", "constant", "official"):
        windows = Windows(crop=(4, 8, 8), overlap=0.4, weight=kind, batch_size=3)
        parts = list(slide(lambda batch: np.concatenate([batch, batch**2], -1), x, windows))
        assert [first for first, _ in parts] == [0, 2, 4, 5]
        np.testing.assert_allclose(np.concatenate([part for _, part in parts], 1), [x, x**2], atol=1e-6)
    own = Windows(crop=(4, 8, 8), steps=(3, 5, 4), margin=(2, 3, 1), weight="official")
    parts = list(slide(lambda batch: batch, x, own))
    assert parts[0][0] == 0 and sum(part.shape[1] for _, part in parts) == 9
    np.testing.assert_allclose(np.concatenate([part for _, part in parts], 1)[0], x, atol=1e-6)
    small = np.random.default_rng(0).random((3, 21, 6)).astype(np.float32)  # is continued by its mirror image
    parts = list(slide(lambda batch: batch, small, Windows(crop=(4, 8, 8))))
    np.testing.assert_allclose(np.concatenate([part for _, part in parts], 1)[0], small, atol=1e-6)


def blended_at_once(predict, x, windows):
    """The same with whole buffers."""
    total, below = np.zeros((3, *x.shape), np.float32), np.zeros(x.shape, np.float32)
    weight = importance(windows.crop, windows.weight)
    for z in windows.starts(x.shape[0], 0):
        for row in windows.starts(x.shape[1], 1):
            for column in windows.starts(x.shape[2], 2):
                at = tuple(slice(s, s + c) for s, c in zip((z, row, column), windows.crop))
                total[(slice(None), *at)] += np.moveaxis(predict(x[at][None, ..., None])[0], -1, 0) * weight
                below[at] += weight
    return total / below


def test_streaming_takes_a_third_of_the_memory_and_changes_nothing():
    x = np.random.default_rng(0).random((96, 48, 48)).astype(np.float32)
    windows = Windows(crop=(8, 16, 16), batch_size=2)

    def predict(batch):
        return np.concatenate([batch, batch.mean((1, 2, 3), keepdims=True) + 0 * batch, 1 - batch], -1)

    def peak(run):
        tracemalloc.start()
        found = run()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found, most

    def streamed():
        for first, part in slide(predict, x, windows):
            file[:, first : first + part.shape[1]] = part

    expected, most = peak(lambda: blended_at_once(predict, x, windows))
    file = np.empty((3, *x.shape), np.float32)  # stands for the one on the disk
    _, least = peak(streamed)
    np.testing.assert_allclose(file, expected, atol=1e-6)
    assert least <= most / 3, (least, most)


# ------------------------------------------------------------------------------------------------- networks and weights


def test_the_published_size():
    """The others are traced by the slow test."""
    assert sum(int(np.prod(s)) for s in shapes(PUBLISHED["tokenunify-base"]).values()) == 28_296_131


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "five", "three"),
    [
        ("small", 112_534_403, 62_201_731),
        ("mid", 206_577_475, 120_592_707),
        ("large", 506_567_395, 283_251_171),
        ("huge", 1_008_908_931, 555_921_027),
    ],
)
def test_the_larger_published_sizes(name, five, three):
    config = PUBLISHED[f"tokenunify-{name}"]
    for kernel, count in ((5, five), (3, three)):
        found = shapes(dataclasses.replace(config, kernel=kernel))
        assert sum(int(np.prod(s)) for s in found.values()) == count


@pytest.mark.slow
def test_what_the_authors_loader_drops():
    """Their class of pre-training against that of fine-tuning: 22 tensors of 291, 19.66M of 28.30M numbers."""
    fine = PUBLISHED["tokenunify-base"]
    before = dataclasses.replace(fine, kernel=3, out_channels=1, next_head=True)
    assert sum(int(np.prod(s)) for s in shapes(before).values()) == 15_712_707 - 2 * 33 + 824_785
    trees = [
        flax.traverse_util.unflatten_dict({p: np.broadcast_to(np.float32(0), s) for p, s in shapes(c).items()})
        for c in (fine, before)
    ]
    adopted = adopt(*trees)
    assert len(adopted.fresh) == 22 and adopted.share * 28_296_131 == pytest.approx(19.66e6, abs=5e3)
    assert "69.5%" in str(adopted)


def test_a_constant_crop_has_no_nan():
    assert not instance_norm(jnp.full((1, 2, 2, 2, 3), 7.0)).any()


def test_a_head_of_another_crop_is_refused():
    model = dataclasses.replace(UNET, out_channels=1, next_head=True)
    task = VolumePretraining(model=model)
    tensors = params_to(model, params_of(task))
    other = dataclasses.replace(model, crop=(16, 32, 16))
    with pytest.raises(ValueError, match=r"preciever\.mlp\.weight has the shape \(256, 8\), but a crop of"):
        params_from(other, tensors)
    alone = dataclasses.replace(other, next_head=False)
    assert "next_head" not in params_from(alone, tensors)
    with pytest.raises(ValueError, match=r"vit\.gscs\.0\.proj\.weight is missing"):
        params_from(model, {name: x for name, x in tensors.items() if name != "vit.gscs.0.proj.weight"})


# ------------------------------------------------------------------------------------------------------ runs and verbs


def test_fine_tuning_starts_with_the_pretrained_body():
    before = VolumePretraining(model=PATCHES)  # with an autoencoder's decoder, which is not kept
    after, given = affinities_case().task, params_of(before)
    surgery = ToAffinities().towards(after)
    assert surgery.task(before, DATA) == (after, DATA)
    found, state = jax.jit(lambda p, key: surgery.params(before, DATA, p, None, key))(given, jax.random.key(0))
    assert state is None and jax.tree.structure(found) == jax.tree.structure(params_of(after))
    adopted = adopt(jax.device_get(found), given)
    assert set(adopted.fresh) == {"out/kernel", "out/bias"} and 0 < adopted.share < 0.5
    for name in ("embedding", "layers", "norm", "positions"):
        jax.tree.map(np.testing.assert_array_equal, found[name], given[name])
    with pytest.raises(ValueError, match="to is None; as a stage of a run, it must be the task"):
        ToAffinities().task(before, DATA)


@pytest.mark.slow
def test_a_run_starts_with_a_pretrained_one(tmp_path):
    steps = TrainConfig(steps=2, checkpoint_every=2, eval_every=0, tensorboard=False)
    before, after = (
        Experiment(task=case.task, data=DATA, train=steps, workdir=str(tmp_path / name), start=start)
        for case, name, start in zip((pretraining_case(), affinities_case()), ("a", "b"), (None, ToAffinities()))
    )
    first = train(before, quiet=True)
    second = train(after, start=functools.partial(open_model, before.directory), quiet=True)
    kernels = first.params["embedding"]["kernel"], second.params["embedding"]["kernel"]
    assert 0 < np.abs(np.subtract(*map(np.asarray, kernels))).max() < 5e-3  # two steps away


@pytest.fixture
def runs(tmp_path):
    """Runs of both tasks that were not trained."""
    for name, case in (("before", pretraining_case()), ("after", affinities_case())):
        begin(Experiment(task=case.task, data=DATA, workdir=str(tmp_path / name)), params_of(case.task))
    return tmp_path


def test_a_volume_is_segmented_by_the_verb(runs, tmp_path, capsys):
    h5py = pytest.importorskip("h5py")
    folder, task = runs, affinities_case().task
    volume = toy_volume(3, (7, 20, 24), cells=5)
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        file["main"] = volume.images
    with h5py.File(tmp_path / "truth.h5", "w") as file:
        file["main"] = volume.segments
    out = tmp_path / "out.h5"
    options = ["--truth", f"{tmp_path}/truth.h5", "--batch-size", "3"]
    assert main(["vision", "segment", str(folder / "after"), f"volume:{tmp_path}/volume.h5", str(out), *options]) == 0
    assert "voi" in capsys.readouterr().out
    expected = predict_affinities(task, params_of(task), volume)
    with h5py.File(out) as file:
        np.testing.assert_allclose(file["affinities"][:], expected, atol=1e-5)
        assert file["segments"].shape == (7, 20, 24) and file["segments"][:].min() >= 1
    assert main(["vision", "segment", str(folder / "after"), f"{tmp_path}/volume.h5", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["vision", "segment", str(folder / "before"), f"{tmp_path}/volume.h5", f"{tmp_path}/new.h5"]) == 1
    assert "give a run that predicts affinities" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PatchConfig(crop=(16, 50, 48)),
            r"\(16, 50, 48\); its sides must be multiples of those of patch",
        ),
        (lambda: PatchConfig(crop=(4, 8, 8)), "a crop must have at least 2 patches"),
        (lambda: PatchConfig(slices=5), "slices is 5; it must divide the number of tokens in a crop, 144"),
        (lambda: SegMambaConfig(crop=(16, 160, 168), patch=(4, 8, 8)), "its sides must be multiples of 16"),
        (
            lambda: SegMambaConfig(crop=(16, 96, 96)),
            "stage 1 has 18432 positions; their number must",
        ),
        (lambda: VolumePretraining(model=PATCHES, mask_ratio=(0.0, 0.5)), "mask_ratio is .* two shares in"),
        (lambda: VolumePretraining(model=PATCHES, objective="paper"), "needs a causal model of patches"),
        (lambda: VolumePretraining(model=dataclasses.replace(UNET, out_channels=1)), "model.next_head must be True"),
        (lambda: VolumePretraining(model=UNET), "model.out_channels is 3; to predict voxels it must be 1"),
        (lambda: AffinityPrediction(model=PATCHES), "model.out_channels is 1; for affinities it must be 3"),
        (lambda: Windows(crop=(4, 8, 8), overlap=1.0), r"overlap is 1.0; it must be in \[0, 1\)"),
        (lambda: Windows(crop=(4, 8, 8), steps=(5, 8, 8)), "larger ones leave voxels out"),
        (
            lambda: next(slide(None, np.zeros((2, 8, 8)), Windows(crop=(4, 8, 8)))),
            "the depth of the volume is 2, and its mirror image cannot",
        ),
        (lambda: segmentation.segment(np.full((3, 1, 2, 2), 1.5)), r"go from 1.5 to 1.5; they must be in \[0, 1\]"),
        (lambda: segmentation.segment(np.full((3, 1, 2, 2), np.nan)), "and not NaN"),
        (lambda: segmentation.agglomerate(np.zeros((3, 1, 2, 2)), np.full((1, 2, 2), -1)), "whole numbers >= 0"),
        (lambda: segmentation.score(np.zeros((2, 2), int), np.ones((2, 2), int)), "not labelled.* everywhere"),
        (lambda: segmentation.score(np.ones((2, 2), int), np.ones((2, 3), int)), "they must be equal"),
        (lambda: segmentation.score(np.ones((2, 2)), np.ones((2, 2), int)), "truth is float64"),
        (lambda: affinities_case().task.fit(VolumeData()), "data.crop is .* they must be equal"),
        (lambda: ToAffinities(to=affinities_case().task).task(object(), DATA), "does not train on volumes"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_margin_is_the_mirror_image():
    seen = []
    x = np.arange(3.0 * 4 * 5).reshape(3, 4, 5).astype(np.float32)
    windows = Windows(crop=(5, 8, 7), margin=(1, 2, 1), batch_size=1)
    list(slide(lambda batch: seen.append(batch[0, ..., 0]) or batch, x, windows))
    np.testing.assert_array_equal(seen[0], np.pad(x, ((1, 1), (2, 2), (1, 1)), mode="reflect"))

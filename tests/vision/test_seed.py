"""SEED: exact statements about its Q-Former, its losses and its codes, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import Case, Operation, typed

from jaxtok.data.captions import CaptionedImages, clean
from jaxtok.data.images import ImageData
from jaxtok.interop.seed import from_official, to_official
from jaxtok.nn.contrastive import contrastive_nats, hard_negatives
from jaxtok.nn.losses import cross_entropy
from jaxtok.nn.quantizers import CodebookAverages, NearestQuantizer
from jaxtok.protocols import FROZEN
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.mesh import unboxed
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.eva_vit import EvaViTConfig, resize_positions, scale_by_depth
from jaxtok.vision.qformer import QFormer, QFormerConfig
from jaxtok.vision.retrieval import class_accuracy, pair_recall, recall
from jaxtok.vision.seed import PatchesConfig, Seed, SeedConfig
from jaxtok.vision.seed_alignment import LearnCodes, SeedAlignment, reader_of, spread, write_states

STILL = {"dropout": 0.0, "attention_dropout": 0.0}
QFORMER = QFormerConfig(
    num_layers=3, d_model=16, num_heads=2, mlp_dim=24, num_queries=4, context_width=16, vocab_size=300,
    max_positions=12, init_std=0.3, **STILL,
)  # fmt: skip
VISION = EvaViTConfig(image_size=8, patch_size=4, num_layers=2, d_model=16, num_heads=2, mlp_dim=24)
MODEL = SeedConfig(
    vision=VISION, qformer=QFORMER, projection_dim=8, codebook_size=32, code_dim=8, depth=1, block_heads=2,
    feature_dim=8 * 8 * 3,
)  # fmt: skip
MESHABLE = dataclasses.replace(
    MODEL,
    vision=dataclasses.replace(VISION, image_size=12, num_heads=8, d_model=16, mlp_dim=32),
    qformer=dataclasses.replace(QFORMER, num_heads=8, mlp_dim=32, vocab_size=304, num_queries=8),
    block_heads=8,
    feature_dim=12 * 12 * 3,
)
"""Sizes that eight devices can divide."""
ALIGNMENT = SeedAlignment(model=MODEL)
CODES = Seed(model=MODEL, target="image", prefixes=(1, 2, 4))


def pairs(task) -> Case:
    """Images with texts, some of which are shorter; the last pair only fills the batch."""
    size = task.model.vision.image_size
    data = CaptionedImages(images="digits", captions="classes", size=size, batch_size=8, length=8, flip=False)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (8, size, size, 3)),
        "labels": rng.integers(0, 10, 8),
        "mask": np.arange(8) < 7,
        "tokens": rng.integers(0, 256, (8, 8)),
        "text_mask": np.arange(8) < rng.integers(3, 9, (8, 1)),
    }
    return Case(task, data, typed(data, batch))


def pictures(task) -> Case:
    data = ImageData(images="digits", size=task.model.vision.image_size, batch_size=8, flip=False)
    batch = {name: array for name, array in pairs(task).batch.items() if name in data.batch_spec()}
    return Case(task, data, batch, rounding=1e-5)


TASKS = {
    "seed": lambda: pictures(Seed(model=MESHABLE, target="image")),
    "seed_averages": lambda: dataclasses.replace(
        pictures(
            Seed(model=dataclasses.replace(MESHABLE, head="qformer", reverse_layers=1), target="image", ema_decay=0.9)
        ),
        unfit={"sequence": "a single query cannot be divided"},
    ),
    "seed_alignment": lambda: dataclasses.replace(
        pairs(SeedAlignment(model=MESHABLE, train_vision=True, captioning=True, matching=True)),
        drawn=True,  # pairs are compared with those of their batch
        rounding=1e-4,
        train=TrainConfig(optimizer=OptimizerConfig(eps=1e-5)),  # so that Adam makes no updates of rounding
    ),
}

IMAGE_TOKENIZERS = {"seed": lambda: CODES}


SHALLOW = dataclasses.replace(QFORMER, num_layers=2)


@functools.cache
def qformer(config=SHALLOW):
    """A Q-Former, noisy parameters, and the function that runs it, compiled."""
    model = QFormer(config)
    image, tokens = jnp.zeros((1, 5, 16)), jnp.zeros((1, 3), jnp.int32)
    init = functools.partial(model.init, method="all_parts")
    shapes = jax.eval_shape(init, jax.random.key(0), image, tokens if config.vocab_size else None)["params"]
    return (
        model,
        filled(unboxed(shapes), 0),
        jax.jit(lambda p, *a, **k: model.apply({"params": p}, *a, **k)[0], static_argnames="queries"),
    )


@functools.cache
def noisy(task, seed=1):
    """Parameters of a task, none of them zero, without compiling its initialisation."""
    return filled(unboxed(jax.eval_shape(lambda: task.init(jax.random.key(0), {}))), seed)


def filled(shapes, seed):
    """Random numbers; the scales of norms are around 1."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        return (rng.normal(scale=0.3, size=x.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


IMAGE = np.random.default_rng(2).normal(size=(2, 5, 16)).astype(np.float32)
TOKENS = np.random.default_rng(3).integers(0, 299, (2, 6)).astype(np.int32)
BITS = np.random.default_rng(4)


# ------------------------------------------------------------------------------------------------------------- Q-Former


def test_a_query_depends_on_earlier_queries_only():
    """Bit for bit; without the causal mask it depends on all of them."""
    for causal in (True, False):
        _, params, run = qformer(dataclasses.replace(SHALLOW, causal=causal))
        before = np.asarray(run(params, IMAGE))
        for changed in range(4):
            queries = params["queries"].copy()
            queries[changed] += np.random.default_rng(9).normal(size=16)
            after = np.asarray(run({**params, "queries": queries}, IMAGE))
            assert np.array_equal(before[:, :changed], after[:, :changed]) == (causal or changed == 0)
            assert not np.allclose(before[:, changed:], after[:, changed:], atol=1e-3)


def test_the_first_queries_alone_give_the_same():
    _, params, run = qformer()
    whole = run(params, IMAGE)
    np.testing.assert_allclose(run(params, IMAGE, queries=3), whole[:, :3], atol=1.5e-6)


@pytest.mark.slow
def test_without_the_causal_mask_the_first_queries_alone_give_something_else():
    _, params, run = qformer(dataclasses.replace(SHALLOW, causal=False))
    assert not np.allclose(run(params, IMAGE, queries=3), run(params, IMAGE)[:, :3], atol=1e-3)


def test_the_order_of_what_is_read_does_not_matter():
    _, params, run = qformer()
    order, mask = np.array([3, 0, 4, 1, 2]), np.array([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]], bool)
    whole = run(params, IMAGE, image_mask=mask)
    permuted = run(params, IMAGE[:, order], image_mask=mask[:, order])
    np.testing.assert_allclose(whole, permuted, atol=1.5e-6)
    hidden = IMAGE.copy()
    hidden[~mask] = 7.0  # what is not there is not read
    np.testing.assert_allclose(run(params, hidden, image_mask=mask), whole, atol=1.5e-6)


def test_padding_does_not_matter():
    """An empty text gives numbers, too."""
    _, params, run = qformer()
    mask = np.array([[1, 1, 1, 1, 0, 0], [0] * 6], np.float32)
    short = run(params, None, TOKENS[:1, :4])
    np.testing.assert_allclose(run(params, None, TOKENS, mask)[:1, :4], short, atol=1.5e-6)
    assert np.isfinite(run(params, None, TOKENS, mask)).all()
    both = run(params, IMAGE, TOKENS, mask)
    np.testing.assert_allclose(both[:1, :8], run(params, IMAGE[:1], TOKENS[:1, :4]), atol=1.5e-6)


def test_a_caption_is_causal_and_sees_all_queries():
    model, params, _ = qformer()
    run = jax.jit(lambda p, i, t: model.apply({"params": p}, i, t, method="caption"))
    before = run(params, IMAGE, TOKENS)
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 299
    after = run(params, IMAGE, changed)
    assert np.array_equal(before[:, :3], after[:, :3]) and not np.allclose(before[:, 3:], after[:, 3:], atol=1e-4)
    queries = params["queries"].copy()
    queries[3, :5] += 1
    assert not np.allclose(run({**params, "queries": queries}, IMAGE, TOKENS)[:, 0], before[:, 0], atol=1e-4)


def test_what_the_qformer_refuses():
    _, params, run = qformer()
    with pytest.raises(ValueError, match="neither an image nor a text"):
        run(params)
    with pytest.raises(ValueError, match="queries is 5"):
        run(params, IMAGE, queries=5)
    with pytest.raises(ValueError, match="13 tokens; there are 12 positions"):
        run(params, None, np.zeros((1, 13), np.int32))
    for field, value in (("cross_every", 0), ("num_queries", 0), ("vocab_size", -1)):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            dataclasses.replace(QFORMER, **{field: value})


# ------------------------------------------------------------------------------------------------------------------ ViT


def test_positions_are_interpolated_as_pytorch_does_it():
    """Constants and the class token stay; values of 4 -> 2 are those of torch.nn.functional.interpolate."""
    rows = np.concatenate([[[9.0]], np.arange(16.0)[:, None]])
    half = resize_positions(rows, 5)
    np.testing.assert_allclose(half[:, 0], [9, 1.40625 + 0.625, 3.65625 + 0.5, 10.40625 + 0.4375, 12.5], atol=1.0)
    np.testing.assert_allclose(resize_positions(np.ones((17, 3)), 50), np.ones((50, 3)), atol=1e-12)
    assert resize_positions(rows, 17) is rows
    with pytest.raises(ValueError, match="square"):
        resize_positions(rows, 4)


@pytest.mark.slow
def test_positions_against_pytorch():
    torch = pytest.importorskip("torch")
    rows = np.random.default_rng(0).normal(size=(17, 3))
    grid = torch.tensor(rows[1:].reshape(1, 4, 4, 3)).permute(0, 3, 1, 2)
    for side in (2, 3, 7):
        theirs = torch.nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        theirs = theirs.permute(0, 2, 3, 1).reshape(side * side, 3).numpy()
        np.testing.assert_allclose(resize_positions(rows, 1 + side**2)[1:], theirs, atol=1e-9)


def test_initialisation_by_depth():
    ones = {"kernel": np.ones((3, 2, 2), np.float32)}
    blocks = {"attention": {"output": ones, "query": {}}, "ffn": {"down": ones}}
    blocks = scale_by_depth({"stack": {"blocks": blocks}})["stack"]["blocks"]
    for kernel in (blocks["attention"]["output"]["kernel"], blocks["ffn"]["down"]["kernel"]):
        np.testing.assert_allclose(kernel[:, 0, 0], 1 / np.sqrt(2 * np.arange(1, 4)), rtol=1e-6)


# ----------------------------------------------------------------------------------------------------- contrastive loss


def unit(shape, seed):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


V, T = unit((8, 6), 0), unit((8, 6), 1)


def test_contrastive_loss_in_parts_is_that_of_the_whole():
    """Value and gradient, to 1e-6; and the definition, with labels smoothed and pairs left out."""

    def total(v, temperature, part):
        return contrastive_nats(v, T, temperature, smoothing=0.1, part=part).sum()

    of = jax.jit(jax.value_and_grad(total, (0, 1)), static_argnums=2)
    whole = of(V, 0.07, 0)
    for part in (1, 4):
        for a, b in zip(jax.tree.leaves(of(V, 0.07, part)), jax.tree.leaves(whole)):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(b).max())
    plain = cross_entropy(V @ T.T / 0.07, jnp.arange(8), 0.1)
    np.testing.assert_allclose(contrastive_nats(V, T, 0.07, smoothing=0.1), plain, rtol=1e-5)
    mask = (np.arange(8) < 5).astype(np.float32)
    few = contrastive_nats(V[:5], T[:5], 0.07, smoothing=0.1)
    found = contrastive_nats(V, T, 0.07, mask=mask, smoothing=0.1, part=4)
    np.testing.assert_allclose(found[:5], few, rtol=1e-5)
    assert not np.any(jax.grad(lambda t: contrastive_nats(V, t, 0.07).sum())(T))
    with pytest.raises(ValueError, match="part is 3"):
        contrastive_nats(V, T, 0.07, part=3)


def test_hard_negatives_are_others_and_follow_the_similarity():
    columns = V.copy()
    columns[5] = V[2] * 0.99  # the only one that row 2 is near, besides its own
    draw = jax.jit(jax.vmap(lambda key: hard_negatives(V, columns, 0.02, key, part=4)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 40)))
    assert (drawn != np.arange(8)).all() and np.mean(drawn[:, 2] == 5) > 0.9


def test_a_batch_in_parts_has_the_gradient_of_the_batch():
    """Encoders run on a part at a time, and the loss is that of all pairs."""
    case = pairs(ALIGNMENT)
    small = dataclasses.replace(QFORMER, num_layers=1)
    alone = SeedAlignment(
        model=dataclasses.replace(
            MODEL, vision=PatchesConfig(patch_size=4), qformer=dataclasses.replace(small, context_width=20)
        )
    )
    params = noisy(alone)

    def gradient(part):
        task = dataclasses.replace(alone, part=part)
        return jax.jit(jax.value_and_grad(lambda p: task.loss(p, case.batch, jax.random.key(1), 0)[0]))(params)

    whole, parts = gradient(0), gradient(2)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole)):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, np.abs(b).max()))


def test_spread():
    assert float(spread(jnp.ones((4, 3)))) == 0
    assert float(spread(jnp.array([[1.0, 0], [-1, 0], [0, 1], [0, -1]]))) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------------------ quantiser


def test_both_losses_of_the_quantiser_are_equal_and_their_gradients_are_not():
    rng = np.random.default_rng(0)
    z, table = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)

    def of(legacy, z, table):
        return NearestQuantizer(5, 4, legacy=legacy).apply({"params": {"embedding": table}}, z).loss.sum()

    values = [jax.value_and_grad(functools.partial(of, legacy), (0, 1))(z, table) for legacy in (True, False)]
    assert float(values[0][0]) == pytest.approx(float(values[1][0]), rel=1e-6)
    np.testing.assert_allclose(values[0][1][0], 4 * values[1][1][0], rtol=1e-5)
    np.testing.assert_allclose(4 * values[0][1][1], values[1][1][1], rtol=1e-5)
    found = NearestQuantizer(5, 4).apply({"params": {"embedding": table}}, table[None])
    assert np.array_equal(found.codes[0, :, 0], np.arange(5)) and float(found.loss[0]) == 0
    cosine = NearestQuantizer(5, 4, cosine=True).apply({"params": {"embedding": table}}, 3 * table[None])
    assert np.array_equal(cosine.codes[0, :, 0], np.arange(5))


def test_averages_move_a_table_towards_what_it_stands_for():
    table = np.eye(3, 2).astype(np.float32)
    averages = CodebookAverages.init(table)
    np.testing.assert_allclose(averages.table(), table, rtol=1e-5)
    for _ in range(50):
        averages = averages.update(jnp.array([2.0, 0, 0]), jnp.array([[4.0, 4], [0, 0], [0, 0]]), decay=0.5)
    np.testing.assert_allclose(averages.table()[0], [2, 2], rtol=1e-3)
    assert np.isfinite(averages.table()).all()


# ---------------------------------------------------------------------------------------------------------- the systems


def test_a_prefix_of_codes_is_that_of_fewer_queries():
    params, images = noisy(CODES), BITS.random((2, 8, 8, 3), np.float32)
    codes = CODES.encode(params, images)
    fewer = dataclasses.replace(MODEL, qformer=dataclasses.replace(QFORMER, num_queries=2))
    reader = {**params[FROZEN]["reader"]}
    reader["qformer"] = {**reader["qformer"], "queries": reader["qformer"]["queries"][:2]}
    codes_of = {**params["codes"]} | {n: params["codes"][n][:2] for n in ("positions", "image_positions")}
    first = Seed(model=fewer, target="image").encode(
        {FROZEN: {**params[FROZEN], "reader": reader}, "codes": codes_of}, images
    )
    assert np.array_equal(first, codes[:, :2])


def test_stage_two_keeps_what_reads_images(tmp_path):
    two = dataclasses.replace(CODES, prefixes=())
    surgery = LearnCodes(to=two)
    before = noisy(ALIGNMENT)
    assert surgery.task(ALIGNMENT, None)[0] is two
    params = jax.eval_shape(lambda: surgery.params(ALIGNMENT, None, before, None, jax.random.key(1))[0])
    assert jax.tree.map(np.shape, unboxed(params)) == jax.tree.map(np.shape, noisy(two))
    images = BITS.random((2, 8, 8, 3), np.float32)
    states = two.causal_embeddings({FROZEN: reader_of(before), "codes": {}}, images)

    @jax.jit
    def vectors(params, states):
        own = ALIGNMENT._apply(params, "image_feature", ALIGNMENT.model.vision.module().apply(
            {"params": params[FROZEN]["vision"]}, MODEL.normalised(images)
        ))  # fmt: skip
        return own, ALIGNMENT.aligner().apply({"params": params["aligner"]}, states, method="of_states")

    np.testing.assert_allclose(*vectors(before, states), atol=1e-5)

    class Two:
        def eval_batches(self, split):
            yield {"images": images, "mask": np.array([0.0, 1.0])}

    write_states(ALIGNMENT, before, Two(), tmp_path, splits=("train",), targets=lambda x: x.mean((1, 2)))
    np.testing.assert_allclose(np.load(tmp_path / "train" / "states.npy"), states[1:], atol=1e-2)
    assert np.load(tmp_path / "train" / "targets.npy").shape == (1, 3)
    other = {"vision": dataclasses.replace(VISION, num_layers=1), "qformer": dataclasses.replace(QFORMER, causal=False)}
    for field, value in other.items():
        changed = Seed(model=dataclasses.replace(MODEL, **{field: value}), target="image")
        with pytest.raises(ValueError, match=f"stage II's model.{field} is not stage I's"):
            LearnCodes(to=changed).task(ALIGNMENT, None)
    with pytest.raises(ValueError, match="stage I"):
        surgery.task(two, None)


def test_files_of_the_authors_are_refused_by_name():
    params = noisy(CODES)
    tensors = to_official(CODES, params)
    assert "encode_task_layer.2.weight" in tensors and "image_down.4.weight" in tensors
    back = from_official(CODES, {**tensors, "Qformer.bert.embeddings.position_ids": np.arange(3)})
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params)):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match=r"image_down\.9\.weight is unknown"):
        from_official(CODES, {**tensors, "image_down.9.weight": tensors["image_down.4.weight"]})
    del tensors["Qformer.bert.encoder.layer.2.crossattention.self.key.weight"]
    with pytest.raises(ValueError, match=r"layer\.2\.crossattention\.self\.key\.weight is missing"):
        from_official(CODES, tensors)


def test_files_of_blip2_hold_some_tensors_twice():
    """And a matching head, which stage I leaves out."""
    tensors = to_official(ALIGNMENT, noisy(ALIGNMENT))
    words = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
    more = {"itm_head.weight": words, "Qformer.cls.predictions.decoder.bias": tensors["Qformer.cls.predictions.bias"]}
    decoder = "Qformer.cls.predictions.decoder.weight"
    back = from_official(ALIGNMENT, {**tensors, **more, decoder: words})
    assert jax.tree.all(jax.tree.map(np.array_equal, back, noisy(ALIGNMENT)))
    with pytest.raises(ValueError, match="the caption head is tied"):
        from_official(ALIGNMENT, {**tensors, decoder: words + 1})


def test_what_the_systems_refuse():
    with pytest.raises(ValueError, match="feature_dim is 9"):
        Seed(model=dataclasses.replace(MODEL, feature_dim=9), target="image")
    with pytest.raises(ValueError, match="the last one 4"):
        Seed(model=MODEL, prefixes=(1, 3))
    with pytest.raises(ValueError, match="context_width is 16; it must be 20"):
        dataclasses.replace(MODEL, vision=PatchesConfig())
    with pytest.raises(ValueError, match="decodes codes to an embedding"):
        Seed(model=MODEL).decode(noisy(CODES), np.zeros((1, 4, 1), np.int32))
    case = pairs(ALIGNMENT)
    with pytest.raises(ValueError, match="batch_size is 1"):
        ALIGNMENT.fit(dataclasses.replace(case.data, batch_size=1))
    with pytest.raises(ValueError, match="images have no texts"):
        ALIGNMENT.fit(pictures(CODES).data)
    with pytest.raises(ValueError, match="no targets"):
        Seed(model=MODEL).fit(case.data)
    small = dataclasses.replace(MODEL, qformer=dataclasses.replace(QFORMER, vocab_size=256))
    with pytest.raises(ValueError, match="vocab_size is 256"):
        SeedAlignment(model=small).fit(case.data)


def test_retrieval():
    """Pairs with one text are right for each other; classes are compared with one text each."""
    images, texts = np.eye(3), np.eye(3)[[0, 2, 1]]
    assert recall(images, texts, [{0}, {1}, {2}], (1, 2)) == {1: 1 / 3, 2: 1 / 3}
    assert recall(images, texts, [{0}, {1, 2}, {1, 2}], (1,)) == {1: 1.0}
    found = pair_recall(images, texts, ["a", "b", "b"])
    assert found["image_to_text_1"] == found["text_to_image_1"] == 1.0
    assert class_accuracy(np.eye(3)[[0, 1, 0]], np.eye(3), ["a", "b", "b"]) == pytest.approx(2 / 3)


def test_the_head_for_text_conditions():
    """77 vectors by a reverse Q-Former of their own names (SEED-1)."""
    model = dataclasses.replace(MODEL, head="text77", text_queries=3, feature_dim=5, reverse_layers=2)
    task = Seed(model=model)
    params = noisy(task)
    tensors = to_official(task, params)
    assert tensors["reverse_tokens_text"].shape == (1, 3, 16) and tensors["distill_text_proj.weight"].shape == (5, 16)
    assert {"pos_embed_text", "blocks_text.0.attn.qkv.bias"} <= set(tensors)
    assert "Reverse_Qformer_text.bert.encoder.layer.0.crossattention.self.key.weight" in tensors
    shaped = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    batch = {"states": shaped((2, 4, 16)), "targets": shaped((2, 3, 5)), "mask": shaped((2,))}
    loss, metrics = jax.eval_shape(lambda b: task.loss(params, b, jax.random.key(0), jnp.zeros((), jnp.int32)), batch)
    assert loss.shape == () and "generation" in metrics
    codes = shaped((2, 4, 1))
    y = jax.eval_shape(lambda c: task.decode_to_embedding(params, c.astype(jnp.int32)), codes)
    assert y.shape == (2, 3, 5)


def test_held_out_pictures_are_resized_without_cutting(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :4] = 255  # a quarter of the width, which the centre does not have
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("A wide, picture!")
    options = {"images": f"folder:{tmp_path}", "captions": "beside", "size": 8, "batch_size": 1, "length": 24}
    for squash, columns in ((False, 0), (True, 2)):
        data = CaptionedImages(**options, squash=squash)
        (batch,) = data.eval_batches("all")
        assert (batch["images"][0, 0, :, 0] > 127).sum() == columns
    assert data.texts("all") == ["a wide picture"]


def test_captions():
    assert clean("Hello,  World_wide (web)!") == "hello world wide web"
    data = CaptionedImages(images="digits", captions="classes", size=8, batch_size=4, length=4)
    batch = next(iter(data.eval_batches()))
    assert batch["tokens"].shape == (4, 4) and batch["text_mask"].sum(1).tolist() == [3.0] * 4
    assert bytes(batch["tokens"][0, 1:2].tolist()) == str(batch["labels"][0]).encode()
    balanced = dataclasses.replace(data, batch_size=10, balanced=True)
    batches = balanced.train_batches()
    assert all(next(batches)["labels"].tolist() == list(range(10)) for _ in range(3))
    with pytest.raises(ValueError, match="only emoji have keywords"):
        CaptionedImages(images="digits")


def operation() -> Operation:
    before = dataclasses.replace(MESHABLE, qformer=dataclasses.replace(MESHABLE.qformer, num_layers=2))
    to = Seed(model=before, target="image")
    return Operation(LearnCodes(to=to), pairs(SeedAlignment(model=before)), to, staged=False)


SURGERIES = {"seed_codes": operation}

DATASETS = {
    "captions": lambda texts, folder: CaptionedImages(
        images="digits", captions="classes", size=8, batch_size=64, length=4, workers=0
    ),
}

"""ELECTRA's exact statements: what is chosen, what is replaced, who learns from what."""

from __future__ import annotations

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.configuration import load_config
from jaxtok.data.encoders import EncoderData
from jaxtok.interop.electra import from_official, to_official, variables
from jaxtok.interop.encoders import read_encoder_config
from jaxtok.interop.huggingface import config_json, read_folder, write_folder
from jaxtok.lm.bert import init_params
from jaxtok.lm.electra import (
    PUBLISHED,
    ElectraConfig,
    ReplacedTokens,
    area_under_curve,
    copying_nats,
    histograms,
    sample,
)
from jaxtok.lm.masked_words import MaskedWords, Masking, put, take
from jaxtok.lm.text_classification import TextClassification
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig, unboxed
from jaxtok.verbs import evaluate
from jaxtok.verbs.convert import convert

CLS, SEP, MASK = 1, 2, 3
MASKING = Masking(rate=0.25, mask_id=MASK, kept_ids=(CLS, SEP))
ONE_HEAD = dict.fromkeys(("tensor 8", "2 x 2 x 2", "sequence"), "the generator has a head for every 64 channels: one")
TASKS = {
    "electra": lambda: tiny.encoder(
        ReplacedTokens(model=tiny.ENCODER, masking=Masking(mask_id=MASK, kept_ids=(CLS, SEP)), generator_width=0.5),
        ONE_HEAD,
    ),
    "text_classification": lambda: tiny.labelled(
        tiny.encoder(TextClassification(model=dataclasses.replace(tiny.ENCODER, num_classes=4, replaced_head=False))),
        4,
    ),
}

EVIDENCE = {"electra": {"formats": ("electra, discriminator", "electra, generator", "electra, variables")}}

MODEL = ElectraConfig(
    vocab_size=40, num_layers=2, d_model=16, num_heads=2, mlp_dim=24, embedding_size=8, max_positions=20
)
TASK = ReplacedTokens(model=MODEL, masking=MASKING, generator_width=0.5)
VARIANTS = {
    "electra": TASK,
    "no sharing": dataclasses.replace(TASK, sharing="nothing"),
    "one encoder": dataclasses.replace(TASK, sharing="everything"),
    "uniform": dataclasses.replace(TASK, generator="uniform"),
    "electra 15%": dataclasses.replace(TASK, objective="replaced_masked"),
    "replace mlm": dataclasses.replace(TASK, objective="replace_mlm"),
    "all-tokens mlm": dataclasses.replace(TASK, objective="all_tokens_mlm"),
    "electric": dataclasses.replace(TASK, generator="towers", objective="electric"),
}


@pytest.fixture(scope="module")
def batch():
    """[CLS] a [SEP] b [SEP] and padding, in rows of several lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 40, (4, 16)).astype(np.int32)
    ends = np.array([15, 12, 9, 4])[:, None]
    position = np.arange(16)[None]
    tokens = np.where(position == 0, CLS, np.where((position == ends) | (position == 6), SEP, tokens))
    mask = position <= ends
    return {
        "tokens": np.where(mask, tokens, 0).astype(np.int32),
        "types": (mask & (position > 6)).astype(np.int32),
        "mask": mask.astype(np.float32),
        "bytes": np.where(mask & (tokens > 3), 2, 0).astype(np.int32),
    }


def parameters(task, batch, seed=1):
    """Parameters, none of them zero, made without compiling anything."""
    shapes = jax.eval_shape(lambda: unboxed(task.init(jax.random.key(0), batch)))
    return random_like(shapes, seed)


def random_like(shapes, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnames="task")
def forward(task, params, batch, choices):
    return task.run(params, batch, choices)


@functools.partial(jax.jit, static_argnames="task")
def gradients(task, params, batch, choices):
    """The result, and the gradients of the generator's and of the discriminator's loss."""

    def parts(params):
        result = task.run(params, batch, choices)
        return (result["generator_loss"], result["discriminator_loss"]), result

    _, pull, result = jax.vjp(parts, params, has_aux=True)
    return result, pull((1.0, 0.0))[0], pull((0.0, 1.0))[0]


@pytest.fixture(scope="module")
def case(batch):
    """Parameters, choices, and the result of a forward pass."""
    params, choices = parameters(TASK, batch), TASK.choose(jax.random.key(0), batch)
    return params, choices, forward(TASK, params, batch, choices)


def test_labels_say_what_differs(batch, case):
    _, choices, result = case
    tokens, corrupted = batch["tokens"], np.asarray(result["corrupted"])
    np.testing.assert_array_equal(result["labels"], corrupted != tokens)
    assert result["labels"].any()
    assert not result["labels"][(tokens == CLS) | (tokens == SEP) | (batch["mask"] == 0)].any()
    chosen = np.zeros_like(tokens)
    np.maximum.at(chosen, (np.arange(4)[:, None], choices.slots.places), choices.slots.weights.astype(np.int32))
    assert not (corrupted != tokens)[chosen == 0].any()
    assert not (corrupted == MASK)[tokens != MASK].any() or (result["samples"] == MASK).any()
    masked = np.asarray(result["masked"])
    np.testing.assert_array_equal(masked[chosen == 0], tokens[chosen == 0])


def test_a_generator_that_is_always_right_leaves_nothing_to_find(batch, case):
    params, choices, _ = case
    targets = take(batch["tokens"], choices.slots.places)
    right = choices._replace(noise=jnp.where(jax.nn.one_hot(targets, 40) > 0, 1 - 1e-7, 1e-9))
    result = forward(TASK, params, batch, right)
    np.testing.assert_array_equal(result["corrupted"], batch["tokens"])
    assert not result["labels"].any()


def test_who_learns_from_what(batch, case):
    """The discriminator's loss moves nothing of the generator's own, and the generator's only what both share."""
    params, choices, _ = case
    _, of_generator, of_discriminator = jax.device_get(gradients(TASK, params, batch, choices))
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_discriminator["generator"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(of_discriminator["discriminator"]))
    moved = {path[0] for path, leaf in flatten_dict(of_generator["discriminator"]).items() if leaf.any()}
    assert moved == {"embedding", "position_embedding", "type_embedding", "embedding_norm"}
    assert all(leaf.any() for leaf in jax.tree.leaves(of_generator["generator"]))


def test_padding_changes_nothing(batch, case):
    params, choices, result = case
    other = dict(batch, tokens=np.where(batch["mask"] > 0, batch["tokens"], 7).astype(np.int32))
    other["types"] = np.where(batch["mask"] > 0, batch["types"], 1)
    changed = forward(TASK, params, other, choices)
    for name in ("generator_loss", "discriminator_loss"):
        np.testing.assert_allclose(changed[name], result[name], rtol=1e-6)


def test_evaluation_has_the_losses_of_training(batch, case):
    """A batch has the choices of its key; the same batch twice has other choices, and the same means each time."""
    params, _, result = case
    metrics = TASK.evaluate(params, [batch])
    for name in ("loss", "generator_loss", "discriminator_loss"):
        assert metrics[name] == pytest.approx(float(result[name]), rel=1e-4)
    labels, real = np.asarray(result["labels"]), batch["mask"] > 0
    assert metrics["replaced"] == labels.sum() and metrics["tokens"] == real.sum()
    assert metrics["baseline_accuracy"] == pytest.approx(1 - labels.sum() / real.sum())
    claims = np.asarray(result["replaced"]) > 0
    assert metrics["accuracy"] == pytest.approx(np.mean(claims[real] == labels[real]))
    assert metrics["precision"] == pytest.approx(labels[claims & real].mean() if (claims & real).any() else 0)
    assert metrics["recall"] == pytest.approx(claims[labels > 0].mean())
    assert metrics["bits_per_byte"] == pytest.approx(metrics["generator_loss"] / math.log(2) / 2, rel=1e-5)
    twice = TASK.evaluate(params, [batch, batch])
    assert twice == TASK.evaluate(params, [batch, batch]) and twice["loss"] != metrics["loss"]


@functools.partial(jax.jit, static_argnames="masking")
def choose(masking, rng, tokens, mask):
    candidates = masking.candidates(tokens, mask)
    return candidates, *masking.choose(rng, candidates, mask)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), rate=st.sampled_from([0.15, 0.4]), repeated=st.booleans(), data=st.data())
def test_as_many_places_as_there_should_be(seed, rate, repeated, data):
    masking = dataclasses.replace(MASKING, rate=rate, with_replacement=repeated)
    ends = np.array(data.draw(st.lists(st.integers(0, 20), min_size=3, max_size=3)))
    specials = np.random.default_rng(seed).integers(0, 8, (3, 20)) < data.draw(st.integers(0, 8))
    mask = np.arange(20) < ends[:, None]
    tokens = np.where(specials, CLS, 9).astype(np.int32)
    candidates, places, weights = map(np.asarray, choose(masking, jax.random.key(seed), tokens, mask))
    assert weights.shape[1] == masking.slots(20) == max(1, int((rate + 0.005) * 20))
    for row in range(3):
        chosen = places[row][weights[row] > 0].tolist()
        there = int(candidates[row].sum())
        wanted = int(np.clip(np.round(np.float32(rate) * ends[row]), 1, masking.slots(20)))
        assert all(candidates[row, k] for k in chosen)
        if repeated:
            assert len(chosen) == (wanted if there else 0)
        else:
            assert len(set(chosen)) == len(chosen) == min(wanted, there)
        assert not places[row][weights[row] == 0].any()


@pytest.mark.parametrize("repeated", [False, True])
def test_the_share_of_masks(repeated):
    """It is rate * 0.85 with distinct positions, and 1 - exp(-0.85 rate) with positions that may be drawn again."""
    masking = Masking(mask_id=MASK, kept_ids=(CLS, SEP), with_replacement=repeated)
    tokens, mask = np.full((1000, 100), 9, np.int32), np.ones((1000, 100))

    @jax.jit
    def hide(rng):
        a, b = jax.random.split(rng)
        slots = masking.choose(a, masking.candidates(tokens, mask), mask)
        return masking.hide(tokens, slots, jax.random.uniform(b, slots.places.shape))

    share = float(np.mean(hide(jax.random.key(0)) == MASK))
    assert share == pytest.approx(1 - math.exp(-0.85 * 0.15) if repeated else 0.1275, abs=3e-3)


def test_berts_mixture():
    masking = Masking(rate=0.5, mask_share=0.8, random_share=0.1, mask_id=MASK, kept_ids=())
    tokens, mask = np.full((100, 100), 9, np.int32), np.ones((100, 100))
    slots = masking.choose(jax.random.key(0), masking.candidates(tokens, mask), mask)
    draws = jax.random.uniform(jax.random.key(1), slots.places.shape)
    hidden = np.asarray(masking.hide(tokens, slots, draws, jnp.full(slots.places.shape, 5)))
    assert np.mean(hidden == MASK) == pytest.approx(0.4, abs=0.02)
    assert np.mean(hidden == 5) == pytest.approx(0.05, abs=0.01)


def test_places_that_are_drawn_twice_get_the_mean():
    places, weights = np.array([[2, 2, 0, 4]]), np.array([[1.0, 1.0, 0.0, 1.0]])
    row = put(jnp.arange(6)[None], places, weights, np.array([[10, 13, 99, 7]]))
    assert row.tolist() == [[0, 1, 11, 3, 7, 5]]
    words = put(jnp.zeros((1, 6, 2), jnp.int32), places, weights, np.array([[[10, 1], [13, 2], [99, 9], [7, 8]]]))
    assert words[0].tolist() == [[0, 0], [0, 0], [11, 1], [0, 0], [7, 8], [0, 0]]


def test_samples_follow_the_softmax():
    logits = jnp.array([1.0, 0.0, -1.0, 2.0])
    noise = jax.random.uniform(jax.random.key(0), (1, 20000, 4))
    for temperature in (1.0, 2.0):
        drawn = sample(jnp.broadcast_to(logits, noise.shape), noise, temperature)
        share = np.bincount(np.asarray(drawn)[0], minlength=4) / 20000
        np.testing.assert_allclose(share, jax.nn.softmax(logits / temperature), atol=0.02)
    assert not (sample(logits + jnp.zeros(noise.shape), noise, disallowed=jnp.full((1, 20000), 3)) == 3).any()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("one encoder", "replace mlm", "all-tokens mlm")]


@pytest.mark.parametrize("name", [*SLOW, "electric"])
def test_variants_learn(name, batch):
    """Both losses are finite, and their gradients reach what they should."""
    task = VARIANTS[name]
    params, choices = parameters(task, batch), task.choose(jax.random.key(0), batch)
    result, of_generator, of_discriminator = jax.device_get(gradients(task, params, batch, choices))
    assert np.isfinite([result["generator_loss"], result["discriminator_loss"]]).all()
    assert all(leaf.any() for leaf in jax.tree.leaves(of_generator["generator"]))
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_discriminator["generator"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(of_discriminator["discriminator"]))
    shared = {path[0] for path, leaf in flatten_dict(of_generator["discriminator"]).items() if leaf.any()}
    assert ("stack" in shared) == (name == "one encoder")
    if name == "electric":  # even where the sample is right
        assert result["labels"].sum() == choices.slots.weights.sum()
    assert task.flops(batch) > 0


def test_a_uniform_generator(batch):
    task = VARIANTS["uniform"]
    params = parameters(task, batch)
    assert set(params) == {"discriminator"}
    metrics = task.evaluate(params, [batch])
    assert metrics["generator_loss"] == pytest.approx(math.log(40), rel=1e-5) and metrics["auc"] > 0


def test_a_loss_at_the_chosen_positions_only(batch, case):
    """In ELECTRA 15%, other logits do not matter, and the mean is over the chosen positions."""
    params, choices, result = case
    chosen = np.asarray(put(jnp.zeros((4, 16), jnp.int32), *choices.slots, jnp.ones_like(choices.slots.places)))
    nats = np.asarray(optax.sigmoid_binary_cross_entropy(result["replaced"], result["labels"]))
    of_15 = forward(VARIANTS["electra 15%"], params, batch, choices)["discriminator_loss"]
    assert float(of_15) == pytest.approx(nats[chosen > 0].mean(), rel=1e-5)
    assert float(result["discriminator_loss"]) == pytest.approx(nats[batch["mask"] > 0].mean(), rel=1e-5)


def test_loss_is_repeatable_and_masked_words_train(batch):
    task = MaskedWords(model=dataclasses.replace(MODEL, mask_head=True, replaced_head=False), masking=MASKING)
    params = parameters(task, batch)
    loss = jax.jit(task.loss)
    first, metrics = loss(params, batch, jax.random.key(0), 0)
    assert first == loss(params, batch, jax.random.key(0), 0)[0] != loss(params, batch, jax.random.key(1), 0)[0]
    assert 0 <= metrics["accuracy"] <= 1
    whole = task.evaluate(params, [batch, batch])
    assert whole == task.evaluate(params, [batch, batch])
    assert whole["bits_per_byte"] == pytest.approx(whole["loss"] / math.log(2) / 2, rel=1e-5)  # two bytes a token
    with pytest.raises(ValueError, match="no words that count"):
        task.evaluate(params, [dict(batch, mask=0 * batch["mask"])])
    with pytest.raises(ValueError, match="no words that count"):
        TASK.evaluate(parameters(TASK, batch), [dict(batch, mask=0 * batch["mask"])])


def test_towers_do_not_see_the_word_they_predict(batch):
    task = VARIANTS["electric"]
    params, choices = parameters(task, batch), task.choose(jax.random.key(2), batch)
    run = jax.jit(
        lambda tokens: task._generate(params, None, tokens, batch["mask"], batch["types"], choices.slots, None)
    )
    before = run(batch["tokens"])[1]
    tokens = batch["tokens"].copy()
    tokens[0, 9] = 20 if tokens[0, 9] != 20 else 21
    change = np.abs(run(tokens)[1] - before)[0].max(-1)
    assert change[9] == 0
    assert (change[:16] > 0).sum() == 15  # of all others that are not padding


def test_copying_is_a_distribution():
    words, copy = jax.random.normal(jax.random.key(0), (1, 1, 6)), jnp.array([[0.3]])
    nats = copying_nats(copy, jnp.repeat(words, 6, 1), jnp.full((1, 6), 2), jnp.arange(6)[None])
    assert float(jnp.exp(-nats).sum()) == pytest.approx(1.0, abs=1e-5)


def test_scores():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=500).astype(np.float32), rng.integers(0, 2, 500)
    logits += labels
    pairs = logits[labels == 1][:, None] - logits[labels == 0]
    expected = np.mean(pairs > 0)
    counts = np.asarray(histograms(jnp.asarray(logits), jnp.asarray(labels), jnp.ones(500)))
    assert area_under_curve(counts) == pytest.approx(expected, abs=2e-3)
    assert counts[:, 2048:].sum() == (logits > 0).sum()
    assert area_under_curve(np.zeros((2, 4096))) == 0.5
    nats = optax.sigmoid_binary_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    probability = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(nats, -np.log(np.where(labels, probability, 1 - probability)), rtol=1e-4)


def test_what_is_shared(batch):
    def size(task):
        shapes = jax.eval_shape(lambda: unboxed(task.init(jax.random.key(0), batch)))
        return {kind: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for kind, tree in shapes.items()}

    tied, untied, one = (size(VARIANTS[name]) for name in ("electra", "no sharing", "one encoder"))
    embeddings = (40 + 20 + 2 + 2) * 8  # words, positions, types, norm; both are of width 8 here
    assert untied["generator"] - tied["generator"] == embeddings
    assert tied["discriminator"] == untied["discriminator"] == one["discriminator"]
    assert one["generator"] == 16 * 8 + 8 + 2 * 8 + 40
    wide = dataclasses.replace(TASK, model=dataclasses.replace(MODEL, embedding_size=0))
    assert wide.generator_config.embedding_size == 16 and wide.generator_config.d_model == 8


def count(config):
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        ("small", 13_549_057, 4_620_026),
        ("base", 109_483_009, 33_740_602),
        ("large", 335_142_913, 51_295_290),
    ],
)
def test_published_sizes(name, discriminator, generator):
    """The counts of Hugging Face's ElectraForPreTraining and ElectraForMaskedLM; what is shared counts in both."""
    task = PUBLISHED[name]
    assert count(task.discriminator_config) == discriminator
    assert count(task.generator_config) == generator
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    for config, kind in ((task.discriminator_config, "PreTraining"), (task.generator_config, "MaskedLM")):
        with torch.device("meta"):
            options = transformers.ElectraConfig(**config_json(config))
            model = getattr(transformers, f"ElectraFor{kind}")(options)
        assert sum(p.numel() for p in model.parameters()) == count(config)


HEADS = {
    "PreTraining": MODEL,
    "MaskedLM": dataclasses.replace(MODEL, mask_head=True, replaced_head=False),
    "SequenceClassification": dataclasses.replace(MODEL, num_classes=3, replaced_head=False),
}
WIDE = {"num_layers": 3, "d_model": 12, "num_heads": 3, "embedding_size": 12, "activation": "gelu_tanh"}


@pytest.mark.parametrize("changed", [{}, WIDE], ids=["projected", "same width"])
@pytest.mark.parametrize("head", HEADS)
def test_hugging_face_folders(head, changed, tmp_path):
    """What is written is read, and `transformers` computes the same from it."""
    config = dataclasses.replace(HEADS[head], **changed)
    if changed and head != "PreTraining":
        with pytest.raises(ValueError, match="it must be gelu, as in Hugging Face's ELECTRA"):
            write_folder(tmp_path / "refused", config, {})
    config = dataclasses.replace(config, head_activation="gelu" if changed else "")
    params = random_like(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    write_folder(tmp_path / "folder", config, params)
    again, tree = read_folder(tmp_path / "folder")
    assert again == dataclasses.replace(config, embedding_size=config.embedding_width)
    chex.assert_trees_all_equal(tree, params)
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    theirs = getattr(transformers, f"ElectraFor{head}").from_pretrained(tmp_path / "folder").eval()
    tokens = np.random.default_rng(1).integers(4, config.vocab_size, (2, 12))
    mask, types = np.ones((2, 12), np.int64), np.arange(12)[None].repeat(2, 0) // 6
    mask[0, 9:] = 0
    with torch.no_grad():
        output = theirs(*map(torch.from_numpy, (tokens, mask, types))).logits.numpy()
    run = jax.jit(functools.partial(config.module().apply, method="everything"))
    heads = run({"params": params}, tokens, mask, types)
    ours = heads[{"PreTraining": "replaced", "MaskedLM": "masked_words", "SequenceClassification": "classes"}[head]]
    real = mask.astype(bool) if head != "SequenceClassification" else slice(None)
    np.testing.assert_allclose(ours[real], output[real], atol=1e-4 * np.abs(output).max())
    theirs.save_pretrained(tmp_path / "theirs")
    back, tree = read_folder(tmp_path / "theirs")
    assert back == again
    chex.assert_trees_all_equal(tree, params)


@pytest.mark.slow
def test_a_run_is_evaluated_and_becomes_a_folder(tmp_path):
    """The loop, a checkpoint, `jaxtok eval` and `jaxtok convert`."""
    (tmp_path / "corpus").mkdir()
    for k in range(100):
        (tmp_path / "corpus" / f"{k}.txt").write_text(f"text {k}, and some more of it. " * 4)
    ids = {"cls_id": 258, "sep_id": 259, "pad_id": 257}
    masking = Masking(mask_id=260, kept_ids=(258, 259))
    run = Experiment(
        task=ReplacedTokens(model=dataclasses.replace(MODEL, vocab_size=0), masking=masking, generator_width=0.5),
        data=EncoderData(corpus=str(tmp_path / "corpus"), length=16, batch_size=4, eval_limit=2, **ids),
        train=TrainConfig(steps=2, log_every=1, tensorboard=False),
        mesh=MeshConfig(data=1),
        workdir=str(tmp_path / "run"),
    )
    result = train(run, quiet=True)
    assert result.task.model.vocab_size == 384  # the tokenizer's, rounded up
    assert evaluate(tmp_path / "run", batches=2)["auc"] == pytest.approx(result.metrics["auc"], abs=1e-6)
    config, params = read_folder(convert(tmp_path / "run", tmp_path / "folder"))
    assert config == result.task.export(result.params)[0]
    chex.assert_trees_all_equal(params, result.params["discriminator"])


@pytest.mark.parametrize("size", PUBLISHED)
def test_configs_have_the_published_sizes(size):
    config = load_config(f"electra_{size}")
    task, model = PUBLISHED[size], config.task.model
    assert (model.dtype, config.train.optimizer.bias_correction) == ("bfloat16", False)
    assert count(config.task.discriminator_config) == count(task.discriminator_config)
    assert config.data.batch_size % config.mesh.fsdp == 0 and model.d_model % config.mesh.fsdp == 0
    assert config.data.length <= model.max_length


@pytest.mark.parametrize("name", ["electra", "no sharing", "one encoder", "uniform", "electric"])
def test_the_authors_variables_there_and_back(name, batch):
    task = VARIANTS[name]
    params = parameters(task, batch)
    theirs = to_official(task, params)
    again = from_official(task, theirs | {"global_step": np.zeros(()), "electra/x/adam_m": np.zeros(3)})
    chex.assert_trees_all_equal(again, jax.tree.map(np.asarray, params))
    assert len({source.name for source in variables(task).values()}) == len(variables(task))
    with pytest.raises(ValueError, match="electra/odd is unknown"):
        from_official(task, theirs | {"electra/odd": np.zeros(3)})
    del theirs["electra/embeddings/LayerNorm/beta"]
    with pytest.raises(ValueError, match=r"LayerNorm/beta is missing"):
        from_official(task, theirs)


def test_bfloat16_is_near(batch, case):
    params, choices, result = case
    half = dataclasses.replace(TASK, model=dataclasses.replace(MODEL, dtype="bfloat16", remat="full"))
    for name in ("generator_loss", "discriminator_loss"):
        assert forward(half, params, batch, choices)[name] == pytest.approx(float(result[name]), rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Masking(rate=0.0), "masking.rate is 0.0"),
        (lambda: Masking(rate=1.0), "masking.rate is 1.0"),
        (lambda: Masking(mask_share=0.9, random_share=0.2), "mask_share is 0.9"),
        (lambda: Masking(mask_id=-1), "mask_id is -1"),
        (lambda: dataclasses.replace(TASK, discriminator_weight=-1.0), "discriminator_weight is -1.0"),
        (lambda: dataclasses.replace(TASK, generator_width=0.0), "generator_width is 0.0"),
        (lambda: dataclasses.replace(TASK, temperature=0.0), "temperature is 0.0"),
        (lambda: dataclasses.replace(TASK, sharing="half"), "sharing is 'half'"),
        (lambda: dataclasses.replace(TASK, objective="electric"), "electric needs towers"),
        (lambda: dataclasses.replace(TASK, masking=Masking()), "has the id 103, but the model's vocab_size is 40"),
        (
            lambda: dataclasses.replace(TASK, generator_width=12.5),
            "num_heads is 3, which does not divide d_model = 200",
        ),
        (lambda: MaskedWords(model=MODEL), "model.mask_head is False"),
        (lambda: dataclasses.replace(MODEL, num_heads=3), "num_heads is 3"),
        (lambda: dataclasses.replace(MODEL, embedding_size=-1), "embedding_size is -1"),
        (lambda: dataclasses.replace(MODEL, pooler=True), "no pooler"),
        (lambda: dataclasses.replace(MODEL, head_activation="mish"), "head_activation is 'mish'"),
        (lambda: MODEL.module().init(jax.random.key(0), np.ones((1, 21), int)), "max_length is 20"),
        (lambda: variables(VARIANTS["replace mlm"]), "objective is 'replace_mlm'"),
        (lambda: read_encoder_config({"model_type": "electra", "hidden_act": "mish"}, {}), "'mish'"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

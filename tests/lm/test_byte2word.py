"""Byte2Word: exact statements about pooling, masking and padding; its table, counts, and the objective."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxtok.configuration import load_config
from jaxtok.data.word_pieces import WordPieceText
from jaxtok.interop.byte2word import read_bert_body, with_bert_body
from jaxtok.interop.huggingface import write_folder
from jaxtok.lm import bert
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.byte2word import (
    PUBLISHED,
    Byte2Word,
    Byte2WordConfig,
    ByteWords,
    ByteWordsClassification,
    WordTable,
    init_params,
)
from jaxtok.lm.masked_words import Masking
from jaxtok.lm.whole_words import WORD_MASKING, SubwordWords, choose_words
from jaxtok.nn.losses import cross_entropy
from jaxtok.nn.transformer import Stack
from jaxtok.tokenizers.byte_words import CLS, MASK, PAD, SEP, UNK, basic_words, collate, symbol_mask
from jaxtok.training.loop import count


def case(task) -> tiny.Case:
    """Rows of words, some of them padded."""
    data = WordPieceText(length=16, batch_size=8, max_bytes=6, max_pieces=3)
    rng = np.random.default_rng(0)
    shape = (data.batch_size, data.length)
    ends = rng.integers(5, 17, (data.batch_size, 1))
    real = np.arange(data.length) < ends
    ids = np.where(np.arange(6) < rng.integers(1, 7, (*shape, 1)), rng.integers(0, 256, (*shape, 6)), 256)
    pieces = np.where(np.arange(3) < rng.integers(1, 4, (*shape, 1)), rng.integers(0, 60, (*shape, 3)), -1)
    ids[:, 0], pieces[:, 0] = [257] + [256] * 5, -1
    ids[~real], pieces[~real] = 256, -1
    batch = {"words": ids, "pieces": pieces, "inputs": pieces, "mask": real, "bytes": real, "cut": 0 * real}
    return tiny.Case(task, data, tiny.typed(data, batch), drawn=True)


WORD_BODY = {"num_layers": 2, "d_model": 16, "num_heads": 8, "mlp_dim": 32, "vocab_size": 64, "dropout": 0.0}
MODEL = Byte2WordConfig(**WORD_BODY, max_length=16, pool_heads=8, max_bytes=6, max_pieces=3)
TASKS = {
    "byte2word": lambda: case(ByteWords(model=MODEL)),
    "byte2word_classification": lambda: tiny.labelled(
        case(ByteWordsClassification(model=dataclasses.replace(MODEL, num_classes=4))), 4
    ),
    "bert_whole_words": lambda: case(
        SubwordWords(model=BertConfig(**WORD_BODY, max_positions=32, pooler=False, next_sentence=False))
    ),
}

TINY = Byte2WordConfig(
    num_layers=2,
    d_model=32,
    num_heads=4,
    pool_heads=2,
    mlp_dim=48,
    vocab_size=40,
    max_length=16,
    max_bytes=12,
    max_pieces=3,
    dropout=0.0,
)
BODY = {"num_layers": 2, "d_model": 32, "num_heads": 4, "mlp_dim": 48}
TEXT = b"the quick brown fox, na\xc3\xafve \xff dogs and words of eleven"
NO_MIXTURE = dataclasses.replace(WORD_MASKING, mask_share=1.0, random_share=0.0)


init_bert = jax.jit(bert.init_params, static_argnums=0)


@functools.lru_cache
def noisy_params(config=TINY):
    """Parameters, none of them zero."""

    @jax.jit
    def noisy_init():
        flat, unflatten = jax.flatten_util.ravel_pytree(init_params(config, jax.random.key(0)))
        return unflatten(flat + 0.3 * jax.random.normal(jax.random.key(1), flat.shape))

    return noisy_init()


def batch(texts=(TEXT, b"a second text"), length=12, max_bytes=12, max_pieces=3, vocab=40):
    """Rows as `WordPieceText` makes them; a word's pieces are its first bytes modulo something."""
    words = [[CLS, *basic_words(text)[: length - 2], SEP] for text in texts]
    ids, _, real, _ = collate(words, max_bytes, length)
    byte = ids[..., :max_pieces]
    pieces = np.where(byte < 256, byte % (vocab - 4), -1)
    return {
        "words": ids,
        "pieces": pieces,
        "inputs": pieces,
        "mask": real.astype(np.float32),
        "bytes": (pieces >= 0).sum(-1).astype(np.int32),
        "cut": np.zeros(real.shape, np.int32),
    }


@functools.partial(jax.jit, static_argnames=("config", "method"))
def run(params, *arrays, config=TINY, method=None):
    return Byte2Word(config).apply({"params": params}, *arrays, method=method)


def vectors(ids, config=TINY, params=None):
    return run(params or noisy_params(config), ids, symbol_mask(ids), config=config, method="vectors")


# --- Pooling ---

OPTIONS = {
    "default": {},
    "constant": {"query": "constant"},
    "length": {"query": "length", "num_queries": 2},
    "first byte": {"query": "first_byte", "pool_mlp_dim": 16, "pool_norm": True},
}


@pytest.mark.parametrize(
    "options", [pytest.param(name, marks=[pytest.mark.slow] * (name == "length")) for name in OPTIONS]
)
def test_factored_pooling_is_plain_pooling(options):
    config = dataclasses.replace(TINY, **OPTIONS[options])
    params, rng = noisy_params(config), np.random.default_rng(0)
    ids = rng.integers(0, 261, (2, 5, 9)).astype(np.int32)
    mask = np.arange(9) < rng.integers(1, 10, (2, 5, 1))

    @functools.partial(jax.jit, static_argnums=0)
    def both(pooling, params):
        model = Byte2Word(dataclasses.replace(config, pooling=pooling))
        run = lambda params: model.apply({"params": params}, ids, mask, method="vectors")  # noqa: E731
        return run(params), jax.grad(lambda params: jnp.sum(jnp.sin(run(params))))(params)

    (fast, fast_gradient), (plain, gradient) = both("factored", params), both("plain", params)
    np.testing.assert_allclose(fast, plain, atol=1e-5 * np.abs(plain).max())
    for ours, theirs in zip(jax.tree.leaves(fast_gradient["pool"]), jax.tree.leaves(gradient["pool"])):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * max(np.abs(theirs).max(), 1))


def test_padding_changes_nothing():
    """Neither more bytes in a word, nor more words in a row, nor the content of the padding changes anything."""
    texts = (b"the quick brown fox, na\xc3\xafve", b"a second text")
    few, many = batch(texts, length=9, max_bytes=6), batch(texts, length=16, max_bytes=12)
    hidden = []
    for rows in (few, many):
        hidden.append(run(noisy_params(), rows["words"], symbol_mask(rows["words"]), rows["mask"]))
    for row, words in enumerate(few["mask"].sum(1).astype(int)):
        np.testing.assert_allclose(hidden[0][row, :words], hidden[1][row, :words], atol=2e-5)
    words = many["words"].copy()
    words[many["mask"] == 0, 0] = ord("x")
    other = run(noisy_params(), words, symbol_mask(words), many["mask"])
    real = many["mask"] > 0
    np.testing.assert_array_equal(np.asarray(other)[real], np.asarray(hidden[1])[real])
    words = many["words"].copy()
    mask = symbol_mask(words)
    words[~mask] = ord("y")
    np.testing.assert_array_equal(run(noisy_params(), words, mask, many["mask"])[:, :3], hidden[1][:, :3])


def test_a_vector_depends_on_the_bytes_alone():
    """A word has the same vector anywhere, and reordering the words reorders their vectors."""
    ids = batch()["words"]
    order = np.random.default_rng(0).permutation(ids.shape[1])
    np.testing.assert_allclose(vectors(ids[:, order]), np.asarray(vectors(ids))[:, order], atol=1e-5)
    np.testing.assert_allclose(vectors(ids[:1, :1]), vectors(np.repeat(ids[:1, :1], 3, 1))[:, 2:], atol=1e-5)


def test_anagrams():
    ids, _, _, _ = collate([[b"listen", b"silent"]], 8)
    one, other = vectors(ids)[0]
    assert np.abs(one - other).max() > 1e-2
    params = jax.tree.map(lambda x: x, noisy_params())
    params["pool"] = params["pool"] | {"byte_position": jnp.zeros_like(params["pool"]["byte_position"])}
    one, other = vectors(ids, params=params)[0]
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_word_without_any_symbol_is_defined():
    ids = np.full((1, 2, 4), PAD, np.int32)
    assert np.isfinite(run(noisy_params(), ids, np.zeros(ids.shape, bool), method="vectors")).all()


def test_numbers_of_parameters():
    """There are d (4 d + 4 + 1 + 261 + M) numbers between bytes and words, a tenth of BERT's table (the abstract)."""
    for config in (PUBLISHED["base"], TINY, *(dataclasses.replace(TINY, **o) for o in OPTIONS.values())):
        shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
        assert count(shapes["pool"]) == config.input_params()
    base = PUBLISHED["base"]
    d, m = base.d_model, base.max_bytes
    assert base.input_params() == d * (4 * d + 4 + 1 + 261 + m) == 2_582_016
    assert base.input_params() < 0.111 * base.vocab_size * d
    constant = dataclasses.replace(base, query="constant")
    assert constant.input_params() == d * (3 * d + 3 + 1 + 261 + m) < 0.086 * base.vocab_size * d
    assert base.pooling_flops() == 2 * m * d * 2


def test_bfloat16_is_near_float32():
    rows = batch()
    arrays = (rows["words"], symbol_mask(rows["words"]), rows["mask"])
    params = init_params(TINY, jax.random.key(3))
    half = run(params, *arrays, config=dataclasses.replace(TINY, dtype="bfloat16")).astype(jnp.float32)
    whole = np.asarray(run(params, *arrays))
    assert np.abs(half - whole).max() < 3e-2 * np.abs(whole).max()


def test_a_table_of_words_is_the_pooling():
    words = [CLS, *basic_words(TEXT), SEP]
    table = WordTable(TINY, noisy_params())
    first = table(words)
    ids, _, real, _ = collate([words], TINY.max_bytes)
    np.testing.assert_allclose(first, vectors(ids)[0], atol=1e-6)
    known = len(table)
    np.testing.assert_array_equal(table(words[::-1]), first[::-1])
    assert len(table) == known == len(set(words))
    hidden = run(noisy_params(), ids, symbol_mask(ids), real)
    np.testing.assert_allclose(run(noisy_params(), first[None], real, method="encode"), hidden, atol=1e-5)


# --- The objective ---


@functools.lru_cache
def task(masking=NO_MIXTURE):
    return ByteWords(model=TINY, masking=masking)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(task, params, batch, rng):
    return jax.value_and_grad(task.loss, has_aux=True)(params, batch, rng, 0)


def test_a_masked_word_does_not_see_its_own_bytes():
    """Their embeddings have no gradient, and other bytes give the same loss; the bytes of other words count."""
    rows, rng = batch((TEXT,)), jax.random.key(4)
    _, slots = jax.jit(task().predict)(noisy_params(), rows, rng)
    (position,) = np.asarray(slots.places)[np.asarray(slots.weights) > 0][:1]
    words = rows["words"].copy()
    words[0, position, :4] = [250, 251, 252, 253]  # in no other word
    words[0, position, 4:] = PAD
    (loss, _), gradient = loss_and_gradient(task(), noisy_params(), rows | {"words": words}, rng)
    assert not np.any(gradient["pool"]["byte_embedding"][250:254])
    assert np.any(gradient["pool"]["byte_embedding"][MASK])
    words[0, position, :4] = 249
    assert loss_and_gradient(task(), noisy_params(), rows | {"words": words}, rng)[0][0] == loss
    unmasked = next(i for i in range(1, 9) if i not in np.asarray(slots.places))
    words[0, unmasked, :4] = 249
    assert loss_and_gradient(task(), noisy_params(), rows | {"words": words}, rng)[0][0] != loss


def test_words_are_chosen_as_bert_does():
    """round(15 %) of the words are chosen, without repetition and never a symbol; of these, 80 % become the mask, 10 %
    other words, and 10 % stay."""
    text = b" ".join(b"w%d" % i for i in range(40))
    rows = batch([text] * 64, length=42)
    model = ByteWords(model=dataclasses.replace(TINY, max_length=42))
    keys = jax.random.split(jax.random.key(0), 3)
    slots, draws = choose_words(keys[0], rows, model.masking)
    assert (np.asarray(slots.weights).sum(1) == 6).all()
    for places, weights in zip(np.asarray(slots.places), np.asarray(slots.weights)):
        chosen = places[weights > 0]
        assert len(set(chosen)) == 6 and chosen.min() >= 1 and chosen.max() <= 40
    read = np.asarray(model.masked(rows, slots, draws, keys[1]))
    kinds = {"mask": 0, "same": 0, "other": 0}
    for row, places, weights in zip(range(64), np.asarray(slots.places), np.asarray(slots.weights)):
        untouched = np.setdiff1d(np.arange(42), places[weights > 0])
        np.testing.assert_array_equal(read[row, untouched], rows["words"][row, untouched])
        for position in places[weights > 0]:
            word, was = read[row, position], rows["words"][row, position]
            kind = "mask" if word[0] == MASK else "same" if (word == was).all() else "other"
            kinds[kind] += 1
            if kind == "mask":
                assert (word[1:] == PAD).all()
            else:
                assert word[0] < 256
    share = {kind: n / (64 * 6) for kind, n in kinds.items()}
    assert abs(share["mask"] - 0.8) < 0.07 and abs(share["same"] - 0.1) < 0.06 and abs(share["other"] - 0.1) < 0.06


def test_the_loss_is_the_mean_over_pieces():
    rows, rng = batch(), jax.random.key(7)
    (loss, metrics), _ = loss_and_gradient(task(), noisy_params(), rows, rng)
    found, slots = jax.jit(task().predict)(noisy_params(), rows, rng)
    nats, pieces, words = 0.0, 0, 0
    for row in range(2):
        for slot in np.flatnonzero(np.asarray(slots.weights)[row]):
            targets = rows["pieces"][row, slots.places[row, slot]]
            nats += float(found.nats[row, slot, : (targets >= 0).sum()].sum())
            pieces, words = pieces + (targets >= 0).sum(), words + 1
    assert loss == pytest.approx(nats / pieces, rel=1e-6)
    assert metrics["nats_per_word"] == pytest.approx(nats / words, rel=1e-6)
    sums = task().evaluate(noisy_params(), [rows, rows])
    assert sums["words"] == 2 * words and sums["pieces_per_word"] == pytest.approx(sums["nats_per_word"] / sums["loss"])


def test_a_second_batch_is_not_compiled_again():
    step = jax.jit(task().loss)
    for text in (TEXT, b"something else"):
        step(noisy_params(), batch((text, text)), jax.random.key(0), 0)
    assert step._cache_size() == 1


def test_one_batch_is_learned_by_heart():
    rows, optimizer, rng = batch(), optax.adam(1e-2), jax.random.key(0)
    learner = dataclasses.replace(task(), model=dataclasses.replace(TINY, init_std=0.1))  # 30 steps are few from 0.02

    @jax.jit
    def step(params, state):
        (loss, _), gradient = jax.value_and_grad(learner.loss, has_aux=True)(params, rows, rng, 0)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    params = init_params(learner.model, jax.random.key(0))
    state = optimizer.init(params)
    for _ in range(30):
        params, state, loss = step(params, state)
    assert loss < 0.1


# --- BERT on the same words ---

SUBWORDS = SubwordWords(
    model=BertConfig(**BODY, vocab_size=44, max_positions=40, dropout=0.0, pooler=False, next_sentence=False),
    masking=NO_MIXTURE,
)


def test_rows_of_pieces():
    rows = batch((b"ab c",))
    tokens, real, starts = SUBWORDS.row(rows["inputs"], rows)
    a, b, c = (ord(x) % 36 for x in "abc")
    assert tokens[0, :6].tolist() == [42, a, b, c, 41, 40] and real[0].sum() == 5
    assert starts[0, :4].tolist() == [0, 1, 3, 4]


@pytest.mark.slow
def test_both_models_are_asked_for_the_same_words():
    rows, rng = batch(), jax.random.key(2)
    params = init_bert(SUBWORDS.model, jax.random.key(0))
    found, slots = jax.jit(SUBWORDS.predict)(params, rows, rng)
    ours, our_slots = jax.jit(task().predict)(noisy_params(), rows, rng)
    np.testing.assert_array_equal(slots.places, our_slots.places)
    np.testing.assert_array_equal(found.weights, ours.weights)
    # the pieces of masked words are not seen
    masked = np.zeros(rows["mask"].shape, bool)
    np.put_along_axis(masked, np.asarray(slots.places), np.asarray(slots.weights) > 0, 1)
    other = np.where(masked[..., None] & (rows["inputs"] >= 0), 0, rows["inputs"])
    again, _ = jax.jit(SUBWORDS.predict)(params, rows | {"inputs": other}, rng)
    np.testing.assert_array_equal(found.nats, again.nats)
    # and the numbers are those of the model on a row made by hand
    inputs = np.where(masked[..., None] & (rows["inputs"] >= 0), 43, rows["inputs"])
    tokens, real, starts = SUBWORDS.row(inputs, rows)
    model = SUBWORDS.module()
    hidden = jax.jit(model.apply)({"params": params}, tokens, real)
    logits = model.apply({"params": params}, hidden, method="masked_words")
    row, slot, piece = np.argwhere(np.asarray(found.weights) > 0)[-1]
    word = slots.places[row, slot]
    nats = cross_entropy(logits[row, starts[row, word] + piece], rows["pieces"][row, word, piece])
    assert found.nats[row, slot, piece] == pytest.approx(float(nats), rel=1e-5)


def test_words_beyond_the_row_of_pieces_do_not_count():
    rows = batch((b"abc def ghi jkl mno pqr",), length=12)
    short = dataclasses.replace(SUBWORDS, max_tokens=4, masking=dataclasses.replace(NO_MIXTURE, rate=0.9))
    params = init_bert(SUBWORDS.model, jax.random.key(0))
    found, _ = jax.jit(short.predict)(params, rows, jax.random.key(0))
    assert found.weights.sum() == 3  # those of the first word


# --- Other tasks and models ---


def test_classes():
    config = dataclasses.replace(TINY, num_classes=3, piece_head=False)
    classify = ByteWordsClassification(model=config)
    params, rows = init_params(config, jax.random.key(0)), batch()
    assert "head_matrix" not in params
    rows = {"words": rows["words"], "mask": rows["mask"], "labels": np.array([2, 0], np.int32)}
    loss, _ = jax.jit(classify.loss)(params, rows, jax.random.key(0), 0)
    logits = jax.jit(classify.logits)(params, rows)
    assert loss == pytest.approx(float(cross_entropy(logits, rows["labels"]).mean()), rel=1e-5)
    padded = {name: np.concatenate([a, np.zeros_like(a)]) for name, a in rows.items()}
    assert classify.evaluate(params, [padded])["texts"] == 2


def test_a_bert_lends_its_body(tmp_path):
    theirs = BertConfig(**BODY, vocab_size=30, max_positions=12)
    body = init_bert(theirs, jax.random.key(5))
    params = with_bert_body(TINY, noisy_params(), theirs, body)
    assert params["position_embedding"] is noisy_params()["position_embedding"]
    folder = write_folder(tmp_path / "bert", theirs, body)
    for ours in (params, read_bert_body(TINY, noisy_params(), folder)):
        chex.assert_trees_all_equal(ours["stack"], body["stack"])
        assert jax.tree.structure(ours) == jax.tree.structure(noisy_params())
    # the same layers: from equal embeddings, equal states
    x = np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32)
    position = jnp.arange(4)[None]
    states = [Stack(c).apply({"params": p["stack"]}, x, position)[0] for c, p in ((theirs, body), (TINY, params))]
    np.testing.assert_array_equal(*states)
    with pytest.raises(ValueError, match="num_layers is 2, but the BERT's is 3"):
        with_bert_body(TINY, noisy_params(), dataclasses.replace(theirs, num_layers=3), body)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_of_published_sizes(name):
    experiment = load_config(f"byte2word_{name}")
    model = experiment.task.model
    assert dataclasses.replace(model, dtype="float32", remat="none") == PUBLISHED[name]
    assert experiment.data.max_bytes == model.max_bytes and experiment.data.max_pieces == model.max_pieces


def test_impossible_models_are_refused():
    with pytest.raises(ValueError, match="pool_heads is 5, which does not divide d_model = 32"):
        dataclasses.replace(TINY, pool_heads=5)
    with pytest.raises(ValueError, match="max_pieces is 0; it must be at least 1"):
        dataclasses.replace(TINY, max_pieces=0)
    with pytest.raises(ValueError, match="query is 'mean'; it must be one of learned"):
        dataclasses.replace(TINY, query="mean")
    with pytest.raises(ValueError, match="pooling is 'fast'; it must be one of factored, plain"):
        dataclasses.replace(TINY, pooling="fast")
    with pytest.raises(ValueError, match="vocab_size is 0"):
        init_params(dataclasses.replace(TINY, vocab_size=0), jax.random.key(0))
    with pytest.raises(ValueError, match="piece_head is False"):
        ByteWords(model=dataclasses.replace(TINY, piece_head=False))
    with pytest.raises(ValueError, match=r"with_replacement is True"):
        ByteWords(model=TINY, masking=dataclasses.replace(WORD_MASKING, with_replacement=True))
    with pytest.raises(ValueError, match="num_classes is 0"):
        ByteWordsClassification(model=TINY)
    with pytest.raises(ValueError, match=r"max_tokens is 50; it must be from 0 to model\.max_length = 40"):
        dataclasses.replace(SUBWORDS, max_tokens=50)
    with pytest.raises(ValueError, match="rate is 0"):
        Masking(rate=0.0)
    ids = np.full((1, 17, 13), UNK, np.int32)
    with pytest.raises(ValueError, match="13 bytes in a word, but the model's max_bytes is 12"):
        vectors(ids)
    with pytest.raises(ValueError, match="17 words in a row, but the model's max_length is 16"):
        run(noisy_params(), ids[..., :12], symbol_mask(ids[..., :12]))
    with pytest.raises(ValueError, match="no words that count"):
        task().evaluate(noisy_params(), [])

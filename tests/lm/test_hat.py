"""Exact statements about HATs: what depends on what, caches, padding, the stream of bytes; and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from tiny import Case

from jaxtok.configuration import load_config
from jaxtok.data.words import WordText
from jaxtok.decoding.sampling import Sampling
from jaxtok.interop.hat import config_json, read_config, read_folder, write_folder
from jaxtok.lm import hat, hat_released
from jaxtok.lm.decoder import init_params
from jaxtok.lm.hat import HAT, HATConfig, HATModeling, everywhere, spell_on_prompts, spelled, split_words
from jaxtok.lm.hat_released import ReleasedConfig, ReleasedHAT, ReleasedModeling, byte_stream, generate_bytes
from jaxtok.nn.linear import LlamaStack
from jaxtok.nn.rotary import RopeScaling
from jaxtok.protocols import TextGenerator
from jaxtok.tokenizers.words import WordSplitter
from jaxtok.training.checkpoints import example_batch
from jaxtok.verbs.convert import convert

GREEDY = Sampling(temperature=0)


def word_batch(data: WordText) -> dict[str, np.ndarray]:
    """Documents of random words, one after the other over the rows, and padding at the end of the last ones."""
    rng = np.random.default_rng(0)
    texts = [bytes(rng.choice(list(b"abcd \n"), n).tolist()) for n in rng.integers(0, 24, 60)]
    items = [data.items(text) for text in texts]
    size = data.batch_size * data.length
    rows = np.zeros((size, items[0].shape[1]), np.int32)
    context = np.zeros((2, size), np.int32)
    whole = np.concatenate(items)[: size - 3]
    rows[: len(whole)] = whole
    documents = np.repeat(np.arange(len(items)), [len(x) for x in items])[: len(whole)]
    for row in range(data.batch_size):
        here = documents[row * data.length : (row + 1) * data.length]
        segments = np.cumsum(np.diff(here, prepend=here[:1]) > 0) + 1
        first = np.searchsorted(segments, segments)
        context[:, row * data.length : row * data.length + len(here)] = segments, np.arange(len(here)) - first
    shape = (data.batch_size, data.length)
    return data.layout(rows.reshape(*shape, -1), context[0].reshape(shape), context[1].reshape(shape))


def paper_case() -> Case:
    char = {"num_layers": 2, "d_model": 8, "num_heads": 2, "mlp_dim": 16}
    model = HATConfig(
        encoder=LlamaStack(**char, causal=False),
        backbone=LlamaStack(num_layers=2, d_model=16, num_heads=8, mlp_dim=32),
        decoder=LlamaStack(**char),
        max_units=5,
    )
    data = WordText(length=8, batch_size=8, max_units=5)
    return Case(HATModeling(model=model), data, word_batch(data))


def released_case() -> Case:
    char = {"num_layers": 2, "d_model": 16, "num_heads": 8, "mlp_dim": 32, "window": 9}
    model = ReleasedConfig(
        encoder=LlamaStack(**char),
        backbone=LlamaStack(num_layers=2, d_model=16, num_heads=8, num_kv_heads=2, mlp_dim=32),
        decoder=LlamaStack(**char),
        connector_heads=8,
        guide_heads=8,
        max_word_size=6,
    )
    task = ReleasedModeling(model=model)
    data = WordText(length=8, batch_size=8, max_units=6, splitter=task.splitter)
    return Case(task, data, word_batch(data))


TASKS = {"hat": paper_case, "hat_released": released_case}

EVIDENCE = {
    "hat": {"generate, cached": "lm/test_hat.py::test_generation_is_what_a_full_pass_says"},
    "hat_released": {
        "generate, cached": "lm/test_hat.py::test_released_generation_is_what_a_full_pass_says",
        "formats": ("hat",),
    },
}


def of_bytes():
    char = LlamaStack(num_layers=1, d_model=16, num_heads=2, mlp_dim=24)
    parts = {"encoder": dataclasses.replace(char, causal=False), "backbone": char, "decoder": char}
    config = HATConfig(**parts, max_units=6, alphabet=258, w_id=256, s_id=257)
    word = jnp.zeros((1, 1, 6), jnp.int32)
    return HATModeling(model=config), lambda key: init_params(HAT(config), key, word, word[..., 0], word)


def released_of_bytes():
    char = LlamaStack(num_layers=1, d_model=16, num_heads=2, mlp_dim=24)
    parts = {"encoder": char, "backbone": char, "decoder": char}
    config = ReleasedConfig(**parts, connector_heads=2, guide_heads=2, max_word_size=6)
    row = jnp.zeros((1, 6), jnp.int32)
    return ReleasedModeling(model=config), lambda key: init_params(ReleasedHAT(config), key, row, row, row)


TEXT_GENERATORS = {"hat": of_bytes, "hat_released": released_of_bytes}


def noisy(params, scale=0.3):
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    return unflatten(flat + scale * jax.random.normal(jax.random.key(1), flat.shape))


def started(name):
    case = TASKS[name]()
    params = jax.jit(
        lambda: noisy(jax.tree.map(jnp.asarray, nn.meta.unbox(case.task.init(jax.random.key(0), case.batch))))
    )()
    return case, params


@pytest.fixture(scope="module")
def paper():
    return started("hat")


@pytest.fixture(scope="module")
def released():
    return started("hat_released")


@functools.partial(jax.jit, static_argnums=0)
def spell(model, params, words, lengths, targets, positions, segments):
    return model.apply({"params": params}, words, lengths, targets, positions, segments)


def one_row(text, words=8, **options):
    """A batch of one row, from one document, and seven rows of padding after it."""
    data = WordText(length=words, batch_size=8, **options)
    items = data.items(text)
    rows = np.zeros((8, words, items.shape[1]), np.int32)
    rows[0, : len(items)] = items
    segments = np.zeros((8, words), np.int32)
    segments[0, : len(items)] = 1
    return data.layout(rows, segments, np.arange(words)[None] * (segments > 0))


INPUTS = ("words", "lengths", "targets", "positions", "segments")


def test_a_byte_changes_only_what_comes_after_it(paper):
    case, params = paper
    batch = one_row(b"abcd bcda cdab dabc acbd", max_units=5)
    before = spell(case.task.module(), params, *(batch[name] for name in INPUTS))
    index, byte = 2, 1  # a byte of the third word, which is the input of the next slot
    changed = {name: array.copy() for name, array in batch.items()}
    changed["targets"][0, index, byte] = changed["words"][0, index + 1, byte] = ord("x")
    after = spell(case.task.module(), params, *(changed[name] for name in INPUTS))
    same = np.all(np.asarray(before == after), -1)
    assert same[0, :index].all() and same[0, index, : byte + 1].all() and same[1:].all()
    assert not same[0, index, byte + 1 :].any() and not same[0, index + 1 : 6, 0].any()


def test_the_decoder_knows_the_past_by_one_vector(paper):
    case, params = paper
    model, batch = case.task.module(), case.batch

    @jax.jit
    def parts(words, lengths, targets, positions, segments):
        run = functools.partial(model.apply, {"params": params})
        outputs, _ = run(
            run(words, lengths, method="encode"), positions=positions, segments=segments, method="backbone"
        )
        predictive = run(outputs, method="predictive")
        shuffled = jax.tree.map(lambda x: x[:, ::-1], (predictive, targets))  # words stand alone
        return run(predictive, targets, method="spell"), run(*shuffled, method="spell")[:, ::-1]

    inputs = [batch[name] for name in INPUTS]
    for logits in parts(*inputs):
        np.testing.assert_allclose(logits, spell(model, params, *inputs), atol=1e-5)


def test_padding_changes_nothing(paper):
    case, params = paper
    wider = HATModeling(model=dataclasses.replace(case.task.model, max_units=8))
    batch = {}
    for name, array in case.batch.items():
        more = [(0, 0), (0, 3)] + [(0, 3)] * (array.ndim - 2)
        batch[name] = np.pad(array, more)
    numbers = case.task.evaluate(params, [case.batch])
    assert numbers["words"] > 30
    for name, value in wider.evaluate(params, [batch]).items():
        assert value == pytest.approx(numbers[name], rel=1e-5), name


@pytest.mark.parametrize("name", ["hat", "hat_released"])
def test_evaluation_weighs_batches_by_what_they_hold(name, request):
    case, params = request.getfixturevalue({"hat": "paper", "hat_released": "released"}[name])
    parts = [
        {n: np.where(np.arange(8).reshape(8, *[1] * (a.ndim - 1)) < cut, a, 0) for n, a in case.batch.items()}
        for cut in (8, 3)
    ]
    for part, cut in zip(parts, (8, 3)):
        part["segments"][cut:] = 0
    whole, some = (case.task.evaluate(params, [part]) for part in parts)
    both = case.task.evaluate(params, parts)
    assert both["bytes"] == whole["bytes"] + some["bytes"] and both["words"] == whole["words"] + some["words"]
    for metric, weight in (("bits_per_byte", "bytes"), ("word_accuracy", "words")):
        mean = sum(part[metric] * part[weight] for part in (whole, some)) / both[weight]
        assert both[metric] == pytest.approx(mean, rel=1e-5), metric
    if name == "hat":
        loss, _ = jax.jit(case.task.loss)(params, case.batch, jax.random.key(0), 0)
        assert float(loss) == pytest.approx(whole["loss"], rel=1e-5)
    empty = {n: np.zeros_like(a) for n, a in case.batch.items()}
    with pytest.raises(ValueError, match="hold no"):
        case.task.evaluate(params, [empty])


def test_without_a_start_the_first_word_is_no_target(paper):
    case, params = paper
    task = HATModeling(model=dataclasses.replace(case.task.model, start=False))
    without = {name: value for name, value in params.items() if name != "start"}
    batch = case.batch
    first = (batch["lengths"] == 0) & (batch["mask"] > 0)
    ends = (batch["target_lengths"] == 0) & (batch["mask"] > 0)
    found = task.evaluate(without, [batch])
    assert found["words"] == batch["mask"].sum() - (first | ends).sum()
    assert found["bytes"] == (batch["bytes"] * (batch["mask"] > 0) * ~first).sum()


PROMPTS = [b"abcd ab", b"", b"dd\nca ", b"\xff\xc3"]


def generate_words(task, params, prompts):
    rows = spell_on_prompts(task.model, params, prompts, 20, GREEDY)
    return [[word for word in split_words(task.model, row.tokens) if word] for row in rows]


@pytest.fixture(scope="module")
def spoken(paper):
    """Greedy words after PROMPTS, of a model whose special ids are no bytes."""
    case, _ = paper
    model = dataclasses.replace(case.task.model, alphabet=258, w_id=256, s_id=257)
    one = np.zeros((1, 1, 5), np.int32)
    params = jax.jit(lambda: noisy(init_params(HAT(model), jax.random.key(0), one, one[..., 0], one)))()
    task = HATModeling(model=model)
    prompts = [task._prompt(prompt, True) for prompt in PROMPTS]
    return task, params, prompts, generate_words(task, params, prompts)


def test_generation_is_what_a_full_pass_says(spoken):
    task, params, prompts, rows = spoken
    cfg = task.model
    lengths, words = np.zeros((len(rows), 32), np.int32), np.zeros((len(rows), 32, cfg.max_units), np.int32)
    starts = []
    for row, ((closed, begun), new) in enumerate(zip(prompts, rows)):
        assert sum(map(len, new)) <= 20 and all(new)
        full = [*closed, begun + new[0], *new[1:]] if new else [*closed, begun]
        starts.append((len(closed), len(begun), full))
        for index, word in enumerate(full, 1):
            lengths[row, index] = len(word)
            words[row, index, : len(word)] = list(word)
    targets = np.concatenate([words[:, 1:], words[:, :1]], 1)
    zeros = np.zeros_like(lengths)
    logits = np.array(spell(HAT(cfg), params, words, lengths, targets, zeros + np.arange(32), zeros + 1))
    logits[:, :, 0, cfg.w_id] = logits[:, :, 1:, cfg.s_id] = -np.inf
    choice, checked = logits.argmax(-1), 0
    for row, (first, begun, full) in enumerate(starts):
        for index in range(first, len(full)):
            word, last = full[index], index + 1 == len(full)
            spelled = choice[row, index, begun if index == first else 0 : len(word)]
            assert bytes(spelled.tolist()) == word[begun if index == first else 0 :]
            if not last and len(word) < cfg.max_units:
                assert choice[row, index, len(word)] == cfg.w_id
            checked += len(spelled)
    assert checked == sum(len(b"".join(row)) for row in rows) and checked > 20


def test_rows_do_not_depend_on_each_other(spoken):
    task, params, prompts, rows = spoken
    assert generate_words(task, params, prompts[::-1]) == rows[::-1]
    texts = task.continue_text(params, PROMPTS, max_bytes=20, sampling=GREEDY)
    assert texts == [b"".join(row) for row in rows]
    assert max(map(len, texts)) == 20


def test_a_whole_last_word_can_be_asked_for(paper):
    task = paper[0].task
    assert task._prompt(b"ab cd", True) == ([b"ab "], b"cd")
    assert task._prompt(b"ab cd", False) == ([b"ab ", b"cd"], b"")
    bare = HATModeling(model=dataclasses.replace(task.model, start=False))
    assert bare._prompt(b"ab", True) == ([b"ab"], b"")  # otherwise there would be nothing to continue
    with pytest.raises(ValueError, match="a prompt is empty"):
        bare.continue_text({}, [b""], max_bytes=4, sampling=GREEDY)
    with pytest.raises(ValueError, match="holds the byte 255"):
        task.continue_text({}, [b"a\xff"], max_bytes=4, sampling=GREEDY)
    with pytest.raises(ValueError, match="0 prompts"):
        task.continue_text({}, [], max_bytes=4, sampling=GREEDY)
    with pytest.raises(ValueError, match="rng is None"):
        task.continue_text({}, [b"a"], max_bytes=4)


def stream_by_hand(batch, row, length, eot):
    """The stream of one row, its documents one after the other, from the words."""
    out = {name: np.zeros(length, np.int64) for name in ("tokens", "positions", "segments", "targets", "mask")}
    out["word"] = np.full(length, batch["lengths"].shape[1])
    words = batch["lengths"].shape[1]
    t = 0
    for segment in range(1, batch["segments"][row].max() + 1):
        slots = np.flatnonzero(batch["segments"][row] == segment)
        pieces = [(slots[0], batch["words"][row, slots[0], : batch["lengths"][row, slots[0]]])]
        pieces += [(slot + 1, batch["targets"][row, slot, : batch["target_lengths"][row, slot]]) for slot in slots]
        text = np.concatenate([piece for _, piece in pieces])
        number = np.concatenate([np.full(len(piece), k) for k, piece in pieces]).astype(int)
        n, context = len(text), len(pieces[0][1])
        ended = batch["target_lengths"][row, slots[-1]] == 0
        span = slice(t, t + n)
        out["tokens"][span], out["word"][span] = text, number
        out["positions"][span], out["segments"][span] = np.arange(n), segment
        out["targets"][span] = [*text[1:], eot if ended else 0][:n]
        counted = [k + 1 >= context and (k + 1 < n or ended) for k in range(n)]
        out["mask"][span] = counted
        t += n
    assert t <= length and words == batch["lengths"].shape[1]
    return out


def test_the_stream_of_bytes_is_that_of_the_words():
    streamed = jax.jit(byte_stream, static_argnums=(1, 2))
    batch = TASKS["hat_released"]().batch
    assert batch["segments"].max() > 2 and (batch["segments"] == 0).any() and (batch["lengths"][:, 0] > 0).any()
    stream = {name: np.array(array) for name, array in streamed(batch, 60, 192).items()}
    for row in range(8):
        expected = stream_by_hand(batch, row, 60, 192)
        np.testing.assert_array_equal(stream["mask"][row], expected["mask"])
        stream["positions"][row] *= stream["segments"][row] > 0
        for name in ("tokens", "word", "positions", "segments"):
            np.testing.assert_array_equal(stream[name][row], expected[name], err_msg=name)
        counted = expected["mask"] > 0
        np.testing.assert_array_equal(stream["targets"][row][counted], expected["targets"][counted])
        words = stream["target_word"][row][counted & (stream["targets"][row] != 192)]
        following = batch["target_lengths"][row][words]
        assert (following > 0).all()
    short = {name: np.asarray(array) for name, array in streamed(batch, 10, 192).items()}
    for name in ("tokens", "word", "segments", "targets"):
        np.testing.assert_array_equal(short[name][:, :9], stream[name][:, :9])  # what fits is kept
    assert not short["mask"][:, 9][stream["targets"][:, 9] != 192].any()


@functools.partial(jax.jit, static_argnums=0)
def read(model, params, tokens, word, words, options):
    return model.apply({"params": params}, tokens, word, words, **options)


def test_documents_in_a_row_are_as_if_alone(released):
    case, params = released
    stream = case.task._stream(case.batch)
    inputs, options = case.task._inputs(stream)
    together = np.asarray(read(case.task.module(), params, *inputs, options))
    segments, word = np.asarray(stream["segments"]), np.asarray(stream["word"])
    row = int(np.argmax(segments.max(1)))
    tokens, numbers = np.zeros((8, segments.shape[1]), np.int32), np.full((8, segments.shape[1]), 8, np.int32)
    kept = []
    for segment in range(1, segments[row].max() + 1):
        span = np.flatnonzero(segments[row] == segment)
        kept.append(span)
        tokens[segment - 1, : len(span)] = np.asarray(stream["tokens"])[row, span]
        if len(span):
            numbers[segment - 1, : len(span)] = word[row, span] - word[row, span[0]]
    words = np.tile(np.arange(8), (8, 1))
    names = {"positions": np.tile(np.arange(segments.shape[1]), (8, 1)), "segments": np.ones_like(segments)}
    alone = read(
        case.task.module(), params, tokens, numbers, words, names | {"word_segments": words * 0, "unknown": words < 0}
    )
    assert sum(len(span) > 1 for span in kept) > 1
    for number, span in enumerate(kept):
        np.testing.assert_allclose(alone[number, : len(span)], together[row, span], atol=2e-4)


def released_inputs(rows, length, most):
    """Texts as words, as the model takes them."""
    tokens, word = np.zeros((len(rows), length), np.int32), np.full((len(rows), length), most, np.int32)
    for row, words in enumerate(rows):
        text = b"".join(words)
        tokens[row, : len(text)] = list(text)
        word[row, : len(text)] = np.repeat(np.arange(len(words)), [len(w) for w in words])
    return tokens, word, np.tile(np.arange(most), (len(rows), 1))


def test_a_byte_changes_no_logits_before_it(released):
    case, params = released
    inputs = released_inputs([WordSplitter("unicode").split("Hello, world! FooBar x+y")] * 2, 32, 12)
    inputs[0][1, 9] = ord("q")
    first, second = np.asarray(read(case.task.module(), params, *inputs, {}))
    np.testing.assert_array_equal(first[:9], second[:9])
    assert not (first[9:24] == second[9:24]).all(-1).any()
    changed = jax.tree.map(lambda x: x, params)
    for name in ("query", "key", "query_norm"):  # of guides: of one key, the weight is 1
        changed["decoder"]["blocks"][name] = jax.tree.map(lambda x: 3 - x, params["decoder"]["blocks"][name])
    np.testing.assert_array_equal(read(case.task.module(), changed, *inputs, {})[0], first)


@dataclasses.dataclass(frozen=True)
class Dictation:
    """A chooser of known texts, which keeps the logits that it is given."""

    texts: tuple[bytes, ...]
    seen: list = dataclasses.field(default_factory=list, hash=False, compare=False)
    draws = False

    def init(self, batch):
        return jnp.zeros(batch, jnp.int32)

    def choose(self, logits, keys, number):
        jax.debug.callback(lambda logits: self.seen.append(np.asarray(logits)), logits, ordered=True)
        texts = jnp.array([list(text) for text in self.texts])
        return texts[jnp.arange(len(texts)), number], number + 1


def test_released_generation_is_what_a_full_pass_says(released):
    """Logits before each byte of a dictated text, with words that open with characters of several bytes."""
    config, params = dataclasses.replace(released[0].task.model, max_word_size=8), released[1]
    prompts = ["Hi x", "東", "a b c d", "zz"]
    dictated = ["東京 ok!é", "京s toolongaword", "_\u0301a  \u0301b🙂e", "q\n"]
    script = [text.encode() + b"\xc0" * 20 for text in dictated]
    script[3] = b"\xe6a\xff\xfe \xe6\x9d\xb1." + b"\xc0" * 20
    script = [text[:20] for text in script]
    steps, chooser = 18, Dictation(tuple(script))
    splitter = WordSplitter("unicode", 8)
    split = [splitter.split(prompt.encode()) for prompt in prompts]
    found = generate_bytes(config, params, split, steps, chooser)
    jax.effects_barrier()
    assert len(chooser.seen) == steps
    prefixes, places, logits = [], [], []
    for row, (more, words) in enumerate(found):
        new = more.text
        assert new == script[row].split(b"\xc0")[0][:steps]
        assert more.tokens == list(new) + [192] * (len(new) < steps)
        assert b"".join(words) == prompts[row].encode() + new
        for step in range(len(new)):
            closed, open_word = split[row][:-1], split[row][-1]
            now = list(closed)
            for byte in new[:step]:  # in the order of the stream
                opened, open_word = splitter.opens(open_word, byte), open_word + bytes([byte])
                if opened:
                    now.append(open_word[:-opened])
                    open_word = open_word[-opened:]
            prefixes.append([*now, open_word])
            places.append(len(prompts[row].encode()) + step - 1)
            logits.append(chooser.seen[step][row])
    assert any(len(words) > 1 and len(words[-1]) == 3 and words[-1][0] > 0xE0 for words in prefixes)
    full = read(ReleasedHAT(config), params, *released_inputs(prefixes, 32, 16), {})
    expected = np.asarray(full)[np.arange(len(places)), places]
    np.testing.assert_allclose(np.array(logits), expected, atol=2e-4 * np.abs(expected).max())


def test_what_released_models_refuse(released):
    task = released[0].task
    with pytest.raises(ValueError, match="holds the byte 192"):
        task.continue_text({}, [b"a\xc0"], max_bytes=4, sampling=GREEDY)
    with pytest.raises(ValueError, match="a prompt is empty"):
        task.continue_text({}, [b"a", b""], max_bytes=4, sampling=GREEDY)
    assert isinstance(task, TextGenerator) and isinstance(HATModeling(), TextGenerator)


def test_special_tokens_in_a_prompt_stand_for_themselves_if_asked(released, monkeypatch):
    asked = []
    monkeypatch.setattr(hat_released, "generate_bytes", lambda config, params, words, *_: asked.append(words) or [])
    for specials in (False, True):
        released[0].task.continue_text({}, [b"a<|eot_id|>"], max_bytes=1, sampling=GREEDY, specials=specials)
    assert b"\xc0" not in asked[0][0] and asked[1] == [[b"a", b"\xc0"]]


COUNTS = {
    "1b": (1.147e9, 23.2e6),
    "3b": (4.316e9, 24.2e6),
    "7b": (9.173e9, 55.3e6),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_papers_sizes(name):
    model = hat.PUBLISHED[name]
    one = jnp.zeros((1, 1, 32), jnp.int32)
    shapes = jax.eval_shape(lambda: init_params(HAT(model), jax.random.key(0), one, one[..., 0], one))

    def count(*parts):
        return sum(leaf.size for part in parts for leaf in jax.tree.leaves(shapes[part]))

    backbone, char = COUNTS[name]
    assert count("backbone_stack") == pytest.approx(backbone, rel=1e-3)
    assert count("encoder", "word_in", "embedding") == pytest.approx(char, rel=3e-3)
    assert count("decoder", "word_out", "head_matrix") == pytest.approx(char, rel=3e-3)


def test_the_released_sizes():
    one = jnp.zeros((1, 1), jnp.int32)
    expected = {"llama-3.1-8b-tfree-hat": 7_192_495_104, "tfree-hat-pretrained-7b": 7_192_507_136}
    for name, parameters in expected.items():
        model = hat_released.PUBLISHED[name]
        shapes = jax.eval_shape(lambda: init_params(ReleasedHAT(model), jax.random.key(0), one, one, one))  # noqa: B023
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters
        assert read_config(config_json(model)) == model


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_written_folder_is_read_again(qk_norm, tmp_path):
    char = {"num_layers": 2, "d_model": 12, "num_heads": 2, "head_size": 8, "mlp_dim": 20, "qk_norm": qk_norm}
    scaling = RopeScaling(kind="llama3", factor=8.0, original_length=64)
    backbone = char | {"d_model": 16, "num_heads": 4, "num_kv_heads": 2, "rotary_scaling": scaling}
    config = ReleasedConfig(
        encoder=LlamaStack(**char, window=5),
        backbone=LlamaStack(**backbone),
        decoder=LlamaStack(**char, window=7, rotary_base=3e4),
        connector_heads=4,
        connector_kv_heads=2,
        max_word_size=30,
        special_tokens=(("<end>", 193), ("<begin>", 192)),
    )
    one = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(lambda: init_params(ReleasedHAT(config), jax.random.key(0), one, one, one))()
    write_folder(tmp_path, config, params, shard_bytes=2000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, tree = read_folder(tmp_path)
    assert again == config
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    chex.assert_trees_all_equal(tree, params)
    if not qk_norm:  # and by the command line's verbs
        run = convert(tmp_path, tmp_path / "run")
        again, tree = read_folder(convert(run, tmp_path / "back"))
        assert again == config
        chex.assert_trees_all_equal(tree, params)
    with pytest.raises(ValueError, match=r"backbone_config.is_neox_style is false"):
        options = config_json(config)
        options["backbone_config"]["is_neox_style"] = False
        read_config(options)


@pytest.mark.parametrize("name", ["hat_1b", "hat_3b", "hat_7b", "hat_released_7b"])
def test_configs(name):
    config = load_config(name)
    batch = example_batch(dataclasses.replace(config.data, batch_size=1, streams=1))
    params = jax.eval_shape(lambda: config.task.init(jax.random.key(0), batch))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 1e9
    assert config.task.flops(batch) > 0
    if name != "hat_released_7b":
        assert config.task.model.max_units == config.data.max_units
        assert config.task.model.backbone.dtype == config.task.model.encoder.dtype == "bfloat16"


def test_what_cannot_be():
    causal, both = (
        LlamaStack(num_layers=1, d_model=8, num_heads=1),
        LlamaStack(num_layers=1, d_model=8, num_heads=1, causal=False),
    )
    for options, message in [
        ({"encoder": causal}, "encoder.causal must be False"),
        ({"encoder": both}, "decoder.d_model is 64, but encoder.d_model = 8"),
        ({"max_units": 0}, "max_units is 0"),
        ({"w_id": 256}, "w_id is 256; it must be below alphabet = 256"),
        ({"w_id": 254}, "the ids must differ"),
        ({"alphabet": 255, "w_id": 3, "s_id": 4}, "alphabet must be at least 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            HATConfig(**options)
    for options, message in [
        ({"encoder": both}, "must be True"),
        ({"encoder": causal}, "decoder.d_model is 64, but encoder.d_model = 8"),
        ({"connector_heads": 4, "connector_kv_heads": 3}, "connector_heads is 4 and connector_kv_heads 3"),
        ({"max_word_size": 0}, "max_word_size is 0"),
        ({"special_tokens": ()}, "special_tokens is empty"),
        ({"special_tokens": (("<e>", 65),)}, "puts '<e>' on the byte 65"),
    ]:
        with pytest.raises(ValueError, match=message):
            ReleasedConfig(**options)
    with pytest.raises(ValueError, match=r"data\.max_units is 6, but task\.model\.max_units is 16"):
        HATModeling().fit(WordText(max_units=6))
    assert everywhere(HATConfig(), dtype="bfloat16").decoder.dtype == "bfloat16"
    assert spelled(HATConfig(), np.zeros((1, 4), np.int32), np.array([0]))[0][0, 0] == 254
    assert ReleasedModeling().splitter.rule == "unicode"

"""The decoding engine, for each CausalLM of the tests: it equals the uncached model, with drafts and without."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect
from recurrent import Recurrent, RecurrentConfig

from jaxtok.decoding import CachedTokens, Drafter, Engine, PromptLookup, Sampling, generate, parse_evictor
from jaxtok.decoding.engine import ancestors
from jaxtok.decoding.protocols import Prompted
from jaxtok.lm.lexinvariant import Lexinvariant
from jaxtok.nn.transformer import layers_apart

LIKE_ANOTHER = ("gpt2", "mistral", "opt", "semi_lexinvariant", "transformer", "word_pooled_plain")
"""Models that decode through the same code as another one; tests/lm/test_causal_lm.py tests the caches of all."""
ONLY = {"skipdecode": ("test_drafts_change_nothing", "test_log_probabilities_are_those_of_a_full_pass")}
"""Models whose own file has the other tests; here these run with --slow."""
GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]
NEW = 12
KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames="model")
def next_token(model, params, tokens, length, num_ids, **options):
    logits = model.apply({"params": params}, tokens, **options)[0][0, length - 1]
    return jnp.where(jnp.arange(logits.shape[0]) < num_ids, logits, -jnp.inf).argmax()


def greedy_without_cache(model, params, prompt, new, num_ids=1000):
    tokens = np.zeros((1, model.config.max_length), np.int32)
    tokens[0, : len(prompt)] = prompt
    options = {"prompts": np.array([len(prompt)])} if isinstance(model, Prompted) else {}
    for length in range(len(prompt), len(prompt) + new):
        tokens[0, length] = next_token(model, params, tokens, length, num_ids, **options)
    return tokens[0, len(prompt) : len(prompt) + new].tolist()


def run(model, params, prompts=PROMPTS, **options):
    return generate(model, params, prompts, **{"max_new_tokens": NEW, "chooser": GREEDY} | options)


def greedy(model, params, prompts=PROMPTS, **options):
    return run(model, params, prompts, **options).tokens


@pytest.fixture
def alike_rows_lm(causal_lm):
    """A model that has the same logits in each row of a batch."""
    if isinstance(causal_lm[0], Lexinvariant):
        pytest.skip("each row has a table of its own; tests/lm/test_lexinvariant.py generates with them")
    return causal_lm


def test_greedy_equals_the_uncached_model_token_for_token(alike_rows_lm):
    model, params = alike_rows_lm
    rows = greedy(model, params)
    assert rows == [greedy_without_cache(model, params, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in rows}) > 1
    assert max(len(set(row)) for row in rows) > 1, "a model that says one thing only tests nothing"


def test_rows_of_a_batch_equal_single_rows(alike_rows_lm):
    model, params = alike_rows_lm
    assert greedy(model, params) == [greedy(model, params, [prompt])[0] for prompt in PROMPTS]
    # With random sampling, a row depends on its index, but not on the other rows.
    first, second = (
        generate(model, params, [PROMPTS[0], other, [7]], max_new_tokens=NEW, rng=KEY).tokens for other in PROMPTS[1:]
    )
    assert first[0] == second[0] == generate(model, params, PROMPTS[:1], max_new_tokens=NEW, rng=KEY).tokens[0]
    assert first[2] == second[2]
    assert first[1] != second[1]


SAMPLED = {"chooser": Sampling(temperature=1.5, top_k=20), "rng": KEY}


@pytest.fixture(scope="module")
def llama():
    """The model for tests of what cannot depend on the model, as each of them compiles the loop anew."""
    model = collect("CAUSAL_LMS")["llama"]()
    return model, noisy_params(model)


def joined(pieces, field):
    return [list(itertools.chain(*parts)) for parts in zip(*(getattr(piece, field) for piece in pieces))]


def test_streaming_equals_not_streaming(causal_lm):
    model, params = causal_lm
    whole = run(model, params, **SAMPLED)
    assert all(len(row) == NEW for row in whole.tokens)
    for chunk in (5, 1, 100):
        pieces = []
        found = run(model, params, on_tokens=pieces.append, chunk=chunk, **SAMPLED)
        assert found.tokens == joined(pieces, "tokens") == whole.tokens
        assert found.logprobs == joined(pieces, "logprobs") == whole.logprobs
        assert len(pieces) == -(-NEW // chunk)
        assert all(len(new) <= chunk for piece in pieces for new in piece.tokens)
    assert greedy(model, params, **SAMPLED | {"rng": jax.random.key(1)}) != whole.tokens


def test_a_row_ends_after_its_stop_token(llama):
    model, params = llama
    whole = greedy(model, params)
    for stop in ({whole[0][3]}, {row[4] for row in whole}):
        expected = []
        for row in whole:
            ends = [i + 1 for i, token in enumerate(row) if token in stop]
            expected.append(row[: ends[0]] if ends else row)
        assert greedy(model, params, stop_tokens=stop) == expected
        calls = []
        assert greedy(model, params, stop_tokens=stop, on_tokens=calls.append, chunk=2) == expected
        assert joined(calls, "tokens") == expected
        assert len(calls) == -(-max(map(len, expected)) // 2)  # no further than the longest row


def test_padding_rows_of_the_vocabulary_are_never_chosen(llama):
    model, params = llama
    real = 6
    prompts = [[3, 1, 4], [1], [2]]
    rows = greedy(model, params, prompts, num_ids=real)
    assert rows == [greedy_without_cache(model, params, prompt, NEW, real) for prompt in prompts]
    assert rows != greedy(model, params, prompts)
    rows = greedy(model, params, prompts, rng=KEY, num_ids=real, chooser=Sampling(temperature=9))
    assert {token for row in rows for token in row} <= set(range(real))


def test_up_to_the_last_place_of_the_context(alike_rows_lm):
    model, params = alike_rows_lm
    longest = model.config.max_length - NEW
    prompts = [[i % 7 for i in range(longest)], [5], [6]]
    assert greedy(model, params, prompts) == [greedy_without_cache(model, params, prompt, NEW) for prompt in prompts]
    with pytest.raises(ValueError, match=f"prompt of {longest} tokens and max_new_tokens = {NEW + 1}.*{longest + NEW}"):
        greedy(model, params, prompts, max_new_tokens=NEW + 1)


class Traced:
    """A greedy chooser that refuses to be traced twice."""

    def __init__(self):
        self.init, self.choose = GREEDY.init, chex.assert_max_traces(lambda *args: GREEDY.choose(*args), n=1)


@pytest.mark.parametrize("drafter", [None, PromptLookup(tokens=3)], ids=["plain", "drafts"])
def test_one_compilation_for_a_whole_generation(llama, drafter):
    """The loop is traced once, streamed or not, for short prompts and longer ones."""
    model, params = llama
    chex.clear_trace_counter()
    options = {"chooser": Traced(), "drafter": drafter, "rng": KEY}
    for prompts in (PROMPTS, [[1] * 20, [2], [3, 4]]):
        whole = run(model, params, prompts, **options)
        assert run(model, params, prompts, on_tokens=lambda new: None, chunk=5, **options).tokens == whole.tokens
    with pytest.raises(AssertionError, match="traced"):
        run(model, params, max_new_tokens=NEW + 1, **options)  # other shapes


# Drafts.


@dataclasses.dataclass(frozen=True)
class Told(Drafter):
    """A drafter whose state is the text [batch, room] that will follow, and what to add to its tokens (0: nothing)."""

    tokens: int = 4

    chain = True

    @property
    def nodes(self):
        return 1 + self.tokens

    def propose(self, state, text, length):
        truth, wrong = state
        truth = jnp.pad(truth, ((0, 0), (0, self.nodes)))
        places = jnp.maximum(length[:, None] - 1 + jnp.arange(self.nodes), 0)
        tokens = (jnp.take_along_axis(truth, places, 1) + wrong) % 32
        return tokens, jnp.broadcast_to(jnp.arange(-1, self.tokens), tokens.shape)

    def observe(self, state, verified):
        return state


@dataclasses.dataclass(frozen=True)
class RandomTree(Told):
    """Drafts another tree in every step and row, with siblings of the same token, gaps, and some right tokens."""

    tokens: int = 9

    chain = False

    def propose(self, state, text, length):
        truth, key = state
        tokens, _ = super().propose((truth, 0), text, length)
        keys = jax.random.split(key, 4)
        numbers = jnp.arange(self.nodes)
        parents = (jax.random.uniform(keys[0], tokens.shape) * (numbers + 0.5) - 0.5).astype(jnp.int32)
        parents = jnp.where(jax.random.bernoulli(keys[1], 0.2, tokens.shape), -1, jnp.minimum(parents, numbers - 1))
        depth = ancestors(parents).sum(-1) - 1
        right = jnp.take_along_axis(tokens, depth, 1)
        other = jax.random.randint(keys[2], tokens.shape, 0, 32)
        return jnp.where(jax.random.bernoulli(keys[3], 0.6, tokens.shape), right, other), parents

    def observe(self, state, verified):
        truth, key = state
        return truth, jax.random.split(key)[0]


def texts_of(prompts, rows):
    texts = np.zeros((len(rows), 100), np.int32)
    for text, prompt, row in zip(texts, prompts, rows):
        text[: len(prompt) + len(row)] = [*prompt, *row]
    return jnp.asarray(texts)


def assert_same(found, plain, what):
    assert found.tokens == plain.tokens, what
    for ours, theirs in zip(found.logprobs, plain.logprobs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=what)


def test_drafts_change_nothing(causal_lm):
    """Neither greedy text, with right and wrong drafts, nor sampled text, with trees, changes."""
    model, params = causal_lm
    plain = run(model, params)
    truth, steps = texts_of(PROMPTS, plain.tokens), {}
    for wrong in (0, 1):
        found = run(model, params, drafter=Told(), drafter_state=(truth, wrong))
        assert_same(found, plain, f"told, {wrong}")
        steps[wrong] = found.steps
    assert steps == {0: [3] * 3, 1: [NEW] * 3} and plain.steps == [NEW] * 3
    if not CachedTokens(model).rewindable:
        return  # it takes no trees
    plain = run(model, params, **SAMPLED)
    state = texts_of(PROMPTS, plain.tokens), jax.random.key(3)
    found = run(model, params, drafter=RandomTree(), drafter_state=state, **SAMPLED)
    assert_same(found, plain, "trees")
    assert sum(found.steps) < 3 * NEW


def check_layers_apart(model, params, monkeypatch):
    plain = run(model, params)
    taken = []

    def apart(*args):
        taken.append(layers_apart(*args, least=0))
        return taken[-1]

    monkeypatch.setattr("jaxtok.decoding.engine.layers_apart", apart)
    assert_same(run(model, params), plain, "apart")
    return taken[0]


def test_layers_apart_change_nothing(llama, monkeypatch):
    """A large model's layers on a CPU are arrays of their own, which share the memory of the stack."""
    model, params = llama
    found = check_layers_apart(model, params, monkeypatch)["stack"]
    assert set(found) == {"blocks_0", "blocks_1"}
    whole = params["stack"]["blocks"]["attention"]["query"]["kernel"]
    layer = found["blocks_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(layer, whole[1])
    assert layer.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + layer.nbytes
    assert layers_apart(params, model.config) is params


@pytest.mark.slow
def test_layers_apart_change_nothing_in_any_model(causal_lm, monkeypatch):
    check_layers_apart(*causal_lm, monkeypatch)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.5, top_p=0.9)], ids=["greedy", "sampled"])
def test_drafts_with_ends(llama, sampling):
    """Rows that end at stop tokens inside of drafts, at several places, with each drafter."""
    model, params = llama
    options = {"chooser": sampling, "rng": KEY, "max_new_tokens": 14}
    first = greedy(model, params, **options)
    options["stop_tokens"] = [first[0][3], first[1][6]]
    plain = run(model, params, **options)
    lengths = [len(row) for row in plain.tokens]
    assert plain.steps == lengths and len(set(lengths)) > 1 and min(lengths) < 14
    truth = texts_of(PROMPTS, plain.tokens)
    told = {
        "oracle": (Told(), (truth, 0)),
        "wrong": (Told(), (truth, 1)),
        "trees": (RandomTree(), (truth, jax.random.key(3))),
        "lookup": (PromptLookup(), None),
    }
    steps = {}
    for name, (drafter, state) in told.items():
        found = run(model, params, drafter=drafter, drafter_state=state, **options)
        assert_same(found, plain, name)
        steps[name] = found.steps
    assert steps["wrong"] == lengths and steps["oracle"] == [-(-length // 5) for length in lengths]


@dataclasses.dataclass(frozen=True)
class Alternating(Sampling):
    """A constraint with a state: tokens alternate between odd and even, and their number is counted."""

    temperature: float = 1.5

    def init(self, batch):
        return {"odd": jnp.zeros(batch, bool), "count": jnp.zeros(batch, jnp.int32)}

    def choose(self, logits, keys, state):
        allowed = jnp.arange(logits.shape[-1]) % 2 == state["odd"][:, None]
        token, _ = super().choose(jnp.where(allowed, logits, -jnp.inf), keys)
        return token, {"odd": token % 2 == 0, "count": state["count"] + 1}


def test_a_constraint_and_a_drafter(llama):
    """The constraint's state is that after the row's tokens, whatever was drafted; generation can continue from it."""
    model, params = llama
    options = {"chooser": Alternating(), "rng": KEY}
    plain = run(model, params, **options)
    assert all(token % 2 == index % 2 for row in plain.tokens for index, token in enumerate(row))
    start = texts_of(PROMPTS, plain.tokens), jax.random.key(3)
    found = run(model, params, drafter=RandomTree(), drafter_state=start, **options)
    assert_same(found, plain, "")
    assert sum(found.steps) < 3 * NEW
    np.testing.assert_array_equal(found.state.chooser["count"], [NEW] * 3)
    assert (jax.random.key_data(found.state.drafter[1]) != jax.random.key_data(start[1])).any()
    odd = found.state.chooser | {"odd": jnp.ones(3, bool)}
    assert all(row[0] % 2 for row in greedy(model, params, chooser_state=odd, **options))


def test_streams_of_drafts_end_where_they_should(llama):
    model, params = llama
    plain = run(model, params, **SAMPLED)
    pieces, state = [], (texts_of(PROMPTS, plain.tokens), 0)
    run(model, params, drafter=Told(tokens=5), drafter_state=state, on_tokens=pieces.append, chunk=3, **SAMPLED)
    assert joined(pieces, "tokens") == plain.tokens
    assert len(pieces) == 2  # six tokens a step


def test_log_probabilities_are_those_of_a_full_pass(alike_rows_lm):
    """Log-probabilities are of the model's own distribution, although temperature and top_k restrict the choice."""
    model, params = alike_rows_lm
    found = run(model, params, **SAMPLED)
    texts = texts_of(PROMPTS, found.tokens)[:, : model.config.max_length]
    options = {"prompts": np.array([len(prompt) for prompt in PROMPTS])} if isinstance(model, Prompted) else {}
    full = jax.nn.log_softmax(full_pass(model, params, texts, **options))
    for row, (prompt, new) in enumerate(zip(PROMPTS, found.tokens)):
        expected = [full[row, len(prompt) + n - 1, token] for n, token in enumerate(new)]
        np.testing.assert_allclose(found.logprobs[row], expected, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnames="model")
def full_pass(model, params, tokens, **options):
    return model.apply({"params": params}, tokens, **options)[0]


# Eviction.


def test_eviction_that_keeps_everything_changes_nothing(causal_lm):
    model, params = causal_lm
    if not CachedTokens(model).rewindable:
        pytest.skip("it has no slots to evict, and refuses evictors (tests/lm/test_mamba.py)")
    whole = run(model, params, **SAMPLED)
    assert_same(run(model, params, evictor=parse_evictor("streaming:64,sinks=2,every=16"), **SAMPLED), whole, "")


@pytest.mark.parametrize("every", [1, 3])
def test_with_eviction_the_cache_is_of_fixed_size(llama, every):
    """Drafts change nothing; they end where slots are evicted."""
    model, params = llama
    evictor = parse_evictor(f"streaming:4,sinks=1,every={every}")
    options = SAMPLED | {"evictor": evictor}
    plain = run(model, params, **options)
    assert plain.tokens != greedy(model, params, **SAMPLED)
    truth = texts_of(PROMPTS, plain.tokens)
    for drafter, state in ((Told(tokens=2), (truth, 0)), (RandomTree(), (truth, KEY))):
        assert_same(run(model, params, drafter=drafter, drafter_state=state, **options), plain, str(drafter))

    engine = Engine(model=CachedTokens(model), chooser=GREEDY, evictor=evictor.fit(model, 64, 14))
    tokens, lengths = np.zeros((3, 64), np.int32), np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(tokens, PROMPTS):
        row[: len(prompt)] = prompt
    state = engine.prefill(params, tokens, lengths, new=14)
    for _, state in engine.stream(params, state, 2):  # noqa: B020
        assert state.model.slots == 4 + every
        assert (state.model.length < 4 + every).all()
    kept = np.sort(np.asarray(state.model.positions[0, :, :, 0]), 1)
    for row, length in zip(kept, lengths + 14):
        found = row[row >= 0]
        assert found[0] == 0 and set(found[-3:]) == {length - 4, length - 3, length - 2}


def test_what_the_evicted_model_sees(llama):
    """Attention to the sinks and the window is that of a model that sees only them, at their own positions."""
    model, params = llama
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    found = run(model, params, [prompt], evictor=parse_evictor("streaming:4,sinks=1"), max_new_tokens=1)

    @jax.jit
    def expected(params):
        _, cache = model.apply({"params": params}, jnp.array([prompt[:-1]]), cache=model.init_cache(1, 8))
        cache = cache.gather(jnp.array([[0, 4, 5, 6, 7]]), jnp.array([4]))
        return model.apply({"params": params}, jnp.array([[6]]), cache=cache, positions=jnp.array([[7]]))[0]

    logits = expected(params)
    assert found.tokens == [[int(logits[0, 0].argmax())]]
    np.testing.assert_allclose(found.logprobs[0][0], jax.nn.log_softmax(logits[0, 0]).max(), atol=1e-5)


@dataclasses.dataclass(frozen=True)
class HeavyHitters:
    """With H2O, each head of each layer keeps its newest slots and those that had the most attention."""

    slots: int = 5
    recent: int = 2
    every: int = 3

    observes = True

    def fit(self, model, prompt, new):
        return self

    def budget_of(self, state):
        return self.slots

    def init(self, cache):
        layers, batch, slots, heads, _ = cache.keys.shape
        return jnp.zeros((layers, batch, heads, slots))

    def observe(self, state, cache, sown, path, count):
        (queries,) = sown["stack"]["blocks"]["attention"]["queries"]
        layers, batch, new, heads, dim = queries.shape
        kept = cache.keys.shape[3]
        queries = jnp.take_along_axis(queries, path[None, :, :, None, None], 2)
        queries = queries.reshape(layers, batch, new, kept, heads // kept, dim)
        scores = jnp.einsum("lbngrd,lbsgd->lbngrs", queries, cache.keys) / dim**0.5
        number = jnp.arange(new)
        slot = cache.length[:, None] - count[:, None] + number  # of each query
        positions = jnp.broadcast_to(cache.positions, (layers, batch, cache.slots, kept))
        own = jnp.take_along_axis(positions, slot[None, :, :, None], 2, mode="clip")
        sees = (positions[:, :, None] >= 0) & (positions[:, :, None] <= own[:, :, :, None])  # [l, b, n, s, g]
        weights = jax.nn.softmax(jnp.where(jnp.moveaxis(sees, 4, 3)[:, :, :, :, None], scores, -1e30))
        real = (number < count[:, None])[None, :, :, None, None, None]
        return state + jnp.where(real, weights, 0).sum((2, 4))

    def evict(self, state, cache, rows, size):
        number = jnp.arange(cache.slots)
        used, old = (number < cache.length[:, None, None] - back for back in (0, self.recent))
        rank = jnp.where(old, state, jnp.where(used, jnp.inf, -jnp.inf))
        index = jnp.sort(jax.lax.top_k(rank, self.slots)[1])
        index = jnp.pad(index, [(0, 0)] * 3 + [(0, size - self.slots)])
        index = jnp.where(rows[:, None, None], index, jnp.arange(size))  # in other rows, all slots in use stay
        count = jnp.where(rows, self.slots, cache.length)
        return cache.gather(index, count), jnp.take_along_axis(state, index, -1, mode="clip") * (
            jnp.arange(size) < count[:, None, None]
        )


def test_an_evictor_that_observes_attention(llama):
    """Heads keep different slots; drafts change nothing, so it has observed the accepted tokens only."""
    model, params = llama
    options = SAMPLED | {"evictor": HeavyHitters()}
    plain = run(model, params, **options)
    truth = texts_of(PROMPTS, plain.tokens)
    for drafter, state in ((Told(tokens=2), (truth, 0)), (RandomTree(), (truth, KEY))):
        found = run(model, params, drafter=drafter, drafter_state=state, **options)
        assert_same(found, plain, str(drafter))
        np.testing.assert_allclose(found.state.evictor[..., :5], plain.state.evictor[..., :5], atol=1e-4)
    whole = run(model, params, evictor=HeavyHitters(slots=40), **SAMPLED)
    assert_same(whole, run(model, params, **SAMPLED), "all")
    # Every query gives a weight of 1 in each of the four heads, which share keys in pairs.
    queries = np.array([len(prompt) for prompt in PROMPTS]) - 1 + NEW
    np.testing.assert_allclose(whole.state.evictor.sum(-1), np.broadcast_to(2 * queries[:, None], (2, 3, 2)), rtol=1e-4)


# A model whose cache cannot be rewound.


def test_a_recurrent_model():
    """Plain decoding equals repeated full passes; drafts that are chains change nothing; all else is refused."""
    model = Recurrent(RecurrentConfig())
    params = noisy_params(model)
    rows = greedy(model, params)
    assert rows == [greedy_without_cache(model, params, prompt, NEW) for prompt in PROMPTS]
    assert max(len(set(row)) for row in rows) > 1
    options = SAMPLED | {"stop_tokens": [7]}
    plain = run(model, params, **options)
    drafted = run(model, params, drafter=Told(), drafter_state=(texts_of(PROMPTS, plain.tokens), 0), **options)
    assert_same(drafted, plain, "")
    assert drafted.steps == [-(-len(row) // 5) for row in plain.tokens]
    with pytest.raises(ValueError, match=r"must propose chains, as tokens cannot be .* the cache of Recurrent"):
        greedy(model, params, drafter=RandomTree())
    with pytest.raises(ValueError, match="it must be None, as tokens"):
        greedy(model, params, evictor=parse_evictor("streaming:8"))


def test_logits_that_are_no_numbers_are_refused(llama):
    model, params = llama
    with pytest.raises(ValueError, match="not numbers"):
        greedy(model, jax.tree.map(lambda x: x * jnp.nan, params))


def test_what_is_no_causal_model_takes_no_drafts():
    with pytest.raises(ValueError, match="must then be a CausalLM"):
        Engine(model=object(), drafter=PromptLookup())


def test_bfloat16_models_generate(causal_lm):
    model, params = causal_lm
    half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    rows = greedy(half, params)
    assert [len(row) for row in rows] == [NEW] * 3
    # Rounding may change a close choice, but not the first token of every row.
    assert any(a[0] == b[0] for a, b in zip(rows, greedy(model, params)))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 is empty.*eod_id"),
        ([[1], [2, 32]], {}, "prompt 1 has the id 32.*0 to 31"),
        ([[-1]], {}, "prompt 0 has the id -1.*0 to 31"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"chunk": 0}, "chunk is 0"),
        ([[1]], {"max_new_tokens": 82}, "max_new_tokens = 82 exceed the model's max_length = 8[02]"),
        ([[1]], {"stop_tokens": [32]}, "stop_tokens has 32"),
        ([[1]], {"num_ids": 33}, "num_ids is 33.*vocab_size = 32"),
        ([[1]], {"chooser": Sampling()}, "rng is None.*temperature 0"),
    ],
)
def test_impossible_requests_are_refused(llama, prompts, options, message):
    model, params = llama
    with pytest.raises(ValueError, match=message):
        greedy(model, params, prompts, **options)

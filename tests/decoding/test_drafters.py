"""Every drafter, alone and in a union, changes nothing: the same tokens as without drafts, greedy and sampled, to any
end, from any state; and what each drafter proposes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect
from recurrent import Recurrent, RecurrentConfig
from test_engine import Told

import jaxtok
from jaxtok.decoding import (
    Drafter,
    DraftModel,
    PromptLookup,
    Sampling,
    SuffixAutomaton,
    TokenRecycling,
    TreeTemplate,
    Union,
    Verified,
    generate,
    parse_evictor,
)
from jaxtok.decoding.token_recycling import TEMPLATES
from jaxtok.decoding.union import merge

VOCAB, NEW = 32, 14
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 1, 5, 9], [8]] * 2
GREEDY_ROWS = jnp.arange(6) < 3
KEY = jax.random.key(0)
TREE = TreeTemplate.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


@dataclasses.dataclass(frozen=True)
class HalfGreedy(Sampling):
    """Greedy in the rows that its state says, so that one program shows both."""

    temperature: float = 1.0

    def choose(self, logits, keys, state):
        drawn, _ = super().choose(logits, keys)
        return jnp.where(state, logits.argmax(-1), drawn).astype(jnp.int32), state


@dataclasses.dataclass(frozen=True)
class Switched(Drafter):
    """A drafter that can be switched off in its state: plain decoding in the same program, at the tree's width."""

    inner: Any

    @property
    def nodes(self):
        return self.inner.nodes

    @property
    def chain(self):
        return self.inner.chain

    def begin(self, state, text, length, logits):
        on, own = state
        own = self.inner.init(*text.shape, logits.shape[-1]) if own is None else own
        return on, self.inner.begin(own, text, length, logits)

    def propose(self, state, text, length):
        tokens, parents = self.inner.propose(state[1], text, length)
        return tokens, jnp.where(state[0], parents, -1)

    def observe(self, state, verified):
        return state[0], self.inner.observe(state[1], verified)


@dataclasses.dataclass(frozen=True)
class Nonsense(Told):
    """Siblings with equal tokens, absent nodes and nodes below absent ones; its state is the text that follows."""

    tokens: int = 11

    chain = False

    def propose(self, state, text, length):
        tokens, _ = super().propose((state, 0), text, length)
        tree = tokens[:, jnp.array([0, 1, 1, 2, 3, 3, 1, 2, 3, 2, 3, 1])]
        return tree, jnp.broadcast_to(jnp.array([-1, 0, 0, 1, 3, 3, -1, 6, 7, 2, 9, 0]), tree.shape)


@pytest.fixture(scope="module")
def llama():
    model = collect("CAUSAL_LMS")["llama"]()
    return model, noisy_params(model)


def run(llama, drafter=None, state=None, **options):
    model, params = llama
    options = {"max_new_tokens": NEW, "chooser": HalfGreedy(), "chooser_state": GREEDY_ROWS, "rng": KEY} | options
    return generate(model, params, PROMPTS, drafter=drafter, drafter_state=state, **options)


@pytest.fixture(scope="module")
def plain(llama):
    """Plain decoding, with stop tokens in the middle of two rows, and the text that each row would go on with."""
    whole = run(llama).tokens
    stops = [whole[0][6], whole[4][9]]
    found = run(llama, stop_tokens=stops)
    lengths = list(map(len, found.tokens))
    assert min(lengths) < NEW == max(lengths) and len(set(lengths)) > 2
    text = np.zeros((6, 100), np.int32)
    for row, prompt, new in zip(text, PROMPTS, whole):
        row[: len(prompt) + NEW] = [*prompt, *new]
    return found, stops, jnp.asarray(text)


def other_model():
    """A draft model with other sizes and a context that is shorter than the texts."""
    model = collect("CAUSAL_LMS")["llama"]()
    model = model.clone(config=dataclasses.replace(model.config, num_layers=1, max_length=16))
    return model, noisy_params(model)


@pytest.fixture(scope="module")
def drafters(llama, plain):
    """Name -> drafter, and its first state (None: a new one)."""
    (own, params), text = llama, plain[2]
    small, theirs = other_model()
    recurrent = Recurrent(RecurrentConfig())
    recycling, lookup = TokenRecycling(template=TREE), PromptLookup(tokens=4)
    draft = DraftModel(model=small, tokens=3)
    random = jax.random.randint(KEY, (VOCAB, 8), 0, VOCAB)
    return {
        "token recycling": (recycling, None),
        "own matrices": (TokenRecycling(template=TREE, shared=False, update_from_prompt=True), None),
        "random matrix": (recycling, random),
        "suffix automaton": (SuffixAutomaton(tokens=4), None),
        "three copies": (SuffixAutomaton(tokens=4, matches=3), None),
        "itself": (DraftModel(model=own, tokens=3), DraftModel(model=own).first_state(params)),
        "draft model": (draft, draft.first_state(theirs)),
        "recurrent": (DraftModel(model=recurrent), DraftModel(model=recurrent).first_state(noisy_params(recurrent))),
        "union": (Union((lookup, recycling)), None),
        "union of all": (
            Union((SuffixAutomaton(tokens=4, matches=3), recycling, draft, Nonsense(), Told()), budget=32),
            (None, None, draft.first_state(theirs), text, (text, 1)),
        ),
        "union of one node": (Union((recycling,), budget=1), None),
        "union of nonsense": (Union((Nonsense(),)), (text,)),
    }


NAMES = ("token recycling", "random matrix", "suffix automaton", "draft model", "union of all", "union of nonsense")
LIKE_ANOTHER = ("three copies", "own matrices", "itself", "recurrent", "union", "union of one node")
slow = [pytest.param(name, marks=pytest.mark.slow) for name in LIKE_ANOTHER]


@pytest.mark.parametrize("name", [*NAMES, *slow])
def test_drafts_change_nothing(llama, plain, drafters, name):
    """Three greedy rows and three sampled ones, of unequal prompts, with stop tokens in the middle: as without drafts,
    and as without drafts in the same program."""
    expected, stops, _ = plain
    drafter, state = drafters[name]
    drafter = Switched(drafter)
    found = run(llama, drafter, (True, state), stop_tokens=stops)
    off = run(llama, drafter, (False, state), stop_tokens=stops)
    assert found.tokens == off.tokens == expected.tokens
    for ours, theirs in zip(found.logprobs, expected.logprobs):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert off.steps == list(map(len, off.tokens))
    fewest = {"itself": 4, "union of nonsense": 4}.get(name, 1)
    greedy = list(zip(found.tokens, found.steps))[:3]
    if fewest > 1:  # they know what follows greedily
        assert [steps for _, steps in greedy] == [-(-len(row) // fewest) for row, _ in greedy]
    if name == "union of one node":
        assert found.steps == off.steps
    elif name not in ("draft model", "recurrent", "random matrix"):
        assert sum(found.steps) < sum(off.steps)


@pytest.mark.parametrize(
    "name", ["token recycling", *(pytest.param(name, marks=pytest.mark.slow) for name in (*NAMES[1:], *LIKE_ANOTHER))]
)
def test_in_bfloat16_as_plain_decoding_of_the_same_width(llama, drafters, name):
    """Rounding depends on the number of tokens of a pass, so plain decoding reads as many, in the same program."""
    model, params = llama
    half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16")), params
    drafter, state = drafters[name]
    found, off = (run(half, Switched(drafter), (on, state)) for on in (True, False))
    assert found.tokens == off.tokens
    for ours, theirs in zip(found.logprobs, off.logprobs):
        np.testing.assert_allclose(ours, theirs, atol=1e-2)
    if name not in ("draft model", "recurrent", "random matrix", "union of one node"):
        assert sum(found.steps) < sum(off.steps)
    narrow = run(half).tokens
    print(f"{name}: {sum(a == b for a, b in zip(found.tokens, narrow))} of 6 as in passes of one token")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model(dtype):
    """SmolLM2's greedy text with a union is that of plain decoding at the union's width; in float32, of any width."""
    smollm2 = jaxtok.open("smollm2")
    model = smollm2.module.clone(config=dataclasses.replace(smollm2.module.config, dtype=dtype))
    drafter = Switched(Union((SuffixAutomaton(), TokenRecycling(template=TEMPLATES["11"]))))
    asked = ["Repeat three times: a cat sat on a mat.", "List ten animals.", "What is 12 times 7?", "Write a poem."]
    prompts = [smollm2.chat_ids(text) for text in asked]
    options = {"max_new_tokens": 32, "chooser": Sampling(temperature=0), "stop_tokens": smollm2.ends}
    found, off = (
        generate(model, smollm2.params, prompts, drafter=drafter, drafter_state=(on, None), **options)
        for on in (True, False)
    )
    narrow = generate(model, smollm2.params, prompts, **options)
    same = sum(a == b for a, b in zip(found.tokens, narrow.tokens))
    apart = [
        max(abs(a - b) for ours, theirs in zip(found.logprobs, of.logprobs) for a, b in zip(ours, theirs))
        for of in (off, narrow)
    ]
    print(f"{dtype}: {same} of {len(prompts)} texts as in passes of one token; steps {found.steps}, not {off.steps}")
    print(f"{dtype}: log probabilities at most {apart[0]:.1e} apart at this width, {apart[1]:.1e} from width 1")
    assert found.tokens == off.tokens and sum(found.steps) < sum(off.steps)
    if dtype == "float32":
        assert found.tokens == narrow.tokens and max(apart) < 1e-4


@pytest.mark.parametrize("name", ["union", pytest.param("union of all", marks=pytest.mark.slow)])
def test_with_an_evictor(llama, drafters, name):
    drafter, state = drafters[name]
    options = {"evictor": parse_evictor("streaming:6,sinks=1,every=3")}
    assert run(llama, drafter, state, **options).tokens == run(llama, **options).tokens


def test_one_compilation_for_a_generation(llama, drafters):
    """Streamed or not, cold or hot, for other prompts: a union's loop is traced once."""

    class Traced(HalfGreedy):
        def __init__(self):
            object.__setattr__(
                self, "choose", chex.assert_max_traces(lambda *args: HalfGreedy.choose(self, *args), n=1)
            )

    chex.clear_trace_counter()
    drafter, _ = drafters["union"]
    options = {"drafter": drafter, "chooser": Traced()}
    cold = run(llama, **options)
    for state in (None, cold.state.drafter):
        pieces = []
        again = run(llama, state=state, on_tokens=pieces.append, chunk=4, **options)
        assert again.tokens == cold.tokens and len(pieces) > 1
        assert [list(itertools.chain(*parts)) for parts in zip(*(piece.tokens for piece in pieces))] == cold.tokens


def test_a_draft_model_goes_on_in_another_generation(llama):
    """Its last state is a first state: the parameters stay and the cache begins anew."""
    model, params = llama
    drafter = DraftModel(model=model, tokens=3)
    first = run(llama, drafter, drafter.first_state(params))
    again = run(llama, drafter, first.state.drafter)
    assert again.tokens == first.tokens and again.steps == first.steps
    assert first.steps[:3] == [4] * 3


def test_a_draft_model_of_another_vocabulary_is_refused(llama):
    model, params = llama
    other = model.clone(config=dataclasses.replace(model.config, vocab_size=40))
    drafter = DraftModel(model=other)
    with pytest.raises(ValueError, match="vocabulary of 40 tokens, and the model one of 32"):
        run(llama, drafter, drafter.first_state(params))
    with pytest.raises(ValueError, match=r"no parameters; give its first_state\(params\)"):
        run(llama, DraftModel(model=model))
    with pytest.raises(ValueError, match="must propose chains"):
        recurrent = Recurrent(RecurrentConfig())
        generate(
            recurrent, noisy_params(recurrent), [[1]], max_new_tokens=2, drafter=Union((SuffixAutomaton(),)), rng=KEY
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Union(()), "drafters is empty"),
        (lambda: Union((PromptLookup(),), budget=-1), "budget is -1"),
        (lambda: Union((PromptLookup(), "m2r2")), "drafters has m2r2, which proposes no tree"),
        (lambda: SuffixAutomaton(tokens=0), "tokens is 0"),
        (lambda: SuffixAutomaton(matches=0), "matches is 0"),
        (lambda: DraftModel(model=None, tokens=0), "tokens is 0"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_union_takes_a_tuple_of_states(llama):
    with pytest.raises(ValueError, match="a union of 2 drafters is a tuple of as many"):
        run(llama, Union((SuffixAutomaton(), PromptLookup())), ((),))


# What they propose.


def longest_suffix(text: list[int], tokens: int, besides: set[int]) -> list[int]:
    """The definition, with lists: the latest of the longest earlier occurrences that go on with another token than
    these, copied on."""
    best, where = 0, None
    for place in range(1, len(text)):
        same = 0
        while same < place and text[place - 1 - same] == text[-1 - same]:
            same += 1
        if same and same >= best and text[place] not in besides:
            best, where = same, place
    if where is None:
        return []
    copied = list(text)
    for number in range(tokens):
        copied.append(copied[where + number])
    return copied[len(text) :]


@pytest.mark.parametrize("matches", [1, 3])
def test_suffix_automaton_by_definition(matches):
    random = np.random.default_rng(0)
    lengths = random.integers(1, 30, 64)
    text = random.integers(0, 4, (64, 32))
    drafter = SuffixAutomaton(tokens=7, matches=matches)
    tokens, parents = jax.jit(drafter.propose)((), jnp.asarray(text), jnp.asarray(lengths))
    assert tokens.shape == parents.shape == (64, drafter.nodes)
    copies = tokens[:, 1:].reshape(64, matches, 7).tolist()
    for row, length in enumerate(lengths):
        assert tokens[row, 0] == text[row, length - 1] and parents[row, 0] == -1
        seen = set()
        for number, copy in enumerate(copies[row]):
            expected = longest_suffix(text[row, :length].tolist(), 7, seen)
            first = 1 + 7 * number
            above = parents[row, first : first + 7].tolist()
            assert above == ([0, *range(first, first + 6)] if expected else [-1] * 7)
            if expected:
                assert copy == expected
                seen.add(copy[0])
    assert matches == 1 or (parents[:, -7:] >= 0).any()  # some have three


def paths_of(tokens, parents) -> list[tuple[int, ...]]:
    """The tokens on the way to each node that is there, in the order of the nodes; those below absent ones are not."""
    found = {0: ()}
    for node in range(1, len(tokens)):
        if parents[node] in found:
            found[node] = (*found[parents[node]], tokens[node])
    return [found[node] for node in sorted(found)][1:]


def test_a_merged_tree_has_the_first_different_paths():
    """Random trees with gaps: the merged tree has each path of tokens once, in their order, up to its size."""
    random = np.random.default_rng(0)
    for size in (1, 5, 30):
        tokens = random.integers(0, 3, (40, 30))
        parents = (random.random((40, 30)) * np.arange(30)).astype(int)
        parents = np.where(random.random((40, 30)) < 0.15, -1, parents)
        parents[:, 0] = -1
        ours, above = jax.jit(merge, static_argnums=2)(jnp.asarray(tokens), jnp.asarray(parents), size)
        assert ours.shape == above.shape == (40, size)
        for row in range(40):
            expected = list(dict.fromkeys(paths_of(tokens[row].tolist(), parents[row].tolist())))[: size - 1]
            assert paths_of(ours[row].tolist(), above[row].tolist()) == expected
            assert ours[row, 0] == tokens[row, 0] and (above[row] >= 0).sum() == len(expected)


def test_the_priority_of_a_union():
    """The budget goes to the first drafter, and what it does not need goes to the second."""
    text, length = jnp.array([[1, 2, 3, 1, 2, 0, 0], [1, 2, 3, 4, 5, 0, 0]]), jnp.array([5, 5])
    recycling = TokenRecycling(template=TreeTemplate.chain(3))
    matrix = jnp.zeros((9, 8), jnp.int32).at[2, 0].set(7).at[5, 0].set(8)
    union = Union((SuffixAutomaton(tokens=2), recycling), budget=4)
    tokens, parents = union.propose(((), matrix), text, length)
    assert tokens.tolist() == [[2, 3, 1, 7], [5, 8, 0, 0]]
    assert parents.tolist() == [[-1, 0, 1, 0], [-1, 0, 1, 2]]


def test_every_drafter_of_a_union_observes_the_whole_tree():
    recycling = TokenRecycling(template=TreeTemplate.chain(1), k=2)
    union = Union((SuffixAutomaton(tokens=2), recycling))
    tokens, parents = jnp.array([[2, 3, 1, 7]]), jnp.array([[-1, 0, 1, 0]])
    logits = jax.random.normal(KEY, (1, 4, 9))
    none = jnp.zeros_like(tokens)
    _, matrix = union.observe(
        ((), recycling.init(1, 1, 9)), Verified(tokens, parents, logits, none, jnp.array([1]), none)
    )
    top = jax.lax.top_k(logits[0], 2)[1]
    np.testing.assert_array_equal(matrix[tokens[0]], top)


def test_a_tree_larger_than_the_context_is_refused():
    model, params = other_model()
    with pytest.raises(ValueError, match="a draft has 81 tokens, and the model's max_length is 16; choose a smaller"):
        generate(model, params, [[3, 1]], max_new_tokens=2, chooser=Sampling(temperature=0), drafter=TokenRecycling())

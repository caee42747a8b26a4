"""Drafters, evictors and constraints together: a drafter changes nothing, whatever evictor and constraint it meets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect

from jaxtok import drafters
from jaxtok.decoding import (
    ADED,
    ADEDState,
    Constrained,
    DraftModel,
    Function,
    PromptLookup,
    Sampling,
    SuffixAutomaton,
    TokenRecycling,
    TreeTemplate,
    Union,
    Vocabulary,
    generate,
    parse_evictor,
)
from jaxtok.decoding.m2r2 import M2R2Config, SelfSpeculation
from jaxtok.decoding.scorers import EVICTORS
from jaxtok.decoding.trigram_table import build_table
from jaxtok.protocols import Special
from jaxtok.training.mesh import MeshConfig, make_layout

NEW = 14
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 1], [8], [2, 7, 1, 8, 2, 8, 1]] * 2
"""The first four rows are greedy, the others are sampled; every second row is constrained."""
KEY = jax.random.key(0)


class Letters:
    """A tokenizer of 31 letters and the end of a text."""

    name, vocab_size, eod_id, special = "letters", 32, 31, Special(eos=(31,))

    def token_bytes(self, token: int) -> bytes:
        return bytes([ord("A") + token]) if token < 31 else b""


LETTERS = Vocabulary(Letters())
FREE = Function(lambda text, complete: True)
ALTERNATING = Function(lambda text, complete: all((letter < 81) == (place % 2) for place, letter in enumerate(text)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalfGreedy(Sampling):
    """Greedy in the first half of the rows, so that one program shows both."""

    temperature: float = 1.2

    def choose(self, logits, keys, state=()):
        drawn, _ = super().choose(logits, keys)
        greedy = jnp.arange(len(logits)) < len(logits) // 2
        return jnp.where(greedy, logits.argmax(-1), drawn).astype(jnp.int32), state


CHOOSER = Constrained(vocabulary=LETTERS, sampling=HalfGreedy())
TREE = TreeTemplate.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


@pytest.fixture(scope="module")
def llama():
    model = collect("CAUSAL_LMS")["llama"]()
    return model, noisy_params(model)


def drafter_of(name: str):
    """A drafter, and its first state (None: a new one)."""
    adaptive = ADED(iterations=20, length=4, sentences=8, choices=20, nodes=10)
    table = ADEDState(build_table(np.array([[3, 1, 4, 1, 5, 9]]), vocab_size=32, kept=4, spare=2, room=64))
    match name:
        case "prompt_lookup":
            return PromptLookup(tokens=4), None
        case "suffix_automaton":
            return SuffixAutomaton(tokens=4), None
        case "token_recycling":
            return TokenRecycling(template=TREE), None
        case "token_recycling, not shared":
            return TokenRecycling(template=TREE, shared=False), None
        case "aded":
            return adaptive, table
        case "draft_model":
            model = collect("CAUSAL_LMS")["llama"]()
            model = model.clone(config=dataclasses.replace(model.config, num_layers=1))
            drafter = DraftModel(model=model, tokens=3)
            return drafter, drafter.first_state(noisy_params(model))
        case "union":
            small, params = drafter_of("draft_model")
            parts = (SuffixAutomaton(tokens=3), TokenRecycling(template=TREE), adaptive, small)
            return Union(parts, budget=16), (None, None, table, params)
        case "m2r2":
            return SelfSpeculation(config=M2R2Config(exits="lens", gates=(1,), gamma=3)), None


DRAFTERS = (*dict.fromkeys(form.partition(":")[0] for form in drafters.DRAFTERS), "union", "m2r2")

EVICTING = {name: f"{name}:6,every=3" for name in EVICTORS} | {
    "streaming": "streaming:6,sinks=2,every=3",
    "snapkv": "snapkv:6,window=3,recent=3,pool=3,every=3",
    "expected": "expected:6,sinks=1,skip=1,future=8,every=3",
    "keyformer, new positions": "keyformer:0.7,positions=new,sinks=1,every=2",
}


def evictor_of(name: str):
    return None if name == "all" else parse_evictor(EVICTING[name])


ALL_EVICTORS = ("all", *EVICTING)


def run(llama, drafter="", evictor="all", prompts=PROMPTS, place=contextlib.nullcontext, **options):
    model, params = llama
    made, state = drafter_of(drafter) if drafter else (None, None)
    constraints = [ALTERNATING if row % 2 else FREE for row in range(len(prompts))]
    options = {"chooser": CHOOSER, "chooser_state": LETTERS.start(constraints)} | options
    options |= {"drafter": made, "drafter_state": state, "evictor": evictor_of(evictor)}
    with place():
        return generate(model, params, prompts, max_new_tokens=NEW, rng=KEY, stop_tokens=LETTERS.eos, **options)


@pytest.fixture(scope="module")
def plain(llama):
    """Evictor -> what is generated without drafts."""
    return functools.cache(lambda evictor: run(llama, evictor=evictor))


def refused(drafter: str, evictor: str) -> bool:
    return drafter == "m2r2" and (made := evictor_of(evictor)) is not None and made.observes


DEFAULT = {("union", "keyformer")}


def pairs():
    for drafter in DRAFTERS:
        for evictor in ALL_EVICTORS:
            marks = [pytest.mark.slow] * ((drafter, evictor) not in DEFAULT)
            yield pytest.param(drafter, evictor, marks=marks, id=f"{drafter}-{evictor}")


@pytest.mark.parametrize(("drafter", "evictor"), pairs())
def test_a_drafter_changes_nothing(llama, plain, drafter, evictor):
    """Greedy and sampled rows of unequal prompts, constrained or not: the same tokens as without drafts."""
    if refused(drafter, evictor):
        with pytest.raises(ValueError, match=r"does not go with the evictor .*, which observes all layers"):
            run(llama, drafter, evictor)
        return
    expected, found = plain(evictor), run(llama, drafter, evictor)
    assert found.tokens == expected.tokens
    for ours, theirs in zip(found.logprobs, expected.logprobs):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    lengths = [len(row) for row in expected.tokens]
    assert expected.steps == lengths and sum(found.steps) < sum(lengths)


@pytest.mark.parametrize("evictor", ["streaming", pytest.param("keyformer", marks=pytest.mark.slow)])
def test_rows_are_the_same_alone_and_in_a_batch(llama, evictor):
    """Unequal prompts with a drafter, an evictor and a constraint: no bit depends on what the other rows hold, and no
    token on how many there are. (Products of another number of rows are rounded differently; so is another draft, which
    the other rows change where they share a matrix.)"""
    chooser = dataclasses.replace(CHOOSER, sampling=Sampling(temperature=0))

    def made(prompts, constraints):
        start = LETTERS.start(constraints)
        return run(llama, "token_recycling, not shared", evictor, prompts, chooser=chooser, chooser_state=start)

    prompts, constraints = PROMPTS[:4], [FREE, ALTERNATING, FREE, ALTERNATING]
    together, others = made(prompts, constraints), made([[6], *prompts[1:3], [9, 9, 8]], constraints)
    assert others.tokens[0] != together.tokens[0]
    for row in range(4):
        if row in (1, 2):
            assert (others.tokens[row], others.logprobs[row]) == (together.tokens[row], together.logprobs[row])
        alone = made([prompts[row]], [constraints[row]])
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices (tests/conftest.py simulates them)")
def test_on_a_mesh(llama, plain):
    """Parameters and rows are divided over eight devices; a union of drafters, an evictor and a constraint."""
    model, params = llama
    layout = make_layout(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 1), jnp.int32)))["params"]
    divided = jax.device_put(params, layout.params(boxed))
    found = run((model, divided), "union", "streaming", place=layout.active)
    assert found.tokens == plain("streaming").tokens
    for ours, theirs in zip(found.logprobs, plain("streaming").logprobs):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

"""Trees of fewer nodes: what is left out, what is counted, and which width is chosen."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect

from jaxtok.decoding import PromptLookup, Sampling, SuffixAutomaton, TokenRecycling, TreeTemplate, Union, generate
from jaxtok.decoding import width as widths
from jaxtok.decoding.protocols import Verified
from jaxtok.decoding.width import Counted, Limited, Widths, fit_width, most_accepted

RECYCLING = TokenRecycling(template=TreeTemplate.of([(0,), (1,), (0, 0), (0, 1), (1, 0)]), k=2)
UNION = Union((SuffixAutomaton(tokens=4), RECYCLING))
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 1, 5, 9]]


@pytest.fixture(scope="module")
def llama():
    model = collect("CAUSAL_LMS")["llama"]()
    return model, noisy_params(model)


def test_counted_nodes():
    drafter = Counted(TokenRecycling(template=TreeTemplate.of([(0,), (1,), (0, 0)]), k=2))
    state = drafter.init(2, 4, 9)
    tokens, parents = drafter.propose(state, jnp.zeros((2, 4), jnp.int32), jnp.array([1, 2]))
    path, count = jnp.array([[0, 1, 3, 0], [0, 2, 0, 0]]), jnp.array([3, 2])
    _, counts = drafter.observe(state, Verified(tokens, parents, jnp.zeros((2, 4, 9)), path, count, tokens))
    assert counts.tolist() == [2, 1, 1, 1]
    assert drafter.nodes == 4 and not drafter.chain


def test_what_is_left_out_is_absent():
    """Of a tree, the kept nodes whose parents are kept; of a pruned template, what the smaller template has."""
    text, length = jnp.array([[8, 3, 0]]), jnp.array([2])
    matrix = jax.random.randint(jax.random.key(0), (9, 2), 0, 9)
    tokens, parents = Limited(RECYCLING, (0, 2, 3, 5)).propose(matrix, text, length)
    whole, _ = RECYCLING.propose(matrix, text, length)
    assert tokens.tolist() == whole[:, jnp.array([0, 2, 3, 5])].tolist()
    assert parents.tolist() == [[-1, 0, -1, 1]]  # the parent of node 3 is node 1
    counts = [9, 6, 3, 5, 1, 2]
    smaller = dataclasses.replace(RECYCLING, template=RECYCLING.template.prune(counts, 4))
    limited = Limited(RECYCLING, most_accepted(counts, 4))
    for ours, theirs in zip(limited.propose(matrix, text, length), smaller.propose(matrix, text, length)):
        np.testing.assert_array_equal(ours, theirs)
    assert Limited(PromptLookup(tokens=3), (0, 1)).chain and not Limited(PromptLookup(tokens=3), (0, 2)).chain


@pytest.mark.parametrize("kept", [(), (1, 2), (0, 2, 2), (0, 6)])
def test_impossible_nodes_are_refused(kept):
    with pytest.raises(ValueError, match="kept"):
        Limited(RECYCLING, kept)


def test_the_width_is_the_fastest(llama, monkeypatch):
    """With times that grow by some law: what is chosen has the most tokens a second, and the text stays the same."""
    model, params = llama
    timed, law = widths.timed_run, {}

    def told(engine, params, state):
        _, ended = timed(engine, params, state)
        return law[engine.nodes] * int(ended.steps.max()), ended

    monkeypatch.setattr(widths, "timed_run", told)
    options = {"widths": (2, 4, 64), "new_tokens": 24}
    nodes = UNION.nodes
    law |= dict.fromkeys((1, 2, 4, nodes), 1.0)
    drafter, found = fit_width(model, params, PROMPTS, UNION, **options)
    assert drafter is UNION and set(found.tokens) == {1, 2, 4, nodes}
    assert 1 == found.tokens[1] < found.tokens[2] < found.tokens[4] < found.tokens[nodes]
    plain = generate(model, params, PROMPTS, max_new_tokens=24, chooser=Sampling(temperature=0))
    whole = generate(model, params, PROMPTS, max_new_tokens=24, chooser=Sampling(temperature=0), drafter=UNION)
    assert found.tokens[nodes] == pytest.approx(48 / sum(whole.steps))
    law |= {4: 1.1, nodes: 1.1 * found.tokens[nodes] / found.tokens[4] * 1.01}
    smaller, again = fit_width(model, params, PROMPTS, UNION, **options)
    assert again.tokens == found.tokens and smaller.nodes == max((2, 4), key=lambda n: found.tokens[n] / law[n])
    made = generate(model, params, PROMPTS, max_new_tokens=24, chooser=Sampling(temperature=0), drafter=smaller)
    assert made.tokens == plain.tokens and sum(made.steps) < 48
    law |= {n: float(n) for n in (2, 4, nodes)}  # as much a token as without drafts
    assert fit_width(model, params, PROMPTS, UNION, **options)[0] is None
    assert Widths({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.04}).best(1.05) == 1


def test_measured_times(llama):
    """Real ones: each width has a time above 0, and a first state is used."""
    model, params = llama
    state = jnp.zeros((32, 2), jnp.int32)
    _, found = fit_width(model, params, PROMPTS, RECYCLING, state=state, widths=(3,), new_tokens=8)
    assert list(found.seconds) == [1, 3, 6] and min(found.seconds.values()) > 0
    with pytest.raises(ValueError, match=r"shape \(33, 2\)"):
        fit_width(model, params, PROMPTS, RECYCLING, state=jnp.zeros((33, 2), jnp.int32), new_tokens=8)

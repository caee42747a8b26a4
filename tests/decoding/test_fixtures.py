"""The engine's parts against the numbers of transformers and of an independent NumPy implementation.

See `tests/goldens/decoding_bricks/README.md`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_llamas import llama_config

from jaxtok.decoding import CachedTokens, Drafter, Engine, PromptLookup
from jaxtok.decoding.engine import ancestors
from jaxtok.interop.huggingface import params_from
from jaxtok.lm.decoder import Decoder
from jaxtok.nn.cache import KVCache


@pytest.mark.parity("decoding_bricks/hf_prompt_lookup*.npz")
def test_prompt_lookup(golden):
    """Cases with one token of budget left are skipped, because here the engine ends a row."""
    checked = 0
    for number in range(golden.config["n"]):
        ids, (longest, tokens, limit, end) = golden[f"in/ids{number}"], golden[f"in/args{number}"].tolist()
        expected = golden[f"out/draft{number}"].tolist()
        if limit == len(ids) + 1:
            assert expected == []
            continue
        drafter = PromptLookup(longest=longest, tokens=tokens, take="first", ends=() if end < 0 else (end,))
        text = jnp.asarray(np.pad(ids, (0, 5)))[None]
        drafted, parents = jax.jit(drafter.propose)((), text, jnp.array([len(ids)]))
        nodes = np.flatnonzero(parents[0] >= 0)
        np.testing.assert_array_equal(nodes, np.arange(1, len(nodes) + 1))
        np.testing.assert_array_equal(parents[0, nodes], nodes - 1)
        assert drafted[0, nodes].tolist() == expected, number
        checked += 1
    assert checked > 3


@dataclasses.dataclass(frozen=True)
class Uniforms:
    """Draws by the inverse of the distribution function, from given uniforms [batch, depth], in float32."""

    draws = False

    def init(self, batch):
        return None

    def choose(self, logits, keys, state):
        number, uniforms = state
        total = jnp.cumsum(jnp.exp(logits), -1)
        drawn = jnp.argmax(total >= uniforms[jnp.arange(len(uniforms)), number][:, None], -1)
        return drawn.astype(jnp.int32), (number + 1, uniforms)


@dataclasses.dataclass(frozen=True)
class Tree(Drafter):
    nodes: int

    chain = False

    def propose(self, state, text, length):
        return state

    def observe(self, state, verified):
        return verified


class Table(CachedTokens):
    """The tree as a model, whose parameters are the logits of the nodes."""

    rewindable = True

    def read(self, params, tokens, cache, positions, mask, sow=False):
        return params, cache, None

    def keep(self, params, tokens, before, after, path, count, chain):
        return after


@pytest.mark.parity("decoding_bricks/numpy_tree_acceptance*.npz")
def test_tree_walks(golden):
    """All walks of the file at once, a row each; the draw at depth d takes uniform d."""
    walks = range(golden.config["n_walks"])
    probs, tokens, uniforms = (
        np.stack([golden[f"in/walk{walk}/{name}"] for walk in walks]) for name in ("probs", "tree_tokens", "uniforms")
    )
    rows, nodes = tokens.shape
    parents = np.tile(golden.config["tree_parent"], (rows, 1))
    engine = Engine(model=Table(None), chooser=Uniforms(), drafter=Tree(nodes))
    state = engine.begin(
        KVCache.init(1, rows, 1, 1, 1),  # the table does not look at it
        np.zeros((rows, 1), np.int32),
        new=nodes,
        rng=jax.random.key(0),
        chooser=(jnp.zeros(rows, jnp.int32), jnp.asarray(uniforms, jnp.float32)),
    )
    state = state.replace(drafter=(jnp.asarray(tokens), jnp.asarray(parents)))
    after = engine.step(jnp.log(jnp.asarray(probs, jnp.float32)), state)
    seen = after.drafter
    for walk in walks:
        path, bonus = golden[f"out/walk{walk}/path"], golden[f"out/walk{walk}/bonus"]
        count = int(seen.count[walk])
        assert seen.path[walk, :count].tolist() == path.tolist()
        assert seen.chosen[walk, count - 1] == bonus
        text = [*tokens[walk, path[1:]].tolist(), int(bonus)]
        assert after.text[walk, 1 : 1 + count].tolist() == text
        likely = np.log(probs[walk, path, text])
        np.testing.assert_allclose(after.logprobs[walk, 1 : 1 + count], likely, atol=1e-5)


@pytest.mark.parity("decoding_bricks/hf_llama_tree_cache*.npz")
def test_tree_of_a_llama(golden, parity):
    """Logits and keys of a tree's nodes, and the cache after a path was accepted; two prompts in one batch."""
    config = llama_config(golden)
    params, model = params_from(config, golden.under("params")), CachedTokens(Decoder(config))
    rows = range(len(golden.config["prompt_lens"]))
    lengths = np.array(golden.config["prompt_lens"])
    prompts = np.zeros((len(rows), lengths.max()), np.int32)
    for row in rows:
        prompts[row, : lengths[row]] = golden[f"in/row{row}/prompt"]
    tokens = np.stack([golden[f"in/row{row}/tree_tokens"] for row in rows])
    path = np.stack([golden[f"in/row{row}/accepted_path"] for row in rows])
    parents = jnp.asarray(np.tile(golden["in/tree_parent"], (len(rows), 1)))
    nodes, accepted = tokens.shape[1], path.shape[1]

    @jax.jit
    def run(params):
        cache = model.model.init_cache(len(rows), int(lengths.max()) + nodes)
        prefill, cache, _ = model.read(params, prompts, cache)
        prompt = cache = cache.truncate(jnp.asarray(lengths))
        seen = ancestors(parents)
        positions = jnp.asarray(lengths)[:, None] + seen.sum(-1) - 1
        logits, tree, _ = model.read(params, tokens, cache, positions, seen)
        padded = jnp.pad(path, ((0, 0), (0, nodes - accepted)))
        kept = model.keep(params, tokens, cache, tree, padded, jnp.full(len(rows), accepted), False)
        return prefill, prompt, seen, logits, tree, kept

    prefill, prompt, seen, logits, tree, kept = run(params)
    np.testing.assert_array_equal(seen[0], golden["mid/tree_mask"].astype(bool))
    np.testing.assert_array_equal(seen[0].sum(-1) - 1, golden["in/tree_depth"])
    np.testing.assert_array_equal(kept.length, lengths + accepted)
    for row, length in enumerate(lengths):
        out = golden.under(f"out/row{row}")
        parity("prefill", prefill[row, :length], out["prefill_logits"], rtol=2e-5)
        parity("tree", logits[row], out["tree_logits"], rtol=2e-5)
        parity("sequence", logits[row, path[row]], out["sequential_logits"][length:], rtol=2e-5)
        for name in ("keys", "values"):
            for what, cache, span in (
                ("prefill", prompt, slice(0, length)),
                ("tree", tree, slice(length, length + nodes)),
                ("compacted", kept, slice(0, length + accepted)),
            ):
                ours = jnp.swapaxes(getattr(cache, name)[:, row, span], 1, 2)
                parity(f"{what} {name}", ours, out[f"{what}_{name}"], rtol=2e-5)
        np.testing.assert_array_equal(kept.positions[0, row, : length + accepted, 0], np.arange(length + accepted))

"""ADED: its table, its search, and its drafts, against the authors' drafter and an independent NumPy implementation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect

from jaxtok.decoding import ADED, ADEDState, CachedTokens, Engine, PromptLookup, Sampling, generate
from jaxtok.decoding.engine import ancestors
from jaxtok.decoding.trigram_table import (
    PROBES,
    TrigramTable,
    build_table,
    corpus_table,
    load_table,
    read_index,
    save_table,
    used_rows,
    write_index,
)
from jaxtok.interop.huggingface import params_from
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.llama import LlamaConfig
from jaxtok.tokenizers import load_tokenizer

GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]
NEW = 12
KEY = jax.random.key(0)


def drafter_of(config, **options) -> ADED:
    """The drafter of a file's config."""
    known = {
        "iterations": config.get("iterations", config.get("mcts_iterations")),
        "length": config.get("sentence_length", config.get("max_draft_depth")),
        "sentences": config.get("top_sentences", config.get("returned_sentences")),
        "choices": config["choices"],
        "nodes": 1 + config.get("tree_cap", 64),
        "exploration_base": config.get("c2", 8.0),
        "window": config.get("window", config.get("update_window")),
        "increment": config.get("increment", config.get("update_increment")),
        "cap": config.get("cap", config.get("update_cap")),
    }
    return ADED(**known | options)


def kept_of(config) -> int:
    return config.get("top_successors", config.get("top_successors_kept"))


def table_of(golden, dtype=np.float32) -> TrigramTable:
    """The file's table as it is searched, with room for all successors that the context may add."""
    config = golden.config
    spare = drafter_of(config).window
    return build_table(golden["in/corpus"], config["vocab"], kept=kept_of(config), spare=spare, dtype=dtype)


def assert_rows(golden, prefix, table: TrigramTable, parity, scores, tolerance):
    keys, successors, found = used_rows(table)
    np.testing.assert_array_equal(keys, golden[f"out/{prefix}keys"])
    width = golden[f"out/{prefix}successors"].shape[1]
    np.testing.assert_array_equal(successors[:, :width], golden[f"out/{prefix}successors"])
    assert (successors[:, width:] == -1).all()
    parity(f"{prefix}scores", found[:, :width], np.maximum(golden[f"out/{prefix}{scores}"], 0), rtol=tolerance)


@pytest.mark.parity("aded/official_search*.npz", "aded/numpy_mcts*.npz")
def test_table_of_a_corpus(golden, parity):
    kept = kept_of(golden.config) if "out/adapted_keys" in golden.arrays else golden.config["vocab"]
    table = build_table(golden["in/corpus"], golden.config["vocab"], kept=kept, spare=0)
    assert_rows(golden, "", table, parity, "probs", 1e-7)


@functools.partial(jax.jit, static_argnames="drafter")
def begin(drafter, table, context):
    return drafter.begin(ADEDState(table), context[None], jnp.array([context.shape[0]]))


@pytest.mark.parity("aded/numpy_mcts*.npz")
def test_adapted_table(golden, parity):
    """In the table of all, in float64, and in a row's own one: the rows that the row has changed."""
    context, drafter = jnp.asarray(golden["in/context"]), drafter_of(golden.config)
    with jax.enable_x64(True):
        table = begin(dataclasses.replace(drafter, shared=True), table_of(golden, np.float64), context).table
        assert_rows(golden, "adapted_", table, parity, "probs64", 1e-15)
    own = jax.tree.map(lambda x: x[0], begin(drafter, table_of(golden), context).own)
    keys, successors, scores = used_rows(own)
    trigrams = {tuple(context[n : n + 2].tolist()) for n in range(len(context) - 2)}
    assert sorted(trigrams) == [tuple(key) for key in keys.tolist()]
    where = [golden["out/adapted_keys"].tolist().index(key) for key in keys.tolist()]
    width = golden["out/adapted_successors"].shape[1]
    np.testing.assert_array_equal(successors[:, :width], golden["out/adapted_successors"][where])
    parity("own scores", scores[:, :width], np.maximum(golden["out/adapted_probs"][where], 0), rtol=1e-6)


@functools.partial(jax.jit, static_argnames="drafter")
def searched(drafter, table, exploration, bigram, uniforms):
    drafter = dataclasses.replace(drafter)
    object.__setattr__(drafter, "exploration", exploration)  # traced, so that one program serves all
    search, selected = drafter.search(bigram, table.rows, uniforms)
    paths, real = drafter.within_budget(*drafter.harvest(search, table.rows))
    return search, selected, paths, real, *drafter.tree(paths, real)


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parity("aded/numpy_mcts*.npz")
def test_search(golden, parity, bits):
    """In float32, the visits are compared for the trigram reward only; rounding decides ties under the other."""
    context, dtype = jnp.asarray(golden["in/context"]), np.float64 if bits == 64 else np.float32
    with jax.enable_x64(bits == 64):
        for reward in ("trigram", "published"):
            drafter = drafter_of(golden.config, reward=reward)
            table = begin(dataclasses.replace(drafter, shared=True), table_of(golden, dtype), context).table
            uniforms = jnp.asarray(golden["in/uniforms"], dtype)
            for release in ("code", "oldcode"):
                exploration = jnp.asarray(golden.config[f"c1_{release}"], dtype)
                out, what = golden.under(f"out/{reward}_{release}"), f"{reward} {release} {bits}"
                search, selected, paths, real, tokens, parents = jax.device_get(
                    searched(drafter, table, exploration, context[-2:], uniforms)
                )
                np.testing.assert_array_equal(paths[real], padded(out["paths"], paths.shape[1], -2), what)
                count = len(out["tree_tokens"])
                assert ((parents >= 0).sum()) == count - 1
                np.testing.assert_array_equal(tokens[1:count], out["tree_tokens"][1:], what)
                np.testing.assert_array_equal(parents[:count], out["tree_parent"], what)
                mask = ancestors(jnp.asarray(parents[None, :count]))[0]
                np.testing.assert_array_equal(mask, out["tree_mask"].astype(bool))
                np.testing.assert_array_equal(mask.sum(-1) - 1, out["tree_depth"])
                if bits == 32 and reward == "published":
                    continue
                count = search.count
                assert count == len(out["mcts_parent"])
                for ours, theirs in (("parent", "parent"), ("previous", "prev"), ("token", "cur"), ("depth", "depth")):
                    np.testing.assert_array_equal(getattr(search, ours)[:count], out[f"mcts_{theirs}"], what)
                np.testing.assert_array_equal(search.visits[:count], out["mcts_visits"], what)
                np.testing.assert_array_equal(selected, out["mcts_selected"], what)
                difference = np.abs(search.total[:count] - out["mcts_score"]).max()
                assert difference < (1e-9 if bits == 64 else 1e-3), what
                parity(f"totals {bits}", search.total[:count], out["mcts_score"], rtol=1e-9 if bits == 64 else 1e-5)
                parity(
                    f"priors {bits}", search.prior[1:count], out["mcts_prior"][1:], rtol=1e-12 if bits == 64 else 1e-6
                )
                assert search.visits[search.parent == 0].sum() == drafter.iterations
                assert search.depth[:count].max() <= drafter.length - 1


def padded(paths, length, fill):
    return np.pad(paths, ((0, 0), (0, length - paths.shape[1])), constant_values=fill)


@pytest.mark.parity("aded/official_search*.npz")
def test_tree_of_the_official_drafter(golden):
    """Nodes, mask, depths and leaves of the sentences that it has returned."""
    drafter = drafter_of(golden.config)
    tree = jax.jit(drafter.tree)
    for run in range(5):
        out = golden.under(f"out/run{run}")
        paths = np.full((drafter.sentences - 1, drafter.length), -2, np.int32)
        paths[: len(out["paths"]), : out["paths"].shape[1]] = out["paths"]
        tokens, parents = map(np.asarray, tree(paths, np.arange(len(paths)) < len(out["paths"])))
        count = 1 + (parents >= 0).sum()
        assert (parents[1:count] >= 0).all()
        mask = np.asarray(ancestors(jnp.asarray(parents[None, :count]))[0])
        np.testing.assert_array_equal(mask, out["mask"].astype(bool))
        depth = mask.sum(-1) - 1
        np.testing.assert_array_equal(depth, out["position_ids"])
        # The tokens, by their numbers among those of their depth.
        of_depth = [list(dict.fromkeys(column[column >= 0].tolist())) for column in paths.T]
        widest = max(map(len, of_depth))
        indices = [1 + (d - 1) * widest + of_depth[d - 1].index(t) for t, d in zip(tokens[1:count], depth[1:])]
        np.testing.assert_array_equal([0, *indices], out["tree_indices"])
        leaves = sorted(set(range(1, count)) - set(parents[:count].tolist()), reverse=True)
        rows = np.full((len(leaves), depth.max() + 1), -1)
        for row, leaf in zip(rows, leaves):
            way = np.flatnonzero(mask[leaf])
            row[: len(way)] = way
        np.testing.assert_array_equal(rows, out["retrieve_indices"])


def prefixes(tokens, parents):
    """The tokens on the way to each node."""
    ways = [()]
    for token, parent in zip(tokens[1:].tolist(), parents[1:].tolist()):
        ways.append((*ways[parent], token) if parent >= 0 else ())
    return {way for way in ways if way}


@functools.partial(jax.jit, static_argnames="drafter")
def drafted(drafter, table, texts, lengths):
    return drafter.propose(drafter.begin(ADEDState(table), texts, lengths), texts, lengths)


@pytest.mark.parity("aded/official_search*.npz")
def test_drafts_of_the_official_drafter(golden):
    """It has drafted every node of ours, and what it drafts always, we draft."""
    drafter = drafter_of(golden.config, reward="published")
    context = jnp.asarray(golden["in/context"])[None]
    tokens, parents = drafted(drafter, table_of(golden), context, jnp.array([context.shape[1]]))
    ours = prefixes(tokens[0], parents[0])
    theirs = {
        tuple(way[way >= 0].tolist()): often
        for way, often in zip(golden["out/node_prefix"], golden["out/node_frequency"])
    }
    assert ours and ours <= {way for way, often in theirs.items() if often > 0}
    assert {way for way, often in theirs.items() if often == 1} <= ours


@dataclasses.dataclass(frozen=True)
class Given:
    """A tree that is given as the state."""

    nodes: int
    chain = False

    def propose(self, state, text, length):
        return state

    def observe(self, state, verified):
        return verified


@pytest.mark.parity("aded/official_generate*.npz")
def test_generation_of_the_official_loop(golden, parity):
    """Its trees with its model: logits and accepted tokens; its greedy text with drafts of ours."""
    size = golden.config["model"]
    config = LlamaConfig(
        num_layers=size["num_hidden_layers"],
        d_model=size["hidden_size"],
        num_heads=size["num_attention_heads"],
        num_kv_heads=size["num_key_value_heads"],
        mlp_dim=size["intermediate_size"],
        vocab_size=size["vocab_size"],
        max_length=size["max_position_embeddings"],
        norm_eps=size["rms_norm_eps"],
        tie_embeddings=size["tie_word_embeddings"],
    )
    model, params = Decoder(config), params_from(config, golden.under("params"))
    prompt, greedy = golden["in/prompt"].tolist(), golden["out/greedy"].tolist()
    table = build_table(golden["in/corpus"], config.vocab_size, spare=16)
    new = greedy[len(prompt) :] if greedy[: len(prompt)] == prompt else greedy
    for shared in (False, True):
        drafter = ADED(choices=golden.config["choices"], shared=shared)
        found = run(model, params, [prompt], drafter=drafter, drafter_state=ADEDState(table), max_new_tokens=len(new))
        assert found.tokens == [new]
        assert found.steps[0] < len(new)
    wide, room, step = 65, 128, 0
    engine = Engine(model=CachedTokens(model), chooser=GREEDY, drafter=Given(wide))
    while f"mid/step{step}/best" in golden.arrays:
        mid = golden.under(f"mid/step{step}")
        before, tree, mask = mid["ids_before"], mid["tree_candidates"], mid["mask"].astype(bool)
        tokens, parents = np.zeros((1, wide), np.int32), np.full((1, wide), -1, np.int32)
        tokens[0, : len(tree)] = tree
        for node in range(1, len(tree)):
            parents[0, node] = np.flatnonzero(mask[node])[-2]
        text = np.zeros((1, room), np.int32)
        text[0, : len(before) + 1] = [*before, tree[0]]
        state = engine.prefill(
            params, text, np.array([len(before) + 1]), new=wide, drafter=(jnp.asarray(tokens), jnp.asarray(parents))
        )
        seen = jax.jit(engine.step)(params, state).drafter
        for row, way in enumerate(mid["retrieve"]):
            way = way[way >= 0]
            parity("logits", seen.logits[0, way], mid["logits"][row, : len(way)], rtol=2e-5)
        accepted = int(mid["accept"])
        assert int(seen.count[0]) == accepted + 1
        expected = mid["cart_candidates"][int(mid["best"]), 1 : accepted + 1].tolist()
        assert seen.chosen[0, :accepted].tolist() == expected
        step += 1
    assert step


def run(model, params, prompts=PROMPTS, **options):
    return generate(model, params, prompts, **{"max_new_tokens": NEW, "chooser": GREEDY} | options)

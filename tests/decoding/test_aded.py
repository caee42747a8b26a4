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
from golden_llamas import llama_config

from jaxtok.decoding import ADED, ADEDState, CachedTokens, Drafter, Engine, PromptLookup, Sampling, generate
from jaxtok.decoding.engine import ancestors
from jaxtok.decoding.trigram_table import (
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
from jaxtok.studies.replay import Nothing, replay
from jaxtok.tokenizers import load_tokenizer

EVIDENCE = {"aded": {"generate, cached": "decoding/test_aded.py::test_drafts_change_nothing"}}

GREEDY = Sampling(temperature=0)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]
NEW = 40
STOP = [31]  # of one length everywhere, so that tests share compiled programs
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


ROOM = 1024  # bigrams, so that the tables of all files have the same shape and share compiled programs


def table_of(golden, dtype=np.float32) -> TrigramTable:
    """The file's table as it is searched, with room for all successors that the context may add."""
    config, kept = golden.config, kept_of(golden.config)
    room, spare = max(ROOM, len(golden["out/keys"])), max(drafter_of(config).window, 28 - kept)
    return build_table(golden["in/corpus"], config["vocab"], kept=kept, spare=spare, room=room, dtype=dtype)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced(ADED):
    """Its exploration may be traced, so that one program serves all."""

    def __post_init__(self):
        pass


@functools.partial(jax.jit, static_argnames="drafter")
def searched(drafter, table, exploration, bigram, uniforms):
    drafter = Traced(**{**vars(drafter), "exploration": exploration})
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
class Given(Drafter):
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
    config = llama_config(golden)
    model, params = Decoder(config), params_from(config, golden.under("params"))
    prompt, greedy = golden["in/prompt"].tolist(), golden["out/greedy"].tolist()
    table = build_table(golden["in/corpus"], config.vocab_size, spare=16)
    new = greedy[len(prompt) :] if greedy[: len(prompt)] == prompt else greedy
    drafter = ADED(choices=golden.config["choices"])
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
    return generate(model, params, prompts, **{"max_new_tokens": NEW, "chooser": GREEDY, "stop_tokens": STOP} | options)


# What holds for any table.

SMALL = ADED(iterations=20, length=4, sentences=8, choices=20, nodes=14)
SAMPLED = {"chooser": Sampling(temperature=1.5, top_k=20), "rng": KEY}
TABLE = {"vocab_size": 32, "kept": 4, "spare": 2, "room": 512}


@pytest.fixture(scope="module")
def llama():
    model = collect("CAUSAL_LMS")["llama"]()
    return model, noisy_params(model)


def tables(texts, seed=0):
    """Tables of one shape: random, empty, of the right text, and always wrong."""
    random = np.random.default_rng(seed).integers(0, 32, (40, 20))
    wrong = [[a, b, (c + 1) % 32] for text in texts for a, b, c in zip(text, text[1:], text[2:])]
    of = {"random": random, "empty": [], "right": texts, "wrong": wrong}
    return {name: build_table(sequences, **TABLE) for name, sequences in of.items()}


def whole(prompts, rows):
    return [[*prompt, *row] for prompt, row in zip(prompts, rows)]


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        pytest.param({}, False, id="greedy, own"),
        pytest.param(SAMPLED, True, id="sampled, shared"),
        pytest.param({}, True, id="greedy, shared", marks=pytest.mark.slow),
        pytest.param(SAMPLED, False, id="sampled, own", marks=pytest.mark.slow),
    ],
)
def test_drafts_change_nothing(llama, options, shared):
    """Rows of different lengths, of which some end at stop tokens, with any table."""
    model, params = llama
    first = run(model, params, **options).tokens
    options = options | {"stop_tokens": [first[0][5]]}
    plain = run(model, params, **options)
    lengths = [len(row) for row in plain.tokens]
    assert plain.steps == lengths and min(lengths) < NEW
    drafter, steps = dataclasses.replace(SMALL, shared=shared), {}
    for name, table in tables(whole(PROMPTS, plain.tokens)).items():
        found = run(model, params, drafter=drafter, drafter_state=ADEDState(table), **options)
        assert found.tokens == plain.tokens, name
        for ours, theirs in zip(found.logprobs, plain.logprobs):
            np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)
        steps[name] = found.steps
    assert sum(steps["right"]) < min(sum(steps["wrong"]), sum(lengths)), steps


@pytest.mark.slow
def test_drafts_of_best_first_change_nothing(llama):
    model, params = llama
    plain = run(model, params)
    drafter = dataclasses.replace(SMALL, maker="best_first")
    state = ADEDState(tables(whole(PROMPTS, plain.tokens))["right"])
    found = run(model, params, drafter=drafter, drafter_state=state)
    assert found.tokens == plain.tokens and max(found.steps) < NEW
    assert run(model, params, drafter=drafter).tokens == plain.tokens  # with a new, empty table


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_in_bfloat16_the_text_is_that_of_passes_of_the_same_width(llama, options):
    """Rounding depends on the tokens of a pass, so the baseline reads as many, which are no draft."""
    model, params = llama
    half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    plain = run(half, params, drafter=Nothing(SMALL.nodes), **options)
    assert plain.steps == [len(row) for row in plain.tokens]
    state = ADEDState(tables(whole(PROMPTS, plain.tokens))["right"])
    found = run(half, params, drafter=SMALL, drafter_state=state, **options)
    assert found.tokens == plain.tokens and sum(found.steps) < sum(plain.steps)


def test_a_row_adapts_alone(llama):
    """With tables of their own, rows draft as they do alone, whatever was asked before; the common table stays."""
    model, params = llama
    table, prompts = tables([])["random"], [[3, 1, 4, 1, 5], PROMPTS[1], [2, 7, 1, 8, 2, 8]]  # padded to one length
    options = {"drafter": SMALL}
    together = run(model, params, prompts, drafter_state=ADEDState(table), **options)
    state, alone = ADEDState(table), []
    for prompt in reversed(prompts):
        found = run(model, params, [prompt], drafter_state=state, **options)
        state = found.state.drafter
        alone[:0] = found.steps
    assert together.steps == alone and sum(alone) < sum(map(len, together.tokens))
    jax.tree.map(np.testing.assert_array_equal, state.table, table)
    assert (state.own.keys >= 0).any()


def test_a_shared_table_adapts_to_all(llama):
    """The kept state helps the next request; the order of the rows does not matter; growth and caps hold."""
    model, params = llama
    drafter = dataclasses.replace(SMALL, shared=True)
    options = {"drafter": drafter}
    before = tables([])["empty"]
    first = run(model, params, drafter_state=ADEDState(before), **options)
    again = run(model, params, drafter_state=first.state.drafter, **options)
    assert again.tokens == first.tokens and sum(again.steps) < sum(first.steps)
    keys, successors, scores = used_rows(first.state.drafter.table)
    assert len(keys) and (scores <= 3.0 + 1e-6).all() and (scores >= 0).all() and scores.max() > 0.1
    assert (np.diff(scores) <= 0).all() and ((successors >= 0) == (scores > 0)).all()
    turned = run(model, params, PROMPTS[::-1], drafter_state=ADEDState(before), **options)
    assert turned.steps == first.steps[::-1]
    jax.tree.map(np.testing.assert_array_equal, turned.state.drafter.table, first.state.drafter.table)


def test_trees_are_within_their_bounds():
    """On random tables: 23 sentences and 65 nodes at most, and all visits of the root go to its children."""
    drafter = ADED()
    for vocab, seed in ((4, 0), (40, 1)):
        corpus = np.random.default_rng(seed).integers(0, vocab, (60, 40))
        table = build_table(corpus, vocab, spare=4, room=ROOM)

        @jax.jit
        def draft(table, bigram):
            uniforms = jax.random.uniform(KEY, (drafter.iterations, drafter.length))
            search, _ = drafter.search(bigram, table.rows, uniforms)
            return search, *drafter.within_budget(*drafter.harvest(search, table.rows))

        search, paths, real = draft(table, jnp.asarray(corpus[0, :2], jnp.int32))
        tokens, parents = drafter.tree(paths, real)
        assert search.visits[0] == search.visits[search.parent == 0].sum() == drafter.iterations
        assert search.depth[: search.count].max() == 3
        assert 0 < real.sum() <= 23 and tokens.shape == (65,)
        different = sum(len(set(path[path >= 0].tolist())) for path in np.asarray(paths)[np.asarray(real)])
        assert different <= drafter.choices
        number = np.arange(65)
        assert (np.asarray(parents) < number).all()
        ways = prefixes(tokens, parents)
        assert len(ways) == (parents >= 0).sum() and max(map(len, ways)) <= 4
        expected = {
            tuple(path[:n].tolist())
            for path in np.asarray(paths)[np.asarray(real)]
            for n in range(1, 5)
            if path[n - 1] >= 0
        }
        assert ways == set(sorted(expected, key=len)[:64]) or len(expected) > 64


@pytest.mark.slow
def test_replayed_steps_are_those_of_the_model(llama):
    """What the study counts without the model, in batches and in turn."""
    model, params = llama
    options = {"stop_tokens": [run(model, params).tokens[0][5]]}
    table = tables([])["random"]
    for drafter in (SMALL, PromptLookup(tokens=5)):
        state = ADEDState(table) if drafter is SMALL else None
        found = run(model, params, drafter=drafter, drafter_state=state, **options)
        assert replay(drafter, PROMPTS, found.tokens, state=state)[0] == found.steps
    drafter, state, steps = dataclasses.replace(SMALL, shared=True), ADEDState(table), []
    for prompt in PROMPTS:
        one = run(model, params, [prompt], drafter=drafter, drafter_state=state, **options)
        state = one.state.drafter
        steps += one.steps
    again, last = replay(drafter, PROMPTS, found.tokens, state=ADEDState(table), in_turn=True)
    assert again == steps
    jax.tree.map(np.testing.assert_array_equal, last.table, state.table)


# The table.


def strengthened(table, trigrams, times=1):
    trigrams = jnp.asarray(trigrams)
    for _ in range(times):
        table = _strengthen(table, trigrams, jnp.ones(len(trigrams), bool), 0.04, 3.0)
    return table


_strengthen = jax.jit(TrigramTable.strengthen)


def test_a_successor_catches_up_at_the_25th_search():
    """Against a score of 1, as measured on the official drafter; then up to the cap, without new rows."""
    table = build_table([[1, 2, 3]], 10, room=40)
    bigram, seen = jnp.array([1, 2]), [[1, 2, 7]]
    table = strengthened(table, seen, 24)
    assert table.rows(bigram)[0][:2].tolist() == [3, 7]
    table = strengthened(table, seen)
    assert table.rows(bigram)[0][:2].tolist() == [7, 3]
    table = strengthened(table, seen, 60)
    successors, scores = table.rows(bigram)
    assert scores[:3].tolist() == [3.0, 1.0, 0.0] and successors[:3].tolist() == [7, 3, -1]
    assert len(used_rows(table)[0]) == 1
    # A trigram that occurs twice counts twice, in any order.
    twice = strengthened(build_table([], 10, room=40), [[1, 2, 7], [4, 5, 6], [1, 2, 7]])
    np.testing.assert_allclose(twice.rows(jnp.array([[1, 2], [4, 5]]))[1][:, 0], [0.08, 0.04], rtol=1e-6)


def test_full_rows_and_full_tables():
    """A new successor takes the place of the lowest score; a table without room counts what it refuses."""
    table = build_table([[1, 2, 3, 1, 2, 3, 1, 2, 4]], 10, kept=2, spare=0, room=40)
    successors, scores = strengthened(table, [[1, 2, 7]]).rows(jnp.array([1, 2]))
    assert successors.tolist() == [3, 7]
    np.testing.assert_allclose(scores, [2 / 3, 0.04], rtol=1e-6)
    full = strengthened(TrigramTable.empty(2, 4), [[1, 2, 3], [2, 3, 4], [3, 4, 5], [3, 4, 6]])
    assert len(used_rows(full)[0]) == 2 and full.refused == 2
    assert not full.rows(jnp.array([3, 4]))[1].any()


def test_many_rows_are_found_and_others_are_not():
    """Rows of a large table, each with its own successors; also bigrams outside of any vocabulary are not found."""
    rng = np.random.default_rng(0)
    corpus = rng.integers(0, 5000, (20, 3000))
    table = build_table(corpus, 5000, kept=3, spare=0)
    keys, successors, scores = used_rows(table)
    assert len(keys) == len({tuple(pair) for row in corpus for pair in zip(row[:-2].tolist(), row[1:-1].tolist())})
    found = table.rows(jnp.asarray(keys))
    np.testing.assert_array_equal(found[0], successors)
    np.testing.assert_array_equal(found[1], scores)
    assert not table.find(jnp.array([[-1, -1], [-1, 5], [4999, 2**31 - 1]]))[1].any()
    assert 2 * len(keys) <= len(table.keys) and len(table.keys) & (len(table.keys) - 1) == 0


def test_files(tmp_path):
    """Saved and read, as safetensors and as the authors' index, a table is the same; damaged files are refused."""
    tokenizer = load_tokenizer("bytes")
    table = strengthened(build_table([[1, 2, 3, 1, 2, 4, 1, 2, 3]], tokenizer.vocab_size), [[1, 2, 9], [7, 8, 9]])
    file = save_table(tmp_path / "table.safetensors", table, tokenizer)
    for again in (load_table(file, tokenizer, room=100), read_index(write_index(tmp_path / "index", table), 300)):
        for ours, theirs in zip(used_rows(again), used_rows(table)):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(FileExistsError, match="nothing was written"):
        save_table(file, table, tokenizer)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        save_table(tmp_path / "table.npz", table, tokenizer)
    other = dataclasses.make_dataclass("Other", ["vocab_size"], namespace={"token_bytes": lambda self, n: b"x"})(260)
    with pytest.raises(ValueError, match="of another tokenizer"):
        load_table(file, other)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_table(tmp_path / "none.safetensors", tokenizer)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged or not a table"):
        load_table(cut, tokenizer)
    index = (tmp_path / "index").read_bytes()
    damaged = {"cut off": index[:-3], "bytes after": index + b"abc", "cut off or not": b"\xff" * 40, "the id 4": index}
    for message, data in damaged.items():
        (tmp_path / "damaged").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_index(tmp_path / "damaged", 4 if data == index else 300)


def test_table_of_files(tmp_path):
    """The trigrams of a folder of documents, none of them across two documents; and of a share of them."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("abcd"[number % 4 :] + "ab")
    tokenizer = load_tokenizer("bytes")
    table = corpus_table(tokenizer, str(tmp_path), split="all", progress=False)
    keys, successors, _ = used_rows(table)
    assert {bytes([*key, *row[row >= 0][:1]]) for key, row in zip(keys.tolist(), successors)} == {
        b"abc", b"bcd", b"cda", b"dab"
    }  # fmt: skip
    half = corpus_table(tokenizer, str(tmp_path), split="all", share=0.25, progress=False)
    assert [bytes(key) for key in used_rows(half)[0].tolist()] == [b"ab", b"bc", b"cd", b"da"][
        : len(used_rows(half)[0])
    ]
    with pytest.raises(ValueError, match="share is 0"):
        corpus_table(tokenizer, str(tmp_path), share=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": 0}, "choices is 0; it must be at least 1"),
        ({"nodes": 1}, "nodes is 1"),
        ({"window": 2}, "window is 2; it must be at least 3"),
        ({"length": 1}, "length is 1"),
        ({"exploration": 0.0}, "exploration is 0.0; it must be above 0"),
        ({"cap": float("nan")}, "cap is nan"),
        ({"increment": -1.0}, "increment is -1.0"),
        ({"maker": "greedy"}, "maker is 'greedy'; it must be one of mcts, best_first"),
        ({"reward": "none"}, "reward is 'none'"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ADED(**options)


def test_impossible_tables_are_refused():
    with pytest.raises(ValueError, match="sequence 1 has the id 10; ids must be 0 to 9"):
        build_table([[1], [3, 10, 4]], 10)
    with pytest.raises(ValueError, match="sequence 0 has the id -1"):
        build_table([[-1, 2]], 10)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        build_table([], 0)
    with pytest.raises(ValueError, match=r"is of TrigramTable; give ADEDState\(table\)"):
        ADED().begin(build_table([], 10), jnp.zeros((1, 4), jnp.int32), jnp.array([2]))
    with pytest.raises(ValueError, match="kept is 0"):
        build_table([[1, 2, 3]], 10, kept=0)

"""Token Recycling: the authors' runs step by step, the template, the matrix, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from causal_lms import noisy_params
from collector import collect
from golden_llamas import llama_config

from jaxtok.decoding import CachedTokens, Engine, Sampling, TokenRecycling, TreeTemplate, Verified, generate
from jaxtok.decoding.engine import ancestors
from jaxtok.decoding.token_recycling import AUTHORS_TREE, TEMPLATES
from jaxtok.interop.huggingface import params_from
from jaxtok.lm.decoder import Decoder

EVIDENCE = {"token_recycling": {"generate, cached": "decoding/test_drafters.py::test_drafts_change_nothing"}}

GREEDY = Sampling(temperature=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(TokenRecycling):
    """Its state also has the outcome of the last draft."""

    def begin(self, state, text, length, logits):
        return state

    def propose(self, state, text, length):
        return super().propose(state[0], text, length)

    def observe(self, state, verified):
        return super().observe(state[0], verified), verified


def leaves_of(parents: np.ndarray) -> list[list[int]]:
    """The nodes on the way to each leaf."""
    found = []
    for leaf in sorted(set(range(len(parents))) - set(parents.tolist())):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, int(parents[path[0]]))
        found.append(path)
    return found


def model_of(golden):
    config = llama_config(golden)
    return Decoder(config), params_from(config, golden.under("params"))


def template_of(golden) -> TreeTemplate:
    paths = golden.config["tree_template"]
    return TreeTemplate.of(paths) if paths else TEMPLATES[golden.config["tree"]]


@pytest.mark.parity("token_recycling/*.npz")
def test_template(golden):
    template = template_of(golden)
    np.testing.assert_array_equal(template.parents, golden["mid/father_index"])
    np.testing.assert_array_equal(template.ranks, golden["mid/candidate_rank"])
    np.testing.assert_array_equal(
        [part.start for part in template.levels] + [template.nodes], golden["mid/level_split"]
    )
    seen = np.asarray(ancestors(jnp.asarray(template.parents)[None])[0])
    np.testing.assert_array_equal(seen, golden["mid/tree_mask"].astype(bool))
    np.testing.assert_array_equal(seen.sum(-1) - 1, golden["mid/tree_depth"])
    leaves = list(itertools.zip_longest(*leaves_of(template.parents), fillvalue=-1))
    np.testing.assert_array_equal(np.transpose(leaves), golden["mid/retrieve_paths"])


@pytest.mark.parity("token_recycling/*.npz")
def test_runs_of_the_authors(golden, parity):
    """Every tree, logit, likeliest token, path, matrix and text of the prompts, which share one matrix in order."""
    (model, params), config = model_of(golden), golden.config
    drafter = Watched(template=template_of(golden), k=config["k"])
    engine = Engine(model=CachedTokens(model), chooser=GREEDY, drafter=drafter)
    propose, step = jax.jit(drafter.propose), jax.jit(engine.step)
    prompts = [golden[f"in/prompt_{number}"] for number in range(config["n_prompts"])]
    room, new = max(map(len, prompts)), max(len(golden[f"out/greedy_{n}"]) for n in range(len(prompts)))
    matrix = drafter.init(1, room, config["model"]["vocab_size"])
    for number, prompt in enumerate(prompts):
        tokens = np.zeros((1, room), np.int32)
        tokens[0, : len(prompt)] = prompt
        state = engine.prefill(params, tokens, np.array([len(prompt)]), new=new, drafter=(matrix, None))
        logits, updates = [], golden[f"mid/matrix_after_{number}"]
        paths = golden["mid/retrieve_paths"][golden[f"mid/best_path_{number}"]]
        for index, count in enumerate(golden[f"out/accept_lengths_{number}"]):
            drafted, parents = propose(state.drafter, state.text, state.length)
            np.testing.assert_array_equal(drafted[0], golden[f"mid/tree_ids_{number}"][index])
            depth = ancestors(parents).sum(-1) - 1
            np.testing.assert_array_equal(state.length - 1 + depth[0], golden[f"mid/positions_{number}"][index])
            state = step(params, state)
            after, verified = state.drafter
            assert verified.count[0] == count
            np.testing.assert_array_equal(verified.logits[0].argmax(-1), golden[f"mid/argmax_{number}"][index])
            ours, theirs = verified.path[0, :count], paths[index, :count]  # they may differ in equal siblings
            np.testing.assert_array_equal(drafted[0, ours], drafted[0, theirs])
            if index < len(updates):  # the authors stop before the update where a row ends
                top = jax.lax.top_k(verified.logits[0], config["k"])[1]
                np.testing.assert_array_equal(top, golden[f"mid/top8_{number}"][index])
                np.testing.assert_array_equal(after, updates[index])
                matrix = after
            logits.append(verified.logits[0])
        reference = golden[f"mid/logits_{number}"]
        parity(f"logits {number}", jnp.stack(logits[: len(reference)]), reference, rtol=2e-5)
        ids = golden[f"out/ids_{number}"]
        np.testing.assert_array_equal(state.text[0, : len(ids)], ids)
        plain = golden[f"out/greedy_{number}"]
        made = state.text[0, : int(state.length[0])]
        np.testing.assert_array_equal(made[: len(plain)], plain[: len(made)])


@pytest.mark.parity("token_recycling/*.npz")
def test_stored_numbers_alone(golden):
    """Trees and matrices from the stored k likeliest tokens, without a model."""
    drafter = TokenRecycling(template=template_of(golden), k=config_k(golden))
    vocab = golden.config["model"]["vocab_size"]
    propose, observe = jax.jit(drafter.propose), jax.jit(drafter.observe)
    matrix = drafter.init(1, 1, vocab)
    for number in range(golden.config["n_prompts"]):
        trees, top = golden[f"mid/tree_ids_{number}"], golden[f"mid/top8_{number}"]
        for index, tree in enumerate(trees):
            tokens, parents = propose(matrix, jnp.asarray(tree[None, :1]), jnp.array([1]))
            np.testing.assert_array_equal(tokens[0], tree)
            if index < len(top):
                ranked = np.full((1, len(tree), vocab), -np.inf, np.float32)
                np.put_along_axis(ranked[0], top[index], -np.arange(drafter.k, dtype=np.float32)[None], -1)
                matrix = observe(matrix, verified(tokens, parents, jnp.asarray(ranked), count=1))
                np.testing.assert_array_equal(matrix, golden[f"mid/matrix_after_{number}"][index])


def config_k(golden) -> int:
    return golden.config["k"]


def verified(tokens, parents, logits, count) -> Verified:
    none = jnp.zeros_like(tokens)
    return Verified(tokens, parents, logits, none, jnp.full(len(tokens), count), none)


def test_the_published_template():
    """Section 2 of the specification: levels of 8, 21, 25, 15, 8 and 3 nodes, 40 leaves, 324 ones in the mask."""
    assert [part.stop - part.start for part in AUTHORS_TREE.levels] == [8, 21, 25, 15, 8, 3]
    assert len(leaves_of(AUTHORS_TREE.parents)) == 40
    assert int(ancestors(jnp.asarray(AUTHORS_TREE.parents)[None]).sum()) == 324


def test_pruned_trees_are_closed():
    counts = np.random.default_rng(0).random(AUTHORS_TREE.nodes)  # a child may count more than its parent
    for size in (1, 2, 11, 40, 81):
        assert AUTHORS_TREE.prune(counts, size).nodes == size
    assert AUTHORS_TREE.prune(np.arange(81, 0, -1), 41).paths == AUTHORS_TREE.paths[:40]
    assert TokenRecycling(template=AUTHORS_TREE.prune(counts, 1)).nodes == 1


def test_the_specifications_example():
    """Section 9: the walk and the update, in which node 4 wins over node 0."""
    drafter = TokenRecycling(template=TreeTemplate.of([(0,), (1,), (0, 0), (0, 1), (1, 0)]), k=3)
    matrix = jnp.zeros((6, 3), int).at[jnp.array([3, 4, 1])].set(jnp.array([[4, 1, 2], [5, 3, 0], [2, 2, 0]]))
    tokens, parents = drafter.propose(matrix, jnp.array([[3]]), jnp.array([1]))
    assert tokens.tolist() == [[3, 4, 1, 5, 3, 2]]
    logits = jax.random.normal(jax.random.key(0), (1, 6, 6))
    top = jax.lax.top_k(logits, 3)[1][0]
    after = drafter.observe(matrix, verified(tokens, parents, logits, 1))
    assert after[0].tolist() == [0, 0, 0]
    for token, node in ((4, 1), (1, 2), (5, 3), (3, 4), (2, 5)):
        assert after[token].tolist() == top[node].tolist()


def test_writes_do_not_depend_on_their_order():
    """Of equal tokens the last node of the last row counts; absent nodes and rows that have stopped write nothing."""
    drafter = TokenRecycling(template=TreeTemplate.chain(3), k=2)
    tokens = jnp.array([[1, 2, 1, 3], [4, 2, 5, 6], [7, 7, 7, 7]])
    parents = jnp.array([[-1, 0, 1, -1], [-1, 0, 1, 2], [-1, 0, 1, 2]])
    logits = jax.random.normal(jax.random.key(0), (3, 4, 9))
    none = jnp.zeros_like(tokens)
    outcome = Verified(tokens, parents, logits, none, jnp.array([1, 2, 0]), none)
    top = jax.lax.top_k(logits, 2)[1]
    expected = np.zeros((9, 2), int)
    for token, row, node in ((1, 0, 2), (4, 1, 0), (2, 1, 1), (5, 1, 2), (6, 1, 3)):
        expected[token] = top[row, node]
    np.testing.assert_array_equal(drafter.observe(drafter.init(3, 1, 9), outcome), expected)
    own = dataclasses.replace(drafter, shared=False)
    after = own.observe(own.init(3, 1, 9), outcome)
    assert after.shape == (3, 9, 2) and not after[2].any() and not after[0, 3].any()
    np.testing.assert_array_equal(after[0, 2], top[0, 1])
    np.testing.assert_array_equal(after[1, 2], top[1, 1])


@pytest.fixture(scope="module")
def llama():
    model = collect("CAUSAL_LMS")["llama"]()
    return model, noisy_params(model)


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]
SMALL = TreeTemplate.of([(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)])


def test_the_prompt_is_recycled_if_asked_for(llama):
    """M[x_t] has the likeliest tokens after x_t in the prompt; a later t wins, and the last token is the first root."""
    model, params = llama
    drafter = TokenRecycling(template=SMALL, update_from_prompt=True, shared=False)
    engine = Engine(model=CachedTokens(model), chooser=GREEDY, drafter=drafter)
    tokens = np.zeros((3, 8), np.int32)
    for row, prompt in zip(tokens, PROMPTS):
        row[: len(prompt)] = prompt
    state = engine.prefill(params, tokens, np.array([len(prompt) for prompt in PROMPTS]), new=4)
    likeliest = jax.jit(lambda tokens: jax.lax.top_k(model.apply({"params": params}, tokens)[0], 8)[1])(tokens)
    expected = np.zeros((3, 32, 8), int)
    for row, prompt in enumerate(PROMPTS):
        for place, token in enumerate(prompt[:-1]):
            expected[row, token] = likeliest[row, place]
    np.testing.assert_array_equal(state.drafter, expected)
    plain = generate(model, params, PROMPTS, max_new_tokens=12, chooser=GREEDY)
    found = generate(model, params, PROMPTS, max_new_tokens=12, chooser=GREEDY, drafter=drafter)
    assert found.tokens == plain.tokens


def test_hot_and_cold(llama, tmp_path):
    """A matrix goes through a file into another generation; its text stays what it is, with fewer steps."""
    model, params = llama
    run = functools.partial(generate, model, params, PROMPTS, max_new_tokens=12, chooser=GREEDY)
    drafter = TokenRecycling(template=SMALL)
    cold = run(drafter=drafter)
    path = drafter.save(tmp_path / "matrix.safetensors", cold.state.drafter, "bytes")
    hot = run(drafter=drafter, drafter_state=drafter.load(path, 32, "bytes"))
    assert hot.tokens == cold.tokens == run().tokens
    assert sum(hot.steps) < sum(cold.steps) < 36
    np.testing.assert_array_equal(drafter.load(path, 32, "bytes"), cold.state.drafter)
    drafter.save(path, hot.state.drafter, "bytes")  # again, over the older one
    np.testing.assert_array_equal(drafter.load(path, 32, "bytes"), hot.state.drafter)


def test_a_file_of_something_else_is_refused(tmp_path):
    drafter, path = TokenRecycling(), tmp_path / "m.safetensors"
    drafter.save(path, jnp.zeros((32, 8), jnp.int32), "bytes")
    for vocab, tokenizer, wrong, message in (
        (33, "bytes", drafter, "vocabulary size 32, but 33"),
        (32, "words", drafter, "tokenizer 'bytes', but 'words'"),
        (32, "bytes", TokenRecycling(k=9), "k 8, but 9"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.load(path, vocab, tokenizer)
    with pytest.raises(ValueError, match="only a shared one"):
        drafter.save(path, jnp.zeros((2, 32, 8), jnp.int32))
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        drafter.save(tmp_path / "m.npz", jnp.zeros((32, 8), jnp.int32))
    with pytest.raises(FileNotFoundError, match=r"does not exist"):
        drafter.load(tmp_path / "none", 32)
    drafter.save(path, jnp.full((32, 8), 32))
    with pytest.raises(ValueError, match="damaged: it has ids outside of 0 to 31"):
        drafter.load(path, 32)
    safetensors.numpy.save_file({"x": np.zeros(2)}, path)
    with pytest.raises(ValueError, match="not the matrix of token_recycling"):
        drafter.load(path, 32)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        drafter.load(path, 32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TreeTemplate.of([(0, 0)]), r"path \(0, 0\), but not \(0,\)"),
        (lambda: TreeTemplate.of([(0,), (0,)]), "twice"),
        (lambda: TreeTemplate.of([()]), "at least one rank"),
        (lambda: TreeTemplate.of([(-1,)]), "each at least 0"),
        (lambda: TreeTemplate(((1,), (0,))), "order of their levels"),
        (lambda: TreeTemplate.chain(0), "length is 0"),
        (lambda: AUTHORS_TREE.prune([1, 2], 2), "2 counts, but the template has 81"),
        (lambda: AUTHORS_TREE.prune([1] * 81, 82), "size is 82"),
        (lambda: TokenRecycling(k=7), "rank 7; k = 7 successors have the ranks 0 to 6"),
        (lambda: TokenRecycling(k=0), "k is 0"),
        (lambda: TokenRecycling().init(1, 4, 7), "k is 8; a vocabulary of 7"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_matrix_of_another_vocabulary_is_refused(llama):
    model, params = llama
    with pytest.raises(ValueError, match=r"shape \(33, 8\).*vocabulary of 32 it must be \(32, 8\)"):
        generate(
            model,
            params,
            PROMPTS,
            max_new_tokens=2,
            chooser=GREEDY,
            drafter=TokenRecycling(template=SMALL),
            drafter_state=jnp.zeros((33, 8), jnp.int32),
        )

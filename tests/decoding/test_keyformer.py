"""Eviction by score: what stays, that drafts change nothing, and how much memory decoding takes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect
from test_engine import KEY, NEW, PROMPTS, SAMPLED, RandomTree, assert_same, greedy, run, texts_of

from jaxtok.decoding import CachedTokens, Engine, Eviction, Keyformer, Sampling, eviction, parse_evictor
from jaxtok.decoding.eviction import EvictionState
from jaxtok.decoding.scorers import EVICTORS, ExpectedAttention, Recency, SnapKV
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.cache import KVCache

EVIDENCE = {"keyformer": {"generate, cached": "decoding/test_keyformer.py::test_drafts_change_nothing"}}

TEXTS = {name: f"{name}:6,every=2" for name in EVICTORS} | {
    "streaming": "streaming:6,sinks=2,every=2",
    "snapkv": "snapkv:6,window=3,recent=3,pool=3,every=2",
    "expected": "expected:6,sinks=1,skip=1,future=8,every=2",
    "new positions": "streaming:6,sinks=2,every=2,positions=new",
    "fixed noise": "keyformer:6,noise=fixed,sinks=1,every=2",
    "a fraction": "keyformer:0.7,every=2",
}
DEFAULT = ("a fraction", "snapkv")


@pytest.fixture(scope="module")
def llama():
    model = collect("CAUSAL_LMS")["llama"]()
    return model, noisy_params(model)


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x not in DEFAULT)) for x in TEXTS])
def test_drafts_change_nothing(llama, name):
    """Trees of right and wrong tokens, for prompts of unequal lengths."""
    model, params = llama
    options = SAMPLED | {"evictor": parse_evictor(TEXTS[name])}
    plain = run(model, params, **options)
    assert plain.tokens != greedy(model, params, **SAMPLED)
    truth = texts_of(PROMPTS, plain.tokens)
    found = run(model, params, drafter=RandomTree(), drafter_state=(truth, KEY), **options)
    assert_same(found, plain, name)
    assert sum(found.steps) < 3 * NEW
    if name == "a fraction":  # of each row's own prompt
        assert run(model, params, PROMPTS[:1], **options).tokens == plain.tokens[:1]


def test_a_budget_for_everything_changes_nothing(llama):
    model, params = llama
    assert_same(run(model, params, evictor=parse_evictor("keyformer:64"), **SAMPLED), run(model, params, **SAMPLED), "")


@pytest.mark.slow
def test_rows_alone_and_in_a_batch(llama):
    """A row's kept tokens do not depend on the others, nor on how far prompts are padded."""
    model, params = llama
    evictor = parse_evictor("keyformer:0.6")
    together = greedy(model, params, [*PROMPTS, [9] * 66], evictor=evictor)
    assert together[:3] == [greedy(model, params, [prompt], evictor=evictor)[0] for prompt in PROMPTS]


# One layer's cache, token by token, beside plain numpy.

STREAM = LlamaConfig(num_layers=1, d_model=8, num_heads=4, num_kv_heads=2, mlp_dim=8, vocab_size=16, max_length=64)


def streamed(evictor: Eviction, length: int = 20, start: int = 9, seed: int = 0):
    """Random keys and queries through an evictor: (its state, the cache, the weights' scores) after each token."""
    keys = jax.random.split(jax.random.key(seed), 2)
    q = jax.random.normal(keys[0], (length, 1, 1, 1, 4, 2)) * 3
    k = jax.random.normal(keys[1], (length, 1, 1, 2, 2))
    cache = KVCache.init(1, 1, evictor.slots + 1, 2, 2)
    state = evictor.init(cache.replace(length=jnp.array([start])))
    cache = cache.replace(positions=jnp.broadcast_to(cache.positions, (1, 1, cache.slots, 2)))

    def body(carry, new):
        state, cache = carry
        queries, key = new
        cache = cache.advance(cache.next_position[:, None]).append(0, key, key)
        if evictor.observes:
            sown = {"attention": {"queries": (queries,)}}
            state = evictor.observe(state, cache, sown, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32))
        before = cache, state
        cache, state = evictor.evict(state, cache, cache.length > state.budget, cache.slots)
        return (state, cache), (before, (cache, state))

    return jax.jit(lambda: jax.lax.scan(body, (state, cache), (q, k))[1])()


def fitted(**fields) -> Eviction:
    return Eviction(**fields).fit(Decoder(STREAM), 10, 15)


def kept_of(cache: KVCache, step: int, head: int) -> set[int]:
    positions = np.asarray(cache.positions)[step, 0, 0, :, head]
    return set(positions[positions >= 0].tolist())


def test_which_tokens_stay():
    """One victim a step is the rule by top-k: the newest stay, and of the others those with the highest scores."""
    evictor = fitted(scorer=Keyformer(), budget=6, recent=2, sinks=1)
    (before, state), (after, _) = streamed(evictor)
    gone = [set(), set()]
    for step in range(20):
        for head in range(2):
            positions = np.asarray(before.positions)[step, 0, 0, :, head]
            scores = dict(zip(positions.tolist(), np.asarray(state.scores)[step, 0, 0, head].tolist()))
            old = sorted((p for p in scores if 1 <= p < step - 1), key=lambda p: (-scores[p], p))
            expected = {0, step - 1, step} | set(old[: 6 - 3]) if step >= 6 else set(range(step + 1))
            kept = kept_of(after, step, head)
            assert kept == expected - {-1} and len(kept) == min(6, step + 1)
            assert not kept & gone[head]
            gone[head] |= set(range(step + 1)) - kept
    assert gone[0] != gone[1]


def test_every_query_gives_a_weight_of_one():
    """The scores of kept and evicted tokens grow by one for each query head that shares the key."""
    (_, state), (_, after) = streamed(fitted(scorer=Keyformer(), budget=6))
    grown = np.asarray(state.scores).sum(-1)[1:] - np.asarray(after.scores).sum(-1)[:-1]
    np.testing.assert_allclose(grown, 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scorer": Keyformer(), "recent": 1.0}, {"scorer": Recency()}),
        ({"scorer": Keyformer(noise="constant")}, {"scorer": Keyformer(noise="none")}),
        (
            {"scorer": Keyformer(noise="none", tau_end=1.0), "budget": 0.6},
            {"scorer": Keyformer(noise="none", tau_end=1.0)},
        ),
        ({"scorer": Recency(), "positions": "new", "recent": 2}, {"scorer": Recency(), "recent": 1}),
    ],
    ids=["no key tokens: a window", "constant noise: none", "a fraction of ten: six", "new positions"],
)
def test_equal_settings(one, other):
    """Compared by keys, which new positions turn: by their lengths."""
    found, expected = (streamed(fitted(**{"budget": 6} | fields))[1][0] for fields in (one, other))
    norms = [np.sort(np.linalg.norm(np.asarray(cache.keys), axis=-1), axis=-2) for cache in (found, expected)]
    np.testing.assert_allclose(*norms, rtol=1e-5, atol=1e-6)
    if one.get("positions") == "new":
        assert all(kept_of(found, step, 0) == set(range(min(6, step + 1))) for step in range(20))


def test_the_order_of_slots_does_not_matter():
    evictor = fitted(scorer=Keyformer(noise="none"), budget=6, recent=2)
    (before, state), (after, _) = streamed(evictor)
    one = jax.tree.map(lambda x: x[10], (before, state))
    cache, held = one
    order = np.random.default_rng(0).permutation(7)
    index = jnp.broadcast_to(jnp.asarray(order), (1, 1, 2, 7))
    mixed = cache.gather(index)
    held = held.replace(scores=jnp.take_along_axis(held.scores, index, -1))
    found, _ = evictor.evict(held, mixed, jnp.array([True]), 7)
    for head in range(2):
        positions = np.asarray(found.positions)[0, 0, :, head]
        assert set(positions[positions >= 0].tolist()) == kept_of(after, 10, head)


@pytest.mark.slow
def test_a_long_prompt_in_blocks(monkeypatch):
    """The scores of a prompt, of which some blocks and rows are padding, are those of token after token."""
    model = Decoder(STREAM)
    params = noisy_params(model)
    tokens = jax.random.randint(KEY, (2, 40), 0, 16)
    engine = Engine(model=CachedTokens(model), chooser=Sampling(temperature=0))
    evictor = Eviction(scorer=Keyformer(), budget=40).fit(model, 40, 10)
    found = {}
    for block in (128, 16):
        monkeypatch.setattr(eviction, "_BLOCK", block)
        jax.clear_caches()
        state = dataclasses.replace(engine, evictor=evictor).prefill(params, tokens, jnp.array([40, 23]), new=10)
        found[block] = np.asarray(state.evictor.scores)
    np.testing.assert_allclose(found[128], found[16], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[16].sum(-1), [[[78, 78], [44, 44]]], rtol=1e-5)  # two query heads a key


def test_evicted_tokens_are_masked_tokens(llama):
    """At original positions, logits are those of full attention in which each head does not see what it evicted."""
    model, params = llama
    evictor = parse_evictor("keyformer:5").fit(model, 64, NEW)
    prompt = jnp.asarray([PROMPTS[1] + PROMPTS[0]])
    engine = Engine(model=CachedTokens(model), chooser=Sampling(temperature=0), evictor=evictor)
    state = engine.prefill(params, prompt, jnp.array([10]), new=8)
    apply = jax.jit(
        lambda tokens, positions, cache: model.apply({"params": params}, tokens, positions=positions, cache=cache)
    )
    whole = model.init_cache(1, 20)
    _, whole = apply(prompt[:, :-1], jnp.arange(9)[None], whole)

    def masked(whole, cache):
        """The whole cache, in which each head sees what it has in the other one."""
        kept = (cache.positions[:, :, None] == jnp.arange(20)[:, None, None]).any(
            3
        )  # [layers, batch, 20, slots, heads]
        return whole.replace(positions=jnp.where(kept, jnp.arange(20)[:, None], -1))

    step = jax.jit(functools.partial(engine.step, params))
    for number in range(8):
        whole = masked(whole, state.model)
        token, at = state.text[:, 9 + number], jnp.array([[9 + number]])
        logits, whole = apply(token[:, None], at, whole)
        state = step(state)
        chosen = int(state.text[0, 10 + number])
        assert chosen == int(logits[0, 0].argmax())
        np.testing.assert_allclose(state.logprobs[0, 10 + number], jax.nn.log_softmax(logits[0, 0])[chosen], atol=1e-5)
    assert (
        len({tuple(sorted(head)) for head in np.moveaxis(state.model.positions[:, 0], 1, 2).reshape(-1, 6).tolist()})
        > 1
    )


def test_new_positions_are_those_of_the_kept_text():
    """With one layer, attention to sinks and window at new positions is the model on these tokens alone."""
    model = Decoder(STREAM)
    params = noisy_params(model)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    found = greedy(
        model, params, [prompt], evictor=parse_evictor("streaming:6,sinks=2,positions=new"), max_new_tokens=4
    )
    text = list(prompt)
    for token in found[0]:
        seen = text[:2] + text[2:][-5:]  # six slots and the newest token
        assert token == greedy(model, params, [seen], max_new_tokens=1)[0][0]
        text.append(token)


def test_each_row_has_its_own_fraction(llama):
    model, _ = llama
    evictor = parse_evictor("keyformer:0.58").fit(model, 64, 4)
    cache = KVCache.init(1, 4, 64, 2, 2).replace(length=jnp.array([49, 0, 9, 63]))
    state = evictor.init(cache)
    assert isinstance(state, EvictionState) and state.budget.tolist() == [29, 1, 5, 37] and evictor.slots == 37


# Memory.

SMOLLM2 = LlamaConfig(
    num_layers=6,
    d_model=576,
    num_heads=9,
    num_kv_heads=3,
    mlp_dim=1536,
    vocab_size=128,
    max_length=8192,
    tie_embeddings=True,
)
"""A fifth of SmolLM2-135M's layers, with its heads."""


def decoding_memory(evictor: str | None, slots: int, batch: int = 1) -> int:
    """Bytes that the compiled loop of decoding needs besides the parameters: its state and temporaries."""
    model = Decoder(SMOLLM2)
    chosen = None if evictor is None else parse_evictor(evictor).fit(model, slots, 64)
    engine = Engine(model=CachedTokens(model), chooser=Sampling(temperature=0), evictor=chosen)
    params = jax.eval_shape(lambda: noisy_params(model))
    new, prompt = (64, 2 * slots) if evictor else (1, slots)
    state = jax.eval_shape(
        lambda params: engine.prefill(params, jnp.zeros((batch, prompt), jnp.int32), jnp.full(batch, prompt), new=new),
        params,
    )
    lowered = Engine._run.lower(engine, params, state.model, state.replace(model=None), jnp.int32(64))
    memory = lowered.compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return total + memory.temp_size_in_bytes - held


def test_memory_is_that_of_the_budget():
    """By the compiler, decoding with Keyformer takes within 3 % of plain decoding whose cache has as many slots."""
    slots = 1024
    ours, plain = decoding_memory("keyformer:1024", slots), decoding_memory(None, slots)
    assert ours < 1.03 * plain, (ours, plain)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keyformer", "NAME:BUDGET"),
        ("keyformer:many", "NAME:BUDGET"),
        ("best:0.5", "NAME is one of keyformer, h2o"),
        ("keyformer:0", "budget is 0; it must be at least 1"),
        ("keyformer:0.0", "budget is 0.0; a fraction"),
        ("keyformer:1.5", "budget is 1.5; a fraction"),
        ("keyformer:-3", "budget is -3"),
        ("h2o:8,recent=9", "together they must be at most the budget of 8"),
        ("streaming:4", "together"),
        ("keyformer:8,recent=0.0", "recent is 0.0; a fraction"),
        ("keyformer:8,evry=2", "its option 'evry' must be one of"),
        ("keyformer:8,every=0", "every is 0"),
        ("keyformer:8,every=x", "wrong kind"),
        ("keyformer:8,noise=pink", "noise is 'pink'"),
        ("keyformer:8,tau_init=0", "tau_init is 0"),
        ("keyformer:8,scope=all", "scope is 'all'"),
        ("keyformer:8,positions=old", "positions is 'old'"),
        ("keyformer:8,noise=fixed,positions=new", "needs the original ones"),
        ("snapkv:64,positions=new", "needs the original ones"),
        ("snapkv:64,pool=4", "pool is 4; it must be odd"),
        ("snapkv:16", "together"),
    ],
)
def test_impossible_evictors_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_evictor(text)


def test_impossible_uses_are_refused(llama):
    model, params = llama
    with pytest.raises(ValueError, match="steps is None; the temperature needs"):
        Keyformer().tau(jnp.arange(3))
    with pytest.raises(ValueError, match="not fitted; call fit"):
        parse_evictor("keyformer:0.5").slots  # noqa: B018
    for scorer in (lambda: SnapKV(window=0), lambda: ExpectedAttention(future=0), lambda: Keyformer(steps=0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            scorer()
    new = parse_evictor("streaming:8,positions=new")
    half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
    with pytest.raises(ValueError, match="the keys are bfloat16"):
        greedy(half, params, evictor=new)
    gpt2 = Decoder(GPT2Config(num_layers=1, d_model=8, num_heads=2, mlp_dim=8, vocab_size=32, max_length=64))
    with pytest.raises(ValueError, match="learned positions, which cannot be turned"):
        greedy(gpt2, params, evictor=new)
    with pytest.raises(ValueError, match="relative position bias"):
        greedy(collect("CAUSAL_LMS")["lexinvariant"](), params, evictor=parse_evictor("h2o:8"))
    with pytest.raises(ValueError, match="not numbers"):
        greedy(model, jax.tree.map(lambda x: x * jnp.nan, params), evictor=parse_evictor("keyformer:4"))

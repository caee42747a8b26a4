"""M2R2's exact statements: shared keys and values, exits that begin as the logit lens, lossless self-speculation."""

from __future__ import annotations

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from causal_lms import noisy_params

from jaxtok.decoding import CachedTokens, Engine, Sampling, generate, parse_evictor
from jaxtok.decoding.expert_prefetch import predict_experts, recall, simulate_expert_prefetch
from jaxtok.decoding.m2r2 import (
    EarlyExit,
    Leaving,
    M2R2Config,
    SelfSpeculation,
    check_exits,
    entry,
    forward_two_streams,
    generate_early_exit,
    init_exits,
    logits_of,
    round_flops,
    to_gate,
    velocity,
)
from jaxtok.door import open_model
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.protocols import FROZEN
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.transfer.m2r2 import M2R2, AddExits, TrainRouter, read_exits, save_exits

SIZES = {**tiny.SIZES, "num_layers": 4}
LLAMA = LlamaConfig(**SIZES, num_kv_heads=2, mlp_dim=32, tie_embeddings=False)
CONFIG = M2R2Config(gates=(2, 3), rank=2, latent=4, gamma=3)
HEAD = dataclasses.replace(CONFIG, exits="head")
LENS = dataclasses.replace(CONFIG, exits="lens")


def case() -> tiny.Case:
    there = tiny.text(LLAMA)
    return dataclasses.replace(there, task=M2R2(task=there.task, config=CONFIG))


TASKS = {"m2r2": case}

EVIDENCE = {"m2r2": {"generate, cached": "decoding/test_m2r2.py::test_self_speculation_is_lossless"}}


def operation() -> tiny.Operation:
    there = case()
    before = dataclasses.replace(there, task=there.task.task)
    return tiny.Operation(AddExits(config=CONFIG, steps=2), before, there.task)


SURGERIES = {"m2r2": operation}


@functools.cache
def model_of(size=LLAMA):
    return Decoder(size), noisy_params(Decoder(size))


def noisy_exits(config=CONFIG, size=LLAMA, scale=0.3, seed=1):
    exits = jax.tree.map(lambda x: x, unboxed(config, size))
    leaves, tree = jax.tree.flatten(exits)
    keys = jax.random.split(jax.random.key(seed), max(len(leaves), 1))
    return jax.tree.unflatten(tree, [x + scale * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


def unboxed(config=CONFIG, size=LLAMA):
    return nn.meta.unbox(init_exits(config, Decoder(size), jax.random.key(0)))


streams = jax.jit(forward_two_streams, static_argnums=(0, 1))
at_gate = jax.jit(to_gate, static_argnums=(0, 1, 4))

TOKENS = jax.random.randint(jax.random.key(2), (2, 9), 0, SIZES["vocab_size"])
PROMPTS = [[3, 1, 4, 1, 5, 9], [7], [2, 6, 5, 3]]


def test_new_exits_are_the_logit_lens():
    """p = h bit for bit in every layer, as U is zero; so the exits' logits are those of h."""
    model, params = model_of()
    exits = unboxed()
    h = entry(model, params, TOKENS)
    for gate in range(2):
        exit, _ = at_gate(CONFIG, model, params, exits, gate, h)
        np.testing.assert_array_equal(exit.state, exit.slow)
        lens, _ = at_gate(LENS, model, params, {}, gate, h)
        both = [logits_of(model, params, state) for state in (exit.state, lens.state)]
        chex.assert_trees_all_close(*both, atol=1e-5)
        h = exit.slow


@pytest.mark.parametrize("config", [CONFIG, HEAD, LENS], ids=lambda config: config.exits)
def test_exits_change_nothing_of_the_model(config):
    """Neither its logits nor its cache: the second stream writes nothing."""
    model, params = model_of()
    apply, cache = jax.jit(model.apply, static_argnames="method"), model.init_cache(2, 12)
    plain, plain_cache = apply({"params": params}, TOKENS, cache=cache)
    out, left = streams(config, model, params, noisy_exits(config), TOKENS, cache=cache)
    chex.assert_trees_all_close(apply({"params": params}, out.final, method="head"), plain, atol=1e-5)
    chex.assert_trees_all_close(left, plain_cache, atol=1e-5)
    uncached, _ = streams(config, model, params, noisy_exits(config), TOKENS)
    chex.assert_trees_all_close(uncached, out, atol=3e-5)
    untouched, same = streams(config, model, params, unboxed(config), TOKENS, cache=cache)
    chex.assert_trees_all_equal((untouched.final, same), (out.final, left))  # bit for bit, whatever the exits are


def test_documents_of_a_row_do_not_see_each_other():
    model, params = model_of()
    segments = jnp.array([[1] * 5 + [2] * 4] * 2)
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3]] * 2)
    exits = noisy_exits()
    both, _ = streams(CONFIG, model, params, exits, TOKENS, positions=positions, segments=segments)
    alone, _ = streams(CONFIG, model, params, exits, TOKENS[:, 5:])
    chex.assert_trees_all_close(both.exits[1].state[:, 5:], alone.exits[1].state, atol=1e-5)


MODELS = {
    "llama": LLAMA,
    "gpt2": GPT2Config(**SIZES, mlp_dim=32),
    "window": dataclasses.replace(LLAMA, window=4),
    "tokenformer": dataclasses.replace(tiny.TOKENFORMER, num_layers=4),
}


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in [*MODELS][1:])])
def test_self_speculation_is_lossless(name):
    """Greedy and sampled, for any exits; one row's prompt is one token, and texts end in the middle of a round."""
    model, params = model_of(MODELS[name])
    noisy = noisy_exits(CONFIG, MODELS[name])
    for config, exits, temperature in ((CONFIG, noisy, 0.0), (CONFIG, noisy, 1.0), (LENS, None, 1.0)):
        chooser = Sampling(temperature=temperature)
        options = {"max_new_tokens": 11, "chooser": chooser, "rng": jax.random.key(5), "stop_tokens": (9,)}
        plain = generate(model, params, PROMPTS, **options)
        drafter = SelfSpeculation(config=config)
        found = generate(model, params, PROMPTS, drafter=drafter, drafter_state=exits, **options)
        assert found.tokens == plain.tokens
        chex.assert_trees_all_close(found.logprobs, plain.logprobs, atol=1e-5)


def test_good_drafts_are_accepted():
    """With blocks that change nothing after the gate, every draft of the lens is right."""
    model, params = model_of()
    blocks = params["stack"]["blocks"]
    silent = jax.tree.map(lambda x: x.at[2:].set(0), {"attention": blocks["attention"], "ffn": blocks["ffn"]})
    params = {**params, "stack": {"blocks": {**blocks, **silent}}}
    options = {"max_new_tokens": 12, "chooser": Sampling(temperature=0)}
    found = generate(model, params, PROMPTS, drafter=SelfSpeculation(config=LENS), **options)
    assert found.tokens == generate(model, params, PROMPTS, **options).tokens
    assert found.steps == [3, 3, 3]  # 12 tokens in rounds of gamma + 1


EVICTORS = [parse_evictor("streaming:6,sinks=1,every=16"), pytest.param(None, marks=pytest.mark.slow)]


@pytest.mark.parametrize("evictor", EVICTORS, ids=["evictor", "without"])
def test_self_speculation_at_the_end_of_the_context(evictor):
    model, params = model_of()
    options = {"max_new_tokens": 26, "chooser": Sampling(temperature=0), "evictor": evictor}
    plain = generate(model, params, PROMPTS, **options)
    drafter, exits = SelfSpeculation(config=CONFIG), noisy_exits()
    assert generate(model, params, PROMPTS, drafter=drafter, drafter_state=exits, **options).tokens == plain.tokens


def test_rows_are_the_same_alone():
    model, params = model_of()
    options = {"max_new_tokens": 8, "chooser": Sampling(temperature=0)}
    options |= {"drafter": SelfSpeculation(config=CONFIG), "drafter_state": noisy_exits()}
    together = generate(model, params, PROMPTS, **options)
    assert generate(model, params, PROMPTS[2:], **options).tokens == together.tokens[2:]


def flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_a_round_costs_what_its_rates_say():
    """The compiler's figure. It counts a loop's body once, so the parts of a round, whose loops are over layers and
    drafts, are unrolled."""
    size = dataclasses.replace(LLAMA, d_model=64, mlp_dim=192, vocab_size=128, max_length=128)
    model = Decoder(dataclasses.replace(size, unroll=4))
    config = M2R2Config(gates=(2,), rank=4, latent=4, gamma=3)
    params = jax.eval_shape(lambda: noisy_params(model))
    exits = jax.eval_shape(lambda: unboxed(config, size))
    slots = 64
    cache = jax.eval_shape(lambda: model.init_cache(1, slots))
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    states = jax.ShapeDtypeStruct((1, 4, 64), jnp.float32)

    def draft(params, exits, token, cache):
        h = entry(model, params, token, cache=cache)
        exit, cache = to_gate(config, model, params, exits, 0, h, cache=cache)
        return logits_of(model, params, exit.state), exit.slow, cache

    def slow(params, token, cache):
        h = entry(model, params, token, cache=cache)
        return model.apply({"params": params}, h, layers=(0, 2), cache=cache, method="hidden")

    def verify(params, hidden, cache):
        positions = jnp.arange(4)[None]
        return CachedTokens(model).resume(params, hidden, cache, positions, 2)

    found = 3 * flops(draft, params, exits, one, cache) + flops(slow, params, one, cache)
    found += flops(verify, params, states, cache)
    assert found == pytest.approx(round_flops(config, model, slots), rel=0.1)


def test_early_exit():
    """No token leaves at threshold 1, and then the text is the model's own; at 0 all leave at the first gate. Rows do
    not depend on each other, and a token that leaves has, in the layers it skips, the keys and values of its state."""
    model, params = model_of()
    everything = {FROZEN: params, "exits": noisy_exits()}
    run = functools.partial(generate_early_exit, model, everything, config=CONFIG, max_new_tokens=8)
    plain = generate(model, params, PROMPTS, max_new_tokens=8, chooser=Sampling(temperature=0))
    none = run(PROMPTS, threshold=1.0)
    assert none.tokens == plain.tokens and none.mean_layers == 4
    early = run(PROMPTS, threshold=0.0)
    assert early.mean_layers == 2 and early.exits.tolist() == [[8, 0, 0]] * 3
    some = run(PROMPTS, threshold=0.1, by="confidence")
    assert 2 <= some.mean_layers <= 4
    assert run(PROMPTS[2:], threshold=0.1, by="confidence").tokens == some.tokens[2:]


def test_a_token_that_left_is_seen_in_all_layers():
    """Its keys and values after the gate are those that the frozen projections make of p."""
    model, params = model_of()
    exits = noisy_exits()
    reader = EarlyExit(model, CONFIG)
    cache = model.init_cache(2, 4)
    before = Leaving(cache, jnp.zeros((2, 3), jnp.int32), threshold=jnp.zeros(2))
    live = jnp.array([True, False])
    logits, after, ready = jax.jit(reader.step)({FROZEN: params, "exits": exits}, TOKENS[:, 0], before, live)
    exit, _ = to_gate(CONFIG, model, params, exits, 0, entry(model, params, TOKENS[:, :1]))
    chex.assert_trees_all_close(logits[0], logits_of(model, params, exit.state)[0, 0], atol=1e-5)
    assert after.cache.length.tolist() == [1, 0] and ready.tolist() == live.tolist()
    blocks = params["stack"]["blocks"]
    for layer in (2, 3):
        normed = exit.state[0, 0] / jnp.sqrt(jnp.mean(exit.state[0, 0] ** 2) + LLAMA.norm_eps)
        value = normed * blocks["norm_attention"]["scale"][layer] @ blocks["attention"]["value"]["kernel"][layer]
        chex.assert_trees_all_close(after.cache.values[layer, 0, 0].ravel(), value, atol=1e-5)


@pytest.mark.slow
def test_two_stages_of_a_run(tmp_path):
    """The loop trains a model, then its exits, then the router; what is frozen stays bit for bit."""
    (tmp_path / "texts").mkdir()
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"document {number} says " + "abc " * 20)
    there = case()
    base = dataclasses.replace(there.task.task, model=dataclasses.replace(LLAMA, vocab_size=384))
    data = dataclasses.replace(there.data, corpus=str(tmp_path / "texts"), batch_size=2, eval_limit=1)
    experiment = Experiment(
        task=base,
        data=data,
        train=TrainConfig(steps=1, checkpoint_every=10, keep_checkpoints=3, tensorboard=False),
        mesh=MeshConfig(data=1),
        stages=(AddExits(config=CONFIG, steps=2), TrainRouter(steps=4)),  # its last matrix begins with zeros
        workdir=str(tmp_path / "run"),
    )
    found = train(experiment, quiet=True)
    one, two, three = (open_model(tmp_path / f"run/checkpoints/{step}").params for step in (1, 3, 7))
    chex.assert_trees_all_equal(one, two[FROZEN], three[FROZEN])
    chex.assert_trees_all_equal(two["exits"]["adapters"], three["exits"]["adapters"])
    new = unboxed(CONFIG, base.model)
    assert any(np.any(two["exits"]["adapters"][name] != new["adapters"][name]) for name in ("attn_up", "mlp_up"))
    moved = jax.tree.map(lambda a, b: np.any(a != b), two["exits"]["router"], three["exits"]["router"])
    assert all(jax.tree.leaves(moved)) and found.task.train == "router"
    assert {"agreement_2", "kl_3", "router_right_2", "expected_tokens"} <= found.metrics.keys()


def test_parameters_are_as_many_as_the_paper_of_adapters_says():
    """4 r d + d an accelerated layer; the head has as many, but for its norms."""
    count = {
        kind: sum(x.size for x in jax.tree.leaves(unboxed(config)["adapters" if kind == "m2r2" else "heads"]))
        for kind, config in (("m2r2", CONFIG), ("head", HEAD))
    }
    r, d, layers = CONFIG.rank, LLAMA.d_model, CONFIG.gates[-1]
    assert count["m2r2"] == layers * (4 * r * d + d) and count["head"] == layers * 4 * r * d + 2 * d
    z = CONFIG.latent
    router = sum(x.size for x in jax.tree.leaves(unboxed()["router"]))
    assert router == d * z + 5 * z + 4 * z * z + 2 * z + 1 + d
    assert CONFIG.rates(4) == (2.0, 2.0)


def test_velocity():
    model, params = model_of()
    found = velocity(CONFIG, model, params, unboxed(), TOKENS)
    assert {name: x.shape for name, x in found.items()} == {"change": (4,), "slow": (4,), "fast": (3,)}
    np.testing.assert_allclose(found["fast"], found["slow"][:3], atol=1e-5)
    assert found["slow"][-1] == pytest.approx(1)


@pytest.mark.parametrize("config", [CONFIG, HEAD], ids=lambda config: config.exits)
def test_exits_are_saved_apart_from_their_model(config, tmp_path):
    _, params = model_of()
    exits = noisy_exits(config)
    file = save_exits(tmp_path / "exits.safetensors", config, params, exits)
    stored, read = read_exits(file, params)
    assert stored == config
    chex.assert_trees_all_equal(read, exits)
    with pytest.raises(FileExistsError, match="exists already"):
        save_exits(file, config, params, exits)
    with pytest.raises(ValueError, match="another model"):
        read_exits(file, {**params, "embedding": params["embedding"] + 1})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_exits(tmp_path / "none", params)


def test_the_simulator_adds_up():
    """All time is compute or stalls, and what is loaded at no cost never stalls."""
    rng = np.random.default_rng(0)
    required = np.stack([[rng.choice(8, 2, replace=False) for _ in range(3)] for _ in range(10)])
    for predicted in (None, required, rng.integers(0, 8, required.shape)):
        found = simulate_expert_prefetch(required, predicted, capacity=3, t_load=0.7, lead=2)
        assert found.hits + found.misses == required.size
        assert found.total_time == pytest.approx(10 * 3 + found.stall.sum())
        assert simulate_expert_prefetch(required, predicted, capacity=3, t_load=0).stall.sum() == 0
    states = jnp.eye(4)[None] * jnp.arange(3)[:, None, None]  # [layers, tokens, d]
    predicted = predict_experts(states, lambda layer, x: x * (layer + 1), lead=2, top_k=1, num_layers=3)
    assert predicted.shape == (1, 4, 1)
    assert recall(jnp.array([[1, 2], [3, 4]]), jnp.array([[2, 5], [4, 3]])) == 0.75


def test_bad_input():
    model, params = model_of()
    for fields, message in (
        ({"gates": ()}, "gates is"),
        ({"gates": (2, 2)}, "rising order"),
        ({"gates": (0, 2)}, "from 1 on"),
        ({"rank": 0}, "rank is 0"),
        ({"gamma": 0}, "gamma is 0"),
        ({"latent": -1}, "latent is -1"),
        ({"exits": "medusa"}, "exits is 'medusa'"),
        ({"router": "none"}, "router is 'none'"),
    ):
        with pytest.raises(ValueError, match=message):
            M2R2Config(**fields)
    with pytest.raises(ValueError, match="below the model's num_layers = 4"):
        M2R2Config(gates=(4,)).check(model)
    with pytest.raises(ValueError, match="below the model's num_layers = 4"):
        AddExits(config=M2R2Config(gates=(2, 4))).task(LanguageModeling(model=LLAMA), None)
    with pytest.raises(ValueError, match="pre-norm"):
        CONFIG.check(Decoder(dataclasses.replace(LLAMA, post_norm=True)))
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="threshold is"):
            generate_early_exit(
                model, {"exits": noisy_exits()}, PROMPTS, config=CONFIG, threshold=threshold, max_new_tokens=2
            )
    with pytest.raises(ValueError, match="drafter_state"):
        generate(model, params, [[1]], max_new_tokens=2, chooser=Sampling(temperature=0), drafter=SelfSpeculation())
    with pytest.raises(ValueError, match="adapters/attn_down has the shape"):
        check_exits(dataclasses.replace(CONFIG, rank=3), model, noisy_exits())
    with pytest.raises(ValueError, match="no parameters"):
        M2R2(task=LanguageModeling(model=LLAMA), config=LENS)
    with pytest.raises(ValueError, match="has no exits"):
        TrainRouter().task(LanguageModeling(model=LLAMA), None)
    with pytest.raises(ValueError, match="capacity is 1"):
        simulate_expert_prefetch(np.zeros((1, 1, 2), int), capacity=1, t_load=1)
    with pytest.raises(ValueError, match="predicted has the id 8"):
        simulate_expert_prefetch(np.zeros((1, 1, 2), int), np.full((1, 1, 2), 8), capacity=2, t_load=1, experts=8)


def test_evictors_that_observe_are_refused():
    model, _ = model_of()
    with pytest.raises(ValueError, match="runs some layers itself"):
        Engine(model=CachedTokens(model), drafter=SelfSpeculation(), evictor=parse_evictor("h2o:6"))

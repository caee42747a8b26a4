"""SkipDecode against its fixtures, and what its schedules guarantee: nesting, caching, batching and cost."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings

import causal_lms
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from causal_lms import noisy_params
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.data.text import TextData
from jaxtok.decoding import PromptLookup, Sampling, generate, parse_evictor
from jaxtok.decoding.skipdecode import Schedule, SkipDecode, solve_budget
from jaxtok.interop.huggingface import params_from, params_to
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.lexinvariant import LexinvariantConfig, LexinvariantModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.lm.opt import OPTConfig
from jaxtok.nn.losses import cross_entropy
from jaxtok.studies.skipdecode import step_flops
from jaxtok.transfer.skipdecode import SkipDecoding, SkipLayers, without_skipped

SHORT = Schedule(max_layers=4, min_layers=2, prompt=3, length=9)
LONGER = Schedule(max_layers=4, min_layers=2, prompt=3, length=23, custom=(4, 4, 3, 3, 2, 2, *(2,) * 14))
BODY = LlamaConfig(**causal_lms.LLAMA | {"num_layers": 4}, num_kv_heads=2, mlp_dim=24)
TASK_BODY = GPT2Config(**tiny.SIZES | {"num_layers": 3}, mlp_dim=32)


def case() -> tiny.Case:
    task = SkipDecoding(model=TASK_BODY, schedule=Schedule(max_layers=3, min_layers=1, prompt=3, length=9))
    return dataclasses.replace(tiny.text(TASK_BODY), task=task)


TASKS = {"skipdecode": case, "opt": lambda: tiny.text(OPTConfig(**tiny.SIZES, mlp_dim=32))}

CAUSAL_LMS = {
    "skipdecode": lambda: SkipDecode(Decoder(BODY), LONGER),
    "opt": lambda: Decoder(OPTConfig(**causal_lms.SIZES | {"rotary_fraction": 0.0}, mlp_dim=24)),
}

SURGERIES = {
    "skipdecode": lambda: tiny.Operation(
        SkipLayers(schedule=case().task.schedule, steps=2),
        tiny.text(TASK_BODY),
        LexinvariantModeling(model=LexinvariantConfig(**tiny.SIZES)),
    )
}

GREEDY = Sampling(temperature=0)


@functools.partial(jax.jit, static_argnames=("model", "method", "layers"))
def apply(model, params, x, method=None, **options):
    return model.apply({"params": params}, x, **({"method": method} if method else {}), **options)


# Fixtures.


def scheduled(golden) -> SkipDecode:
    config = golden.config
    sizes = config["model"]
    model = OPTConfig(
        num_layers=sizes["layers"],
        d_model=sizes["width"],
        num_heads=sizes["heads"],
        mlp_dim=sizes["ffn"],
        vocab_size=sizes["vocab"],
        max_length=golden["params/model.decoder.embed_positions.weight"].shape[0] - 2,
        norm_eps=config["layer_norm_eps"],
    )
    schedule = Schedule(
        max_layers=config["max_exit"],
        min_layers=config["min_exit"],
        warmup=config["warmup_layers"],
        prompt=config["prompt_len"],
        length=config["sequence_length"],
        prompt_budget=config["prompt_budget"],
    )
    return SkipDecode(Decoder(model), schedule)


@pytest.mark.parity("skipdecode/hf_opt_*.npz")
def test_parallel_form(golden, parity):
    model = scheduled(golden)
    params, ids = params_from(model.config, golden.under("params")), golden["in/ids"]
    layers, positions = model.config.num_layers, ids.shape[1]
    np.testing.assert_array_equal(model.schedule.budgets(positions, layers), golden["out/budgets"])
    active = model.schedule.active(positions, layers)
    np.testing.assert_array_equal(active, golden["out/active_layers"])
    np.testing.assert_array_equal(active.sum(0), golden["out/cache_lengths"])
    parity("full logits", apply(model.model, params, ids)[0], golden["out/full_logits"], rtol=2e-5)

    @jax.jit
    def states(params):
        """After the embedding, and after each layer; the last one is followed by the final norm."""

        def hidden(x, *part):
            return model.apply({"params": params}, x, method="hidden", layers=part)[0]

        embedded = model.apply({"params": params}, ids, method="embed")
        found = [hidden(embedded, 0, 0), hidden(embedded, 0, 1)]  # positions are added before the first layer
        for layer in range(1, layers):
            found.append(hidden(found[-1], layer, layer + 1))
        return found, hidden(golden["mid/hidden"][-1], layers, layers)

    ours, last = states(params)
    for layer, theirs in enumerate([*golden["mid/hidden"][:-1], last]):
        parity("hidden states", ours[layer], theirs, rtol=2e-5)

    task, prompt = SkipDecoding(model=model.config, schedule=model.schedule), golden.config["prompt_len"]
    n = positions - 1
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "positions": np.broadcast_to(np.arange(n), (len(ids), n)),
        "segments": np.ones((len(ids), n), np.int32),
        "mask": np.ones((len(ids), n), np.float32),
        "bytes": np.ones((len(ids), n), np.int32),
    }
    assert task.counts(batch).sum() == len(ids) * (positions - prompt)

    @jax.jit
    def loss(params):
        return jax.value_and_grad(lambda p: task.loss(p, batch, jax.random.key(0), 0)[0])(params)

    found, gradient = loss(params)
    parity("logits", apply(model, params, ids)[0], golden["out/logits"], rtol=2e-5)
    parity("loss", found, golden["out/loss"], rtol=1e-6)
    theirs, ours = golden.under("grad"), params_to(model.config, gradient)
    theirs = {name: array for name, array in theirs.items() if name in ours}  # the head is the embedding again
    largest = max(np.abs(array).max() for array in theirs.values())
    unit = {"": np.ones(1)}  # so that errors are relative to the largest entry of all
    for name in ours:
        error = np.abs(ours[name] - theirs[name]).max() / largest
        parity("gradient", {"": unit[""] + error}, unit, rtol=1e-5)
    for layer in set(range(layers)) - set(np.flatnonzero(active.any(0)).tolist()):
        assert not any(np.any(a[layer]) for a in jax.tree.leaves(gradient["stack"])), "this layer never runs"


@pytest.mark.parity("skipdecode/hf_opt_*.npz")
def test_incremental_form(golden, parity):
    model = scheduled(golden)
    params, ids = params_from(model.config, golden.under("params")), golden["in/ids"]
    cache, parts = model.init_cache(*ids.shape), []
    for position in range(ids.shape[1]):
        logits, cache = apply(model, params, ids[:, position : position + 1], cache=cache)
        parts.append(logits)
    parity("logits with a cache", jnp.concatenate(parts, 1), golden["out/logits_incremental"], rtol=2e-5)
    written = np.abs(np.asarray(cache.keys)).sum((1, 3, 4)) > 0  # [layers, slots]
    np.testing.assert_array_equal(written, golden["out/active_layers"].T)

    prompt, theirs = golden.config["prompt_len"], golden["out/greedy_ids"]
    new = theirs.shape[1] - prompt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fixture may go past the planned length
        made = generate(model, params, theirs[:, :prompt].tolist(), max_new_tokens=new, chooser=GREEDY)
    np.testing.assert_array_equal(made.tokens, theirs[:, prompt:])


@pytest.mark.parity("skipdecode/schedules*.npz")
def test_schedules(golden):
    for i in range(golden.config["n_rows"]):
        layers, w, low, high, prompt, length, positions = golden[f"in/row{i}"].tolist()
        schedule = Schedule(max_layers=high, min_layers=low, warmup=w, prompt=prompt, length=length)
        np.testing.assert_array_equal(schedule.budgets(positions, layers), golden[f"out/budgets{i}"])
        np.testing.assert_array_equal(schedule.active(positions, layers), golden[f"out/active{i}"])
        assert schedule.mean_layers() == pytest.approx(float(golden[f"out/mean_gen_layers{i}"]), rel=1e-12)
        assert layers / schedule.mean_layers() == pytest.approx(float(golden[f"out/layer_speedup{i}"]), rel=1e-12)


# Schedules.


@st.composite
def schedules(draw, layers=st.integers(1, 12)):
    count = draw(layers)
    high = draw(st.integers(1, count))
    low = draw(st.integers(1, high))
    warmup = draw(st.integers(0, low))
    prompt = draw(st.integers(1, 5))
    decay = draw(st.sampled_from(["linear", "cosine", "power", "step"]))
    schedule = Schedule(
        max_layers=high,
        min_layers=low,
        warmup=warmup,
        prompt=prompt,
        length=prompt + draw(st.integers(1, 20)),
        decay=decay,
        power=draw(st.sampled_from([0.5, 2.0])),
        plateaus=draw(st.integers(2, 5)),
        prompt_budget=draw(st.sampled_from(["max_exit", "all"])),
        skip=draw(st.sampled_from(["lower", "top"])),
    )
    return count, schedule


@given(schedules())
@settings(max_examples=200, deadline=None)
def test_sets_of_layers_are_nested(drawn):
    layers, schedule = drawn
    positions = schedule.length + 3
    budgets, active = schedule.budgets(positions, layers), schedule.active(positions, layers)
    assert (np.diff(budgets) <= 0).all() and budgets[-1] == schedule.min_layers
    assert (budgets[: schedule.prompt] == (layers if schedule.prompt_budget == "all" else schedule.max_layers)).all()
    np.testing.assert_array_equal(active.sum(1), budgets)
    assert not (active[1:] & ~active[:-1]).any()  # so that the positions that ran a layer are the first ones
    first = range(schedule.warmup) if schedule.skip == "lower" else range(schedule.min_layers)
    assert active[:, list(first)].all()
    stages = schedule.stages(positions, layers)
    assert len(stages) <= schedule.max_layers - schedule.min_layers + 1 + (schedule.prompt_budget == "all")
    assert [s.start for s in stages[1:]] == [s.end for s in stages[:-1]] and stages[-1].end == positions
    for start, end, members in stages:
        np.testing.assert_array_equal(np.flatnonzero(active[start]), members)
        assert (active[start:end] == active[start]).all()


def test_the_worked_example():
    schedule = Schedule(max_layers=7, min_layers=3, prompt=6, length=18)
    assert schedule.active(18, 8).sum(0).tolist() == [18, 0, 8, 11, 14, 17, 18, 18]
    assert [stage[:2] for stage in schedule.stages(18, 8)] == [(0, 8), (8, 11), (11, 14), (14, 17), (17, 18)]
    assert round(schedule.mean_layers(), 2) == 5.17


def test_other_decays():
    def after(**options):
        return Schedule(max_layers=8, min_layers=2, prompt=1, length=13, **options).generated().tolist()

    assert after(decay="step", plateaus=2) == [8] * 6 + [2] * 7
    assert after(decay="step", plateaus=4) == [8] * 3 + [6] * 3 + [4] * 3 + [2] * 4
    assert after(decay="cosine")[:2] == [8, 8] and after(decay="cosine")[-2:] == [2, 2]
    early, late = (sum(after(decay="power", power=p)) for p in (0.5, 2.0))
    assert early < sum(after()) < late
    assert after(custom=(8, 8, 5, 2)) == [8, 8, 5, 2, 2]


def test_budgets_are_solved_for_a_speed():
    assert solve_budget(24, 3, 1, 2) == (11, 5)
    assert solve_budget(32, 2, 1, 2) == (21, 11)
    for layers, speed, w in itertools.product((4, 24), (1.0, 2.5, 4.0), (0, 1, 3)):
        high, low = solve_budget(layers, speed, w)
        assert max(w, 1) <= low <= high <= layers
    with pytest.raises(ValueError, match=r"speedup is 0.5; it must be from 1 to num_layers = 4"):
        solve_budget(4, 0.5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_layers": 1, "warmup": 2}, r"min_layers is 1; it must be at least 2"),
        ({"min_layers": 0, "warmup": 0}, r"min_layers is 0; it must be at least 1"),
        ({"min_layers": 5}, r"max_layers is 4; it must be at least min_layers = 5"),
        ({"warmup": -1}, r"warmup is -1; it must be 0 or more"),
        ({"prompt": 0}, r"prompt is 0; it must be at least 1"),
        ({"prompt": 9}, r"length is 9; it must be more than prompt = 9"),
        ({"custom": (4, 2, 3)}, r"custom is \(4, 2, 3\); a budget must not rise"),
        ({"custom": (5, 2)}, r"custom is \(5, 2\); budgets must be from min_layers = 2 to max_layers = 4"),
        ({"custom": (3.5, 2)}, r"custom is \(3.5, 2\); budgets are whole numbers"),
        ({"decay": "sudden"}, r"decay is 'sudden'; it must be one of linear, cosine"),
        ({"power": 0.0}, r"power is 0.0; it must be positive"),
        ({"plateaus": 1}, r"plateaus is 1; it must be at least 2"),
        ({"skip": "middle"}, r"skip is 'middle'; it must be one of lower, top"),
    ],
)
def test_impossible_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHORT, **options)


def test_a_schedule_of_more_layers_than_the_model_has():
    with pytest.raises(ValueError, match=r"schedule.max_layers is 5; .* at most the model's num_layers = 4"):
        SkipDecode(Decoder(BODY), dataclasses.replace(SHORT, max_layers=5))
    with pytest.raises(ValueError, match=r"schedule.max_layers is 4; .* at most the model's num_layers = 3"):
        SkipDecoding(model=TASK_BODY, schedule=SHORT)


# Models.

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [8]]
NEW = 8


@pytest.fixture(scope="module")
def params():
    return noisy_params(Decoder(BODY))


VARIANTS = {
    "paper": SHORT,
    "no warm-up": dataclasses.replace(SHORT, warmup=0, min_layers=1),
    "warm-up only at last": dataclasses.replace(SHORT, warmup=2, min_layers=2, custom=(3, 3, 2)),
    "a layer never runs": dataclasses.replace(SHORT, max_layers=3, min_layers=1),
    "whole prompt": dataclasses.replace(SHORT, max_layers=2, min_layers=1, prompt_budget="all"),
    "early termination": dataclasses.replace(SHORT, skip="top"),
    "early termination, always": dataclasses.replace(SHORT, skip="top", max_layers=3),
}


LIKE_ANOTHER = ("paper", "warm-up only at last", "whole prompt", "early termination, always", "a layer never runs")


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(schedule, marks=[pytest.mark.slow] * (name in LIKE_ANOTHER), id=name)
        for name, schedule in VARIANTS.items()
    ],
)
def test_generation_is_the_parallel_form(params, schedule):
    """Of each row from the end of its own prompt on, as if the row was alone."""
    model = SkipDecode(Decoder(BODY), schedule)
    made = generate(model, params, PROMPTS, max_new_tokens=6, chooser=GREEDY)
    rows = np.zeros((3, 16), np.int32)
    for row, (prompt, new) in enumerate(zip(PROMPTS, made.tokens)):
        rows[row, : len(prompt) + len(new)] = prompt + new
    logits, _ = apply(model, params, rows, prompts=np.array([3, 7, 1]))
    other, _ = apply(model, params, rows)
    logprobs = jax.nn.log_softmax(logits)
    for row, (prompt, new) in enumerate(zip(PROMPTS, made.tokens)):
        at = len(prompt) - 1 + np.arange(len(new))
        assert logits[row, at].argmax(-1).tolist() == new
        np.testing.assert_allclose(logprobs[row, at, np.array(new)], made.logprobs[row], atol=2e-4)
    # The first prompt has the schedule's length; for the others that matters, so the test can fail.
    chex.assert_trees_all_close(other[0], logits[0], rtol=1e-5, atol=1e-5)
    assert np.abs(other[1, 7:12] - logits[1, 7:12]).max() > 1e-2


def test_the_whole_budget_is_the_model_bit_for_bit(params):
    schedule = dataclasses.replace(SHORT, min_layers=4)
    tokens = jax.random.randint(jax.random.key(1), (3, 12), 0, 32)
    plain, model = Decoder(BODY), SkipDecode(Decoder(BODY), schedule)
    np.testing.assert_array_equal(apply(model, params, tokens)[0], apply(plain, params, tokens)[0])
    made = [generate(m, params, PROMPTS, max_new_tokens=6, chooser=GREEDY) for m in (plain, model)]
    assert made[0].tokens == made[1].tokens and made[0].logprobs == made[1].logprobs


def test_a_row_does_not_depend_on_its_neighbours(params):
    """Not on their prompts' lengths, nor on when they stop, nor on drafts."""
    model = SkipDecode(Decoder(BODY), SHORT)
    run = functools.partial(generate, model, params, max_new_tokens=6, chooser=GREEDY)
    whole = run(PROMPTS)
    alone = run(PROMPTS[2:])
    assert alone.tokens == whole.tokens[2:]
    np.testing.assert_allclose(alone.logprobs, whole.logprobs[2:], atol=1e-4)  # other shapes round otherwise
    stop = whole.tokens[0][1]
    stopped = run(PROMPTS, stop_tokens=[stop])
    for row, tokens in enumerate(whole.tokens):
        assert stopped.tokens[row] == tokens[: tokens.index(stop) + 1 if stop in tokens else None]
    drafted = run(PROMPTS, drafter=PromptLookup(tokens=3))
    assert drafted.tokens == whole.tokens


def test_what_a_layer_holds_of_tokens_that_skipped_it_is_never_read(params):
    model = SkipDecode(Decoder(BODY), SHORT)
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 32)
    _, cache = apply(model, params, tokens[:, :6], cache=model.init_cache(2, 14))
    skipped = np.zeros((4, 14), bool)
    skipped[:, :6] = ~SHORT.active(6, 4).T
    assert skipped.any()
    noise = jnp.where(skipped[:, None, :, None, None], 1e4, 0.0)
    spoilt = cache.replace(keys=cache.keys + noise, values=cache.values - noise)
    for position in range(6, 12):
        new = tokens[:, position : position + 1]
        logits, cache = apply(model, params, new, cache=cache)
        other, spoilt = apply(model, params, new, cache=spoilt)
        np.testing.assert_array_equal(logits, other)
    read = cache.replace(values=cache.values.at[3, :, 0].add(1.0))  # so the test can fail
    assert (apply(model, params, new, cache=read)[0] != apply(model, params, new, cache=cache)[0]).any()


def test_compiled_flops_are_those_of_the_layers_that_run():
    model = dataclasses.replace(BODY, num_layers=6, d_model=64, mlp_dim=128)  # wide, so that masks cost nothing
    task = SkipDecoding(model=model, schedule=SHORT)
    flops = [step_flops(task, n) for n in range(1, 7)]
    each = np.diff(flops)
    np.testing.assert_allclose(each, each[0], rtol=0.01)
    fixed = flops[0] - each[0]
    for n in range(1, 7):  # "within 1.05 of the layer ratio", without head and embedding
        assert (flops[n - 1] - fixed) / (flops[5] - fixed) == pytest.approx(n / 6, rel=0.05)


@pytest.mark.slow
def test_compiled_flops_at_the_sizes_of_opt():
    """Those of a token with head and embedding, over those of the whole model, against the mean share of layers that
    run. FLOPs are a + c n, so that three layers tell both."""
    schedule = Schedule(max_layers=3, min_layers=1, prompt=64, length=320)
    for width, heads, layers, budgets, over in ((4096, 32, 32, (22, 11), 1.05), (2048, 32, 24, (16, 8), 1.08)):
        sizes = {"num_layers": 3, "d_model": width, "num_heads": heads, "mlp_dim": 4 * width}
        task = SkipDecoding(model=OPTConfig(**sizes, vocab_size=50272, max_length=2048), schedule=schedule)
        two, three = (step_flops(task, n) for n in (2, 3))
        each, fixed = three - two, 3 * two - 2 * three
        high, low = budgets
        mean = dataclasses.replace(schedule, max_layers=high, min_layers=low).mean_layers()
        share = (fixed + each * mean) / (fixed + each * layers)
        assert 1 < share / (mean / layers) < over


@pytest.mark.slow
def test_evictors_work_on_it(params):
    model = SkipDecode(Decoder(BODY), SHORT)
    options = {"max_new_tokens": 6, "chooser": GREEDY}
    roomy = generate(model, params, PROMPTS, evictor=parse_evictor("streaming:32,sinks=2,every=16"), **options)
    assert roomy.tokens == generate(model, params, PROMPTS, **options).tokens
    tight = generate(model, params, PROMPTS, evictor=parse_evictor("streaming:5,sinks=1"), **options)
    assert all(len(row) == 6 for row in tight.tokens)


def test_more_tokens_than_planned_are_told_once(params):
    model = SkipDecode(Decoder(BODY), SHORT)
    with pytest.warns(UserWarning, match="10 new tokens are asked for, and the schedule is planned for 6; .* 2 layers"):
        long = generate(model, params, PROMPTS, max_new_tokens=10, chooser=GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = generate(model, params, PROMPTS, max_new_tokens=6, chooser=GREEDY)
    assert [row[:6] for row in long.tokens] == short.tokens


# The task.


def test_only_the_tokens_after_a_prompt_count():
    task, batch = case().task, case().batch
    counted = np.asarray(task.counts(batch))
    np.testing.assert_array_equal(counted, batch["mask"] * (batch["positions"] >= 2))
    params = jax.jit(task.init)(jax.random.key(0), batch)
    sums = jax.jit(task.sums)(params, batch, jax.random.key(0))
    logits, _ = apply(task.module(), params, batch["tokens"], positions=batch["positions"], segments=batch["segments"])
    expected = (cross_entropy(logits, batch["targets"]) * counted).sum()
    np.testing.assert_allclose(sums["nats"], expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"data.length is 2; it must be at least task.schedule.prompt = 3"):
        dataclasses.replace(task.with_model(vocab_size=384)).fit(TextData(length=2))


@pytest.mark.parametrize("skip", ["lower", "top"])
def test_layers_that_never_run_can_be_taken_out(params, skip):
    task = SkipDecoding(model=BODY, schedule=dataclasses.replace(SHORT, max_layers=3, skip=skip))
    less, fewer = without_skipped(task, params)
    assert less.model.num_layers == 3 and less.module().init_cache(1, 8).keys.shape[0] == 3
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 32)
    np.testing.assert_array_equal(apply(less.module(), fewer, tokens)[0], apply(task.module(), params, tokens)[0])
    numbered = dataclasses.replace(task, model=GPT2Config(**causal_lms.SIZES | {"num_layers": 4}, scale_by_layer=True))
    with pytest.raises(ValueError, match="layers depend on their number"):
        without_skipped(numbered, params)


def test_some_steps_at_full_depth():
    task, batch = case().task, case().batch
    mixed = dataclasses.replace(task, full_depth=0.5)
    params = task.init(jax.random.key(0), batch)
    params = jax.tree.map(lambda x: x + 0.1, params)
    loss = jax.jit(lambda key: mixed.loss(params, batch, key, 0)[0])
    found = {round(float(loss(jax.random.key(seed))), 5) for seed in range(8)}
    whole = LanguageModeling(model=task.model)._nats(params, batch)
    counts = task.counts(batch)
    expected = {float((nats * counts).sum() / counts.sum()) for nats in (whole, task._nats(params, batch))}
    assert len(found) == 2
    np.testing.assert_allclose(sorted(found), sorted(expected), atol=1e-4)
    with pytest.raises(ValueError, match=r"full_depth is 1; it must be in \[0, 1\)"):
        dataclasses.replace(task, full_depth=1)

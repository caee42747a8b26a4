"""MrT5: what deletion does not change, what training may and may not do, and what is refused."""

from __future__ import annotations

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok import verbs
from jaxtok.cli import main
from jaxtok.configuration import from_json, load_config, to_json
from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.decoding.sampling import Sampling
from jaxtok.door import open_model
from jaxtok.interop.huggingface import read_folder, write_folder
from jaxtok.lm.mrt5 import (
    PUBLISHED,
    Begun,
    MrT5,
    MrT5Config,
    MrT5Training,
    capacities,
    compact,
    control,
    from_t5,
    mrt5,
)
from jaxtok.lm.mrt5_baselines import (
    BASELINES,
    SEPARATORS,
    Convolution,
    NoInput,
    RandomDeletion,
    Segments,
    fixed_gate,
    random_gate,
)
from jaxtok.lm.t5 import PUBLISHED as T5_PUBLISHED
from jaxtok.lm.t5 import T5, SequenceToSequence, T5Config, byt5, init_params
from jaxtok.training.checkpoints import load, write_config
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import start_from, train
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.mrt5 import T5ToMrT5
from jaxtok.verbs.convert import convert

TINY_T5 = T5Config(**tiny.SIZES, head_size=4, mlp_dim=32, gated=True, tie_embeddings=False)
TINY = MrT5Training(
    model=mrt5(TINY_T5, gate_layer=1, softmax1=True), target_rate=0.5, score_weight=0.5, hard_probability=0.5
)
TASKS = {"mrt5": lambda: tiny.pairs(TINY)}

EVIDENCE = {"mrt5": {"generate, cached": "lm/test_mrt5.py::test_evaluation_and_generation"}}


def operation() -> tiny.Operation:
    to = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, vocab_size=0))  # the T5's
    return tiny.Operation(T5ToMrT5(to=to, steps=2), tiny.pairs(SequenceToSequence(model=TINY_T5)), TINY)


SURGERIES = {"mrt5": operation}


def generator():
    model = mrt5(byt5(16, 24, 1, 1, 2), gate_layer=0)
    return MrT5Training(model=model), lambda key: init_params(model, key)


TEXT_GENERATORS = {"mrt5": generator}

SIZES = {"num_layers": 3, "decoder_layers": 1, "d_model": 16, "num_heads": 2, "head_size": 6, "mlp_dim": 24}
PLAIN = T5Config(**SIZES, vocab_size=384, gated=True, activation="gelu_tanh", tie_embeddings=False, softmax1=True)
CONFIG = mrt5(PLAIN, gate_layer=1)
SATURATED = dataclasses.replace(CONFIG, gate_scale=-1e4, threshold=-5e3)
LENGTH = 16


@pytest.fixture(scope="module")
def t5_params():
    flat, unflatten = jax.flatten_util.ravel_pytree(jax.jit(functools.partial(init_params, PLAIN))(jax.random.key(0)))
    return unflatten(flat + 0.2 * jax.random.normal(jax.random.key(1), flat.shape))


@pytest.fixture(scope="module")
def params(t5_params):
    """Parameters of a MrT5 around that T5, whose gate keeps about half."""
    params = jax.jit(functools.partial(from_t5, CONFIG))(t5_params, jax.random.key(2))
    return with_gate(params, kernel=2.0 * jax.random.normal(jax.random.key(3), (16, 1)), bias=jnp.zeros(1))


def with_gate(params, **leaves):
    gate = params["encoder"]["delete_gate"]
    return {**params, "encoder": {**params["encoder"], "delete_gate": {**gate, **leaves}}}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 259, (3, LENGTH)).astype(np.int32)
    tokens[1, 11:] = 0
    return tokens, rng.integers(3, 259, (3, 5)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def run(config, params, tokens, outputs, hard=False, capacity=0, threshold=-15.0):
    """Logits, and the states before the reduction."""
    apply = functools.partial(MrT5(config).apply, {"params": params})
    begun = apply(tokens, threshold=threshold, method="begin")
    return apply(outputs, apply(begun, hard, capacity, method="finish"), method="decode")[0], begun


@pytest.fixture(scope="module")
def without_gate(t5_params, arrays):
    return jax.jit(T5(PLAIN).apply)({"params": t5_params}, *arrays)


def close(ours, theirs, atol=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol * float(np.abs(theirs).max()))


def test_a_threshold_that_keeps_all_is_the_t5(params, arrays, without_gate):
    for capacity in (0, LENGTH):
        close(run(CONFIG, params, *arrays, True, capacity, -jnp.inf)[0], without_gate)


def test_a_gate_that_keeps_all_is_the_t5(params, arrays, without_gate):
    open_gate = with_gate(params, kernel=jnp.zeros((16, 1)), bias=jnp.full(1, 40.0))
    close(run(CONFIG, open_gate, *arrays)[0], without_gate)


def test_saturated_gates_make_soft_and_hard_the_same(params, arrays):
    gate = params["encoder"]["delete_gate"]
    loud = with_gate(params, kernel=1e6 * gate["kernel"])
    soft, begun = run(SATURATED, loud, *arrays, False, 0, -5e3)
    assert begun.kept.any(-1).all() and 0.2 < begun.kept.mean() < 0.8
    for capacity in (0, LENGTH):
        close(run(SATURATED, loud, *arrays, True, capacity, -5e3)[0], soft)
    gates = np.asarray(begun.gate)
    assert np.isin(gates.round(), (0, -1e4)).all()


def test_capacities_agree(params, arrays):
    """Bytes are taken out into just enough positions, into more, and hidden."""
    hidden, begun = run(CONFIG, params, *arrays, True)
    most = int(begun.counts.max())
    assert most < LENGTH
    for capacity in (most, LENGTH):
        close(run(CONFIG, params, *arrays, True, capacity)[0], hidden)
    assert not np.asarray(begun.kept)[arrays[0] == 0].any()  # padding never stays


def test_rows_do_not_depend_on_each_other(params, arrays):
    order = np.array([2, 0, 1])
    logits, _ = run(CONFIG, params, *arrays, True, LENGTH)
    permuted, _ = run(CONFIG, params, *(a[order] for a in arrays), True, LENGTH)
    close(permuted, logits[order])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=18, max_size=18), st.sampled_from([1, 4, 9]))
def test_compaction(kept, capacity):
    kept = np.array(kept).reshape(2, 9)
    gate = np.where(kept, -np.arange(9, dtype=np.float32)[::-1], -30)  # later ones are higher
    begun = Begun(jnp.zeros(()), np.ones_like(kept), kept, gate)
    np.testing.assert_array_equal(begun.truncated(capacity), np.maximum(kept.sum(1) - capacity, 0))
    places, filled = jax.jit(compact, static_argnames="capacity")(begun, capacity)
    for row in range(len(kept)):
        expected = np.flatnonzero(kept[row])[-capacity:]
        found = np.asarray(places[row])[np.asarray(filled[row])]
        np.testing.assert_array_equal(found, expected if len(expected) else [0])


def test_only_the_regulariser_reaches_the_gate_in_a_hard_step(params, arrays):
    batch = {"tokens": arrays[0], "targets": arrays[1], "mask": np.ones((3, 5), np.float32), "bytes": np.ones((3, 5))}

    @functools.partial(jax.jit, static_argnames="task")
    def gradient(task):
        loss = lambda p: task.loss(p, batch, jax.random.key(0), jnp.zeros((), jnp.int32))[0]  # noqa: E731
        return jax.grad(loss)(params)["encoder"]["delete_gate"]

    hard = gradient(MrT5Training(model=CONFIG, hard_probability=1.0))
    regularised = gradient(MrT5Training(model=CONFIG, hard_probability=1.0, alpha=0.1))
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(regularised))
    assert not any(jnp.any(leaf != 0) for leaf in jax.tree.leaves(hard))


def test_the_controller_reaches_its_target():
    """The controlled rate follows alpha slowly; alpha is never negative on the way."""

    def step(carry, _):
        state, rate = carry
        rate = 0.98 * rate + 0.02 * jnp.clip(4 * state["alpha"], 0, 1)
        state = control(state, rate, 0.5, 0.5, 5e-4)
        return (state, rate), (rate, state["alpha"])

    start = ({name: jnp.zeros(()) for name in ("p", "i", "alpha")}, jnp.zeros(()))
    _, (rates, alphas) = jax.lax.scan(step, start, None, length=20000)
    assert alphas.min() >= 0 and abs(rates[-1] - 0.5) < 0.01


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(200):
        (folder / f"{i}.txt").write_text(f"def f{i}(x): return x + {i}\n" * 6)
    return str(folder)


@pytest.fixture(scope="module")
def experiment(corpus, tmp_path_factory):
    return Experiment(
        task=MrT5Training(model=CONFIG, target_rate=0.5, regulariser_delay=2, k_i=0.1, score_weight=0.5),
        data=SpanCorruption(corpus=corpus, length=LENGTH, batch_size=4, density=0.3, mean_span=3.0, eval_limit=1),
        train=TrainConfig(steps=4, log_every=1, eval_every=0, checkpoint_every=2, tensorboard=False),
        mesh=MeshConfig(data=1),
        workdir=str(tmp_path_factory.mktemp("runs") / "run"),
    )


def test_the_controller_is_saved_with_the_parameters(experiment):
    """Its state stays the same during the delay, then follows the rates that were logged; a checkpoint holds it."""
    import json

    result = train(experiment, quiet=True)
    lines = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in lines if "deletion_rate" in row and "alpha" in row]
    state = {name: jnp.zeros(()) for name in ("p", "i", "alpha")}
    assert len(rows) == 4
    for step, row in enumerate(rows):
        np.testing.assert_allclose(row["alpha"], state["alpha"], rtol=1e-6)
        if step >= 2:
            state = control(state, row["deletion_rate"], 0.5, 0.5, 0.1)
    saved = load(experiment.directory).params["controller"]
    assert float(saved["alpha"]) > 0
    for name, value in state.items():
        np.testing.assert_allclose(saved[name], value, rtol=1e-6)
        np.testing.assert_array_equal(saved[name], result.params["controller"][name])
    assert {"deletion_rate", "slots", "emptied", "bits_per_byte"} <= result.metrics.keys()


def test_a_run_starts_from_a_byt5(experiment, t5_params, tmp_path):
    """A MrT5 starts from a folder and from a run that `jaxtok convert` made of it; both verbs take the folder too."""
    folder = write_folder(tmp_path / "byt5", dataclasses.replace(PLAIN, softmax1=False), t5_params)
    run = convert(folder, tmp_path / "run")
    assert isinstance(load(run).task, SequenceToSequence)
    assert load(run).experiment.data == SpanCorruption(batch_size=8, begin=(), ends=(1,), pad=0)
    for source in (folder, run):
        there = dataclasses.replace(experiment, workdir=str(tmp_path / f"mrt5_{source.name}"), start=T5ToMrT5())
        opened = open_model(source)
        params = start_from(there, opened)
        assert float(params["controller"]["alpha"]) == 0
        for name, layers in (("stack", slice(0, 1)), ("rest", slice(1, 3))):
            ours, theirs = (tree["encoder"] for tree in (params, t5_params))
            kernels = [part["blocks"]["ffn"]["up"]["kernel"] for part in (ours[name], theirs["stack"])]
            np.testing.assert_array_equal(kernels[0], kernels[1][layers])
    with pytest.raises(ValueError, match=r"SequenceToSequence of a T5Config and .* MrT5Config.*set `start`"):
        start_from(dataclasses.replace(there, start=None), opened)
    wide = dataclasses.replace(there.task, model=dataclasses.replace(there.task.model, mlp_dim=32))
    with pytest.raises(ValueError, match="other shapes"):
        start_from(dataclasses.replace(there, task=wide), opened)
    (text,) = verbs.generate(folder, prompt=("def f",), max_new_tokens=3, stream=False)
    assert len(text) <= 3


def test_the_command_starts_a_run_from_a_byt5(experiment, t5_params, tmp_path):
    """The result is one small step away from the T5's weights; a run that exists is resumed without opening the T5."""
    folder = write_folder(tmp_path / "byt5", dataclasses.replace(PLAIN, softmax1=False), t5_params)
    run = dataclasses.replace(
        experiment,
        train=TrainConfig(steps=1, optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-3, warmup=0.0)),
        workdir=str(tmp_path / "run"),
        start=T5ToMrT5(),
    )
    write_config(run.directory, run)
    assert main(["train", run.workdir, "--start", str(folder)]) == 0
    params = load(run.directory).params
    np.testing.assert_allclose(params["embedding"], t5_params["embedding"], atol=2e-3)
    assert main(["train", run.workdir, "--start", str(tmp_path / "nowhere")]) == 0
    again = dataclasses.replace(run, workdir=str(tmp_path / "again"))
    write_config(again.directory, again)
    assert main(["train", again.workdir, "--start", str(tmp_path / "nowhere")]) == 1


def test_configs_of_published_sizes():
    for kind, sizes in (("byt5", T5_PUBLISHED), ("mrt5", PUBLISHED)):
        for size in ("small", "base", "large", "xl", "xxl"):
            config = load_config(f"{kind}_{size}")
            plain = {"dtype": "float32", "remat": "none", "dropout": 0.0, "attention_dropout": 0.0, "mlp_dropout": 0.0}
            assert dataclasses.replace(config.task.model, **plain) == sizes[f"{kind}-{size}"]
            assert config.data.row_items == 1193 and config.data.batch_spec()["targets"].shape == (1024, 189)


def test_evaluation_and_generation(params, experiment):
    """Hard evaluation shortens rows; texts are continued; rows of padding alone do not count."""
    task = experiment.task
    batch = next(iter(experiment.data.eval_batches("train")))
    found = task.evaluate(params, [batch])
    soft = task.evaluate(params, [batch], deletion="soft")
    assert 0.1 < found["deletion_rate"] == soft["deletion_rate"] < 0.9
    assert found["slots"] < 1 == soft["slots"] and found["tokens"] == batch["mask"].sum()
    emptied = {name: np.where((np.arange(4) > 1)[:, None], array, 0) for name, array in batch.items()}
    half = task.evaluate(params, [emptied])
    assert np.isfinite(half["loss"]) and half["tokens"] == batch["mask"][2:].sum()
    prompts = [b"def f", b"return"]
    options = {"max_bytes": 6, "sampling": Sampling(temperature=0), "rng": None}
    texts = task.continue_text(params, prompts, **options)
    assert all(len(text) <= 6 for text in texts)
    alone = [task.continue_text(params, [prompt], **options)[0] for prompt in prompts]
    assert texts == alone
    with pytest.raises(ValueError, match="input 1 has an id outside of 0 to 383"):
        task.generate(params, [[5], [384]], max_new_tokens=2)
    with pytest.raises(ValueError, match="input 0 has 0 ids"):
        task.generate(params, [[]], max_new_tokens=2)
    with pytest.raises(ValueError, match="there is no input"):
        task.generate(params, [], max_new_tokens=2)


def test_a_gate_that_deletes_everything_is_an_error(params, experiment):
    closed = with_gate(params, kernel=jnp.zeros((16, 1)), bias=jnp.full(1, -40.0))
    batch = next(iter(experiment.data.eval_batches("train")))
    with pytest.raises(ValueError, match=r"deletes every byte of a batch.*threshold = -15\.0"):
        experiment.task.evaluate(closed, [batch])


def test_a_row_without_survivors_keeps_its_first_place(params, arrays):
    """A row is the same alone and among others, and a row of padding alone stays finite."""
    tokens, outputs = arrays
    tokens = tokens.copy()
    tokens[0] = 0
    logits, begun = run(CONFIG, params, tokens, outputs, True, LENGTH)
    assert np.isfinite(logits).all() and not begun.kept[0].any() and begun.counts[0] == 1
    gates = np.asarray(begun.gate)[1]
    threshold = jnp.float32(gates.max())  # nothing in row 1 is above
    whole, begun = run(CONFIG, params, tokens, outputs, True, LENGTH, threshold)
    assert not begun.kept[1].any()
    np.testing.assert_array_equal(compact(begun, 4)[0][1], 0)
    close(run(CONFIG, params, tokens, outputs, True, 0, threshold)[0], whole)


def test_random_and_fixed_deletion():
    gates = np.asarray(random_gate(jax.random.key(0), (40, 50), 0.3, -30.0))
    assert set(np.unique(gates)) == {-30.0, 0.0} and abs((gates < 0).mean() - 0.3) < 0.2
    rates = [(random_gate(jax.random.key(i), (40, 50), 0.3, -30.0) < 0).mean() for i in range(30)]
    assert abs(np.mean(rates) - 0.3) < 0.04 and 0.02 < np.std(rates) < 0.09
    ids = np.array([[100, 101, 102, 103, 35, 104, 105, 1, 0, 0], [35, 100, 101, 102, 103, 104, 105, 106, 107, 1]])
    both = fixed_gate(ids, ids > 0, 0.5, -30.0)
    kept = [[1, 1, 0, 0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0, 1]]
    np.testing.assert_array_equal(both == 0, np.array(kept, bool))
    np.testing.assert_array_equal(fixed_gate(ids[:1], ids[:1] > 0, 0.5, -30.0)[0], both[0])
    assert {bytes([i - 3]) for i in SEPARATORS if i > 2} >= {b" ", b"\t", b"\n", b",", b".", b"!"}


@pytest.mark.parametrize(("kind", "options"), [(Segments, {"mask_surplus": True}), (Convolution, {}), (NoInput, {})])
def test_baselines(kind, options, arrays, tmp_path):
    """Each deletes what it should, and is the same after it was written and read."""
    config = mrt5(PLAIN, kind, gate_layer=0 if kind is NoInput else 1, **options)
    params = jax.jit(functools.partial(init_params, config))(jax.random.key(0))
    tokens, _ = arrays
    uniform = np.random.default_rng(1).uniform(0.01, 0.99, tokens.shape).astype(np.float32)

    @jax.jit
    def apply(tokens, uniform):
        variables = {"params": params, "noise": {"encoder": {"uniform": uniform}}}
        return config.module().apply(variables, tokens, method="encode")

    encoded = apply(tokens, uniform)
    slots = {Segments: LENGTH, Convolution: LENGTH // 4, NoInput: 1}[kind]
    assert encoded.states.shape == (3, slots, 16)
    if kind is NoInput:
        np.testing.assert_array_equal(encoded.states, apply(tokens[::-1], uniform).states)
        return
    if kind is Segments:  # no row sees the others
        alone = apply(np.stack([tokens[1]] * 3), np.stack([uniform[1]] * 3))
        seen = np.asarray(encoded.bias[0][1, 0, 0] == 0)
        close(alone.states[0][seen], encoded.states[1][seen])
    again, tree = read_folder(write_folder(tmp_path / "folder", config, params))
    assert type(again) is kind
    chex.assert_trees_all_equal(tree, params)


def test_written_then_read_is_the_same(params, t5_params, tmp_path):
    again, tree = read_folder(write_folder(tmp_path / "folder", CONFIG, params))
    assert again == dataclasses.replace(CONFIG, activation=again.activation)
    chex.assert_trees_all_equal(tree, params)
    with pytest.raises(ValueError, match="other shapes"):
        from_t5(dataclasses.replace(CONFIG, mlp_dim=32), t5_params, jax.random.key(0))


def test_published_sizes_have_a_gate_more():
    for name, config in PUBLISHED.items():
        base = T5_PUBLISHED[name.replace("mrt5", "byt5")]
        trees = [jax.eval_shape(functools.partial(init_params, c), jax.random.key(0)) for c in (config, base)]
        sizes = [sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree)) for tree in trees]
        assert sizes[0] - sizes[1] == 2 * config.d_model + 1, name
        assert config.plain == dataclasses.replace(base, softmax1=True)


@pytest.mark.parametrize("kind", [MrT5Config, *BASELINES.values()], ids=["gate", *BASELINES])
def test_every_reduction_trains_in_bfloat16(kind, arrays):
    """Only shapes and types are computed; parameters and loss stay float32."""
    options = {"dtype": "bfloat16", "remat": "full", "dropout": 0.1, "attention_dropout": 0.1, "mlp_dropout": 0.1}
    config = mrt5(CONFIG, kind, gumbel_noise=True, gate_layer=0, **options)
    gated = {"target_rate": 0.5, "score_weight": 0.5} if kind is MrT5Config else {}
    task = MrT5Training(model=config, hard_probability=0.5, **gated)
    batch = {"tokens": arrays[0], "targets": arrays[1], "mask": np.ones((3, 5), np.float32), "bytes": np.ones((3, 5))}

    def step(rng):
        params = jax.tree.map(lambda x: x, nn.meta.unbox(task.init(rng, batch)))
        (loss, metrics), gradient = jax.value_and_grad(task.loss, has_aux=True)(params, batch, rng, jnp.zeros((), int))
        return loss, metrics, gradient

    loss, metrics, gradient = jax.eval_shape(step, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves((loss, gradient))} == {np.dtype("float32")}
    assert all(leaf.shape == () for leaf in metrics.values()) and "deletion_rate" in metrics
    assert "stack" not in gradient["encoder"]


def test_shorter_rows_cost_less():
    config, base = PUBLISHED["mrt5-small"], T5_PUBLISHED["byt5-small"]
    assert abs(config.encoder_flops(1024) / base.encoder_flops(1024) - 1) < 1e-3
    assert config.encoder_flops(1024, 512) < 0.65 * base.encoder_flops(1024)
    assert capacities(1024) == [128 * i for i in range(1, 9)] and capacities(10)[-1] == 10 and capacities(1) == [1]
    batch = {"tokens": np.zeros((2, 1024)), "targets": np.zeros((2, 189))}
    assert SequenceToSequence(model=base).flops(batch) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "relu"}, "gate is 'relu'"),
        ({"gate_layer": 3}, "gate_layer is 3; it must be from 0 to 2"),
        ({"gate_layer": -1}, "gate_layer is -1"),
        ({"gate_scale": 0.0}, "gate_scale is 0.0"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": -30.0}, r"threshold is -30\.0; it must be between -30\.0 and 0"),
        ({"relative_buckets": 3}, "relative_buckets is 3"),
        ({"relative_distance": 16}, "relative_distance is 16"),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MrT5Config(**SIZES | {"gate_layer": 1} | options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RandomDeletion, {"amount": 1.0}, "amount is 1.0"),
        (Convolution, {"stride": 0}, "stride is 0"),
        (Segments, {"temperature": 0.0}, "temperature is 0.0"),
        (Segments, {"prior": 1.0}, "prior 1.0"),
    ],
)
def test_baselines_that_cannot_be(kind, options, message):
    with pytest.raises(ValueError, match=message):
        mrt5(CONFIG, kind, **options)


@pytest.mark.parametrize("name", ["gate", *BASELINES])
def test_configs_saved_when_reduction_was_a_field(name):
    """Old runs have all options of all reductions; those of other reductions had no effect."""
    kind = BASELINES.get(name, MrT5Config)
    own = {"random": {"amount": 0.3}, "convolution": {"stride": 2}, "boundaries": {"prior": 0.3}}.get(name, {})
    now = mrt5(CONFIG, kind, **own)
    every = {"reduction": name, "amount": 0.5, "stride": 4, "temperature": 0.5, "prior": 0.2, "mask_surplus": False}
    saved = every | to_json(now) | {"type": "jaxtok.lm.mrt5:MrT5Config"}
    again = from_json(saved)
    assert type(again) is kind and again == (dataclasses.replace(now, gate_layer=0) if kind is NoInput else now)
    with pytest.raises(ValueError, match="reduction is 'half'; it must be one of gate, random"):
        from_json(saved | {"reduction": "half"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rate": 1.0}, r"target_rate is 1\.0; it must be in \[0, 1\)"),
        ({"regulariser": "mean"}, "regulariser is 'mean'"),
        ({"hard_probability": 2.0}, "hard_probability is 2.0"),
        ({"alpha": -1.0}, "alpha is -1.0"),
        ({"entropy_weights": (1.0, 1.0)}, "log_sigmoid"),
    ],
)
def test_tasks_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        MrT5Training(model=CONFIG, **options)


def test_only_a_gate_has_a_target():
    with pytest.raises(ValueError, match="reduction random has no gate"):
        MrT5Training(model=mrt5(CONFIG, RandomDeletion), target_rate=0.5)

"""Meshes: their rules and errors, and that a Task on eight devices computes the same as on one."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import collect
from jax.sharding import PartitionSpec as P

from jaxtok.door import open_model
from jaxtok.lm.tokenformer import uniform_counts
from jaxtok.protocols import ArraySpec
from jaxtok.training.compiled import read_program
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.loop import abstract_state, compile_surgery, initial_state, make_train_step, train
from jaxtok.training.mesh import AxisRules, MeshConfig, make_layout, one_device
from jaxtok.training.optimizer import OptimizerConfig, make_optimizer
from jaxtok.transfer.growth import Growth

TASKS = collect("TASKS")

MESHES = {
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 8": MeshConfig(data=1, tensor=8),
    "2 x 2 x 2": MeshConfig(data=2, fsdp=2, tensor=2),
    "sequence": MeshConfig(data=2, sequence=2, tensor=2),
}

needs_eight = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices (tests/conftest.py simulates them)"
)


def steps(case, layout, count=2, params=None):
    """The state and the numbers of each step, from one batch of random inputs, and new parameters or these."""
    config, size = case.train, case.data.batch_size
    state = initial_state(case.task, config, case.data, layout, params)
    step = make_train_step(case.task, config, 10, case.data, layout)
    batch = layout.put(case.batch, range(size), case.data.batch_spec())
    numbers = []
    with layout.active():
        for _ in range(count):
            state, metrics = step(state, batch)
            numbers.append(jax.device_get(metrics))
    return state, numbers


@pytest.fixture(scope="module")
def on_one_device():
    """Each task's first parameters, and its result from these on one device, computed once."""

    @functools.cache
    def run(name):
        case = TASKS[name]()
        first = jax.device_get(initial_state(case.task, case.train, case.data).params)
        state, numbers = steps(case, one_device(), params=first)
        chex.assert_tree_all_finite((state.params, state.opt_state, numbers))
        return first, state, numbers

    return run


EVERYWHERE = ("tokenformer",)
"""The other tasks are tested on one mesh of three axes, and on the rest with --slow."""

LIKE_ANOTHER = (
    "bae",
    "semi_lexinvariant",
    "opt",
    "bert_whole_words",
    "byte2word_classification",
    "text_classification",
    "masked_words",
    "elm_masked",
    "kl_vae",
    "tokenbridge",
    "tokenbridge_tokenizer",
    "flextok_generation",
    "tokenunify",
    "t5",
    "hat_released",
    "lora",
    "seed_alignment",
    "seed_averages",
    "seed_llama",
)
"""Tasks of the same kind as one that is tested (VQGAN, lexinvariant, GPT-2, Byte2Word, ELECTRA, ELM, MrT5, HAT, SEED's
second stage, TokenUnify's affinities, Llama, and LoRA as a surgery in tests/transfer); they run with --slow."""


def tasks_on_meshes():
    for name in TASKS:
        for mesh in MESHES:
            fast = name in EVERYWHERE or (mesh == "2 x 2 x 2" and name not in LIKE_ANOTHER)
            marks = [] if fast else [pytest.mark.slow]
            yield pytest.param(name, mesh, marks=marks, id=f"{name}-{mesh}")


@needs_eight
@pytest.mark.parametrize(("name", "mesh"), tasks_on_meshes())
def test_every_task_is_the_same_on_every_mesh(name, mesh, on_one_device):
    """Loss, gradient norm, and the parameters after two updates. (One of them learns nothing, as its rate is 0.)"""
    case = TASKS[name]()
    if reason := case.unfit.get(mesh):
        pytest.skip(reason)
    layout = make_layout(MESHES[mesh])
    first, alone, expected = on_one_device(name)
    # Programs that draw parameters take long to compile, so most tasks are given them.
    state, numbers = steps(case, layout, params=None if name in EVERYWHERE else first)
    for ours, theirs in zip(numbers, expected):
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=2e-5, atol=1e-7, err_msg=key)
    moments = lambda s: jax.tree.leaves(s.opt_state)  # noqa: E731
    for ours, theirs in zip(moments(state), moments(alone)):  # the first is the gradient but for a factor
        # Gradients that are 0 (of the keys' biases) are nothing but rounding.
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(np.abs(theirs).max(), case.rounding))
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(state.params))
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(alone.params), rtol=1e-7, atol=2e-5)


@needs_eight
def test_moments_of_parts_and_averages_live_where_their_parameters_do():
    case, layout = TASKS["bae"](), make_layout(MESHES["fsdp 8"])
    optimizer = dataclasses.replace(case.train.optimizer, ema_decay=0.9)
    assert [part.part for part in optimizer.parts] == ["discriminator"]
    state = abstract_state(case.task, TrainConfig(optimizer=optimizer), case.data, layout)
    places = lambda tree: jax.tree.map(lambda x: x.sharding, tree)  # noqa: E731
    rest, parts = state.opt_state.state
    assert places(state.opt_state.average) == places(state.params)
    own = {"discriminator": state.params["discriminator"]}
    adam = next(s for s in parts["discriminator"] if hasattr(s, "mu"))
    assert places(adam.mu) == places(own)
    adam = next(s for s in rest if hasattr(s, "mu"))
    assert places(adam.mu) == places({k: v for k, v in state.params.items() if k not in own})
    assert sum(len(set(s.spec)) > 1 for s in jax.tree.leaves(places(adam.mu))) > 10  # many are divided


def started(case, layout):
    """A state whose moments are not zero."""
    state = initial_state(case.task, TrainConfig(), case.data, layout)
    count = iter(range(1000))
    moments = jax.tree.map(lambda x: x + next(count) * jnp.ones_like(x), state.opt_state)
    return state.replace(opt_state=moments)


@needs_eight
@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[pytest.mark.slow] * (mesh not in ("fsdp 8", "2 x 2 x 2"))) for mesh in MESHES]
)
def test_growth_happens_where_the_parameters_are(mesh):
    """Sharded before and after, equal to growth on one device, and no device gets a whole parameter on the way."""
    case, results = TASKS["tokenformer"](), []
    growth = Growth(to=uniform_counts(32, 64), init="random", optimizer="keep")
    rng = jax.random.key(3)
    for layout in (one_device(), make_layout(MESHES[mesh])):
        state = started(case, layout)
        optimizer = make_optimizer(TrainConfig().optimizer)
        task, _, program = compile_surgery(
            growth, case.task, case.data, state.params, state.opt_state, rng, optimizer, layout
        )
        results.append((task, program(state.params, state.opt_state)))
    (alone, expected), (task, grown) = results
    assert task == alone
    for ours, theirs in zip(jax.tree.leaves(grown), jax.tree.leaves(expected)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # two programs round the random rows differently
        assert len(ours.sharding.device_set) == 8
    keys = grown[0]["stack"]["blocks"]["ffn"]["keys"]
    assert keys.shape == (2, 64, 16) and keys.sharding == layout.sharding(("layers", "param_tokens", None), keys.shape)
    # Rows that move to a neighbour are exchanged; nothing is gathered.
    kinds = {collective.kind for collective in read_program(program.as_text()).collectives}
    assert kinds <= {"all-to-all", "collective-permute"}


@needs_eight
def test_a_run_on_a_mesh_starts_with_another_run(short, finished, tmp_path):
    """Which is opened on one device, whatever the mesh."""
    short = dataclasses.replace(
        short,
        data=dataclasses.replace(short.data, batch_size=8),
        train=dataclasses.replace(
            short.train,
            steps=1,
            optimizer=OptimizerConfig(learning_rate=1e-8, min_learning_rate=1e-8, warmup=0.0),
        ),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        workdir=str(tmp_path / "meshed"),
    )
    result = train(short, start=functools.partial(open_model, finished), quiet=True)
    old = open_model(finished).params
    chex.assert_trees_all_close(jax.device_get(result.params), jax.device_get(old), rtol=0, atol=1e-6)


@needs_eight
def test_a_run_goes_on_on_another_mesh(short, tmp_path):
    short = dataclasses.replace(short, data=dataclasses.replace(short.data, batch_size=8))
    alone = dataclasses.replace(short, mesh=MeshConfig(data=8), workdir=str(tmp_path / "alone"))
    whole = train(alone, quiet=True)
    first = dataclasses.replace(short, mesh=MeshConfig(data=4, fsdp=2))
    with pytest.MonkeyPatch.context() as patch:
        from jaxtok.training import loop

        original = loop.make_train_step

        def dying(*args):
            inner = original(*args)

            def train_step(state, batch):
                if int(state.step) == 4:
                    raise KeyboardInterrupt
                return inner(state, batch)

            return train_step

        patch.setattr(loop, "make_train_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(first, quiet=True)
    rest = train(dataclasses.replace(short, mesh=MeshConfig(data=1, fsdp=4, tensor=2)), quiet=True)
    assert rest.step == 6
    chex.assert_trees_all_close(jax.device_get(rest.params), jax.device_get(whole.params), rtol=1e-7, atol=2e-4)
    assert rest.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)


@needs_eight
def test_collectives_of_a_tensor_mesh():
    """The normalisation needs one number a row, the output one sum; heads and vocabulary the rest."""
    case = TASKS["tokenformer"]()
    layout = make_layout(MESHES["tensor 8"])
    rows, length, width = case.data.batch_size, case.data.length, case.task.model.d_model
    found = collectives(case, layout)
    row, hidden = rows * length * 4, rows * length * width * 4  # bytes: a number a token, a vector a token
    blocks = [c for c in found if c.times == case.task.model.num_layers]
    other = [c for c in found if c.times == 1]
    assert len(blocks) + len(other) == len(found)
    # For five parameter attentions: forward, a norm and an output; backward, a number for the norm's gradient and
    # the gradient of the input. (XLA joins sums that are ready together, so bytes are counted.)
    sums = [c for c in blocks if c.kind == "all-reduce"]
    assert sum(c.bytes for c in sums) == 10 * row + 10 * hidden, [(c.kind, c.bytes, c.source) for c in sums]
    # The heads are gathered before `output`, again there in the backward pass, and for the gradients of q, k, v.
    gathers = [c for c in blocks if c.kind == "all-gather"]
    assert sum(c.bytes for c in gathers) == 5 * hidden, [(c.kind, c.bytes, c.source) for c in gathers]
    assert {c.kind for c in blocks} == {"all-reduce", "all-gather"}
    assert {c.kind for c in other} == {"all-reduce"}
    assert max(c.bytes for c in other) <= hidden


@needs_eight
def test_collectives_of_an_fsdp_mesh_are_gathers_of_parameters_and_sums_of_gradients():
    case = TASKS["tokenformer"]()
    found = collectives(case, make_layout(MESHES["fsdp 8"]))
    params = jax.tree.leaves(initial_state(case.task, TrainConfig(), case.data, one_device()).params)
    sizes = {leaf.nbytes // (leaf.shape[0] if leaf.ndim == 3 else 1) for leaf in params}
    for c in found:
        if c.kind == "all-gather":
            assert c.bytes in sizes, c
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    gathered = sum(c.bytes * c.times for c in found if c.kind == "all-gather")
    assert gathered == sum(leaf.nbytes for leaf in params if leaf.ndim > 1)  # each once: kept for the backward pass
    sums = sum(c.bytes * c.times for c in found if c.kind == "all-reduce")
    assert sums < 1.1 * (sum(leaf.nbytes for leaf in params) + params[0].nbytes), sums


@needs_eight
def test_collectives_of_a_data_mesh_are_sums_of_gradients():
    case = TASKS["tokenformer"]()
    found = collectives(case, make_layout(MESHES["data 8"]))
    assert {c.kind for c in found} == {"all-reduce"}
    params = initial_state(case.task, TrainConfig(), case.data, one_device()).params
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) + params["embedding"].nbytes  # that of each of its uses
    assert size <= sum(c.bytes * c.times for c in found) <= size + 64


def collectives(case, layout):
    size = case.data.batch_size
    state = initial_state(case.task, TrainConfig(), case.data, layout)
    batch = layout.put(case.batch, range(size), case.data.batch_spec())
    with layout.active():
        step = make_train_step(case.task, TrainConfig(), 10, case.data, layout)
        return read_program(step.lower(state, batch).compile().as_text()).collectives


@needs_eight
def test_what_a_mesh_does_not_divide_is_named(short):
    def on(batch_size=8, model=(), **mesh):
        task = dataclasses.replace(short.task, model=dataclasses.replace(short.task.model, **dict(model)))
        data = dataclasses.replace(short.data, batch_size=batch_size)
        return train(dataclasses.replace(short, task=task, data=data, mesh=MeshConfig(**mesh)), quiet=True)

    with pytest.raises(ValueError, match=r"axis batch of the batch.* has size 6, which mesh axes data = 8.*tensor 1"):
        on(batch_size=6)
    with pytest.raises(ValueError, match=r"axis param_tokens of .*ffn/keys has size 20.* tensor = 8"):
        on(data=1, tensor=8, model={"num_heads": 8, "rotary_fraction": 1.0, "tokens": uniform_counts(8, 20)})
    with pytest.raises(ValueError, match=r"axis heads of an activation has size 2, which mesh axes tensor = 8"):
        on(data=1, tensor=8, model={"tokens": uniform_counts(8, 16)})
    with pytest.raises(ValueError, match=r"mesh \(data -1, fsdp 3.*does not fit 8 devices"):
        on(fsdp=3)


def test_meshes_and_rules_that_cannot_be():
    with pytest.raises(ValueError, match=r"mesh\.tensor is 0"):
        MeshConfig(tensor=0)
    with pytest.raises(ValueError, match="two mesh axes are -1"):
        MeshConfig(fsdp=-1)
    with pytest.raises(ValueError, match=r"rules\.mlp has 'model'"):
        AxisRules(mlp=("model",))
    with pytest.raises(ValueError, match=r"rules\.vocab is tensor, tensor; it must have each mesh axis at most once"):
        AxisRules(vocab=("tensor", "tensor"))
    assert MeshConfig(data=-1, tensor=4).shape(8) == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 4}


@needs_eight
def test_rules_are_chosen_in_the_config():
    """If `heads` is not divided, each device computes attention by itself, and only sums cross devices."""
    rules = AxisRules(heads=())
    layout = make_layout(dataclasses.replace(MESHES["tensor 8"], rules=rules))
    assert layout.sharding(("batch", "length", "heads", None), (8, 8, 8, 2)).spec == P(
        ("data", "fsdp"), ("sequence",), None, None
    )
    found = collectives(TASKS["tokenformer"](), layout)
    assert {c.kind for c in found} == {"all-reduce"}


def test_rows_of_a_process_and_their_place():
    layout = one_device()
    assert layout.rows(6) == range(6)
    batch = {"tokens": np.arange(12).reshape(6, 2)}
    spec = {"tokens": ArraySpec((6, 2), np.int32, ("batch", "length"))}
    np.testing.assert_array_equal(layout.put(batch, range(6), spec)["tokens"], batch["tokens"])

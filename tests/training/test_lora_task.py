"""LoRA as a Task of the loop, and its way through the verbs."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxtok.nn.lora import LoraConfig
from jaxtok.training.checkpoints import load
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.loop import initial_state, train
from jaxtok.training.lora import Lora
from jaxtok.training.mesh import MeshConfig
from jaxtok.verbs import adapt, convert, evaluate, generate, open_model


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory):
    """A Hugging Face folder, a run of three steps that adapts it, and the adapter as PEFT has it."""
    source = request.config.getoption("--goldens") / "llama_gpt2_bricks" / "hf_folder_llama"
    folder = tmp_path_factory.mktemp("lora")
    (folder / "texts").mkdir()
    for number in range(80):
        (folder / "texts" / f"{number}.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    run = adapt(
        source,
        folder / "run",
        lora=LoraConfig(rank=2, dropout=0.1),
        corpus=str(folder / "texts"),
        steps=3,
        learning_rate=0.05,
        batch_size=2,
        length=16,
    )
    base = load(run).params
    result = train(dataclasses.replace(load(run).experiment, mesh=MeshConfig(data=1)), quiet=True)
    return source, run, convert(run, folder / "peft"), base, result


def test_only_the_adapter_trains(folders):
    _, run, _, before, result = folders
    assert result.step == 3
    jax.tree.map(np.testing.assert_array_equal, result.params["frozen"], before["frozen"])
    for old, new in zip(jax.tree.leaves(before["adapter"]), jax.tree.leaves(result.params["adapter"])):
        assert np.abs(old - new).max() > 0
    state = load(run).opt_state()
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == 2 * sum(leaf.size for leaf in jax.tree.leaves(result.params["adapter"]))  # two moments


def test_an_adapted_run_is_the_model_with_its_adapter(folders):
    source, run, peft, _, _ = folders
    ours, theirs = open_model(run), open_model(source, peft)
    assert ours.task == theirs.task
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(theirs.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    options = {"prompt": ("The quick",), "max_new_tokens": 8, "temperature": 0.0, "stream": False}
    assert generate(source, adapter=peft, **options) != generate(source, **options)
    corpus = str(run.parent / "texts")
    ours = evaluate(run, corpus=corpus, split="all", batches=1)
    theirs = evaluate(source, corpus=corpus, split="all", batches=1, adapter=peft)
    plain = evaluate(source, corpus=corpus, split="all", batches=1)
    assert theirs["bits_per_byte"] < plain["bits_per_byte"] and ours["bits_per_byte"] < plain["bits_per_byte"]


def test_a_run_of_new_parameters(short):
    model = dataclasses.replace(short.task.model, vocab_size=384)
    base = dataclasses.replace(short.task, model=model)
    with pytest.raises(ValueError, match="which is no projection"):
        initial_state(Lora(task=base, lora=LoraConfig(targets=(r".*",))), TrainConfig(), short.data)
    task = Lora(task=base, lora=LoraConfig(targets=("embedding",), rank=2))
    state = initial_state(task, TrainConfig(), short.data)
    assert set(state.params) == {"frozen", "adapter"}
    assert state.params["adapter"]["pairs"]["embedding"]["in"].shape == (384, 2)

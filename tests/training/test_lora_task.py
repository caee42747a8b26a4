"""LoRA as a Task of the loop, and its way through the verbs."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtok.data.text import TextData
from jaxtok.door import open_model
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.lora import LoraConfig
from jaxtok.training.checkpoints import load
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.loop import initial_state, make_train_step, train
from jaxtok.training.mesh import MeshConfig, one_device
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.lora import AddLora, Lora
from jaxtok.verbs import adapt, evaluate, generate
from jaxtok.verbs.convert import convert


def case() -> tiny.Case:
    """The only axis of the adapter's matrices that a mesh divides is that of their parameter."""
    config = LoraConfig(rank=2, targets=(r".*/kernel", "embedding", "head_matrix"), saved=(r"final_norm/.*",))
    base = tiny.text(LlamaConfig(**tiny.SIZES, num_kv_heads=2, mlp_dim=32, tie_embeddings=False))
    return dataclasses.replace(base, task=Lora(task=base.task, lora=config))


TASKS = {"lora": case}

EVIDENCE = {
    "lora": {
        "generate, cached": "training/test_lora_task.py::test_an_adapted_run_is_the_model_with_its_adapter",
        "import": "interop/test_peft.py::test_folders",
        "export": "interop/test_peft.py::test_trained_here_then_written_is_the_same",
    }
}


def operation() -> tiny.Operation:
    """Adds an adapter to every projection and a table; a task that has one already is refused."""
    there = case()
    before = dataclasses.replace(there, task=there.task.task)
    return tiny.Operation(AddLora(lora=there.task.lora, steps=2), before, there.task)


SURGERIES = {"lora": operation}


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


def test_texts_begin_and_end_as_those_of_the_model(folders):
    """Also where that is not what the tokenizer's names say, as in Llama's folder; the tokenizer is in the run."""
    source, run, *_ = folders
    before, after = open_model(source), open_model(run)
    assert (after.begin, after.ends, after.pad) == (before.begin, before.ends, before.pad)
    assert after.begin != (after.tokenizer.eod_id,)
    assert Path(after.data.tokenizer).parent == run.absolute()


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
    chex.assert_trees_all_close(ours.params, theirs.params, rtol=1e-7, atol=1e-6)
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


@pytest.mark.slow
def test_an_adapter_learns_another_domain_and_forgets_less(tmp_path):
    """A model of Python's documentation, trained on source code: LoRA has more than half of what full training gains,
    and is no worse on the documentation (arXiv 2106.09685: on par with fine-tuning; 2405.09673: forgets less)."""
    from pydoc_data.topics import topics

    docs, code = tmp_path / "docs.txt", tmp_path / "code.txt"
    docs.write_text("\n".join(topics.values()))
    library = Path(sysconfig.get_paths()["stdlib"])
    code.write_text(
        "\n".join((library / f"{name}.py").read_text() for name in ("argparse", "ast", "inspect", "tarfile"))
    )
    model = LlamaConfig(
        num_layers=2, d_model=48, num_heads=4, mlp_dim=128, vocab_size=384, max_length=64, tie_embeddings=True
    )
    task = LanguageModeling(model=model)

    def data(corpus):
        return TextData(corpus=str(corpus), length=64, batch_size=16, eval_limit=16)

    def fit(task, params, corpus, steps, rate):
        optimizer = OptimizerConfig(learning_rate=rate, min_learning_rate=rate / 10, warmup=0.1)
        config = TrainConfig(steps=steps, optimizer=optimizer)
        state = initial_state(task, config, data(corpus), one_device())
        if params is not None:
            state = state.replace(params=jax.tree.map(jnp.array, params))
        step = make_train_step(task, config, steps, data(corpus), one_device())
        batches = data(corpus).train_batches()
        for _ in range(steps):
            state, _ = step(state, next(batches))
        return state.params

    def bits(task, params, corpus):
        return task.evaluate(params, data(corpus).eval_batches("validation"))["bits_per_byte"]

    base = fit(task, None, docs, 300, 5e-3)
    full = fit(task, base, code, 150, 2e-3)
    lora = Lora(task=task, lora=LoraConfig(rank=8, alpha=16))
    adapted = fit(lora, lora.start(base, jax.random.key(0)), code, 150, 5e-3)
    before, after_full, after = bits(task, base, code), bits(task, full, code), bits(lora, adapted, code)
    print(f"code: base {before:.3f}, full {after_full:.3f}, LoRA {after:.3f} bits a byte")
    forgot_full, forgot = bits(task, full, docs), bits(lora, adapted, docs)
    print(f"docs: base {bits(task, base, docs):.3f}, full {forgot_full:.3f}, LoRA {forgot:.3f}")
    assert before - after > 0.5 * (before - after_full)
    assert forgot <= forgot_full + 0.02

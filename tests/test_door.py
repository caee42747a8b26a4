"""`import jaxtok` is quick and does not import JAX, and a model takes three lines."""

import doctest
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import collect

import jaxtok
from jaxtok import door, model, systems
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus, an experiment on it, and its run of four steps."""
    root = tmp_path_factory.mktemp("door")
    (root / "corpus").mkdir()
    for i in range(100):
        (root / "corpus" / f"{i}.txt").write_text(f"number {i}, twice {2 * i}, thrice {3 * i}; and so on.\n" * 4)
    jaxtok.train(config(root))
    return root


def config(root):
    return Experiment(
        task=LanguageModeling(
            model=TokenFormerConfig(
                num_layers=1, d_model=8, num_heads=2, rotary_fraction=0.5, tokens=uniform_counts(4, 8), max_length=32
            )
        ),
        data=TextData(corpus=str(root / "corpus"), length=16, batch_size=4, shuffle_window=8, eval_limit=2),
        train=TrainConfig(steps=4, tensorboard=False),
        mesh=MeshConfig(data=1),
        workdir=str(root / "run"),
    )


def test_importing_is_quick_and_imports_no_jax():
    code = "import jaxtok, sys; jaxtok.list('*byte*'); print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "numpy", "tyro", "rich"} & set(done.stdout.split())
    bare = subprocess.run([sys.executable, "-X", "importtime", "-c", "import jaxtok"], capture_output=True, text=True)
    took = [line for line in bare.stderr.splitlines() if line.rstrip().endswith(" jaxtok")]
    assert int(took[0].split("|")[1]) < 0.2 * 1e6, "microseconds"
    assert time.perf_counter() - start < 10


def test_every_name_of_the_door_is_there():
    for name in jaxtok.__all__:
        assert name in dir(jaxtok) and callable(getattr(jaxtok, name)), name
    with pytest.raises(AttributeError, match="has no attribute 'opne'"):
        jaxtok.opne  # noqa: B018


EXAMPLES = [
    test
    for module in (door, model, systems)
    for test in doctest.DocTestFinder().find(module, module.__name__)
    if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_examples_of_the_docstrings(example, folder, monkeypatch):
    monkeypatch.chdir(folder)
    example.globs |= {"jaxtok": jaxtok, "run": "run", "config": config(folder)}
    assert (
        doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(example, clear_globs=False).failed == 0
    )


def test_public_functions_have_an_example():
    named = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert {"open_model", "train", "published", "generate", "evaluate", "find", "Model", "logits", "ids"} <= named


def test_texts_come_as_they_are_made(folder, capsys):
    opened = jaxtok.open(folder / "run")
    pieces = {0: "", 1: ""}

    def note(row, text):
        pieces[row] += text

    texts = opened.generate(["number ", "twice"], max_new_tokens=9, on_text=note)
    assert [pieces[0], pieces[1]] == texts
    one = opened.generate("number ", max_new_tokens=9, stream=True)
    assert one == texts[0] and capsys.readouterr().out == f"number {one}\n"
    with pytest.raises(ValueError, match="stream is for a single prompt"):
        opened.generate(["a", "b"], stream=True)


def test_log_probabilities_of_new_tokens_are_the_models(folder):
    opened, prompts = jaxtok.open(folder / "run"), ["number ", "twice"]
    options = {"max_new_tokens": 9, "temperature": 0.5, "stop_at_end": False}
    texts, rows = opened.generate_bytes(prompts, logprobs=True, **options)
    assert texts == opened.generate_bytes(prompts, **options)
    for prompt, text, row in zip(prompts, texts, rows):
        known = opened.ids(prompt.encode() + text)
        said = jax.nn.log_softmax(opened.logits(known[:-1]))[jnp.arange(len(known) - 1), known[1:]]
        np.testing.assert_allclose(row, said[-9:], atol=1e-5)
    assert jaxtok.generate(opened, prompts, logprobs=True, **options)[1] == rows
    text, row = jaxtok.generate(opened, prompts[0], logprobs=True, **options)
    assert text == opened.generate(prompts[0], **options) == texts[0].decode(errors="replace")
    np.testing.assert_allclose(row, rows[0], atol=1e-5)  # products of one row may be rounded differently


def test_logits_of_texts_and_of_ids_are_the_modules(folder):
    opened = jaxtok.open(folder / "run")
    ids = opened.ids("number 7")
    whole, _ = opened.module.apply({"params": opened.params}, ids[None])
    for logits in (opened.logits("number 7"), opened.logits(ids), opened.logits(ids[None])[0]):
        np.testing.assert_allclose(logits, whole[0], atol=1e-5)


def test_the_error_names_what_another_kind_of_model_cannot_do():
    t5, encoder, tokenizer = (
        jaxtok.Model(task=case.task, params={}, data=case.data)
        for case in (collect("TASKS")[name]() for name in ("t5", "masked_words", "bae"))
    )
    for one in (t5, encoder):
        with pytest.raises(ValueError, match="which has no logits of next tokens; give a causal language model"):
            one.logits(jnp.array([1, 2]))
    with pytest.raises(ValueError, match="a model of Autoencoding, which does not read text; give a model of text"):
        tokenizer.generate("a")
    with pytest.raises(ValueError, match="of SequenceToSequence, which is not an image tokenizer; give a run of one"):
        t5.decode(np.zeros((1, 4, 1), int))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rnu", "there is nothing at rnu; did you mean run?"),
        ("some/gpt2", "there is no folder some/gpt2, and nothing is downloaded; give the folder that has this size's"),
        ("no/such/run", "there is nothing at no/such/run; give a run's folder, or a folder or file of a model."),
        ("hat_1b", "hat_1b has not been trained here: there is no runs/hat_1b; run `jaxtok train hat_1b`."),
        ("hat_study", "hat_study is a study, which has several models"),
        ("run/checkpoints/7", "there is nothing at run/checkpoints/7; did you mean run/checkpoints/4?"),
        ("corpus", "which is in none of the formats here"),
    ],
)
def test_the_error_names_what_is_no_model(path, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        jaxtok.open(path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train__step": 3}, "train.step is not a field: a TrainConfig has no 'step'; did you mean steps?"),
        ({"stages__0__init": "copy"}, "stages.0.init is not a field"),
        ({"train__steps": "3"}, "train.steps is '3'; it must be of type int."),
        ({"train__steps": 0}, "train.steps is 0; it must be at least 1."),
    ],
)
def test_overrides_that_cannot_be(overrides, message, folder):
    with pytest.raises(ValueError) as error:
        jaxtok.train(config(folder), **overrides)
    assert message in str(error.value)


def test_a_study_is_not_trained():
    with pytest.raises(ValueError, match="hat_study is a study, which `jaxtok train` does not take; run it with"):
        jaxtok.train("hat_study")

"""The command line, as a user calls it: one run goes through every verb."""

import contextlib
import dataclasses
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from collector import collect

import jaxtok
from jaxtok import __version__
from jaxtok.cli import FUNCTIONS, VERBS, VISION, main
from jaxtok.drafters import DRAFTERS
from jaxtok.tokenizers import load_tokenizer
from jaxtok.tokenizers.bytes import ByteTokenizer
from jaxtok.training.checkpoints import begin
from jaxtok.verbs.text import generate

CONFIG = """
from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig

config = Experiment(
    task=LanguageModeling(model=TokenFormerConfig(
        num_layers=2, d_model=16, num_heads=2, rotary_fraction=0.5, tokens=uniform_counts(8, 16), max_length=128)),
    data=TextData(corpus=CORPUS, length=16, batch_size=4, shuffle_window=8, eval_limit=2),
    train=TrainConfig(steps=3, checkpoint_every=2, tensorboard=False),
    mesh=MeshConfig(data=1),
    workdir=WORKDIR,
)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def corpus(folder):
    texts = folder / "corpus"
    texts.mkdir()
    for i in range(100):
        (texts / f"{i}.txt").write_text(f"number {i}, twice {2 * i}, thrice {3 * i}; and so on.\n" * 4)
    return texts


@pytest.fixture(scope="module")
def run(folder, corpus):
    config = folder / "config.py"
    config.write_text(CONFIG.replace("CORPUS", repr(str(corpus))).replace("WORKDIR", repr(str(folder / "run"))))
    assert main(["train", str(config), "--train.steps", "4"]) == 0
    return folder / "run"


def test_train_again_says_the_same_and_continues_by_folder(run, capsys):
    assert main(["train", str(run)]) == 0
    assert "step 4" in " ".join(capsys.readouterr().out.split())


def test_eval_on_the_own_and_on_another_corpus(run, folder, capsys):
    assert main(["eval", str(run), "--output", str(folder / "eval.json")]) == 0
    row = json.loads((folder / "eval.json").read_text())
    assert row["split"] == "validation" and 0 < row["bits_per_byte"] < 12 and row["bytes"] > 100
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50)))
    assert main(["eval", str(run), "--corpus", str(other), "--split", "all"]) == 0
    assert "other.jsonl" in capsys.readouterr().out


def test_generate_streams_one_and_batches_several(run, capfdbinary):
    assert main(["generate", str(run), "--prompt", "number ", "--max-new-tokens", "12"]) == 0
    one = capfdbinary.readouterr().out
    assert one.startswith(b"number ")
    assert main(["generate", str(run), "--prompt", "number ", "--max-new-tokens", "12"]) == 0
    assert capfdbinary.readouterr().out == one  # the same seed, the same text
    index = next(n for n, byte in enumerate(one) if n > 6 and byte < 128)  # a character of one byte, and so a token
    assert main(["generate", str(run), "--prompt", "number ", "--stop", chr(one[index])]) == 0
    assert capfdbinary.readouterr().out == one[: index + 1] + b"\n"
    assert main(["generate", str(run), "--prompt", "a", "--stop", "two"]) == 1  # not a single token
    capfdbinary.readouterr()
    assert main(["generate", str(run), "--prompt", "a", "twice", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert b"--- 1 ---\ntwice" in capfdbinary.readouterr().out


@pytest.fixture(scope="module")
def plain(run):
    return jaxtok.open(run).generate_bytes(["number 1", "a"], 12, temperature=0.0, stop_at_end=False)


def test_the_help_has_every_drafter():
    assert DRAFTERS.keys() <= set(re.split(r"[\s,;()]+", generate.__doc__))


@pytest.mark.parametrize(
    "drafter", ["prompt_lookup", "suffix_automaton:2", "draft_model:RUN", "token_recycling:KEPT+prompt_lookup"]
)
def test_generate_with_drafts_is_the_same_text(run, folder, plain, drafter):
    text = drafter.replace("RUN", str(run)).replace("KEPT", str(folder / "kept.safetensors"))
    texts = generate(run, ("number 1", "a"), max_new_tokens=12, temperature=0.0, drafter=text, stop_at_end=False)
    assert texts == plain
    if "KEPT" in drafter:  # the second time, from what the first has learned
        before = (folder / "kept.safetensors").read_bytes()
        again = generate(run, ("number 1", "a"), max_new_tokens=12, temperature=0.0, drafter=text, stop_at_end=False)
        assert again == plain and len((folder / "kept.safetensors").read_bytes()) == len(before)


def test_generate_from_a_cache_of_few_slots(run, plain):
    texts = generate(run, ("number 1", "a"), max_new_tokens=12, temperature=0.0, evict="h2o:64", stop_at_end=False)
    assert texts == plain  # as nothing had to go


def test_generate_under_a_constraint(run, capfdbinary):
    pytest.importorskip("llguidance")
    texts = generate(run, ("number ", "x"), max_new_tokens=8, constrain="regex:[0-9]{3}", drafter="prompt_lookup")
    assert all(re.fullmatch(rb"[0-9]{3}", text) for text in texts)


def test_generate_exact_bytes(run, plain):
    texts = generate(run, ("number 1", "a"), max_new_tokens=12, temperature=0.0, exact_bytes=True, stop_at_end=False)
    assert texts == plain  # as each byte is a token here


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--drafter", "oracle"], "'oracle' is none of prompt_lookup"),
        (["--drafter", "aded"], "aded:TABLE"),
        (["--drafter", "suffix_automaton:all"], "a number of copies"),
        (["--drafter", "draft_model:nowhere"], "nowhere"),
        (["--evict", "h2o"], "it must be NAME:BUDGET"),
        (["--evict", "magic:3"], "NAME is one of"),
        (["--evict", "h2o:0"], "budget is 0"),
        (["--constrain", "words:x"], "it must be regex:EXPRESSION"),
        (["--constrain", "json:nowhere.json"], "no file nowhere.json"),
        (["--exact-bytes", "--stop", "a"], "exact_bytes is given with"),
        (["--exact-bytes", "--constrain", "regex:a"], "exact_bytes is given with"),
        (["--exact-bytes", "--max-new-tokens", "9", "--prompt", "a" * 200], "a prompt has 200 tokens"),
    ],
)
def test_options_of_generate_that_cannot_be(run, capfd, options, said):
    refused(capfd, said, str(run), "--prompt", "a", *options)


def refused(capfd, said, *arguments):
    """`jaxtok generate` ends with one sentence, that has `said` in it."""
    assert main(["generate", *arguments]) == 1
    error = " ".join(capfd.readouterr().err.split())
    assert said in error and "Traceback" not in error, error


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ("json:false", "Unsatisfiable schema"),
        ('json:{"type": "integer", "minimum": 3, "maximum": 2}', "Unsatisfiable schema: minimum (3) is greater"),
        ('json:{"type": "object", "properties": {"a": false}, "required": ["a"]}', "'a' is unsatisfiable"),
        ('json:{"$ref": "#/nowhere"}', "Pointer '/nowhere' does not exist"),
        ('json:{"type": "object"', "the JSON schema is no JSON"),
        ("json:half.json", "the JSON schema is no JSON"),
        ("json:list.json", "schema must be an object or boolean"),
        ("json:bytes", "the file bytes is not UTF-8"),
        ("regex:", "it must be regex:EXPRESSION"),
        ("regex:(a", "unclosed group"),
        (r"regex:[^\s\S]", "no text satisfies the constraint"),
        ("grammar:nowhere.lark", "no file nowhere.lark"),
        ("grammar:bytes", "the file bytes is not UTF-8"),
        ("grammar:names.lark", 'unknown name: "a"'),
        pytest.param("grammar:endless.lark", "fails: parser error", marks=pytest.mark.slow),  # inside the program
    ],
)
def test_constraints_that_cannot_be(run, capfd, tmp_path, monkeypatch, constraint, said):
    pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.json").write_text('{"type": ')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "bytes").write_bytes(b"\xff\x00")
    (tmp_path / "names.lark").write_text("start: a b\n")
    (tmp_path / "endless.lark").write_text('start: "a" start\n')
    refused(capfd, said, str(run), "--prompt", "a", "--max-new-tokens", "6", "--constrain", constraint)


def test_prompts_longer_than_the_context(run, capfd):
    pytest.importorskip("llguidance")
    for options in (["--constrain", "regex:[0-9]+"], []):
        refused(capfd, "max_length = 128", str(run), "--prompt", "a" * 200, "--max-new-tokens", "9", *options)


class Lower(ByteTokenizer):
    name = "lower"

    def encode(self, text):
        return super().encode(text.lower())


def test_exact_bytes_need_a_tokenizer_that_keeps_them(run, capfd, monkeypatch):
    model = dataclasses.replace(jaxtok.open(run), tokenizer=Lower())
    monkeypatch.setattr("jaxtok.verbs.text.open_model", lambda *_: model)
    refused(capfd, "the tokenizer lower turns", str(run), "--prompt", "a", "--exact-bytes")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--constrain", "regex:[0-9]+"], ["--exact-bytes"]])
def test_parameters_that_are_not_numbers(run, capfd, monkeypatch, options):
    pytest.importorskip("llguidance")
    model = jaxtok.open(run)
    model = dataclasses.replace(model, params=jax.tree.map(lambda x: x * jnp.nan, model.params))
    monkeypatch.setattr("jaxtok.verbs.text.open_model", lambda *_: model)
    refused(capfd, "not numbers (NaN)", str(run), "--prompt", "a", "--max-new-tokens", "4", *options)


def test_grow_and_train_on(run, folder, capsys):
    assert main(["grow", str(run), "--times", "2", "--output", str(folder / "grown"), "--steps", "2"]) == 0
    assert main(["train", str(folder / "grown")]) == 0
    assert "step 2" in " ".join(capsys.readouterr().out.split())
    assert main(["grow", str(run), "--to.ffn", "4", "--output", str(folder / "less")]) == 1
    assert "ffn has 16 parameter tokens and cannot grow to 4" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "less").exists()


def test_convert_there_and_back_is_bit_equal(run, folder, capsys):
    assert main(["convert", str(run), str(folder / "official")]) == 0
    assert main(["convert", str(folder / "official"), str(folder / "back")]) == 0
    assert main(["convert", str(folder / "back"), str(folder / "again")]) == 0
    first, second = (folder / name / "model.safetensors" for name in ("official", "again"))
    assert first.read_bytes() == second.read_bytes()
    assert main(["convert", str(run), str(folder / "official")]) == 1  # nothing is overwritten
    assert "exists already" in " ".join(capsys.readouterr().err.split())


def test_tokenizer_trains_on_the_corpus_and_a_model_on_the_tokenizer(run, folder, corpus, capsys):
    model = folder / "words.model"
    assert main(["tokenizer", str(model), "--corpus", str(corpus), "--vocab-size", "300"]) == 0
    tokenizer = load_tokenizer(str(model))
    assert tokenizer.decode(tokenizer.encode("number 12 \xff")) == "number 12 \xff".encode()
    arguments = ["--data.tokenizer", str(model), "--workdir", str(folder / "words"), "--train.steps", "2"]
    assert main(["train", str(folder / "config.py"), *arguments]) == 0


@pytest.fixture(scope="module")
def places(folder, run):
    """Paths that hold no model for generating text."""
    (folder / "README.md").write_text("# A page\n")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "whisper"}')
    case = collect("TASKS")["masked_words"]()
    encoder = dataclasses.replace(case.experiment, workdir=str(folder / "encoder"))
    begin(encoder, nn.meta.unbox(case.task.init(jax.random.key(0), case.batch)))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian x", "there is no verb 'trian'; did you mean train?"),
        ("train no/such/config.py", "there is no config 'no/such/config.py'; `jaxtok list` shows them."),
        ("train tokenformer_smal", "there is no config 'tokenformer_smal'; did you mean tokenformer_small?"),
        ("train README.md", "README.md is not a config; it must be a Python file that defines one, or the name"),
        ("train broken", "config.json is not JSON"),
        ("train other", "config.json is not a run's config; give what `jaxtok train` made."),
        ("train corpus", "corpus is not a run: it has no config.json; give what `jaxtok train` made."),
        (
            "train growth_study",
            "growth_study is a study, which `jaxtok train` does not take; run it with `jaxtok study",
        ),
        ("plan growth_study", "growth_study is a study, which `jaxtok plan` does not take"),
        ("recovery growth_study --workdir nowhere", "growth_study is a study, which `jaxtok recovery` does not take"),
        ("study hat_1b", "hat_1b is an experiment, not a study; run it with `jaxtok train hat_1b`."),
        ("eval no/such/run", "there is nothing at no/such/run; give a run's folder, or a folder or file of a model."),
        ("eval rnu", "there is nothing at rnu; did you mean run?"),
        ("eval README.md", "README.md is a file .md, which is in none of the formats here"),
        ("eval broken", "broken/config.json is not JSON"),
        ("eval other", "other has the model_type 'whisper' in its config.json, which is in none of the formats here"),
        ("generate broken", "broken/config.json is not JSON"),
        ("generate README.md", "README.md is a file .md"),
        ("generate encoder", "is a model of MaskedWords, which does not generate text; give a language model."),
        ("generate run --ema", "the run kept no moving average of its parameters"),
        ("grow no/such/run --times 2", "there is nothing at no/such/run"),
        ("grow no/such/run --to.ffn 20", "there is nothing at no/such/run"),
        ("grow encoder --times 2", "encoder has no parameter tokens, so it cannot grow; give a run of a TokenFormer."),
        ("grow encoder --to.ffn 20", "encoder has no parameter tokens, so it cannot grow"),
        ("grow broken --to.ffn 20", "broken/config.json is not JSON"),
        (
            "train config.py --mesh.fsdp 999",
            "does not fit 8 devices; its axes must multiply to 8, as with --mesh.fsdp 1",
        ),
        ("adapt no/such/run", "there is nothing at no/such/run"),
        ("convert no/such/folder target", "no/such/folder"),
        ("convert broken target", "broken/config.json is not JSON"),
        ("tokenizer t.model --corpus no/such/corpus", "no/such/corpus"),
        ("tokenizer words --corpus corpus", "words must end in .model."),
        ("generate run --prompt a --seed 1180591620717411303424", "a number is too large (Python int too large"),
        ("generate run --prompt-file empty.txt", "empty.txt is empty; it must have a prompt on each line."),
        ("generate run --prompt-file binary.txt", "binary.txt is not UTF-8 text ("),
        ("generate run --prompt-file corpus", "corpus cannot be used: is a directory."),
        (
            "eval run --output no/such/folder/x.json",
            "it must be a file in a folder that exists (nothing was",
        ),
        ("vision genrate x", "there is no verb 'genrate' of vision; did you mean generate?"),
        ("vision reconstruct run", "give a run of an image tokenizer"),
        ("vision generate README.md", "README.md is a file .md, which is in none of the formats here"),
        ("vision generate run", "give a run of a model of image codes"),
        ("list nothing*", "no name matches 'nothing*'; `jaxtok list` shows all of them."),
    ],
)
def test_mistakes_end_with_one_clear_sentence(arguments, message, places, monkeypatch, capsys):
    monkeypatch.chdir(places)
    assert main(arguments.split()) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error:") and message in error and "Traceback" not in error


def test_libtpu_is_silent_where_there_is_no_tpu(tmp_path):
    """It is asked for devices whenever it is installed, and would complain that this is no TPU VM."""
    chips = [file for file in Path("/sys/bus/pci/devices").glob("*/vendor") if file.read_text().strip() == "0x1ae0"]
    if chips:
        pytest.skip("there is a TPU")
    pytest.importorskip("libtpu")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
    code = "from jaxtok.cli import main; main(['list', 'gpt2']); import jax; print(jax.devices())"
    run = {"env": env | {"PYTHONPATH": str(Path(jaxtok.__file__).parents[1])}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, **run)
    assert "CpuDevice" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("config", ["tokenformer_small", "mrt5_small"])
def test_start_is_a_model_in_the_help_of_a_config(config, capsys):
    """It is the option of the verb, and not the config's field of that name, which holds a surgery."""
    with pytest.raises(SystemExit):
        main(["train", config, "--help"])
    text = capsys.readouterr().out
    assert text.count("--start") == 1 and "With `--start MODEL`, a new run begins with the parameters" in text


def test_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"jaxtok {verb} " in text or f"jaxtok {verb}\n" in text for verb in VERBS)
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__
    own = {"train", "study", "plan", "vision"}
    for verb in set(VERBS) - own:
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0 and f"usage: jaxtok {verb}" in capsys.readouterr().out
    for verb in own:
        assert main([verb, "--help"]) == 0
    assert "recovery" in capsys.readouterr().out


def test_help_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for arguments in ([], ["train", "--help"], ["study", "--help"], ["plan", "--help"], ["vision"], ["list"]):
        assert main(arguments) == 0
        lines = capsys.readouterr().out.split("\n")
        assert max(map(len, lines)) <= 100, max(lines, key=len)
    for command in [[verb] for verb in FUNCTIONS] + [["vision", verb] for verb in VISION]:
        lines = _help(command, capsys).split("\n")
        assert max(map(len, lines)) <= 100, max(lines, key=len)
    assert "    mrt5_small                          300M parameters; in the paper" in _help(["train"], capsys)


def _help(command, capsys):
    with contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return capsys.readouterr().out


def test_help_breaks_no_sentence_where_the_source_does(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    assert "TokenBridge, TokenUnify, ELECTRA's variables); the new run then has this config." in _help(
        ["convert"], capsys
    )
    shown = _help(["train", "elm_l"], capsys)
    assert "ELM (arXiv 2410.16257): a Llama" in shown and "elm_l: 316M parameters" in shown
    assert "linearly from 0 in the first layer (stochastic depth, arXiv 1603.09382). If it is positive, it" in shown


def test_every_verb_says_what_each_of_its_options_is():
    """Each option has whole sentences; tyro adds `Literal` choices and defaults."""
    for entry in (*FUNCTIONS.values(), *VISION.values()):
        module, _, name = entry.partition(":")
        function = getattr(importlib.import_module(module), name)
        described = inspect.getdoc(function)
        for parameter in inspect.signature(function).parameters:
            assert re.search(rf"^\s+{parameter}: \S", described, re.M), f"{entry} does not say what {parameter} is"


def test_lists_need_no_jax():
    code = (
        "import sys; from jaxtok.cli import main; main(['train', '--help']); main(['study', '--help']); "
        "main(['list', '*byte*']); print({'jax', 'flax', 'tyro'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n")
    for name in ("mrt5_xxl", "elm_masked_b", "quickstart", "byte2word-base"):
        assert name in done.stdout

"""The standard harness on tiny models, with tasks that are made here."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxtok
from jaxtok.cli import main
from jaxtok.harness import continuations, score
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.llama import LlamaConfig

FOLDER = "goldens/llama_gpt2_bricks/hf_folder_llama"
TASK = """\
task: NAME
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
"""
CHOICE = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROLLING = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
UNTIL = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def model():
    return jaxtok.open(Path(__file__).parent / FOLDER)


def reference(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """By the logits of the whole row, one row at a time; what follows a row changes nothing before it."""
    ids = context + continuation
    logits = model.logits(np.array(ids[:-1] + [0] * (65 - len(ids)))[None])[0, : len(ids) - 1]
    logprobs = jax.nn.log_softmax(logits)[len(context) - 1 :]
    chosen = [float(row[i]) for row, i in zip(logprobs, continuation)]
    return sum(chosen), all(int(row.argmax()) == i for row, i in zip(logprobs, continuation))


def test_scores_are_those_of_each_row_alone():
    config = LlamaConfig(num_layers=1, d_model=16, num_heads=2, mlp_dim=16, vocab_size=40, max_length=96)
    params = init_params(Decoder(config), jax.random.key(0), np.zeros((1, 1), np.int32))
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 40, length).tolist(), count) for length, count in [(3, 1), (5, 4), (70, 9), (97, 96)] * 3]
    rows.append((rng.integers(0, 40, 130).tolist(), 5))  # loses its beginning
    apply = jax.jit(Decoder(config).apply)
    for (ids, count), (logprob, greedy) in zip(rows, score(Decoder(config), params, rows, 96)):
        ids = ids[-97:]
        padded = np.array(ids[:-1] + [0] * (97 - len(ids)))[None]
        logits = apply({"params": params}, padded)[0][0, : len(ids) - 1]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[-count:]
        assert logprob == pytest.approx(sum(row[i] for row, i in zip(logprobs, ids[-count:])), abs=1e-3)
        assert greedy == all(row.argmax() == i for row, i in zip(logprobs, ids[-count:]))


def test_continuations_end_at_the_first_stop_text(model):
    def encode(text):
        return [*model.begin, *model.tokenizer.encode(text)]

    whole = model.generate("hello", 6, temperature=0)
    assert len(whole) > 2
    settings = {"until": [whole[1:3]], "max_gen_toks": 6, "do_sample": False}
    plain = {"until": [], "max_gen_toks": 6}
    found = continuations(model, [("hello", settings), ("hello", plain), ("x" * 300, plain)], encode)
    assert found[:2] == [whole[: whole.index(whole[1:3])], whole] and found[2]


def test_tasks_by_the_verb(model, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    questions = ["one and", "two", "a longer question, which is third:", "", "x", "yes", "no", "so", "last"]
    rows = [{"question": q, "choices": [" a b", " c", " hello you"], "answer": n % 3} for n, q in enumerate(questions)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = []
    for name, text in {"choice": CHOICE, "rolling": ROLLING, "until": UNTIL}.items():
        file = tmp_path / f"{name}.yaml"
        head = TASK.replace("NAME", f"made_{name}").replace("FILE", str(tmp_path / "rows.jsonl"))
        file.write_text(head + text)
        files.append(str(file))
    out = tmp_path / "numbers.json"
    assert main(["eval", str(model.path), "--harness", *files, "--output", str(out)]) == 0
    assert "made choice acc" in capsys.readouterr().out
    numbers = json.loads(out.read_text())

    def encode(text):
        return model.tokenizer.encode(text)

    right = 0
    prefix = [model.begin[-1]]
    nats = 0.0
    for row in rows:
        context = [*model.begin, *encode(row["question"])] if row["question"] else prefix
        scores = [reference(model, context, encode(row["question"] + c)[len(context) - 1 :])[0] for c in row["choices"]]
        right += int(np.argmax(scores)) == row["answer"]
        if row["question"]:
            nats -= reference(model, prefix, encode(row["question"]))[0]
    assert numbers["made_choice acc"] == pytest.approx(right / len(rows))
    size = sum(len(row["question"].encode()) for row in rows)
    assert numbers["made_rolling bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert 0 <= numbers["made_until exact_match"] <= 1
    assert main(["eval", str(model.path), "--harness", "no_such_task"]) == 1
    assert "the harness has no task 'no_such_task'" in " ".join(capsys.readouterr().err.split())


def test_without_the_harness(model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert main(["eval", str(model.path), "--harness", "x"]) == 1
    assert "pip install 'jaxtok[harness]'" in " ".join(capsys.readouterr().err.split())

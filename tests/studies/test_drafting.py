"""Mean accepted tokens, on a model that has learned nothing and on SmolLM2 (slow)."""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import pytest
from causal_lms import noisy_params
from collector import collect

import jaxtok.door
from jaxtok.decoding import ADED, PromptLookup, SuffixAutomaton, TokenRecycling, TreeTemplate, Union
from jaxtok.studies import drafting
from jaxtok.studies.draft_width import WidthStudy
from jaxtok.studies.drafting import Arm, DraftStudy, answers

SPEC_BENCH = Path(__file__).parents[3] / "shared/data/spec_bench/question.jsonl"
RECYCLING = TokenRecycling(template=TreeTemplate.of([(0,), (1,), (0, 0)]), k=2)


@pytest.fixture(scope="module")
def model():
    """What the study needs of a `jaxtok.model.Model`."""
    module = collect("CAUSAL_LMS")["llama"]()
    return types.SimpleNamespace(
        module=module,
        params=noisy_params(module),
        tokenizer=types.SimpleNamespace(vocab_size=30),
        task=types.SimpleNamespace(model=module.config),
        ends=(7,),
        chat_ids=lambda text: [len(word) for word in text.split()],
    )


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Four questions each of two of MT-bench's categories and of another one; the last is too long."""
    path = tmp_path_factory.mktemp("questions") / "question.jsonl"
    rows = [
        {"category": category, "turns": ["a bb " + "ccc " * (number if number < 11 else 99), "more"]}
        for number, category in enumerate(["writing"] * 4 + ["coding"] * 4 + ["qa"] * 4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_requests(model, questions, tmp_path):
    """Evenly from each category, in turns; MT-bench's are one."""
    study = DraftStudy(arms=(), questions=questions, each=4, new_tokens=8)
    found = study.prompts(model)
    assert [(group, len(ids)) for group, ids in found] == [
        *[("mt_bench", 2), ("qa", 10), ("mt_bench", 4), ("qa", 11)],
        *[("mt_bench", 6), ("qa", 12), ("mt_bench", 8)],
    ]
    assert found[2][1] == [1, 2, 3, 3]
    with pytest.raises(FileNotFoundError, match=r"give Spec-Bench's question.jsonl"):
        DraftStudy(arms=(), questions=str(tmp_path / "none")).prompts(model)


def test_a_study(model, questions, tmp_path, monkeypatch):
    """Replayed arms and those that run with the model; the second run has all of it already, but for new arms."""
    monkeypatch.setattr(jaxtok.door, "open_model", lambda name: model)
    union = Union((SuffixAutomaton(tokens=3), RECYCLING, ADED(nodes=5, maker="best_first")))
    arms = (
        Arm(name="lookup", drafter=PromptLookup(tokens=3)),
        Arm(name="cold", drafter=RECYCLING, with_model=True),
        Arm(name="hot", drafter=RECYCLING, with_model=True, in_turn=True),
        Arm(name="union", drafter=union, with_model=True, in_turn=True),
    )
    options = {"questions": questions, "each": 2, "new_tokens": 10, "workdir": str(tmp_path)}
    assert DraftStudy(arms=arms[:3], checked=1, **options).run()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["lookup"]["checked"] == {"requests": 1} | dict.fromkeys(list(rows["lookup"]["checked"])[1:], 1)
    assert rows["cold"]["same"] == rows["hot"]["same"] == len(rows["hot"]["requests"]) == 4
    texts, steps = (json.loads((tmp_path / name).read_text()) for name in ("texts.json", "steps.json"))
    made = steps[repr(arms[2])]
    assert rows["hot"]["all"] == sum(len(text) for text, _ in made) / sum(count for _, count in made) > 1
    assert rows["hot"]["requests"] == [len(text) / count for text, count in made]
    assert rows["hot"]["qa"] == sum(len(text) for text, _ in made[1::2]) / sum(count for _, count in made[1::2])
    assert rows["hot"]["nodes"] == 4 and (tmp_path / "requests.png").exists()
    del steps[repr(arms[1])][1:]  # goes on from here
    (tmp_path / "steps.json").write_text(json.dumps(steps))
    monkeypatch.setattr(DraftStudy, "_generate", None)
    assert DraftStudy(arms=arms, only=("cold", "hot", "union"), **options).run()
    again = json.loads((tmp_path / "results.json").read_text())
    assert {name: again[name] for name in ("cold", "hot")} == {name: rows[name] for name in ("cold", "hot")}
    assert again["union"]["same"] == 4 and json.loads((tmp_path / "texts.json").read_text()) == texts
    with pytest.raises(ValueError, match="texts of other requests"):
        DraftStudy(arms=arms, **options | {"new_tokens": 9}).run()


def test_answers_hot_and_cold(model):
    """A state goes on from request to request, or does not; the text is the same."""
    requests = [[3, 1, 4], [8]]
    runs = {
        name: list(answers(model, requests, own, new_tokens=10, in_turn=hot))
        for name, own, hot in (("plain", None, True), ("hot", RECYCLING, True), ("cold", RECYCLING, False))
    }
    texts = {name: [text for (text,), _, _ in run] for name, run in runs.items()}
    assert texts["hot"] == texts["cold"] == texts["plain"]
    passes = {name: [count for _, (count,), _ in run] for name, run in runs.items()}
    assert passes["plain"] == list(map(len, texts["plain"])) and passes["hot"][0] == passes["cold"][0]
    written = {name: int((run[1][2] != 0).any(-1).sum()) for name, run in runs.items() if name != "plain"}
    assert written["hot"] > written["cold"] > 0
    own = dataclasses.replace(RECYCLING, shared=False)
    ((both, counts, _),) = answers(model, requests, own, new_tokens=10, in_turn=False, rows=2)
    assert both == texts["plain"] and counts == passes["cold"]  # rows with a matrix each, as alone
    with pytest.raises(ValueError, match=r"a request has 3 tokens.*max_length = 80"):
        next(answers(model, requests, None, new_tokens=78))


def test_an_arm_in_turn_goes_on_from_its_last_state(model, questions, tmp_path, monkeypatch):
    """Stopped after each request, it needs as many steps as in one go."""
    monkeypatch.setattr(jaxtok.door, "open_model", lambda name: model)
    union = Union((SuffixAutomaton(tokens=3), RECYCLING, ADED(nodes=5, maker="best_first", shared=True)))
    arm = Arm(name="union", drafter=union, with_model=True, in_turn=True)
    options = {"arms": (arm,), "questions": questions, "each": 2, "new_tokens": 10}
    assert DraftStudy(workdir=str(tmp_path / "whole"), **options).run()
    made = (tmp_path / "whole" / "steps.json").read_text()
    real = drafting.answers

    def stopped(model, requests, *rest, **of):
        yield from real(model, requests[:1], *rest, **of)
        if len(requests) > 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(drafting, "answers", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            DraftStudy(workdir=str(tmp_path / "parts"), **options).run()
    assert DraftStudy(workdir=str(tmp_path / "parts"), **options).run()
    assert (tmp_path / "parts" / "steps.json").read_text() == made


def test_speeds_of_batches(model, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtok.door, "open_model", lambda name: model)
    options = {"questions": questions, "batches": (2,), "widths": (2,), "new_tokens": 8, "turns": 1}
    assert WidthStudy(drafter=RECYCLING, workdir=str(tmp_path), **options).run()
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["batch"] == 2 and row["chosen"] in (1, 2, 4) and 1 <= row["mean accepted"] <= 3
    assert (row["of plain"] == 1) if row["chosen"] == 1 else (row["of plain"] > 0)
    assert row["plain, tokens/s"] > 0 and row["tokens a step by width"].startswith("1: 1.00 2: ")


def test_impossible_studies_are_refused():
    with pytest.raises(ValueError, match="no drafter 'medusa'; choose from plain"):
        DraftStudy(arms=(Arm(name="plain", drafter=PromptLookup()),), only=("medusa",), corpus="python")
    with pytest.raises(ValueError, match="one of questions and corpus"):
        DraftStudy(arms=())


@pytest.mark.slow
@pytest.mark.skipif(not SPEC_BENCH.is_file(), reason="needs Spec-Bench's questions")
def test_a_union_accepts_more_than_its_drafters(tmp_path):
    """SmolLM2 on one question a category, 64 tokens: the union is the best, and its answers are those of plain."""
    hot = {"with_model": True, "in_turn": True}
    arms = (
        Arm(name="suffix automaton", drafter=SuffixAutomaton()),
        Arm(name="recycling", drafter=TokenRecycling(), **hot),
        Arm(name="union", drafter=Union((SuffixAutomaton(), TokenRecycling()), budget=81), **hot),
    )
    options = {"questions": str(SPEC_BENCH), "each": 1, "new_tokens": 64, "workdir": str(tmp_path)}
    assert DraftStudy(arms=arms, **options).run()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows["union"]["all"] > 1.05 * max(rows["suffix automaton"]["all"], rows["recycling"]["all"])
    assert min(rows["recycling"]["same"], rows["union"]["same"]) >= 5


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.skipif(not SPEC_BENCH.is_file(), reason="needs Spec-Bench's questions")
def test_prompt_lookup_beside_that_of_transformers():
    """Four short questions, 64 tokens: what both accept, and whether their texts are plain decoding's."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    smollm2 = jaxtok.door.open_model("smollm2")
    asked = DraftStudy(arms=(), questions=str(SPEC_BENCH), each=2, new_tokens=64).prompts(smollm2)
    requests = [ids for _, ids in asked if len(ids) < 100][:4]
    options = {"new_tokens": 64, "in_turn": False, "rows": len(requests)}
    ((plain, _, _),) = answers(smollm2, requests, None, **options)
    ((texts, steps, _),) = answers(
        smollm2, requests, PromptLookup(longest=2, take="first", ends=smollm2.ends), **options
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32).eval()
    passes = []
    theirs.register_forward_hook(lambda *_: passes.append(1))
    others = []
    for ids in requests:
        given = torch.tensor([ids])
        lookup = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2}
        made = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=64, do_sample=False, **lookup
        )
        others.append(made[0, len(ids) :].tolist())
    for name, found, count in (("jaxtok", texts, sum(steps)), ("transformers", others, len(passes))):
        same = sum(a == b for a, b in zip(found, plain))
        print(f"{name}: {sum(map(len, found)) / count:.3f} tokens a pass, {same} of {len(plain)} as plain decoding")
    assert texts == plain

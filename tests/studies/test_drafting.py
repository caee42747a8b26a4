"""Mean accepted tokens, on a model that has learned nothing and on SmolLM2 (slow)."""

from __future__ import annotations

import json
import types
from pathlib import Path

import jax.numpy as jnp
import pytest
from causal_lms import noisy_params
from collector import collect

from jaxtok.decoding import TokenRecycling, TreeTemplate, Verified
from jaxtok.studies.drafting import Answer, Counted, DraftingStudy, Question, answers, mean_accepted, spec_bench, table

SPEC_BENCH = Path(__file__).parents[3] / "shared/data/spec_bench/question.jsonl"


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


def test_questions(model, tmp_path):
    path = tmp_path / "question.jsonl"
    rows = [
        {"question_id": number, "category": category, "turns": ["a bb " + "c " * number, "more"]}
        for number, category in enumerate(["writing"] * 4 + ["coding"] * 4 + ["qa"] * 4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = spec_bench(model, path, per_category=2)
    assert [(question.number, question.category) for question in found] == [
        (0, "mt_bench"),
        (4, "mt_bench"),
        (8, "qa"),
        (9, "qa"),
    ]
    assert found[1].ids == (1, 2, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="per_category is 0"):
        spec_bench(model, path, per_category=0)
    with pytest.raises(FileNotFoundError, match=r"give Spec-Bench's question.jsonl"):
        spec_bench(model, tmp_path / "none")


def test_the_table(model):
    plain = [Answer(1, "qa", [5, 6, 7], 3, 1, 0.0), Answer(2, "rag", [4] * 5, 5, 1, 0.0)]
    other = [Answer(1, "qa", [5, 6, 7], 1, 4, 0.0), Answer(2, "rag", [4] * 4 + [3], 3, 4, 0.0)]
    first, second = table(model, {"plain": plain, "other": other, "none": []})
    assert first["mean_accepted"] == first["read_a_token"] == first["as_plain"] == 1
    assert (second["mean_accepted"], second["qa"], second["rag"]) == (2, 3, 5 / 3)
    assert (second["nodes"], second["read_a_token"], second["as_plain"]) == (4, 2, 0.5)
    assert second["gigaflops_a_token"] == 2 * first["gigaflops_a_token"]


def test_answers_hot_and_cold(model):
    """A state goes on from question to question, or does not; the text is the same."""
    drafter = TokenRecycling(template=TreeTemplate.of([(0,), (1,), (0, 0)]), k=2)
    questions = [Question(1, "qa", (3, 1, 4)), Question(2, "qa", (3, 1, 4))]
    runs = {
        name: list(answers(model, questions, own, max_new_tokens=10, hot=hot))
        for name, own, hot in (("plain", None, True), ("hot", drafter, True), ("cold", drafter, False))
    }
    texts = {name: [answer.tokens for answer, _ in run] for name, run in runs.items()}
    assert texts["hot"] == texts["cold"] == texts["plain"]
    passes = {name: [answer.passes for answer, _ in run] for name, run in runs.items()}
    assert passes["plain"] == list(map(len, texts["plain"])) and passes["cold"][0] == passes["cold"][1]
    assert passes["hot"][0] == passes["cold"][0] and passes["hot"][1] < passes["cold"][1]
    assert mean_accepted([answer for answer, _ in runs["plain"]]) == 1
    with pytest.raises(ValueError, match=r"question 1 has 3 tokens.*max_length = 80"):
        next(answers(model, questions, None, max_new_tokens=78))


def test_counted_nodes():
    drafter = Counted(TokenRecycling(template=TreeTemplate.of([(0,), (1,), (0, 0)]), k=2))
    state = drafter.init(2, 4, 9)
    tokens, parents = drafter.propose(state, jnp.zeros((2, 4), jnp.int32), jnp.array([1, 2]))
    path, count = jnp.array([[0, 1, 3, 0], [0, 2, 0, 0]]), jnp.array([3, 2])
    _, counts = drafter.observe(state, Verified(tokens, parents, jnp.zeros((2, 4, 9)), path, count, tokens))
    assert counts.tolist() == [2, 1, 1, 1]
    assert drafter.nodes == 4 and not drafter.chain


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="no method 'medusa'; choose from plain"):
        DraftingStudy(methods=("medusa",))


@pytest.mark.slow
@pytest.mark.skipif(not SPEC_BENCH.is_file(), reason="needs Spec-Bench's questions")
def test_a_union_accepts_more_than_its_drafters(tmp_path):
    """SmolLM2 on one question a category, 64 tokens: the union is the best, and the answers are those of plain."""
    methods = ("plain", "suffix_automaton", "token_recycling", "union")
    options = {"questions": str(SPEC_BENCH), "per_category": 1, "new_tokens": 64, "workdir": str(tmp_path)}
    assert DraftingStudy(methods=methods, **options).run()
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    mean = {name: row["mean_accepted"] for name, row in rows.items()}
    assert mean["union"] > 1.05 * max(mean["suffix_automaton"], mean["token_recycling"]) > 1.05 * mean["plain"]
    assert all(row["as_plain"] > 0.8 for row in rows.values())
    with pytest.raises(ValueError, match="answers to other questions"):
        DraftingStudy(methods=methods, **options | {"new_tokens": 32}).run()

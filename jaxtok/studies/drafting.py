"""How many tokens a pass of the model gives with each drafter, on the questions of Spec-Bench (arXiv 2401.07851).

The number is the mean of accepted tokens: new tokens over passes that gave some, the model's own token of each pass
included, so that plain decoding has 1. Passes over the prompt do not count. Means are over all passes of all prompts of
a category (micro averages), as in Spec-Bench.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console

from jaxtok.decoding import (
    CachedTokens,
    Drafter,
    Engine,
    PromptLookup,
    Sampling,
    SuffixAutomaton,
    TokenRecycling,
    Union,
    Verified,
)
from jaxtok.decoding.engine import new_tokens
from jaxtok.door import open_model
from jaxtok.model import Model

Row = dict[str, Any]

TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
"""Spec-Bench's categories beside those of MT-bench."""

METHODS: dict[str, Drafter | None] = {
    "plain": None,
    "prompt_lookup": PromptLookup(),
    "suffix_automaton": SuffixAutomaton(),
    "token_recycling": TokenRecycling(),
    "union": Union((SuffixAutomaton(), TokenRecycling())),
}
"""What is compared, by name."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, as ids, and its category."""

    number: int
    category: str
    ids: tuple[int, ...]


def spec_bench(model: Model, path: Path, per_category: int = 20) -> list[Question]:
    """The first questions of each category of Spec-Bench's question.jsonl, as first turns of a chat.

    The eight small categories are those of MT-bench, which counts as one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: per_category is below 1.
    """
    if per_category < 1:
        raise ValueError(f"per_category is {per_category}; it must be at least 1.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; give Spec-Bench's question.jsonl.")
    rows: dict[str, list[Row]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["category"] if row["category"] in TASKS else "mt_bench", []).append(row)
    # MT-bench has ten questions of each kind in a row, so of a few there should be one of each.
    return [
        Question(row["question_id"], category, tuple(model.chat_ids(row["turns"][0])))
        for category, group in rows.items()
        for row in (group[:: max(1, len(group) // per_category)] if category == "mt_bench" else group)[:per_category]
    ]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a method made of a question."""

    question: int
    category: str
    tokens: list[int]
    passes: int
    nodes: int
    """The tokens that a pass read."""
    seconds: float
    """The time of the passes, without the prompt's; with compilation where a shape is new."""


@dataclasses.dataclass(frozen=True)
class Counted(Drafter):
    """A drafter whose state also counts how often each node was accepted, for `TreeTemplate.prune`."""

    inner: Drafter

    @property
    def nodes(self) -> int:
        return self.inner.nodes

    @property
    def chain(self) -> bool:
        return self.inner.chain

    def init(self, batch: int, room: int, vocab: int) -> tuple[Any, jax.Array]:
        return self.inner.init(batch, room, vocab), jnp.zeros(self.nodes, jnp.int32)

    def propose(self, state, text, length):
        return self.inner.propose(state[0], text, length)

    def observe(self, state, verified: Verified) -> tuple[Any, jax.Array]:
        passed = jnp.arange(self.nodes) < verified.count[:, None]
        nodes = jnp.where(passed, verified.path, self.nodes)
        return self.inner.observe(state[0], verified), state[1].at[nodes].add(1, mode="drop")


def answers(
    model: Model,
    questions: Iterable[Question],
    drafter: Drafter | None,
    *,
    max_new_tokens: int = 128,
    hot: bool = True,
    state: Any = None,
) -> Iterator[tuple[Answer, Any]]:
    """Answers one question after another, greedily; yields each answer and the drafter's state after it.

    Args:
      hot: whether the drafter's state goes on from question to question. Otherwise each question begins with `state`.
      state: the drafter's first state; default: a new one.
    """
    engine = Engine(model=CachedTokens(model.module), chooser=Sampling(temperature=0), drafter=drafter)
    engine = dataclasses.replace(engine, num_ids=min(model.tokenizer.vocab_size, model.task.model.vocab_size))
    params, stops = jax.device_put(model.params), sorted(model.ends)
    longest = model.task.model.max_length
    for question in questions:
        length = len(question.ids)
        if length + max_new_tokens > longest:
            raise ValueError(
                f"question {question.number} has {length} tokens, which with max_new_tokens = {max_new_tokens} exceed "
                f"the model's max_length = {longest}."
            )
        # Few widths, so that few programs are compiled.
        tokens = np.zeros((1, min(max(128, 1 << (length - 1).bit_length()), longest)), np.int32)
        tokens[0, :length] = question.ids
        decoding = engine.prefill(params, tokens, np.array([length]), new=max_new_tokens, stop=stops, drafter=state)
        start = time.perf_counter()
        decoding = jax.block_until_ready(engine.run(params, jax.block_until_ready(decoding)))
        seconds = time.perf_counter() - start
        made, passes = new_tokens(decoding).tokens[0], int(decoding.steps[0])
        yield Answer(question.number, question.category, made, passes, engine.nodes, seconds), decoding.drafter
        state = decoding.drafter if hot else state


def mean_accepted(found: Sequence[Answer]) -> float:
    """The mean number of tokens that a pass gave."""
    return sum(len(answer.tokens) for answer in found) / sum(answer.passes for answer in found)


def table(model: Model, found: dict[str, Sequence[Answer]]) -> list[Row]:
    """A row for each method: mean accepted tokens, over all and by category, and the model's work a new token.

    `read_a_token` is how many tokens the model reads for a new one (plain decoding: 1), `gigaflops_a_token` what that
    costs at a context of 512 tokens, and `as_plain` the share of answers that are equal to those of plain decoding.
    """
    rows = []
    plain = {answer.question: answer.tokens for answer in found.get("plain", ())}
    for method, own in found.items():
        if not own:
            continue
        categories = dict.fromkeys(answer.category for answer in own)
        read = own[0].nodes / mean_accepted(own)
        row = {"method": method, "questions": len(own), "mean_accepted": mean_accepted(own)}
        row |= {name: mean_accepted([answer for answer in own if answer.category == name]) for name in categories}
        row |= {"nodes": own[0].nodes, "read_a_token": read}
        if hasattr(model.task.model, "flops"):
            row["gigaflops_a_token"] = read * model.task.model.flops(512) / 1e9
        known = [answer.tokens == plain[answer.question] for answer in own if answer.question in plain]
        row["as_plain"] = sum(known) / len(known) if known else None
        rows.append(row)
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftingStudy:
    """Answers questions of Spec-Bench with each method; if it is run again, it resumes with the answers that it has."""

    questions: str = "question.jsonl"
    """Spec-Bench's file."""
    per_category: int = 4
    """The questions of each of six categories."""
    methods: tuple[str, ...] = (*METHODS, "token_recycling_cold")
    """Names of `METHODS`. Their states go on from question to question; with _cold, each question has a new one."""
    new_tokens: int = 128
    """The most tokens of an answer."""
    model: str = "smollm2"
    workdir: str = "runs/drafting"

    def __post_init__(self):
        if unknown := [name for name in self.methods if name.removesuffix("_cold") not in METHODS]:
            raise ValueError(f"there is no method {unknown[0]!r}; choose from {', '.join(METHODS)}.")

    def run(self) -> bool:
        """Writes answers.json, rows.json and table.md."""
        folder, console = Path(self.workdir), rich.console.Console()
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(self.model)
        questions = spec_bench(model, Path(self.questions), self.per_category)
        kept = folder / "answers.json"
        done = json.loads(kept.read_text()) if kept.exists() else {}
        asked = json.dumps([self.model, self.new_tokens, [question.number for question in questions]])
        if done.setdefault("asked", asked) != asked:
            raise ValueError(f"{folder} has the answers to other questions; choose another workdir.")
        found: dict[str, list[Answer]] = {}
        for name in self.methods:
            if name not in done:
                drafter, hot = METHODS[name.removesuffix("_cold")], not name.endswith("_cold")
                run = answers(model, questions, drafter, max_new_tokens=self.new_tokens, hot=hot)
                done[name] = [dataclasses.asdict(answer) for answer, _ in run]
                kept.write_text(json.dumps(done))
            found[name] = [Answer(**answer) for answer in done[name]]
            console.print(f"{name}: {mean_accepted(found[name]):.3f}", soft_wrap=True)
        rows = table(model, found)
        (folder / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
        shown = markdown(rows)
        (folder / "table.md").write_text(shown + "\n")
        console.print(shown, soft_wrap=True, markup=False)
        return True


def markdown(rows: Sequence[Row]) -> str:
    """The rows of `table` as a table in Markdown."""
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    for row in rows:
        lines.append(" | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    return "\n".join(f"| {line} |" for line in lines)

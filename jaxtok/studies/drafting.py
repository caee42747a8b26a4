"""How many tokens a pass of the model gives with each drafter, on the questions of Spec-Bench (arXiv 2401.07851).

The number is the mean of accepted tokens: new tokens over passes that gave some, the model's own token of each pass
included, so that plain decoding has 1. Passes over the prompt do not count. Means are over all passes of all requests
of a category (micro averages), as in Spec-Bench.

The model's greedy texts are generated once. Drafters that look at the text only are replayed on them
(`jaxtok.studies.replay`); those that look at logits run with the model, in batches. A row's text and steps are those
that it has alone, unless the drafter's state is of all rows: those of a batch then learn from each other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from jaxtok.data.corpora import open_corpus
from jaxtok.decoding import ADED, ADEDState, CachedTokens, Drafter, Engine, Sampling, Union, generate
from jaxtok.decoding.engine import new_tokens as tokens_of
from jaxtok.decoding.trigram_table import TrigramTable, corpus_table
from jaxtok.model import Model
from jaxtok.studies.replay import Nothing, replay

TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
"""Spec-Bench's categories beside those of MT-bench."""

_BATCH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A drafter, and how it is measured."""

    name: str
    drafter: Drafter
    corpus: str = ""
    """What ADED's table is made from (see `jaxtok.data.corpora.open_corpus`); empty: an empty table."""
    share: float = 1.0
    """The share of the corpus's training documents."""
    in_turn: bool = False
    """Whether the requests come one after the other, and each begins with the state that the one before it left."""
    with_model: bool = False
    """Whether the model runs, which a drafter that looks at logits needs. Otherwise, its texts are replayed."""
    rows: int = 1
    """The requests that are answered as one batch, with the model; `in_turn`, batches come one after the other."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftStudy:
    """Compares drafters on the greedy text of a model.

    If it is run again, it resumes with the texts that it has, and with what the arms have done with the model.
    """

    arms: tuple[Arm, ...]
    only: tuple[str, ...] = ()
    """The names of the arms that are run; empty: all."""
    questions: str = ""
    """A JSON-lines file with `category` and `turns`, as Spec-Bench's; the first turn is asked in the chat template."""
    categories: tuple[str, ...] = TASKS
    """The categories that are asked from, each a column of the table; further ones are `others`. Empty: all of them."""
    others: str = "mt_bench"
    """The name of what the further categories are together; empty: they are left out."""
    corpus: str = ""
    """A corpus whose held-out documents are continued, in place of questions."""
    each: int = 8
    """The requests of each category, evenly from all that it has."""
    prompt_tokens: int = 64
    """The tokens of a document that are given."""
    new_tokens: int = 128
    checked: int = 0
    """The requests that each replayed arm generates again with the model, as a batch."""
    model: str = "smollm2"
    workdir: str = "runs/drafts"

    def __post_init__(self):
        if bool(self.questions) == bool(self.corpus):
            raise ValueError("one of questions and corpus must be given, and not both.")
        names = [arm.name for arm in self.arms]
        if unknown := [name for name in self.only if name not in names]:
            raise ValueError(f"there is no drafter {unknown[0]!r}; choose from {', '.join(names)}.")

    def run(self) -> bool:
        """Generates, replays, and writes texts.json, steps.json, results.json, results.md and requests.png.

        Raises:
          ValueError: the folder has the texts of other requests.
        """
        from jaxtok.door import open_model

        folder, console = Path(self.workdir), rich.console.Console()
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(self.model)
        prompts = self.prompts(model)
        asked = json.dumps([self.model, self.new_tokens, prompts])
        kept = folder / "texts.json"
        texts = json.loads(kept.read_text()) if kept.exists() else {"asked": asked}
        if texts["asked"] != asked:
            raise ValueError(f"{folder} has the texts of other requests; choose another workdir.")
        texts = self._texts(model, prompts, texts, kept, console)
        groups = list(dict.fromkeys(group for group, _ in prompts))
        requests = [prompt for _, prompt in prompts]
        results: dict[str, Any] = {}
        tables: dict[tuple[str, float], Any] = {}
        for arm in self.arms:
            if self.only and arm.name not in self.only:
                continue
            state = first_state(arm, model, tables)
            if arm.with_model:
                made = self._run(model, arm, state, requests, folder / "steps.json", console)
                tokens, steps = [len(text) for text, _ in made], [count for _, count in made]
                results[arm.name] = {"same": sum(text == plain for (text, _), plain in zip(made, texts))}
            else:
                tokens = [len(text) for text in texts]
                steps, _ = replay(arm.drafter, requests, texts, state=state, in_turn=arm.in_turn)
                results[arm.name] = {}
                if self.checked and not arm.in_turn:
                    results[arm.name]["checked"] = self._check(model, arm, state, requests, texts, steps)
            for group in ["all", *groups]:
                mine = [n for n, (name, _) in enumerate(prompts) if group in ("all", name)]
                results[arm.name][group] = sum(tokens[n] for n in mine) / sum(steps[n] for n in mine)
            results[arm.name]["nodes"] = arm.drafter.nodes
            results[arm.name]["requests"] = [count / number for count, number in zip(tokens, steps)]
            console.print(f"{arm.name}: {results[arm.name]['all']:.3f}", soft_wrap=True)
            (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        self._show(results, groups, folder, console)
        return True

    def prompts(self, model: Model) -> list[tuple[str, list[int]]]:
        """The group and the ids of each request.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: there are none.
        """
        found: dict[str, list[list[int]]] = {}
        if self.corpus:
            documents = (model.ids(document).tolist() for document in open_corpus(self.corpus, "validation"))
            long = [ids[: self.prompt_tokens] for ids in documents if len(ids) >= self.prompt_tokens]
            found[self.corpus] = long
        else:
            if not Path(self.questions).is_file():
                raise FileNotFoundError(f"{self.questions} does not exist; give Spec-Bench's question.jsonl.")
            for line in Path(self.questions).read_text().splitlines():
                question = json.loads(line)
                group = question["category"]
                if self.categories and group not in self.categories:
                    group = self.others
                if group:
                    found.setdefault(group, []).append(question["turns"][0])
        # One of each category after the other, as requests of different kinds come together.
        chosen = [
            (group, all_of_it[number])
            for numbers in zip(
                *(np.linspace(0, len(of), self.each, endpoint=False, dtype=int) for of in found.values())
            )
            for (group, all_of_it), number in zip(found.items(), numbers)
        ]
        longest = model.task.model.max_length - self.new_tokens
        ids = [(group, prompt if self.corpus else model.chat_ids(prompt)) for group, prompt in chosen]
        fits = [(group, prompt) for group, prompt in ids if len(prompt) <= longest]
        if not fits:
            raise ValueError("there is no request that fits into the model's context; give other questions.")
        return fits

    def _generate(self, model: Model, requests, **options):
        return generate(
            model.module,
            model.params,
            requests,
            max_new_tokens=self.new_tokens,
            chooser=Sampling(temperature=0),
            stop_tokens=model.ends,
            num_ids=min(model.tokenizer.vocab_size, model.task.model.vocab_size),
            **options,
        )

    def _texts(self, model: Model, prompts, done: dict[str, Any], file: Path, console: rich.console.Console):
        """The model's greedy text after each prompt; a file keeps those that are done."""
        requests = {json.dumps(prompt): prompt for _, prompt in prompts}
        todo = sorted((prompt for key, prompt in requests.items() if key not in done), key=len)
        for first in range(0, len(todo), _BATCH):
            batch = todo[first : first + _BATCH]
            for prompt, text in zip(batch, self._generate(model, batch).tokens):
                done[json.dumps(prompt)] = text
            file.write_text(json.dumps(done))
            console.print(f"generated {first + len(batch)} of {len(todo)} texts", soft_wrap=True)
        return [done[json.dumps(prompt)] for _, prompt in prompts]

    def _run(self, model: Model, arm: Arm, state: Any, requests, file: Path, console) -> list[tuple[list[int], int]]:
        """The text and the steps of each request with the model; files keep them, and the state of an arm in turn."""
        done = json.loads(file.read_text()) if file.exists() else {}
        found = done.setdefault(repr(arm), [])
        last = file.with_name(f"{arm.name}.npz")
        if found and arm.in_turn and len(found) < len(requests):
            empty = jax.eval_shape(lambda: arm.drafter.init(1, 1, model.task.model.vocab_size))
            with np.load(last) as leaves:
                state = jax.tree.unflatten(jax.tree.structure(empty), list(leaves.values()))
        options = {"new_tokens": self.new_tokens, "state": state, "in_turn": arm.in_turn, "rows": arm.rows}
        for texts, steps, after in answers(model, requests[len(found) :], arm.drafter, **options):
            found.extend(zip(texts, steps))
            if arm.in_turn:
                np.savez(last, *jax.tree.leaves(_kept(after)))
            file.write_text(json.dumps(done))
            mean = sum(len(text) for text, _ in found) / sum(steps for _, steps in found)
            console.print(f"{arm.name}: {len(found)} of {len(requests)}, {mean:.3f}", soft_wrap=True)
        return [(text, steps) for text, steps in found]

    def _check(self, model: Model, arm: Arm, state: Any, requests, texts, steps) -> dict[str, int]:
        """Which of some texts, evenly from all, and of their steps, are the same with the model in the loop."""
        some = np.linspace(0, len(requests), self.checked, endpoint=False, dtype=int).tolist()
        asked = [requests[n] for n in some]
        found = self._generate(model, asked, drafter=arm.drafter, drafter_state=state)
        # Plain decoding in passes of the same width, so that rounding is the same.
        wide = self._generate(model, asked, drafter=Nothing(nodes=arm.drafter.nodes))
        return {
            "requests": len(some),
            "same text as plain decoding at this width": sum(a == b for a, b in zip(found.tokens, wide.tokens)),
            "same text as plain decoding": sum(a == texts[n] for a, n in zip(found.tokens, some)),
            "same number of steps": sum(a == steps[n] for a, n in zip(found.steps, some)),
        }

    def _show(self, results, groups: Sequence[str], folder: Path, console: rich.console.Console) -> None:
        table = rich.table.Table(box=rich.box.MARKDOWN, title=f"mean accepted tokens, {self.new_tokens} new tokens")
        columns = ["all", *groups] if len(groups) > 1 else ["all"]
        for name in ["drafter", *columns, "first third", "last third", "nodes", "read a token", "checked"]:
            table.add_column(name, overflow="fold")
        for name, row in results.items():
            third = max(1, len(row["requests"]) // 3)
            ends = [float(np.mean(row["requests"][part])) for part in (slice(third), slice(-third, None))]
            told = f"{row['same']} of {len(row['requests'])}" if "same" in row else ""
            if checked := row.get("checked"):
                told = "/".join(map(str, list(checked.values())[1:])) + f" of {checked['requests']}"
            means = (f"{x:.2f}" for x in [*(row[column] for column in columns), *ends])
            table.add_row(name, *means, str(row["nodes"]), f"{row['nodes'] / row['all']:.1f}", told)
        console.print(table)
        with (folder / "results.md").open("w") as file:
            rich.console.Console(file=file, width=240).print(table)
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for number, (name, row) in enumerate(results.items()):
            served = np.arange(1, 1 + len(row["requests"]))
            style = ("-", "--", ":")[number // 10 % 3]  # there are ten colours
            axes.plot(served, np.cumsum(row["requests"]) / served, style, label=name)
        axes.set(xlabel="requests served", ylabel="mean accepted tokens so far")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        figure.savefig(folder / "requests.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def first_state(arm: Arm, model: Model, tables: dict[tuple[str, float], TrigramTable]) -> Any:
    """The state that an arm's drafter begins with; None: a new one.

    Args:
      tables: those of the corpora that were read before; a new one is added.
    """

    def of(drafter: Drafter) -> Any:
        if isinstance(drafter, Union):
            return tuple(map(of, drafter.drafters))
        if not isinstance(drafter, ADED):
            return None
        if (key := (arm.corpus, arm.share)) not in tables:
            empty = TrigramTable.empty(2**16, 16)
            tables[key] = corpus_table(model.tokenizer, arm.corpus, share=arm.share) if arm.corpus else empty
        return ADEDState(tables[key])

    return of(arm.drafter)


def answers(
    model: Model,
    requests: Sequence[Sequence[int]],
    drafter: Drafter | None,
    *,
    new_tokens: int = 128,
    in_turn: bool = True,
    state: Any = None,
    rows: int = 1,
) -> Iterator[tuple[list[list[int]], list[int], Any]]:
    """Answers one batch of requests after another, greedily; yields their texts, their passes, and the last state.

    Args:
      in_turn: whether the drafter's state goes on from batch to batch. Otherwise each begins with `state`.
      state: the drafter's first state; default: a new one.
      rows: the requests of a batch.
    """
    engine = Engine(model=CachedTokens(model.module), chooser=Sampling(temperature=0), drafter=drafter)
    engine = dataclasses.replace(engine, num_ids=min(model.tokenizer.vocab_size, model.task.model.vocab_size))
    params, stops = jax.device_put(model.params), sorted(model.ends)
    longest = model.task.model.max_length
    for first in range(0, len(requests), rows):
        batch = requests[first : first + rows]
        lengths = np.array([len(ids) for ids in batch])
        if (most := lengths.max()) + new_tokens > longest:
            raise ValueError(
                f"a request has {most} tokens, which with new_tokens = {new_tokens} exceed the model's max_length = "
                f"{longest}."
            )
        # Few widths, so that few programs are compiled.
        tokens = np.zeros((len(batch), min(max(128, 1 << (int(most) - 1).bit_length()), longest)), np.int32)
        for row, ids in zip(tokens, batch):
            row[: len(ids)] = ids
        decoding = engine.prefill(params, tokens, lengths, new=new_tokens, stop=stops, drafter=state)
        decoding = engine.run(engine.prepared(params), decoding)
        yield tokens_of(decoding).tokens, np.asarray(decoding.steps).tolist(), decoding.drafter
        state = _kept(decoding.drafter) if in_turn else state


def _kept(state: Any) -> Any:
    """A drafter's state without what ADED knows of one request only, whose shapes are of its length."""

    def kept(part: Any) -> Any:
        return ADEDState(part.table) if isinstance(part, ADEDState) else part

    return jax.tree.map(kept, state, is_leaf=lambda part: isinstance(part, ADEDState))

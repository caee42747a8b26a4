"""How many tokens a step drafters give to greedy text of a model: mean accepted tokens, without running it again.

What a greedy model says does not depend on the drafts, so its text is generated once, and each drafter is then replayed
on it. This is exact for drafters that look at the text only (not at logits); `checked` requests are generated again
with the drafts, and their texts and steps are compared. Mean accepted tokens are the new tokens over the steps, the
model's own token included, so that plain decoding has 1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.table
from jaxtyping import Array, Int

from jaxtok.data.corpora import open_corpus
from jaxtok.decoding import ADED, ADEDState, CachedTokens, Drafter, Engine, Sampling, generate
from jaxtok.decoding.trigram_table import TrigramTable, corpus_table
from jaxtok.model import Model

_BATCH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A drafter, and what ADED's table is made from."""

    name: str
    drafter: Drafter
    corpus: str = ""
    """See `jaxtok.data.corpora.open_corpus`; empty: an empty table."""
    share: float = 1.0
    """The share of the corpus's training documents."""
    in_turn: bool = False
    """Whether the requests come one after the other, and each begins with the state that the one before it left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftStudy:
    """Compares drafters on the greedy text of a model; if it is run again, it resumes with the texts that it has."""

    arms: tuple[Arm, ...]
    questions: str = ""
    """A JSON-lines file with `category` and `turns`, as Spec-Bench's; the first turn is asked in the chat template."""
    categories: tuple[str, ...] = ()
    """The categories that are asked from, each a row of the table; further ones are `others`. Empty: all of them."""
    others: str = ""
    """The name of what the further categories are together; empty: they are left out."""
    corpus: str = ""
    """A corpus whose held-out documents are continued, in place of questions."""
    each: int = 8
    """The requests of each category, evenly from all that it has."""
    prompt_tokens: int = 64
    """The tokens of a document that are given."""
    new_tokens: int = 128
    checked: int = 2
    """The requests that each arm generates again with the model, as a batch."""
    model: str = "smollm2"
    workdir: str = "runs/drafts"

    def __post_init__(self):
        if bool(self.questions) == bool(self.corpus):
            raise ValueError("one of questions and corpus must be given, and not both.")

    def run(self) -> bool:
        """Generates, replays, and writes texts.json, results.json, results.md and requests.png."""
        from jaxtok.door import open_model

        folder, console = Path(self.workdir), rich.console.Console()
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(self.model)
        prompts = self.prompts(model)
        texts = self._texts(model, prompts, folder / "texts.json", console)
        groups = list(dict.fromkeys(group for group, _ in prompts))
        requests = [prompt for _, prompt in prompts]
        results: dict[str, Any] = {}
        tables: dict[tuple[str, float], Any] = {}
        for arm in self.arms:
            state = None
            if isinstance(arm.drafter, ADED):
                if (key := (arm.corpus, arm.share)) not in tables:
                    empty = TrigramTable.empty(2**16, 16)
                    made = corpus_table(model.tokenizer, arm.corpus, share=arm.share) if arm.corpus else empty
                    tables[key] = made
                state = ADEDState(tables[key])
            steps, _ = replay(arm.drafter, requests, texts, state=state, in_turn=arm.in_turn)
            tokens = [len(text) for text in texts]
            of_group = {}
            for group in groups:
                mine = [n for n, (name, _) in enumerate(prompts) if name == group]
                of_group[group] = sum(tokens[n] for n in mine) / sum(steps[n] for n in mine)
            results[arm.name] = {
                "all": sum(tokens) / sum(steps),
                **of_group,
                "requests": [count / number for count, number in zip(tokens, steps)],
            }
            if self.checked and not arm.in_turn:
                results[arm.name]["checked"] = self._check(model, arm, state, requests, texts, steps)
            console.print(f"{arm.name}: {results[arm.name]['all']:.3f}", soft_wrap=True)
            (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        self._show(results, groups, folder, console)
        return True

    def prompts(self, model: Model) -> list[tuple[str, list[int]]]:
        """The group and the ids of each request.

        Raises:
          ValueError: there are none.
        """
        found: dict[str, list[list[int]]] = {}
        if self.corpus:
            documents = (model.ids(document).tolist() for document in open_corpus(self.corpus, "validation"))
            long = [ids[: self.prompt_tokens] for ids in documents if len(ids) >= self.prompt_tokens]
            found[self.corpus] = long
        else:
            for line in Path(self.questions).read_text().splitlines():
                question = json.loads(line)
                group = question["category"]
                if self.categories and group not in self.categories:
                    group = self.others
                if group:
                    found.setdefault(group, []).append(question["turns"][0])
        chosen = [
            (group, all_of_it[number])
            for group, all_of_it in found.items()
            for number in np.linspace(0, len(all_of_it), self.each, endpoint=False, dtype=int)
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

    def _texts(self, model: Model, prompts, file: Path, console: rich.console.Console) -> list[list[int]]:
        """The model's greedy text after each prompt; a file keeps those that are done."""
        done = json.loads(file.read_text()) if file.exists() else {}
        requests = {json.dumps(prompt): prompt for _, prompt in prompts}
        todo = sorted((prompt for key, prompt in requests.items() if key not in done), key=len)
        for first in range(0, len(todo), _BATCH):
            batch = todo[first : first + _BATCH]
            for prompt, text in zip(batch, self._generate(model, batch).tokens):
                done[json.dumps(prompt)] = text
            file.write_text(json.dumps(done))
            console.print(f"generated {first + len(batch)} of {len(todo)} texts", soft_wrap=True)
        return [done[json.dumps(prompt)] for _, prompt in prompts]

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
        for name in ["drafter", *columns, "first third", "last third", "checked"]:
            table.add_column(name, overflow="fold")
        for name, row in results.items():
            third = max(1, len(row["requests"]) // 3)
            ends = [float(np.mean(row["requests"][part])) for part in (slice(third), slice(-third, None))]
            checked = row.get("checked", {})
            told = "/".join(map(str, list(checked.values())[1:])) + f" of {checked['requests']}" if checked else ""
            table.add_row(name, *(f"{x:.2f}" for x in [*(row[column] for column in columns), *ends]), told)
        console.print(table)
        with (folder / "results.md").open("w") as file:
            rich.console.Console(file=file, width=200).print(table)
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(7, 4))
        for name, row in results.items():
            served = np.arange(1, 1 + len(row["requests"]))
            axes.plot(served, np.cumsum(row["requests"]) / served, label=name)
        axes.set(xlabel="requests served", ylabel="mean accepted tokens so far")
        axes.legend(fontsize=7)
        figure.savefig(folder / "requests.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


@dataclasses.dataclass(frozen=True)
class Nothing(Drafter):
    """A drafter that proposes nothing, but makes the model read `nodes` tokens a step, as another one does."""

    nodes: int
    chain = False

    def propose(self, state, text, length):
        return jnp.zeros((len(text), self.nodes), jnp.int32), jnp.full((len(text), self.nodes), -1, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A chooser of texts that are known: [batch, most] tokens."""

    draws = False

    def init(self, batch: int) -> None:
        return None

    def choose(self, logits, keys, state):
        number, texts = state
        return texts[jnp.arange(len(number)), number], (number + 1, texts)


class _NoModel(CachedTokens):
    """What takes the model's place: its logits are not looked at."""

    rewindable = True

    def read(self, params, tokens, cache, positions=None, mask=None, sow=False):
        return jnp.zeros((*tokens.shape, 1)), cache, None

    def keep(self, params, tokens, before, after, path, count, chain):
        return after


def replay(
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    state: Any = None,
    in_turn: bool = False,
) -> tuple[list[int], Any]:
    """The steps in which a model would give each text with the drafts, if it says these texts, and the last state.

    Args:
      drafter: one that does not look at logits.
      prompts, texts: the ids before each text and its own; a text has at least one.
      state: the drafter's first state; default: a new one.
      in_turn: whether the texts come one after the other with one state; if not, in batches, each with the first state.
    """
    engine = Engine(model=_NoModel(None), chooser=Recorded(), drafter=drafter)
    room, most = max(map(len, prompts)), max(map(len, texts))
    size = 1 if in_turn else min(_BATCH, len(prompts))
    steps: list[int] = []
    for first in range(0, len(prompts), size):
        # The last batch is filled up, so that one program serves all.
        numbers = [min(first + n, len(prompts) - 1) for n in range(size)]
        given, said = np.zeros((size, room), np.int32), np.zeros((size, most), np.int32)
        for row, number in enumerate(numbers):
            given[row, : len(prompts[number])] = prompts[number]
            said[row, : len(texts[number])] = texts[number]
        lengths, ends = (np.array([len(of[number]) for number in numbers], np.int32) for of in (prompts, texts))
        counts, after = _replayed(engine, state, given, lengths, said, ends)
        steps += np.asarray(counts)[: min(size, len(prompts) - first)].tolist()
        state = after if in_turn else state
    return steps, after


@functools.partial(jax.jit, static_argnames="engine")
def _replayed(
    engine: Engine,
    drafter: Any,
    prompts: Int[Array, "batch room"],
    lengths: Int[Array, " batch"],
    texts: Int[Array, "batch most"],
    ends: Int[Array, " batch"],
) -> tuple[Int[Array, " batch"], Any]:
    batch, most = texts.shape
    said = (jnp.zeros(batch, jnp.int32), jnp.pad(texts, ((0, 0), (0, 1))))
    begun = engine.begin(None, prompts, new=most, lengths=lengths, rng=jax.random.key(0), chooser=said)
    begun = begun.replace(limit=lengths + ends)
    if drafter is None:
        drafter = engine.drafter.init(batch, begun.text.shape[1], 0)
    drafter = engine.drafter.begin(drafter, begun.text, begun.length, jnp.zeros((*prompts.shape, 1)))
    step = functools.partial(engine.step, None)
    state = jax.lax.while_loop(lambda state: state.live.any(), step, begun.replace(drafter=drafter))
    return state.steps, state.drafter

"""Tokens a second with drafts whose width is fitted to the batch, against plain decoding, on one machine."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from jaxtok.decoding import CachedTokens, Drafter, Engine, Sampling, State
from jaxtok.decoding.engine import padded_prompts
from jaxtok.decoding.width import fit_width, timed_run
from jaxtok.model import Model
from jaxtok.studies.drafting import DraftStudy


@dataclasses.dataclass(frozen=True, kw_only=True)
class WidthStudy:
    """Fits a drafter's width to batches of several sizes on some questions, and times it on others."""

    drafter: Drafter
    questions: str = "question.jsonl"
    """Spec-Bench's file."""
    batches: tuple[int, ...] = (1, 4, 8)
    widths: tuple[int, ...] = (2, 4, 8)
    """The widths that are tried, beside plain decoding and the whole tree."""
    longest: int = 256
    """Longer prompts are left out, so that the time goes to decoding."""
    new_tokens: int = 32
    turns: int = 2
    """How often plain decoding and drafts are timed, in turns."""
    model: str = "smollm2"
    workdir: str = "runs/draft_width"

    def run(self) -> bool:
        """Writes rows.json."""
        from jaxtok.door import open_model

        folder, console = Path(self.workdir), rich.console.Console()
        folder.mkdir(parents=True, exist_ok=True)
        model = open_model(self.model)
        each = max(self.batches)
        asked = DraftStudy(arms=(), questions=self.questions, each=each, new_tokens=self.new_tokens).prompts(model)
        prompts = [prompt for _, prompt in asked if len(prompt) <= self.longest]
        rows: list[dict[str, Any]] = []
        table = rich.table.Table(box=rich.box.MARKDOWN)
        for batch in self.batches:
            rows.append(self._row(model, prompts[:batch], prompts[batch : 2 * batch]))
            console.print(rows[-1], soft_wrap=True)
            (folder / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
        for name in rows[0]:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
        return True

    def _row(self, model: Model, first: list[list[int]], others: list[list[int]]) -> dict[str, Any]:
        """The width for the first batch of prompts, and the speeds for the other one, as hot as the first leaves it."""
        stops = sorted(model.ends)
        options = {"widths": self.widths, "new_tokens": self.new_tokens, "stop_tokens": stops, "repeats": self.turns}
        drafter, found = fit_width(model.module, model.params, first, self.drafter, **options)
        plain = Engine(model=CachedTokens(model.module), chooser=Sampling(temperature=0))
        engines = {"plain": plain, "whole": dataclasses.replace(plain, drafter=self.drafter)}
        if drafter not in (None, self.drafter):
            engines["fitted"] = dataclasses.replace(plain, drafter=drafter)
        fitted = "plain" if drafter is None else "whole" if drafter is self.drafter else "fitted"
        config, params = model.module.config, jax.device_put(model.params)

        def run(engine: Engine, prompts: list[list[int]], state: Any) -> tuple[float, State]:
            tokens, lengths = padded_prompts(prompts, config.vocab_size, config.max_length, self.new_tokens)
            begun = engine.prefill(params, tokens, lengths, new=self.new_tokens, stop=stops, drafter=state)
            return timed_run(engine, params, jax.block_until_ready(begun))

        hot = run(engines["whole"], first, None)[1].drafter
        times: dict[str, list[float]] = {name: [] for name in engines}
        ended: dict[str, State] = {}
        for turn in range(1 + self.turns):  # the first one compiles
            for name, engine in engines.items():
                seconds, ended[name] = run(engine, others, None if name == "plain" else hot)
                times[name] += [seconds] if turn else []
        new = {name: int((state.length - state.start).sum()) for name, state in ended.items()}
        speed = {name: new[name] / statistics.median(some) for name, some in times.items()}
        return {
            "batch": len(others),
            "a step by width, ms": " ".join(f"{n}: {1000 * x:.0f}" for n, x in found.seconds.items()),
            "tokens a step by width": " ".join(f"{n}: {x:.2f}" for n, x in found.tokens.items()),
            "chosen": 1 if drafter is None else drafter.nodes,
            "mean accepted": new[fitted] / int(ended[fitted].steps.sum()),
            "plain, tokens/s": speed["plain"],
            "of plain": speed[fitted] / speed["plain"],
            "whole tree, of plain": speed["whole"] / speed["plain"],
        }

"""The field's standard harness of evaluations (EleutherAI's `lm_eval`, an extra) on any causal language model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.model import Model
from jaxtok.nn.losses import by_parts, cross_entropy
from jaxtok.protocols import CausalLM, Params

BATCH = 8
"""Rows of a batch."""
_BUCKET = 64  # rows are padded to a multiple of this, so that few lengths are compiled


def evaluate(model: Model, tasks: Sequence[str], limit: int = 0) -> dict[str, float]:
    """Measures a model on tasks of the harness.

    Args:
      model: a causal language model.
      tasks: names of the harness's tasks and groups, or .yaml files of tasks.
      limit: the number of documents of each task; 0: all.

    Returns:
      Each number under the names of its task and metric.

    Raises:
      ImportError: the harness is not installed.
      FileNotFoundError, ValueError: there is no such task, or the model is not a causal language model.
    """
    lm = language_model(model)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    manager = TaskManager()
    wanted: list[Any] = []
    for task in tasks:
        if task.endswith((".yaml", ".yml")):
            if not Path(task).is_file():
                raise FileNotFoundError(f"there is no task file {task}; give a .yaml file of a task, or a task's name.")
            wanted.append(load_yaml(Path(task), resolve_func=True))
        elif task not in manager.all_tasks:
            raise ValueError(f"the harness has no task {task!r}; `lm_eval ls tasks` lists them, or give a .yaml file.")
        else:
            wanted.append(task)
    found = simple_evaluate(model=lm, tasks=wanted, limit=limit or None, task_manager=manager, bootstrap_iters=0)
    return {
        f"{task} {metric.removesuffix(',none')}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and "stderr" not in metric and metric != "sample_len"
    }


def language_model(model: Model) -> Any:
    """Returns a model as the harness's `LM`.

    Raises:
      ImportError: the harness is not installed.
      ValueError: the model is not a causal language model.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise ImportError(f"the harness needs lm_eval ({error}); pip install 'jaxtok[harness]'.") from error
    model.logits(jnp.zeros(1, jnp.int32))  # raises an error if it is not a causal language model
    room, tokenizer = model.task.model.max_length, model.tokenizer
    params = jax.device_put(model.params)

    class Harness(TemplateLM):
        """Scores and continues texts in batches of static shapes."""

        @property
        def eot_token_id(self) -> int:
            return model.ends[0] if model.ends else tokenizer.eod_id

        @property
        def prefix_token_id(self) -> int:
            return model.begin[-1] if model.begin else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            before = () if add_special_tokens is False else model.begin
            return [*before, *tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests, **_: Any) -> list[tuple[float, bool]]:
            rows = [(context + continuation, len(continuation)) for _, context, continuation in requests]
            return score(model.module, params, rows, room)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            rows, owners = [], []
            for number, request in enumerate(requests):
                ids = self.tok_encode(request.args[0], add_special_tokens=False)
                for pair in map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, room, 1)):
                    rows.append((pair[0] + pair[1], len(pair[1])))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, (logprob, _) in zip(owners, score(model.module, params, rows, room)):
                totals[owner] += logprob
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            return continuations(model, [request.args for request in requests], self.tok_encode)

    return Harness()


def score(
    module: CausalLM, params: Params, rows: Sequence[tuple[list[int], int]], room: int
) -> list[tuple[float, bool]]:
    """Returns the log probability, in nats, of the last ids of each row, and whether each of them is the likeliest.

    Args:
      rows: ids, and how many of the last ones are scored; a row that is longer than the context loses its beginning.
      room: the length of the context.
    """
    found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
    for batch in _batches(range(len(rows)), lambda number: len(rows[number][0])):
        length = min(-(-max(len(rows[number][0]) - 1 for number in batch) // _BUCKET) * _BUCKET, room)
        tokens, targets = np.zeros((2, BATCH, length), np.int32)
        scored = np.zeros((BATCH, length), bool)
        for row, number in enumerate(batch):
            ids, count = rows[number]
            ids = ids[-(length + 1) :]
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            scored[row, max(len(ids) - 1 - count, 0) : len(ids) - 1] = True
        sums, greedy = jax.device_get(_score(module, params, tokens, targets, scored))
        for row, number in enumerate(batch):
            found[number] = float(sums[row]), bool(greedy[row])
    return found


def _batches(numbers: Iterable[int], length_of: Callable[[int], int]) -> Iterator[list[int]]:
    """Yields the numbers of rows in batches, the longest rows first, so that a lack of memory shows at once."""
    ordered = sorted(numbers, key=length_of, reverse=True)
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]


@functools.partial(jax.jit, static_argnums=0)
def _score(
    module: CausalLM,
    params: Params,
    tokens: Int[Array, "batch length"],
    targets: Int[Array, "batch length"],
    scored: Bool[Array, "batch length"],
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    weights = {"params": params}
    x, _ = module.apply(weights, module.apply(weights, tokens, method="embed"), method="hidden")

    def nats_and_hits(x: Array, targets: Array) -> Array:
        logits = module.apply(weights, x, method="head").astype(jnp.float32)
        return jnp.stack([cross_entropy(logits, targets), logits.argmax(-1) == targets], -1)

    length = tokens.shape[1]
    part = _BUCKET if length % _BUCKET == 0 else 0
    nats, hits = jnp.moveaxis(by_parts(nats_and_hits, part, x, targets), -1, 0)
    return -jnp.sum(nats * scored, -1), jnp.all((hits > 0) | ~scored, -1)


def continuations(
    model: Model, requests: Sequence[tuple[str, dict[str, Any]]], encode: Callable[[str], list[int]]
) -> list[str]:
    """Returns the text that follows each prompt, up to the first of its stop texts.

    Args:
      requests: prompts and the harness's settings: until, max_gen_toks, do_sample, temperature, top_k, top_p.
      encode: maps a prompt to its ids; one that leaves no room for new tokens loses its beginning.
    """
    texts = [""] * len(requests)
    room, ids = model.task.model.max_length, [encode(prompt) for prompt, _ in requests]
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in enumerate(requests):
        groups.setdefault(repr(sorted(settings.items())), []).append(number)
    for numbers in groups.values():
        settings = requests[numbers[0]][1]
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        new = min(int(settings.get("max_gen_toks", 256)), room - 1)
        options = {"temperature": float(settings.get("temperature", 1.0)) if settings.get("do_sample") else 0.0}
        options |= {name: settings[name] for name in ("top_k", "top_p") if name in settings}
        stop = [text for text in until if len(model.tokenizer.encode(text)) == 1]
        for batch in _batches(numbers, lambda number: len(ids[number])):
            prompts = [ids[number][-(room - new) :] or [model.tokenizer.eod_id] for number in batch]
            prompts += prompts[-1:] * (BATCH - len(batch))
            for number, text in zip(batch, model.generate_bytes(prompts, new, stop=stop, **options)):
                ends = [at for end in until if (at := text.find(end.encode())) >= 0]
                texts[number] = text[: min(ends, default=len(text))].decode(errors="replace")
    return texts

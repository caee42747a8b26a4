"""What drafters and evictors do to the decoding of a real model: `jaxtok bench --what decoding`.

All methods continue the same prompts, topics of Python's documentation in the chat template, greedily and for the same
number of tokens. Their runs alternate, and each is compared with the plain one of the same round.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.decoding import (
    ADED,
    CachedTokens,
    Drafter,
    Engine,
    PromptLookup,
    Sampling,
    Verified,
    parse_evictor,
)
from jaxtok.decoding.engine import State, new_tokens, padded_prompts
from jaxtok.door import open_model
from jaxtok.drafters import DRAFTERS, drafter_of
from jaxtok.model import Model

Row = dict[str, Any]

METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{form: {"drafter": form} for form in DRAFTERS if ":" not in form},
    "prompt_lookup of 7 tokens": {"drafter": PromptLookup(tokens=7)},
    "aded, empty table": {"drafter": ADED()},
    "suffix_automaton+token_recycling": {"drafter": "suffix_automaton+token_recycling"},
    "keyformer:0.5": {"evictor": parse_evictor("keyformer:0.5")},
    "streaming:0.5": {"evictor": parse_evictor("streaming:0.5")},
    "prompt_lookup, streaming:0.5": {"drafter": "prompt_lookup", "evictor": parse_evictor("streaming:0.5")},
}
"""What is compared, by name: evictors, and drafters or what --drafter calls them. Drafters begin without what earlier
texts have taught them."""


def prompts_of(model: Model, count: int, characters: int = 800) -> list[list[int]]:
    """The first prompts: the longest topics of Python's documentation, each cut, to be explained."""
    chosen = sorted(topics, key=lambda name: (-len(topics[name]), name))[:count]
    return [model.chat_ids(f"Explain this text:\n{topics[name][:characters]}") for name in chosen]


def decoding(
    measure: Callable[[dict[Any, Callable[[], Any]]], dict[Any, Any]],
    name: str = "smollm2",
    batches: Sequence[int] = (1, 8),
    new: int = 64,
    methods: dict[str, dict[str, Any]] = METHODS,
) -> Iterator[Row]:
    """Yields a row for each batch and method.

    Args:
      measure: times functions in turns (`jaxtok.bench.measure`).
      name: what `jaxtok.open` takes.
      new: the new tokens of each prompt; none ends a text.
    """
    model = open_model(name)
    module, params = model.module, jax.device_put(model.params)
    vocab, longest = module.config.vocab_size, module.config.max_length
    for batch in batches:
        tokens, lengths = padded_prompts(prompts_of(model, batch), vocab, longest, new)
        engines, begun, ended = {}, {}, {}
        for method, parts in methods.items():
            if evictor := parts.get("evictor"):
                parts = parts | {"evictor": evictor.fit(module, tokens.shape[1], new)}
            if isinstance(named := parts.get("drafter"), str):
                parts = parts | {"drafter": drafter_of(named, model)[0]}
            engines[method] = Engine(model=CachedTokens(module), chooser=Sampling(temperature=0), **parts)
            begun[method] = engines[method].prefill(params, tokens, lengths, new=new)
        ready = {method: engine.prepared(params) for method, engine in engines.items()}
        samples = measure({each: functools.partial(_run, each, engines, begun, ended, ready[each]) for each in methods})
        texts = {method: new_tokens(state).tokens for method, state in ended.items()}
        context = float(np.mean(lengths)) + new / 2
        for method, engine in engines.items():
            seconds, steps = statistics.median(samples[method].seconds), np.asarray(ended[method].steps)
            drafting = 0.0
            if engine.drafter is not None:
                drafting = int(steps.max()) * drafting_seconds(engine.drafter, begun[method], vocab) / seconds
            equal = [a == b for ours, plain in zip(texts[method], texts["plain"]) for a, b in zip(ours, plain)]
            yield {
                "batch": batch,
                "method": method,
                "mean_accepted": batch * new / int(steps.sum()),
                "gigaflops_a_token": engine.nodes * int(steps.sum()) / batch / new * module.config.flops(context) / 1e9,
                "tokens_per_second": batch * new / seconds,
                "times_plain": statistics.median(samples["plain"].seconds / samples[method].seconds),
                "drafting_of_time": drafting,
                "cache_megabytes": sum(leaf.nbytes for leaf in jax.tree.leaves(begun[method].model)) / 1e6,
                "equal_tokens": float(np.mean(equal)),
            }


def _run(
    method: str, engines: dict[str, Engine], begun: dict[str, State], ended: dict[str, State], params: Any
) -> State:
    """The last state, which `ended` keeps; the first one stays, as its cache is copied."""
    first = begun[method]
    ended[method] = engines[method].run(params, first.replace(model=jax.tree.map(jnp.copy, first.model)))
    return ended[method]


def drafting_seconds(drafter: Drafter, state: State, vocab: int) -> float:
    """The seconds in which a drafter proposes a tree and observes what became of it, without the model."""

    @jax.jit
    def round_of(own, text, length):
        tokens, parents = drafter.propose(own, text, length)
        path, count = jnp.zeros_like(tokens), jnp.ones_like(length)
        logits = jnp.broadcast_to(text[:, :1, None].astype(jnp.float32), (*tokens.shape, vocab))
        return tokens, drafter.observe(own, Verified(tokens, parents, logits, path, count, tokens, length > 0))

    times = []
    for _ in range(6):  # the first one compiles
        start = time.perf_counter()
        jax.block_until_ready(round_of(state.drafter, state.text, state.length))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Draws the speeds and the accepted tokens of all methods as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 + 0.45 * len(methods)), sharey=True)
    height = 0.8 / len(batches)
    for axis, value in zip(axes, ("times_plain", "mean_accepted")):
        for number, batch in enumerate(batches):
            found = {row["method"]: row[value] for row in rows if row["batch"] == batch}
            places = np.arange(len(methods)) + (len(batches) / 2 - 0.5 - number) * height
            axis.barh(places, [found[method] for method in methods], height, label=f"batch {batch}")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].set_xlabel("speed / plain decoding's")
    axes[1].set_xlabel("new tokens a step and row")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path

"""Constrained generation by every method, with SmolLM2, for the schemas of function calls of `bfcl-eval`.

    pip install jaxtok[constraints] && pip download --no-deps bfcl-eval
    python -m jaxtok.studies.constraints methods --schemas bfcl_eval-2026.3.23-py3-none-any.whl
    python -m jaxtok.studies.constraints costs --schemas bfcl_eval-2026.3.23-py3-none-any.whl
    python -m jaxtok.studies.constraints callbacks

Each part prints a table; `costs` also makes a plot. See configs/decoding/README.md for what they showed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxtok
from jaxtok.decoding import Sampling, generate
from jaxtok.decoding.awrs import PRESETS, SMC, Sampled, sample
from jaxtok.decoding.constraints import Constrained, Function, Grammar, Vocabulary
from jaxtok.decoding.engine import CachedTokens, Engine

MEMBER = "bfcl_eval/data/BFCL_v4_simple_python.json"
TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def schema_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """A function's parameters, as `bfcl-eval` writes them, as a JSON schema."""
    kind = parameters.get("type", "any")
    schema: dict[str, Any] = {} if kind == "any" else {"type": TYPES.get(kind, kind)}
    schema |= {name: parameters[name] for name in ("enum", "required") if name in parameters}
    if "items" in parameters:
        schema["items"] = schema_of(parameters["items"])
    if "properties" in parameters:
        schema["properties"] = {name: schema_of(each) for name, each in parameters["properties"].items()}
        schema["additionalProperties"] = False
    return schema


def calls(wheel: Path, count: int) -> list[tuple[str, dict[str, Any]]]:
    """The first questions, each with the schema of its function's arguments."""
    with zipfile.ZipFile(wheel) as zipped:
        lines = zipped.read(MEMBER).decode().splitlines()[:count]
    found = []
    for line in map(json.loads, lines):
        function, question = line["function"][0], line["question"][0][0]["content"]
        text = (
            f"{question}\n\nAnswer only with the arguments of a call of {function['name']} as one JSON object. Its "
            f"parameters: {json.dumps(function['parameters']['properties'])}"
        )
        found.append((text, schema_of(function["parameters"])))
    return found


class Opened:
    """SmolLM2 with its vocabulary, and prompts with grammars."""

    def __init__(self, schemas: Path | None = None, count: int = 0):
        self.model = jaxtok.open("smollm2")
        self.vocabulary = Vocabulary(self.model.tokenizer)
        self.params = jax.device_put(self.model.params)
        self.questions = calls(schemas, count) if schemas else []
        self.prompts = [self.model.chat_ids(text) for text, _ in self.questions]
        # Without white space where JSON needs none: a small model may write it for ever.
        rules = [json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}}) for _, schema in self.questions]
        self.grammars = [Grammar("json", rule) for rule in rules]

    def sample(self, options: SMC, constraints, max_tokens: int, seed: int, **more) -> tuple[list[Sampled], float]:
        """What each prompt gets, and the seconds that a second call takes for another seed."""
        call = functools.partial(
            sample,
            self.model.module,
            self.params,
            self.prompts,
            constraints,
            vocabulary=self.vocabulary,
            max_tokens=max_tokens,
            options=options,
            **more,
        )
        found = call(rng=jax.random.key(seed))
        began = time.perf_counter()
        return found + call(rng=jax.random.key(seed + 1)), time.perf_counter() - began


def is_valid(text: bytes, schema: dict[str, Any]) -> bool:
    """Whether the text is JSON of the schema, by another library."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def methods(schemas: Path, count: int = 4, max_tokens: int = 56, names: str = ",".join(PRESETS)) -> None:
    """Validity, evidence, checks and time of every method.

    Args:
      schemas: the wheel of bfcl-eval.
      count: the number of questions.
      max_tokens: the most tokens of an answer.
      names: the methods, separated by commas.
    """
    opened = Opened(schemas, count)
    print("| method | particles | ended, weight > 0 | of these valid | effective | checks / token | s / step | log p |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names.split(","):
        options = PRESETS[name]
        found, seconds = opened.sample(options, opened.grammars, max_tokens, seed=0)
        alive = valid = tokens = 0
        for number, one in enumerate(found):
            for text, weight in zip(one.tokens, one.log_weights):
                tokens += len(text)
                if weight > -np.inf:
                    alive += 1
                    plain = opened.model.tokenizer.decode(t for t in text if t not in opened.vocabulary.eos)
                    valid += is_valid(plain, opened.questions[number % count][1])
        steps = max(len(text) for one in found[count:] for text in one.tokens)
        checks = sum(one.checks for one in found)
        evidence = np.array([one.log_evidence for one in found])
        particles = options.particles * len(found)
        print(
            f"| {name} | {options.particles} | {alive / particles:.2f} | {valid / max(alive, 1):.3f} | "
            f"{np.mean([one.effective for one in found]):.2f} | {checks / tokens:.2f} | {seconds / steps:.3f} | "
            f"{' '.join(f'{x:.1f}' for x in evidence)} |",
            flush=True,
        )


@dataclasses.dataclass(frozen=True)
class Slow:
    """A constraint whose checks take longer."""

    rule: Grammar
    seconds: float
    masks = False

    @property
    def name(self) -> str:
        return f"{self.rule.name} {self.seconds}"

    def _wait(self) -> None:
        if self.seconds:
            time.sleep(self.seconds)

    def start(self, vocabulary):
        return self.rule.start(vocabulary)

    def allows(self, state, token):
        self._wait()
        return self.rule.allows(state, token)

    def advance(self, state, token):
        return self.rule.advance(state, token)

    def score(self, state, complete):
        self._wait()
        return self.rule.score(state, complete)

    def mask(self, state):
        return self.rule.mask(state)  # for the tests' sake; a checker without masks has none


def costs(
    schemas: Path,
    count: int = 2,
    max_tokens: int = 40,
    delays: tuple[float, ...] = (0.0, 1e-3, 1e-2),
    out: Path = Path("constraint_costs.png"),
) -> None:
    """Seconds a particle and token against the cost of a check: one by one, by masks, and the model's own texts.

    Args:
      schemas: the wheel of bfcl-eval.
      count: the number of questions.
      max_tokens: the most tokens of an answer.
      delays: what a check is made to take in addition, in seconds.
      out: the plot.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    opened = Opened(schemas, count)
    vocab = len(opened.vocabulary.tokens)
    each: dict[str, list[tuple[float, float]]] = {}
    print("| method | a check takes | checks / token | ms / particle and token | ms / effective particle and token |")
    print("| --- | --- | --- | --- | --- |")
    for name in ("awrs", "twisted", "mask"):
        options = dataclasses.replace(PRESETS[name], particles=5)
        for delay in delays if name != "mask" else (0.0,):
            rules = [Slow(rule, delay) for rule in opened.grammars] if name != "mask" else opened.grammars
            found, seconds = opened.sample(options, rules, max_tokens, seed=2)
            new = found[count:]
            tokens = sum(len(text) for one in new for text in one.tokens)
            share = np.mean([one.effective for one in new]) / options.particles
            checks = sum(one.checks for one in new) / tokens
            a_token = 1e3 * seconds / tokens
            each.setdefault(name, []).append((delay, a_token))
            effective = f"{a_token / share:.1f}" if share else "none"
            print(f"| {name} | {delay:g} s | {checks:.2f} | {a_token:.1f} | {effective} |", flush=True)
    state = opened.grammars[0].start(opened.vocabulary)
    took = {}
    for what, call, times in (
        ("check", lambda n: state.validate_tokens([n]), 20_000),
        ("mask", lambda n: state.compute_bitmask(), 200),
    ):
        began = time.perf_counter()
        for n in range(times):
            call(n)
        took[what] = (time.perf_counter() - began) / times
    print(f"llguidance at the first token: a check {took['check'] * 1e6:.2f} us, a mask {took['mask'] * 1e6:.0f} us")

    figure, axes = plt.subplots(figsize=(6, 4))
    grid = np.logspace(-7, -1, 100)
    base = each["mask"][0][1]
    for name in ("awrs", "twisted"):
        delay, ms = map(np.array, zip(*each[name]))
        line = np.polyfit(delay, ms, 1)
        (drawn,) = axes.plot(grid, np.polyval(line, grid), label=name)
        axes.plot(np.maximum(delay, grid[0]), ms, "o", color=drawn.get_color())
    axes.axhline(base, color="black", label="whole masks by llguidance (their cost is fixed)")
    axes.plot(grid, base + 1e3 * vocab * grid, "--", label=f"whole masks by {vocab} checks (computed)")
    axes.set(xscale="log", yscale="log", xlabel="seconds a check", ylabel="ms a particle and token")
    axes.set_ylim(base / 3, 1e5)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


@dataclasses.dataclass(frozen=True)
class Given:
    """A chooser whose state is the mask, which the host writes between steps; to be compared with callbacks."""

    vocab: int
    draws = False

    def init(self, batch):
        return jnp.ones((batch, self.vocab), bool)

    def choose(self, logits, keys, state):
        return jnp.where(state, logits[:, : self.vocab], -jnp.inf).argmax(-1).astype(jnp.int32), state


def callbacks(batches: tuple[int, ...] = (1, 4), new: int = 48) -> None:
    """What a constraint costs in generation: by a callback of the compiled loop, and by stepping it from the host.

    Args:
      batches: the numbers of rows.
      new: the number of new tokens.
    """
    opened = Opened()
    model, params, vocabulary = opened.model.module, opened.params, opened.vocabulary
    prompt = opened.model.chat_ids("Write a story about a house.")
    rule = Grammar("regex", "(?s:[a-zA-Z ,.'\"!?\n-]{400,})")
    greedy, vocab = Sampling(temperature=0), len(vocabulary.tokens)
    free = Function(lambda text, complete: True)
    print("| rows | way | ms / token and row | tokens equal |\n| --- | --- | --- | --- |")
    for batch in batches:
        prompts = [prompt + opened.model.tokenizer.encode(" " * n) for n in range(batch)]
        call = functools.partial(generate, model, params, prompts, max_new_tokens=new)
        mask = Constrained(vocabulary=vocabulary, sampling=greedy)
        one = Constrained(vocabulary=vocabulary, sampling=greedy, mask=False)

        def stepped():
            tokens = np.zeros((batch, 64), np.int32)  # noqa: B023
            for row, each in zip(tokens, prompts):  # noqa: B023
                row[: len(each)] = each
            engine = Engine(model=CachedTokens(model), chooser=Given(vocab))
            lengths = np.array([len(each) for each in prompts])  # noqa: B023
            state = engine.prefill(params, tokens, lengths, new=new)
            matchers = [rule.start(vocabulary) for _ in prompts]  # noqa: B023
            rows, made = np.arange(len(prompts)), []  # noqa: B023
            for number in range(new):
                state = state.replace(chooser=jnp.array([rule.mask(each)[:vocab] for each in matchers]))
                state = engine.run(params, state, number + 1)
                newest = np.asarray(state.text)[rows, np.asarray(state.length) - 1]
                made.append(newest)
                matchers = [rule.advance(each, token) for each, token in zip(matchers, newest.tolist())]
            return np.array(made).T.tolist()

        ways = {
            "no constraint": lambda: call(chooser=greedy).tokens,  # noqa: B023
            "mask, callback": lambda: call(chooser=mask, chooser_state=mask.start([rule] * batch)).tokens,  # noqa: B023
            "mask, host steps": stepped,
            "one by one, callback": lambda: call(chooser=one, chooser_state=one.start([rule] * batch)).tokens,  # noqa: B023
            "anything allowed, one by one": lambda: call(chooser=one, chooser_state=one.start([free] * batch)).tokens,  # noqa: B023
        }
        first = None
        for way, run in ways.items():
            made = run()
            times = []
            for _ in range(3):
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
            first = made if way == "mask, callback" else first
            equal = "" if first is None else ("yes" if made == first else "no")
            print(f"| {batch} | {way} | {1e3 * min(times) / new / batch:.2f} | {equal} |", flush=True)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"methods": methods, "costs": costs, "callbacks": callbacks})

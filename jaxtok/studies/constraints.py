"""Constrained generation by every method, for the schemas of `bfcl-eval`'s function calls (its simple_python)."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.cache import cache_folder, whole
from jaxtok.data.packages import PIP, PIP_HINT, Package, check, download
from jaxtok.decoding import Sampling, generate
from jaxtok.decoding.awrs import PRESETS, SMC, Sampled, sample_texts
from jaxtok.decoding.constraints import Constrained, Function, Grammar, Vocabulary
from jaxtok.decoding.engine import CachedTokens, Engine
from jaxtok.door import open_model

WHEEL = Package(
    archive="bfcl_eval-2026.3.23-py3-none-any.whl",
    sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
    command=(*PIP, "bfcl-eval==2026.3.23"),
    hint=PIP_HINT,
)
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


def calls(count: int) -> list[tuple[str, dict[str, Any]]]:
    """The first questions of simple_python, each with the schema of its function's arguments. They are fetched once.

    Raises:
      FileNotFoundError: they are not in the cache and cannot be fetched.
      ValueError: what was fetched is not what was published.
    """
    folder = cache_folder("corpora") / WHEEL.sha256[:32]
    with whole(folder) as half_done:
        if half_done is not None:
            with tempfile.TemporaryDirectory(dir=half_done) as scratch:
                archive = download(WHEEL, Path(scratch), "the questions of bfcl-eval are", "put them into the cache")
                check(archive, WHEEL)
                with zipfile.ZipFile(archive) as zipped:
                    (half_done / "questions.jsonl").write_bytes(zipped.read(MEMBER))
    found = []
    for line in (folder / "questions.jsonl").read_text().splitlines()[:count]:
        row = json.loads(line)
        function, question = row["function"][0], row["question"][0][0]["content"]
        text = (
            f"{question}\n\nAnswer only with the arguments of a call of {function['name']} as one JSON object. Its "
            f"parameters: {json.dumps(function['parameters']['properties'])}"
        )
        found.append((text, schema_of(function["parameters"])))
    return found


def is_valid(text: bytes, schema: dict[str, Any]) -> bool:
    """Whether the text is JSON of the schema, by another library."""
    import jsonschema

    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Slow:
    """A constraint whose checks take longer."""

    rule: Grammar
    seconds: float
    masks: ClassVar[bool] = False

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


@dataclasses.dataclass(frozen=True)
class Given:
    """A chooser whose state is the mask, which the host writes between steps; to be compared with callbacks."""

    vocab: int
    draws: ClassVar[bool] = False

    def init(self, batch):
        return jnp.ones((batch, self.vocab), bool)

    def choose(self, logits, keys, state):
        return jnp.where(state, logits[:, : self.vocab], -jnp.inf).argmax(-1).astype(jnp.int32), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constraints:
    """A study in three parts: the methods, what they cost if a check takes longer, and generation with callbacks.

    What was measured is saved, so that a run that was stopped goes on.
    """

    model: str = "smollm2"
    questions: int = 4
    max_tokens: int = 40
    """The most tokens of an answer."""
    methods: tuple[str, ...] = tuple(PRESETS)
    delays: tuple[float, ...] = (0.0, 1e-2)
    """What a check is made to take in addition, in seconds; (): that part is left out."""
    batches: tuple[int, ...] = (4,)
    """The rows of generation with callbacks; (): that part is left out."""
    workdir: str = "runs/constraints"

    def __post_init__(self):
        if unknown := set(self.methods) - set(PRESETS):
            raise ValueError(f"methods has {min(unknown)!r}; it must be of {', '.join(PRESETS)}.")
        for field in ("questions", "max_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")

    def run(self) -> bool:
        """Measures what is missing, and writes results.json, results.md and costs.png."""
        folder = Path(self.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        todo = {f"method {name}": functools.partial(self._method, name) for name in self.methods}
        for name in ("awrs", "twisted", "mask") if self.delays else ():
            for delay in self.delays if name != "mask" else (0.0,):
                todo[f"cost {name} {delay:g}"] = functools.partial(self._cost, name, delay)
        todo |= {f"callbacks {batch}": functools.partial(self._callbacks, batch) for batch in self.batches}
        opened = None
        for name, measure in todo.items():
            if name not in results:
                opened = opened or _Opened(self.model, self.questions)
                results[name] = measure(opened)
                file.write_text(json.dumps(results, indent=1))
                print(name, json.dumps(results[name]), flush=True)
        lines = []
        for part in ("method", "cost", "callbacks"):
            rows = [row for name in todo if name.startswith(part) for row in results[name]]
            if rows:
                lines += [f"| {' | '.join(rows[0])} |", f"| {' | '.join(['---'] * len(rows[0]))} |"]
                lines += [f"| {' | '.join(map(str, row.values()))} |" for row in rows] + [""]
        (folder / "results.md").write_text("\n".join(lines))
        print("\n".join(lines))
        if self.delays:
            self._plot([row for name in todo if name.startswith("cost") for row in results[name]], folder / "costs.png")
        return True

    def _method(self, name: str, opened: _Opened) -> list[dict[str, Any]]:
        options, count = PRESETS[name], self.questions
        found, seconds = opened.sample(options, opened.grammars, self.max_tokens)
        alive = valid = tokens = 0
        for number, one in enumerate(found):
            for text, weight in zip(one.tokens, one.log_weights):
                tokens += len(text)
                if weight > -np.inf:
                    alive += 1
                    plain = opened.model.tokenizer.decode(t for t in text if t not in opened.vocabulary.eos)
                    valid += is_valid(plain, opened.questions[number % count][1])
        steps = max(len(text) for one in found[count:] for text in one.tokens)
        row = {
            "method": name,
            "particles": options.particles,
            "with weight": f"{alive / (options.particles * len(found)):.2f}",
            "of these valid": f"{valid} of {alive}",
            "effective": f"{np.mean([one.effective for one in found]):.2f}",
            "checks a token": f"{sum(one.checks for one in found) / tokens:.2f}",
            "s a step": f"{seconds / steps:.3f}",
            "log p of each question, two runs": "; ".join(
                f"{one.log_evidence:.1f}, {two.log_evidence:.1f}" for one, two in zip(found, found[count:])
            ),
        }
        return [row]

    def _cost(self, name: str, delay: float, opened: _Opened) -> list[dict[str, Any]]:
        options = dataclasses.replace(PRESETS[name], particles=5)
        rules = opened.grammars if name == "mask" else [Slow(rule, delay) for rule in opened.grammars]
        found, seconds = opened.sample(options, rules, self.max_tokens)
        new = found[self.questions :]
        tokens = sum(len(text) for one in new for text in one.tokens)
        share = np.mean([one.effective for one in new]) / options.particles
        row = {
            "method": name,
            "added to a check, s": delay,
            "checks a token": round(sum(one.checks for one in new) / tokens, 2),
            "ms a particle and token": round(1e3 * seconds / tokens, 2),
            "the same a share of effective particles": round(1e3 * seconds / tokens / share, 2) if share else "none",
        }
        return [row]

    def _plot(self, rows: list[dict[str, Any]], file: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 4))
        grid = np.logspace(-7, -1, 100)
        base = next(row["ms a particle and token"] for row in rows if row["method"] == "mask")
        for name in ("awrs", "twisted"):
            own = [row for row in rows if row["method"] == name]
            delay, ms = (np.array([row[key] for row in own]) for key in list(own[0])[1:4:2])
            # Linear in the delay; the two ends are measured.
            (line,) = axes.plot(grid, ms[0] + (ms[-1] - ms[0]) / max(delay[-1], 1e-9) * grid, label=name)
            axes.plot(np.maximum(delay, grid[0]), ms, "o", color=line.get_color())
        axes.axhline(base, color="black", label="whole masks by llguidance, whose cost is fixed")
        vocab = 49152
        axes.plot(grid, base + 1e3 * vocab * grid, "--", label=f"whole masks by {vocab} checks (computed)")
        axes.set(xscale="log", yscale="log", xlabel="seconds a check", ylabel="ms a particle and token")
        axes.set_ylim(base / 3, 1e5)
        axes.legend(fontsize=7)
        figure.tight_layout()
        figure.savefig(file, dpi=110)
        plt.close(figure)

    def _callbacks(self, batch: int, opened: _Opened) -> list[dict[str, Any]]:
        model, params, vocabulary, new = opened.model.module, opened.params, opened.vocabulary, self.max_tokens
        prompt = opened.model.chat_ids("Write a story about a house.")
        prompts = [[*prompt, *opened.model.tokenizer.encode(" " * n)] for n in range(batch)]
        rules = [Grammar("regex", r"(?s:[a-zA-Z ,.'\"!?\n-]{400,})")] * batch
        free = [Function(lambda text, complete: True)] * batch
        greedy, vocab = Sampling(temperature=0), len(vocabulary.tokens)
        call = functools.partial(generate, model, params, prompts, max_new_tokens=new)
        mask = Constrained(vocabulary=vocabulary, sampling=greedy)
        one = dataclasses.replace(mask, mask=False)

        def stepped() -> list[list[int]]:
            tokens, lengths = np.zeros((batch, 64), np.int32), np.array([len(each) for each in prompts])
            for row, each in zip(tokens, prompts):
                row[: len(each)] = each
            engine = Engine(model=CachedTokens(model), chooser=Given(vocab))
            state = engine.prefill(params, tokens, lengths, new=new)
            states, made = [rule.start(vocabulary) for rule in rules], []
            for number in range(new):
                allowed = [rule.mask(each)[:vocab] for rule, each in zip(rules, states)]
                state = engine.run(params, state.replace(chooser=jnp.array(allowed)), number + 1)
                newest = np.asarray(state.text)[np.arange(batch), np.asarray(state.length) - 1]
                made.append(newest)
                states = [rule.advance(each, token) for rule, each, token in zip(rules, states, newest.tolist())]
            return np.array(made).T.tolist()

        ways = {
            "no constraint": lambda: call(chooser=greedy).tokens,
            "masks by callbacks": lambda: call(chooser=mask, chooser_state=mask.start(rules)).tokens,
            "masks, steps from the host": stepped,
            "one by one by callbacks": lambda: call(chooser=one, chooser_state=one.start(rules)).tokens,
            "one by one, all allowed": lambda: call(chooser=one, chooser_state=one.start(free)).tokens,
        }
        rows, texts = [], {}
        for way, generated in ways.items():
            texts[way] = generated()
            times = []
            for _ in range(3):
                began = time.perf_counter()
                generated()
                times.append(time.perf_counter() - began)
            rows.append({"rows": batch, "constraint": way, "ms a step": round(1e3 * min(times) / new, 2)})
        same = [texts[way] == texts["masks by callbacks"] for way in list(ways)[1:4]]
        rows[-1]["constraint"] += f"; the texts of the other three are {'equal' if all(same) else 'NOT equal'}"
        return rows


class _Opened:
    """The model with its vocabulary, the prompts and their grammars."""

    def __init__(self, name: str, count: int):
        self.model = open_model(name)
        self.vocabulary = Vocabulary(self.model.tokenizer)
        self.params = jax.device_put(self.model.params)
        self.questions = calls(count)
        self.prompts = [self.model.chat_ids(text) for text, _ in self.questions]
        # Without white space where JSON needs none: a small model may write it for ever.
        rules = [json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}}) for _, schema in self.questions]
        self.grammars = [Grammar("json", rule) for rule in rules]

    def sample(self, options: SMC, rules: list[Any], max_tokens: int) -> tuple[list[Sampled], float]:
        """What each prompt gets with two seeds, and the seconds for the second one, without compiling."""
        call = functools.partial(
            sample_texts,
            self.model.module,
            self.params,
            self.prompts,
            rules,
            vocabulary=self.vocabulary,
            max_tokens=max_tokens,
            options=options,
        )
        found = call(rng=jax.random.key(0))
        began = time.perf_counter()
        return found + call(rng=jax.random.key(1)), time.perf_counter() - began

"""Constrained generation by every method, for the schemas of `bfcl-eval`'s function calls (its simple_python)."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.cache import cache_folder, whole
from jaxtok.data.packages import PIP, PIP_HINT, Package, check, download
from jaxtok.decoding import Sampling, generate
from jaxtok.decoding.awrs import PRESETS, SMC, Sampled, sample_texts
from jaxtok.decoding.constraints import Constrained, Constraint, Function, Grammar, Vocabulary
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
    """A constraint whose checks take longer, and whose masks are made by checks."""

    rule: Grammar
    seconds: float
    made: list[int] = dataclasses.field(default_factory=lambda: [0], compare=False)
    """How many checks were made."""
    masks: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.rule.name} {self.seconds} {id(self.made)}"

    def _wait(self) -> None:
        self.made[0] += 1
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
        return np.array([self.allows(state, token) for token in range(len(state.vocabulary.tokens))])


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
    """A study in four parts: the methods, what they cost if a check takes longer, generation with callbacks, and
    `genlm-control` on the same constraint.

    What was measured is saved, so that a run that was stopped goes on.
    """

    model: str = "smollm2"
    questions: int = 4
    seeds: int = 4
    """The runs of each question by each method."""
    max_tokens: int = 40
    """The most tokens of an answer."""
    methods: tuple[str, ...] = tuple(PRESETS)
    delays: tuple[float, ...] = (0.0, 1e-3, 1e-2)
    """What a check is made to take in addition, in seconds; (): that part is left out."""
    batches: tuple[int, ...] = (4,)
    """The rows of generation with callbacks; (): that part is left out."""
    peer: bool = True
    """Whether AWRS is compared with `genlm-control`, if that is installed."""
    workdir: str = "runs/constraints"

    def __post_init__(self):
        if unknown := set(self.methods) - set(PRESETS):
            raise ValueError(f"methods has {min(unknown)!r}; it must be of {', '.join(PRESETS)}.")
        for field in ("questions", "seeds", "max_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")

    def run(self) -> bool:
        """Measures what is missing, and writes results.json, results.md and costs.png."""
        folder = Path(self.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "results.json"
        results = json.loads(file.read_text()) if file.exists() else {}
        todo: dict[str, Callable[[_Opened], Any]] = {}
        costs = [(name, delay) for name in ("awrs", "twisted") for delay in self.delays]
        for name, delay in [*costs, ("mask", 0.0), ("mask by checks", 0.0)] if self.delays else ():
            todo[f"cost {name} {delay:g}"] = functools.partial(self._cost, name, delay)
        todo |= {f"callbacks {batch}": functools.partial(self._callbacks, batch) for batch in self.batches}
        if self.peer:
            todo["peer"] = _peer
        for name in self.methods:
            for seed in range(self.seeds):
                todo[f"method {name} {seed}"] = functools.partial(self._method, name, seed)
        opened = None
        for name, measure in todo.items():
            if name not in results:
                opened = opened or _Opened(self.model, self.questions, self.max_tokens)
                results[name] = measure(opened)
                file.write_text(json.dumps(results, indent=1))
                print(name, json.dumps(results[name]), flush=True)
        runs = {name: [results[f"method {name} {seed}"] for seed in range(self.seeds)] for name in self.methods}
        tables = [[_summary(name, each) for name, each in runs.items()], _evidence(runs)]
        for part in ("cost", "callbacks", "peer"):
            tables.append([row for name in todo if name.startswith(part) for row in results[name]])
        text = "\n".join(_table(rows) for rows in tables if rows)
        (folder / "results.md").write_text(text)
        print(text)
        if self.delays:
            _plot(tables[2], folder / "costs.png")
        return True

    def _method(self, name: str, seed: int, opened: _Opened) -> dict[str, Any]:
        """One run of each question: log evidence, and the counts of all of them."""
        found, seconds = opened.sample(PRESETS[name], opened.grammars, seed)
        valid = []
        for one, (_, schema) in zip(found, opened.questions):
            for text, weight in zip(one.tokens, one.log_weights):
                if weight > -np.inf:
                    plain = opened.model.tokenizer.decode(t for t in text if t not in opened.vocabulary.eos)
                    valid.append(is_valid(plain, schema))
        return {
            "log_evidence": [one.log_evidence for one in found],
            "effective": [one.effective for one in found],
            "weighted": len(valid),
            "valid": sum(valid),
            "checks": sum(one.checks for one in found),
            "tokens": sum(len(text) for one in found for text in one.tokens),
            "steps": max(len(text) for one in found for text in one.tokens),
            "seconds": seconds,
        }

    def _cost(self, name: str, delay: float, opened: _Opened) -> list[dict[str, Any]]:
        options = dataclasses.replace(PRESETS[name.split()[0]], particles=5)
        grammars = opened.grammars[:2]
        rules = grammars if name == "mask" else [Slow(rule, delay) for rule in grammars]
        found, seconds = opened.sample(options, rules, seed=1)
        checks = "one mask" if name == "mask" else sum(rule.made[0] for rule in rules)
        seconds += 0 if name == "mask" else delay * checks  # a check that sleeps takes no time of the processor
        texts = [text for one in found for text in one.tokens]
        rows = len(texts) * max(map(len, texts))  # of all steps, those of ended texts, too
        share = np.mean([one.effective for one in found]) / options.particles
        return [
            {
                "method": name,
                "added to a check, s": delay,
                "checks a particle and step": checks if name == "mask" else round(checks / rows, 2),
                "ms a particle and step": round(1e3 * seconds / rows, 2),
                "the same, an effective particle": round(1e3 * seconds / rows / share, 2) if share else "none lives",
            }
        ]

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
                began = time.process_time()
                generated()
                times.append(time.process_time() - began)
            rows.append({"rows": batch, "constraint": way, "processor, ms a step": round(1e3 * min(times) / new, 2)})
        same = [texts[way] == texts["masks by callbacks"] for way in list(ways)[1:4]]
        rows[-1]["constraint"] += f"; the texts of the other three are {'equal' if all(same) else 'NOT equal'}"
        return rows


def _summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    total = {key: sum(run[key] for run in runs) for key in ("weighted", "valid", "checks", "tokens")}
    particles = PRESETS[name].particles
    rows = particles * sum(len(run["effective"]) for run in runs)
    return {
        "method": name,
        "particles": particles,
        "with weight": f"{total['weighted'] / rows:.2f}",
        "of these valid": f"{total['valid']} of {total['weighted']}",
        "effective": f"{np.mean([run['effective'] for run in runs]):.2f}",
        "checks a token": f"{total['checks'] / total['tokens']:.2f}",
        "processor, s a step": f"{np.median([run['seconds'] / run['steps'] for run in runs]):.3f}",
    }


def _evidence(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The log of the mean evidence of each question, and its standard error (that of the mean, over the mean)."""
    rows = []
    shown = {name: each for name, each in runs.items() if name not in ("model", "local")}
    for number in range(max((len(each[0]["effective"]) for each in shown.values()), default=0)):
        row: dict[str, Any] = {"log p of question": number + 1}
        for name, each in shown.items():
            logs = np.array([run["log_evidence"][number] for run in each])
            if np.isneginf(logs).all():
                row[name] = "all died"
                continue
            share = np.exp(logs - logs.max())
            error = share.std(ddof=1) / share.mean() / np.sqrt(len(logs)) if len(logs) > 1 else np.nan
            row[name] = f"{logs.max() + np.log(share.mean()):.1f} ± {error:.1f}"
        rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _plot(rows: list[dict[str, Any]], file: Path) -> None:
    """The time of a token of an effective particle, by what a check costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    key = "the same, an effective particle"
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    grid = np.logspace(-7, -1, 200)
    base, by_checks = (next(row for row in rows if row["method"] == name) for name in ("mask", "mask by checks"))
    for name in ("awrs", "twisted"):
        own = [row for row in rows if row["method"] == name and row[key] != "none lives"]
        if not own:
            continue
        delay, ms = (np.array([row[column] for row in own]) for column in ("added to a check, s", key))
        # Linear in the cost of a check; the points are measured.
        slope, start = np.polyfit(delay, ms, 1, w=1 / ms) if len(own) > 1 else (0, ms[0])
        (line,) = axes.plot(grid, start + slope * grid, label=f"{name}, check by check")
        axes.plot(np.maximum(delay, grid[0]), ms, "o", color=line.get_color())
    axes.axhline(base[key], color="black", label="whole masks by llguidance (where there are some)")
    slope = 1e3 * by_checks["checks a particle and step"] * by_checks[key] / by_checks["ms a particle and step"]
    (line,) = axes.plot(grid, by_checks[key] + slope * grid, "--", label="whole masks by checks (line computed)")
    axes.plot(grid[0], by_checks[key], "o", color=line.get_color())
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="seconds a check, beyond llguidance's own",
        ylabel="ms a step of an effective particle",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


class _Opened:
    """The model with its vocabulary, the prompts and their grammars."""

    def __init__(self, name: str, count: int, max_tokens: int):
        self.model = open_model(name)
        self.max_tokens = max_tokens
        self.vocabulary = Vocabulary(self.model.tokenizer)
        self.params = jax.device_put(self.model.params)
        self.questions = calls(count)
        self.prompts = [self.model.chat_ids(text) for text, _ in self.questions]
        # Without white space where JSON needs none: a small model may write it for ever.
        rules = [json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}}) for _, schema in self.questions]
        self.grammars = [Grammar("json", rule) for rule in rules]
        self._compiled: set[Any] = set()

    def sample(self, options: SMC, rules: Sequence[Constraint], seed: int) -> tuple[list[Sampled], float]:
        """What the first prompts get, one for each rule, and the seconds of the processor, without compiling.

        Unlike those of the clock, they hardly depend on what else the machine does.
        """
        call = functools.partial(
            sample_texts,
            self.model.module,
            self.params,
            self.prompts[: len(rules)],
            vocabulary=self.vocabulary,
            max_tokens=self.max_tokens,
            options=options,
        )
        if (what := (options, len(rules))) not in self._compiled:
            nothing = Function(lambda text, complete: not text and not complete)  # all particles die at once
            call(nothing, rng=jax.random.key(0))
            self._compiled.add(what)
        began = time.process_time()
        return call(rules, rng=jax.random.key(seed)), time.process_time() - began


PEER_PROMPT = "Once upon a time there was a house, and"
PEER_EXPRESSION = rb"( [a-z]{2,12}){6,16}\."


def _peer(opened: _Opened, particles: int = 10, max_tokens: int = 24) -> list[dict[str, Any]]:
    """AWRS beside that of `genlm-control`, with one prompt, and one regular expression that Python checks."""
    try:
        import torch
        from genlm.control import AWRS, Potential, PromptedLLM
    except ImportError:
        return [{"AWRS of": "genlm-control is not installed (pip install genlm-control==0.4.1): not compared"}]
    import asyncio

    import regex

    pattern = regex.compile(PEER_EXPRESSION)

    def fits(text: bytes, complete: bool) -> bool:
        made[0] += 1
        return pattern.fullmatch(text, partial=not complete) is not None

    class Fits(Potential):
        async def complete(self, context):
            return 0.0 if fits(bytes(context), True) else -np.inf

        async def prefix(self, context):
            return 0.0 if fits(bytes(context), False) else -np.inf

    made, ids = [0], opened.model.tokenizer.encode(PEER_PROMPT)
    llm = PromptedLLM.from_name(str(opened.model.path), backend="hf", hf_opts={"torch_dtype": torch.float32})
    llm.prompt_ids = ids
    sampler = AWRS(llm, Fits(list(range(256))).coerce(llm, f=b"".join))

    def theirs(seed: int) -> tuple[int, float]:
        torch.manual_seed(seed)
        llm.model.clear_cache()
        llm.model.cache_kv(ids)
        done = asyncio.run(sampler.smc(n_particles=particles, ess_threshold=0.5, max_tokens=max_tokens))
        return sum(map(len, done.contexts)), done.log_ml

    def ours(seed: int) -> tuple[int, float]:
        (done,) = sample_texts(
            opened.model.module,
            opened.params,
            [ids],
            Function(fits),
            vocabulary=opened.vocabulary,
            max_tokens=max_tokens,
            rng=jax.random.key(seed),
            options=dataclasses.replace(PRESETS["awrs"], particles=particles, resampling="multinomial"),
        )
        return sum(map(len, done.tokens)), done.log_evidence

    module, params = opened.model.module, opened.params
    logits = module.apply({"params": params}, jnp.array([ids]))[0][0, -1]
    apart = np.abs(np.array(jax.nn.log_softmax(logits)) - llm.model.next_token_logprobs_sync(ids).numpy()).max()
    rows = []
    for name, way in {"jaxtok": ours, "genlm-control": theirs}.items():
        way(0)
        times, checks, logs, made_tokens = [], [], [], 0
        for seed in range(1, 6):
            made[0], began = 0, (time.perf_counter(), time.process_time())
            tokens, log_evidence = way(seed)
            spent = time.perf_counter() - began[0], time.process_time() - began[1]
            times.append([1e3 * each / tokens for each in spent])
            made_tokens += tokens
            checks.append(made[0] / tokens)
            logs.append(log_evidence)
        clock, processor = np.median(times, 0)
        rows.append(
            {
                "AWRS of": name,
                "ms a particle and token": f"{clock:.1f}",
                "of the processor": f"{processor:.1f}",
                "calls of the check a token": f"{np.mean(checks):.2f}",
                "tokens of five runs": made_tokens,
                "their log p": ", ".join(f"{value:.1f}" for value in logs),
                "log p of the first token differs by": f"{apart:.0e}",
            }
        )
    return rows

"""How fast this machine trains and decodes, as fractions of what it can do: `jaxtok bench`.

Times are medians. On a CPU, float32 products of 2048 x 2048 matrices are timed before every sample, and the sample's
fraction is that of their rate, so that other work on the machine slows both down. On an accelerator the fraction is
that of the published peak (`jaxtok.training.peak`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
import rich.console
import rich.progress
import rich.table
from jax.experimental.compilation_cache import compilation_cache
from tyro.conf import arg

from jaxtok.bench_decoding import decoding, plot
from jaxtok.data.text import TextData
from jaxtok.decoding import Sampling, generate
from jaxtok.lm.decoder import DecoderConfig
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.mrt5 import PUBLISHED as MRT5
from jaxtok.lm.mrt5 import MrT5Config, MrT5Training
from jaxtok.lm.t5 import init_params
from jaxtok.lm.tokenformer import PUBLISHED, TokenFormerConfig, uniform_counts
from jaxtok.lm.transformer import matched_transformer
from jaxtok.studies.deletion import encoders, slots
from jaxtok.training.experiment import TrainConfig
from jaxtok.training.loop import initial_state, make_train_step
from jaxtok.training.mesh import one_device, unboxed
from jaxtok.training.peak import matmul_rate, peak_flops
from jaxtok.vision.autoencoding import Autoencoding
from jaxtok.vision.binary_autoencoder import PUBLISHED as BAE
from jaxtok.vision.binary_autoencoder import BAEConfig
from jaxtok.vision.elm import Elm, ElmConfig, published
from jaxtok.vision.elm import init_params as init_elm
from jaxtok.vision.elm_sampling import ElmSampling
from jaxtok.vision.elm_sampling import generate as draw_codes

Row = dict[str, Any]
"""One line of results; its `part` names the measurement."""

PARTS = ("train", "compile", "decode", "loader")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the batch it is trained on."""

    model: TokenFormerConfig
    batch_size: int
    length: int


def _small(attention: int, ffn: int, d_model: int = 128) -> TokenFormerConfig:
    tokens = uniform_counts(attention, ffn)
    return TokenFormerConfig(
        num_layers=4, d_model=d_model, num_heads=4, tokens=tokens, vocab_size=384, max_length=512, rotary_fraction=0.5
    )


CASES = {
    "tiny": Case(_small(16, 64, d_model=32), 2, 32),
    "small": Case(_small(48, 144), 16, 128),  # configs/lm/quickstart.py, before its growth
    "grown": Case(_small(192, 576), 16, 128),  # and after it
    "124m": Case(PUBLISHED["124m"], 1, 512),
}


def bench(
    what: tuple[
        Literal[
            "train",
            "compile",
            "decode",
            "loader",
            "profile",
            "deletion",
            "tokenizer",
            "generation",
            "decoding",
            "peers",
        ],
        ...,
    ] = PARTS,
    models: tuple[Literal["tiny", "small", "grown", "124m"], ...] = ("small", "grown", "124m"),
    output: Annotated[Path | None, arg(metavar="FILE")] = None,
    seconds: float = 5.0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    batch_size: int = 0,
    quiet: bool = False,
) -> list[Row]:
    """Measures speed and prints tables.

    Args:
      what: The parts to measure. train takes a step of each model and of the Transformer of its size; compile compiles
        a step of 4 and of 24 layers; decode generates tokens with the cache; loader makes batches, and compares that
        with the first model's steps; profile shows where the time of each model's step goes. The others do not depend
        on the models: deletion runs the encoder of ByT5-small, and that of MrT5 with 50 and 80 % of 1,024 bytes deleted
        (2.5 GB); tokenizer encodes and decodes images of 256 x 256 with ELM's binary autoencoder of 16 bits; generation
        draws images with ELM-B, with the key-value cache and without it. decoding generates with SmolLM2, with each
        drafter and with evictors; with --output, it also draws a plot beside that file. peers compares training steps
        of the models with eager PyTorch, and SmolLM2 with transformers, in float32 (pip install
        'jaxtok[transformers]').
      models: The models to measure; small and grown are the quickstart's, and 124m is the published size, on one row of
        512 tokens.
      output: A JSON file into which the rows and the machine's description are also written.
      seconds: How long each measurement takes (at least three samples are taken).
      dtype: The dtype of activations; auto is float32 on a CPU, and bfloat16 elsewhere.
      batch_size: How many rows a training batch has; 0 means as many as each model has here (16, and 1 for 124m). For
        decoding, the prompts of a batch; 0 means 1, and then 8.
      quiet: Whether tables and the progress bar are left out.
    """
    if seconds <= 0 or batch_size < 0 or not what or not models:
        raise ValueError(
            f"seconds is {seconds}, batch_size {batch_size}, what {what} and models {models}; seconds must be above 0, "
            "batch_size at least 0, and the others must not be empty."
        )
    if dtype == "auto":
        dtype = "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"
    cases = {
        name: dataclasses.replace(
            CASES[name],
            model=dataclasses.replace(CASES[name].model, dtype=dtype),
            batch_size=batch_size or CASES[name].batch_size,
        )
        for name in models
    }
    first = models[0]
    work: list[tuple[str, str, Callable[[], Iterator[Row]]]] = []
    for part in what:
        match part:
            case "train" | "profile" | "decode":
                function = {"train": train, "profile": profile, "decode": decode}[part]
                work += [(part, name, functools.partial(function, case, seconds)) for name, case in cases.items()]
            case "compile":
                work.append((part, first, functools.partial(compilation, cases[first])))
            case "loader":
                work.append((part, first, functools.partial(loader, cases[first], seconds)))
            case "deletion":
                model = dataclasses.replace(MRT5["mrt5-small"], dtype=dtype)
                work.append((part, "mrt5-small", functools.partial(deletion, model, seconds)))
            case "tokenizer":
                autoencoder = dataclasses.replace(BAE["bae-16"], dtype=dtype)
                work.append((part, "bae-16", functools.partial(image_tokenizer, autoencoder, seconds)))
            case "generation":
                model = published("b", "2-10", dtype=dtype)
                work.append((part, "elm-b 2-10", functools.partial(image_generation, model, seconds)))
            case "decoding":
                times = functools.partial(measure, seconds=seconds)
                batches = (batch_size,) if batch_size else (1, 8)
                work.append((part, "smollm2", functools.partial(decoding, times, batches=batches)))
            case "peers":
                work += [(part, name, functools.partial(peer_training, CASES[name], seconds)) for name in models]
                work.append((part, "smollm2", functools.partial(peer_decoding, seconds)))

    console = rich.console.Console(quiet=quiet)
    if not console.is_terminal:
        console = rich.console.Console(quiet=quiet, width=132)
    rows: list[Row] = []
    with rich.progress.Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(work))
        for part, name, function in work:
            progress.update(bar, description=f"{part} {name}")
            with _no_compilation_cache():
                rows += [{"part": part, "model": name} | row for row in function()]
            progress.advance(bar)
    description = machine() | {"dtype": dtype}
    for part in what:
        console.print(_table(part, [row for row in rows if row["part"] == part]))
    console.print(", ".join(f"{name.replace('_', ' ')}: {_text(value)}" for name, value in description.items()))
    if output:
        output.write_text(json.dumps({"machine": description, "rows": rows}, indent=2) + "\n")
        if drawn := [row for row in rows if row["part"] == "decoding"]:
            plot(drawn, output.with_suffix(".png"))
    return rows


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """Inside, everything is compiled anew, even what this process or the cache on disk has compiled already."""
    enabled = jax.config.jax_enable_compilation_cache
    make_train_step.cache_clear()
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


class TrainStep:
    """A compiled training step with its state and one batch of random tokens; each call is an update."""

    def __init__(self, model: DecoderConfig, batch_size: int, length: int):
        self.task = LanguageModeling(model=model)
        self.batch = random_batch(model.vocab_size, batch_size, length)
        self.flops = self.task.flops(self.batch)
        data, layout = TextData(batch_size=batch_size, length=length), one_device()
        self.state = initial_state(self.task, TrainConfig(), data, layout)
        start = time.perf_counter()
        step = make_train_step(self.task, TrainConfig(), 1000, data, layout)
        self.compiled = step.lower(self.state, self.batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics

    def loss(self, params: Any) -> jax.Array:
        return self.task.loss(params, self.batch, jax.random.key(0), jnp.zeros((), jnp.int32))[0]


def train(case: Case, seconds: float) -> Iterator[Row]:
    """Times a training step of TokenFormer and of the Transformer of its size, in turns."""
    systems = {"TokenFormer": case.model, "Transformer": matched_transformer(case.model)}
    steps = {name: TrainStep(model, case.batch_size, case.length) for name, model in systems.items()}
    samples = measure(steps, seconds)
    for name, step in steps.items():
        median = _median(samples[name].seconds)
        yield {
            "system": name,
            "seconds": median,
            "tokens_per_second": case.batch_size * case.length / median,
            "fraction_of_peak": samples[name].fraction(step.flops),
            "times_transformer": _median(samples[name].seconds / samples["Transformer"].seconds),
            "compile_seconds": step.compile_seconds,
            "planned_gigabytes": _planned_memory(step.compiled) / 1e9,
            "peak_gigabytes": _peak_memory()[0] / 1e9,
        }


def _peers() -> Any:
    try:
        from jaxtok import peers
    except ImportError as error:
        raise ValueError(
            f"what has peers, which needs PyTorch and transformers ({error}); pip install 'jaxtok[transformers]'."
        ) from error
    return peers


def peer_training(case: Case, seconds: float) -> Iterator[Row]:
    """Times a training step of TokenFormer and of the Transformer of its size, and the products of TokenFormer's block,
    each in turns with PyTorch's."""
    peers, tokens = _peers(), case.batch_size * case.length
    for name, model in {"TokenFormer": case.model, "Transformer": matched_transformer(case.model)}.items():
        step = TrainStep(model, case.batch_size, case.length)
        peer = peers.TorchTrainStep(model, jax.device_get(step.state.params), step.batch)
        products = products_alone(jax.value_and_grad(step.loss), step.state.params)
        samples = measure({"jaxtok": step, "peer": peer, "products": products}, seconds, settle=True)
        yield _compared(f"a step of {name}", "PyTorch", tokens, samples)
    width, counts = case.model.d_model, dataclasses.astuple(case.model.tokens)
    products = peers.Products(tokens, [pair for n in counts for pair in ((width, n), (n, width))])
    samples = measure({"jaxtok": products, "peer": products.peer}, seconds, settle=True)
    yield _compared("a block's products", "PyTorch", tokens, samples | {"products": samples["jaxtok"]})


def peer_decoding(seconds: float, prompt: int = 16, new: int = 64, long: int = 512) -> Iterator[Row]:
    """Times SmolLM2 in turns with transformers: greedy decoding in a batch of 1 and of 8, and the cache of a long
    prompt. The last row is the command's first token, a whole process."""
    peers = _peers()
    model = peers.Pretrained()
    for rows in (1, 8):
        step = products_alone(*model.decoding_step(rows, prompt))
        runs = {
            "jaxtok": functools.partial(model.decode, rows, prompt, new),
            "peer": functools.partial(model.peer_decode, rows, prompt, new),
            "products": lambda step=step: [step() for _ in range(new)],
        }
        samples = measure(runs, seconds, settle=True)
        yield _compared(f"{new} tokens, batch {rows}", "transformers", rows * new, samples)
    runs = {
        "jaxtok": functools.partial(model.prefill, long),
        "peer": functools.partial(model.peer_prefill, long),
        "products": products_alone(*model.reading(long)),
    }
    yield _compared(f"a prompt of {long} tokens", "transformers", long, measure(runs, seconds, settle=True))
    peers.first_token()  # from here on, all that it compiles is in the cache
    first = _median([peers.first_token() for _ in range(3)])
    yield {
        "work": "first token of the command",
        "peer": "",
        "seconds": first,
        "tokens_per_second": 1 / first,
        "peer_tokens_per_second": None,
        "times_as_fast": None,
        "products_times_as_fast": None,
    }


def _compared(work: str, peer: str, tokens: int, samples: dict[str, Samples]) -> Row:
    """`products_times_as_fast` is what it would be if jaxtok made its matrix products alone (`products_alone`)."""
    ours, theirs = samples["jaxtok"].seconds, samples["peer"].seconds
    return {
        "work": work,
        "peer": peer,
        "seconds": _median(ours),
        "tokens_per_second": tokens / _median(ours),
        "peer_tokens_per_second": tokens / _median(theirs),
        "times_as_fast": _median(theirs / ours),
        "products_times_as_fast": _median(theirs / samples["products"].seconds),
    }


def compilation(case: Case) -> Iterator[Row]:
    """Measures the seconds to trace and compile the training step of a shallow and of a deep model."""
    for layers in (4, 24):
        step = TrainStep(dataclasses.replace(case.model, num_layers=layers), case.batch_size, case.length)
        yield {"layers": layers, "compile_seconds": step.compile_seconds}


def deletion(model: MrT5Config, seconds: float, rows: int = 1, length: int = 1024) -> Iterator[Row]:
    """Times the encoder that deletes bytes and the same encoder without a gate, in turns, with random parameters."""
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    programs = encoders(MrT5Training(model=model), params, rows, length)
    samples = measure(programs, seconds)
    whole = model.plain.encoder_flops(length)
    for name in programs:
        flops = whole if name == "whole" else model.encoder_flops(length, slots(length, int(name)))
        yield {
            "deleted": "0 %" if name == "whole" else f"{name} %",
            "seconds": _median(samples[name].seconds),
            "fraction_of_peak": samples[name].fraction(rows * flops),
            "times_as_fast": _median(samples["whole"].seconds / samples[name].seconds),
            "times_fewer_flops": whole / flops,
        }


def image_tokenizer(model: BAEConfig, seconds: float, batches: tuple[int, ...] = (1, 4)) -> Iterator[Row]:
    """Times encoding (with bits that are drawn) and decoding images, with random parameters."""
    task = Autoencoding(model=model, discriminator=None, perceptual="none")
    size = model.image_size
    params = unboxed(jax.jit(task.init)(jax.random.key(0), {"images": jnp.zeros((1, size, size, model.channels))}))
    for batch in batches:
        images = jax.random.uniform(jax.random.key(1), (batch, size, size, model.channels))
        codes = task.encode(params, images, jax.random.key(2))
        runs = {
            "encode": functools.partial(task.encode, params, images, jax.random.key(2)),
            "decode": functools.partial(task.decode, params, codes),
        }
        samples = measure(runs, seconds)
        for name, flops in {"encode": model.encoder_flops(), "decode": model.generator_flops()}.items():
            median = _median(samples[name].seconds)
            yield {
                "images": batch,
                "direction": name,
                "seconds": median,
                "images_per_second": batch / median,
                "fraction_of_peak": samples[name].fraction(batch * flops),
            }


def image_generation(model: ElmConfig, seconds: float, batches: tuple[int, ...] = (1, 8)) -> Iterator[Row]:
    """Times guided images, code by code, with the cache; and one pass over a whole image, which is what each position
    costs without the cache."""
    params = jax.jit(functools.partial(init_elm, model))(jax.random.key(0))
    sampling = ElmSampling(guidance=2.0, top_k=0)

    @jax.jit
    def whole(params, codes, labels, rng):
        logits = Elm(model).apply({"params": params}, codes, labels)[:, -1]
        guided = logits[::2] + 2.0 * (logits[1::2] - logits[::2])
        return jax.random.categorical(rng, guided)

    for batch in batches:
        labels = np.zeros(batch, np.int32)
        both = np.tile([0, model.num_classes], batch)
        codes = jnp.zeros((2 * batch, model.positions, model.sub_codes), jnp.int32)
        runs = {
            "cached": lambda labels=labels: draw_codes(model, params, labels, sampling=sampling, rng=jax.random.key(0)),
            "a whole pass": lambda codes=codes, both=both: whole(params, codes, both, jax.random.key(0)),
        }
        samples = measure(runs, seconds)
        with_cache = _median(samples["cached"].seconds) / model.positions
        without = _median(samples["a whole pass"].seconds)
        yield {
            "images": batch,
            "positions_per_second": batch / with_cache,
            "without_cache": batch / without,
            "times_as_fast": without / with_cache,
            "seconds_an_image": with_cache * model.positions / batch,
        }


def decode(case: Case, seconds: float, new_tokens: int = 24, chunk: int = 8) -> Iterator[Row]:
    """Times greedy decoding with the cache, without the prefill and the first tokens.

    Each token reads all parameters once, whatever the batch; the rate of these reads is compared with that of a product
    of a 256 MB matrix and a vector.
    """
    task = LanguageModeling(model=case.model)
    params = unboxed(jax.jit(task.init)(jax.random.key(0), random_batch(case.model.vocab_size, 1, 8)))
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    matrix = jnp.ones((8192, 8192))
    product = jax.jit(jnp.matmul)
    for batch in (1, 8):
        times: list[float] = []

        def decoded(times=times, batch=batch):
            clock: list[float] = []
            generate(
                task.module(),
                params,
                [[1]] * batch,
                max_new_tokens=new_tokens,
                chooser=Sampling(temperature=0),
                on_tokens=lambda _: clock.append(time.perf_counter()),
                chunk=chunk,
            )
            times.extend(np.diff(clock) / chunk)

        samples = measure({"decode": decoded, "read": lambda: product(matrix, matrix[0])}, seconds / 2)
        median, rate = _median(times), matrix.nbytes / _median(samples["read"].seconds)
        yield {
            "rows": batch,
            "tokens_per_second": batch / median,
            "parameter_gigabytes_per_second": read / median / 1e9,
            "fraction_of_read_rate": read / median / rate,
        }


def loader(case: Case, seconds: float) -> Iterator[Row]:
    """Times batches of the default corpus as bytes, and tells how many are ready in the time of one training step."""
    data = TextData(batch_size=case.batch_size, length=case.length)
    step = TrainStep(case.model, case.batch_size, case.length)
    batches = data.train_batches()
    for _ in range(10 + data.prefetch):
        next(batches)
    samples = measure({"step": step, "batch": lambda: next(batches)}, seconds)
    step_seconds, batch_seconds = (_median(samples[name].seconds) for name in ("step", "batch"))
    yield {
        "corpus": data.corpus,
        "tokenizer": data.tokenizer,
        "batches_per_second": 1 / batch_seconds,
        "steps_per_second": 1 / step_seconds,
        "batches_per_step": step_seconds / batch_seconds,
    }


def profile(case: Case, seconds: float) -> Iterator[Row]:
    """Times the step's parts alone; their shares tell what bounds it.

    `matrix products` are those of the gradient, by themselves in a program of their own.
    """
    step = TrainStep(case.model, case.batch_size, case.length)
    forward, gradient = jax.jit(step.loss), jax.jit(jax.value_and_grad(step.loss))
    runs = {
        "step": step,
        "forward": lambda: forward(step.state.params),
        "gradient": lambda: gradient(step.state.params),
        "matrix products": products_alone(jax.value_and_grad(step.loss), step.state.params),
    }
    samples = measure(runs, seconds)
    times = {name: _median(sample.seconds) for name, sample in samples.items()}
    parts = {
        "forward": times["forward"],
        "backward": times["gradient"] - times["forward"],
        "optimizer": times["step"] - times["gradient"],
        "step": times["step"],
        "matrix products": times["matrix products"],
    }
    for name, value in parts.items():
        yield {"time_of": name, "seconds": value, "share_of_step": value / parts["step"]}


def matrix_products(function: Callable, *args: Any) -> Counter:
    """Counts how often `function(*args)` makes each matrix product; each iteration of a scan counts.

    A key is (shapes and dtypes of both operands, dimension numbers of `jax.lax.dot_general`).
    """
    counts: Counter = Counter()

    def walk(jaxpr, times):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                operands = tuple((x.aval.shape, x.aval.dtype) for x in equation.invars)
                counts[operands, equation.params["dimension_numbers"]] += times
            repeat = equation.params["length"] if equation.primitive.name == "scan" else 1
            for value in equation.params.values():
                for item in value if isinstance(value, tuple | list) else [value]:
                    inner = getattr(item, "jaxpr", item)
                    if hasattr(inner, "eqns"):
                        walk(inner, times * repeat)

    walk(jax.make_jaxpr(function)(*args).jaxpr, 1)
    return counts


def products_alone(function: Callable, *args: Any) -> Callable[[], Any]:
    """Makes the matrix products of `function(*args)`, as often as it does, on operands of their own in one program."""
    counts = matrix_products(function, *args)
    keys = [key for key, count in counts.items() for _ in range(count)]
    operands = [tuple(jnp.ones(shape, dtype) for shape, dtype in pair) for pair, _ in keys]

    @jax.jit
    def make(operands):
        made = (jax.lax.dot_general(*pair, numbers) for pair, (_, numbers) in zip(operands, keys))
        return [jax.lax.optimization_barrier(product).ravel()[0] for product in made]

    return lambda: make(operands)


@dataclasses.dataclass
class Samples:
    """The seconds of each sample's call, and the FLOP/s of matrix products measured before it."""

    seconds: np.ndarray
    rates: np.ndarray

    def fraction(self, flops: float) -> float:
        return _median(flops / self.seconds / self.rates)


def measure(
    runs: dict[Any, Callable[[], Any]], seconds: float, least: int = 3, settle: bool = False
) -> dict[Any, Samples]:
    """Times functions in turns; a sample is the mean over a fifth of a second.

    Args:
      settle: whether each turn begins with a call that is not timed. After PyTorch's step, the first one of a large
        model takes up to a quarter longer.
    """
    for run in runs.values():
        jax.block_until_ready(run())
    samples: dict[Any, list[tuple[float, float]]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or time.perf_counter() < end:
        for name, run in runs.items():
            rate = _rate()
            if settle:
                jax.block_until_ready(run())
            start, calls = time.perf_counter(), 0
            while not calls or time.perf_counter() - start < min(0.2, seconds / 10):
                jax.block_until_ready(run())
                calls += 1
            samples[name].append(((time.perf_counter() - start) / calls, rate))
        rounds += 1
    return {name: Samples(*np.array(pairs).T) for name, pairs in samples.items()}


_rates: list[float] = []
"""The FLOP/s of all matrix products that this process has timed."""


def _rate() -> float:
    on_cpu = jax.devices()[0].platform == "cpu"
    _rates.append((None if on_cpu else peak_flops()) or matmul_rate(seconds=0.1))
    return _rates[-1]


def machine() -> Row:
    """Returns what the numbers were measured on, and the matmul rate over the whole run."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
        "peak_memory_of": _peak_memory()[1],
        "peak_median_gigaflops": _median(_rates) / 1e9 if _rates else None,
        "peak_best_gigaflops": max(_rates) / 1e9 if _rates else None,
    }


def random_batch(vocab_size: int, rows: int, length: int) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens, in which each row is one document."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=(rows, length + 1), dtype=np.int32)
    ones = np.ones((rows, length), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        "segments": ones,
        "mask": ones.astype(np.float32),
        "bytes": ones,
    }


def _planned_memory(compiled: Any) -> float:
    """Returns the bytes of a step's arguments and temporary arrays, by the compiler's plan."""
    plan = compiled.memory_analysis()
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes if plan else math.nan


def _peak_memory() -> tuple[int, str]:
    """Returns the most bytes ever in use, and where: on the device if it counts them, otherwise in the process."""
    if peak := (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"):
        return peak, "device"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "process"  # in kilobytes on Linux


def _median(values: Any) -> float:
    return float(np.median(values))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _table(part: str, rows: list[Row]) -> rich.table.Table:
    table = rich.table.Table(title=part, box=rich.box.SIMPLE, title_justify="left")
    for name in list(rows[0])[1:]:
        table.add_column(name.replace("_", " "), justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_text(value) for value in list(row.values())[1:]))
    return table

"""The `jaxtok` command. It is thin: every verb is a function that can be imported."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jaxtok
from jaxtok import systems
from jaxtok.cache import cache_folder

HELP = """\
jaxtok {version}: systems about tokens, in JAX

  jaxtok train CONFIG|RUN  trains what a config describes, or resumes a run
  jaxtok eval MODEL        measures loss, perplexity and bits per byte on a corpus
  jaxtok generate MODEL    continues prompts
  jaxtok grow RUN          makes a new run whose model has more parameter tokens
  jaxtok adapt MODEL       makes a new run that trains a LoRA adapter of a model
  jaxtok convert FROM TO   converts between runs and the formats of Hugging Face, PEFT and authors
  jaxtok tokenizer FILE    trains a SentencePiece tokenizer on a corpus
  jaxtok vision VERB       tokenizes, reconstructs and generates images, and measures their tokens
  jaxtok study CONFIG      runs an experiment with its baselines, and writes a table and a plot
  jaxtok plan CONFIG|RUN   estimates memory and time on a TPU slice or GPUs, without having any
  jaxtok recovery          kills a run 50 times, and compares it with an undisturbed one
  jaxtok bench             measures speed, as a fraction of what this machine can do
  jaxtok list [PATTERN]    shows systems, configs and published sizes

`jaxtok VERB --help` lists the options. Fields of a config are set by their dotted names:
  jaxtok train tokenformer_small --train.steps 100 --task.model.d-model 256
"""

TRAINING = """
A new run starts with new parameters, or with those of another model:
  --start MODEL  a run, RUN/checkpoints/STEP, or a folder or file in another format. If that model
                 is of another kind, the field `start` of the config must be the surgery that turns
                 it into the run's model. A run that is resumed does not open it again.

In a run of several processes, each process is started with the same command. They find each other
by what Slurm or a TPU pod sets; by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
or by
  --coordinator HOST:PORT --num-processes N --process-id I
  --distributed  asks the TPU VM (if it sets no variables, as in a shell on a Cloud TPU)
SIGTERM to any of them saves the run and ends all of them with exit code 75; the same command
resumes it. See tpu_scripts/.
"""

PLANNING = """
Options of `plan` itself:
  --topology T   CHIP:AxB or CHIP:AxBxC with v4, v5e, v5p or v6e, such as v5e:16x16; or v5e-256,
                 v5p-512, v6e-256; or GPU:N or GPU:HOSTSxN with a100, h100 or h200, such as h100:8
                 (default: v5e-256)
  --sweep        tries meshes and remat policies (fifteen compilations for 256 chips), and prints
                 the best first
  --output FILE  also writes the numbers as JSON
  --decode       plans steps of decoding instead, on one TPU chip: plain, with drafts, with each
                 evictor. CONFIG may then be a published size, such as llama-2-7b (jaxtok list)
  --rows N, --prompt N, --new N
                 the batch to decode, and the tokens that its cache has room for (1, 2048, 128)
The step is compiled by the TPU compiler (pip install libtpu), or by XLA for GPUs (pip install
jax-cuda12-plugin); neither needs the devices. For GPUs, the compiler tells memory and collectives,
but no times.
The exit code is 1 if the step does not fit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code.

    That is 0; 1 after an error, which its message explains (set JAXTOK_TRACEBACK=1 to see where it came from); 2 after
    unknown options; 75 if a run was interrupted and saved, and can be resumed; 130 after Ctrl-C elsewhere.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(version=jaxtok.__version__), end="")
        return 0
    if arguments[0] == "--version":
        print(jaxtok.__version__)
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        hint = systems.nearest(verb, VERBS, f"; use one of {', '.join(VERBS)}")
        return _fail(f"there is no verb {verb!r}{hint}")
    _cache_compilations()
    _quieten_tpu()
    try:
        return VERBS[verb](rest)
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, OverflowError, ImportError) as error:
        if os.environ.get("JAXTOK_TRACEBACK"):
            raise
        return _fail(_sentence(error))
    except KeyboardInterrupt:
        return 130


def _cache_compilations() -> None:
    """Keeps compiled programs between calls, unless JAX's own environment variables say otherwise."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder("xla")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _quieten_tpu() -> None:
    """Tells libtpu what it would ask a TPU VM for, and complain about, where there is no TPU (as to plan for one)."""
    vendors = Path("/sys/bus/pci/devices").glob("*/vendor")
    if not any(vendor.read_text().strip() == "0x1ae0" for vendor in vendors):  # Google's devices
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-16")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def _sentence(error: BaseException) -> str:
    """Returns what an error says; those of the operating system name the file first, and no number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fspath(error.filename)} cannot be used: {error.strerror[0].lower()}{error.strerror[1:]}."
    if isinstance(error, OverflowError):
        return f"a number is too large ({error}); give a smaller one."
    return str(error)


def _fail(message: str) -> int:
    import rich.console
    import rich.markup

    text = f"[red]error:[/] {rich.markup.escape(message)}"
    rich.console.Console(stderr=True).print(text, highlight=False, soft_wrap=True)  # paths can be copied whole
    return 1


def _train(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--start", type=Path)
    ours, arguments = parser.parse_known_args(_join_processes(arguments))
    experiment = _config(arguments, "train")
    if experiment is None:
        return 0
    from jaxtok.door import open_model
    from jaxtok.training.distributed import is_main
    from jaxtok.training.loop import INTERRUPTED, count, train

    result = train(experiment, start=functools.partial(open_model, ours.start) if ours.start else None)
    if not is_main():
        return INTERRUPTED if result.interrupted else 0
    _show({"run": result.directory, "step": result.step, "parameters": count(result.params)} | result.metrics)
    return INTERRUPTED if result.interrupted else 0


def _join_processes(arguments: list[str]) -> list[str]:
    """Joins the other processes of the run; returns the arguments without those that were for this."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator", default="")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    ours, rest = parser.parse_known_args(arguments)
    if rest and not {"-h", "--help"} & set(rest):
        from jaxtok.training.distributed import initialize

        initialize(ours.coordinator, ours.num_processes, ours.process_id, ours.distributed)
    return rest


def _study(arguments: list[str]) -> int:
    study = _config(arguments, "study")
    if study is None:
        return 0
    from jaxtok.training.loop import INTERRUPTED

    return 0 if study.run() else INTERRUPTED


def _plan(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("jaxtok plan CONFIG", add_help=False, allow_abbrev=False)
    parser.add_argument("--topology", default="v5e-256")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--decode", action="store_true")
    for name, default in {"rows": 1, "prompt": 2048, "new": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    ours, rest = parser.parse_known_args(arguments)
    if ours.decode and rest and rest[0] in systems.find(rest[0]).published:
        model = jaxtok.published(rest[0])
    else:
        experiment = _config(rest, "plan")
        if experiment is None:
            print(PLANNING, end="")
            return 0
        model = experiment.task.model
    if ours.decode:
        from jaxtok.plan_decoding import plan_decoding

        size = {"rows": ours.rows, "prompt": ours.prompt, "new": ours.new}
        rows = plan_decoding(model, ours.topology, name=rest[0], output=ours.output, **size)
    else:
        from jaxtok.plan import plan

        rows = plan(experiment, ours.topology, sweep=ours.sweep, output=ours.output)
    return 0 if rows[0]["fits"] else 1


def _config(arguments: list[str], verb: str) -> Any:
    """Returns the config that a command line begins with, changed by the rest; None if it asks for help."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: jaxtok {verb} {'CONFIG' if verb == 'study' else 'CONFIG|RUN'} [--FIELD VALUE ...]\n")
        print("CONFIG is one of these names, a Python file that defines one, or FILE:NAME if it defines several.\n")
        print(_fitted(systems.configs_text("study" if verb == "study" else "train")))
        print(f"`jaxtok {verb} CONFIG --help` lists the fields of a config and their values.")
        if verb == "train":
            print(TRAINING, end="")
        return None
    from jaxtok.configuration import override
    from jaxtok.door import experiment_of, study_of

    name = arguments[0]
    config = study_of(name) if verb == "study" else experiment_of(name, verb)
    entry = systems.configs().get(name)
    about = f"{entry.title}\n\n{entry.name}: {entry.about}" if entry and entry.title else entry.about if entry else ""
    if verb == "train":
        about += "\n\nWith `--start MODEL`, a new run begins with the parameters of that model."
    return override(config, arguments[1:], f"jaxtok {verb} {name}", about.strip())


def _vision(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jaxtok vision VERB ...\n")
        for name, path in VISION.items():
            print(_fitted(f"  {name:<11}  {(_function(path).__doc__ or '').splitlines()[0]}"))
        print("\n`jaxtok vision VERB --help` lists the options.")
        return 0
    verb, *rest = arguments
    if verb not in VISION:
        hint = systems.nearest(verb, VISION, f"; use one of {', '.join(VISION)}")
        return _fail(f"there is no verb {verb!r} of vision{hint}")
    if verb == "generate":  # its options depend on the run
        _print(_function("jaxtok.verbs.vision:generate_from_arguments")(rest))
        return 0
    return _call(VISION[verb], f"vision {verb}", rest)


def _list(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("jaxtok list", description="Shows systems, configs and published sizes.")
    about = 'A pattern, such as "*byte*"; only the names that match it are shown.'
    parser.add_argument("pattern", nargs="?", default="*", help=about)
    pattern = parser.parse_args(arguments).pattern
    listing = systems.find(pattern)
    if not listing:
        return _fail(f"no name matches {pattern!r}; `jaxtok list` shows all of them.")
    print(_fitted(str(listing)))
    return 0


def _fitted(text: str) -> str:
    """Breaks the lines that are wider than the terminal; they go on below their last column."""
    width = shutil.get_terminal_size((10_000, 24)).columns
    lines = []
    for line in text.split("\n"):
        indent = re.match(r" *(?:\S+(?: \S+)* {2,})?", line)[0]
        options = {"break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(line, width, subsequent_indent=" " * len(indent), **options) or [""]
    return "\n".join(lines)


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _call(path: str, verb: str, arguments: list[str]) -> int:
    """Calls a function with a command line; its signature and docstring become the options and the help."""
    from jaxtok.configuration import command_line

    result = command_line(_function(path), arguments, prog=f"jaxtok {verb}")
    _print(f"jaxtok train {result}" if verb in ("grow", "adapt") else result)
    return 0


def _print(result: Any) -> None:
    """Prints numbers as a table, and a folder or file as its path; any other result was shown as it came."""
    if isinstance(result, dict):
        _show(result)
    elif isinstance(result, str | Path):
        print(result)


def _show(values: dict[str, Any]) -> None:
    import rich.console
    import rich.table

    table = rich.table.Table(show_header=False, box=None)
    for name, value in values.items():
        if isinstance(value, int | float):
            value = f"{value:.4f}" if value % 1 else f"{value:,.0f}"
        table.add_row(name.replace("_", " "), str(value))
    rich.console.Console().print(table)


FUNCTIONS = {
    "eval": "jaxtok.verbs.text:evaluate",
    "generate": "jaxtok.verbs.text:generate",
    "grow": "jaxtok.verbs.change:grow",
    "adapt": "jaxtok.verbs.change:adapt",
    "convert": "jaxtok.verbs.convert:convert",
    "tokenizer": "jaxtok.verbs.tokenizers:tokenizer",
    "recovery": "jaxtok.studies.recovery:recovery",
    "bench": "jaxtok.bench:bench",
}
"""Verbs that are one function, by its module and name; it is imported when it is called."""

VISION = {
    "tokenize": "jaxtok.verbs.vision:tokenize",
    "reconstruct": "jaxtok.verbs.vision:reconstruct",
    "generate": "jaxtok.verbs.vision:generate",
    "statistics": "jaxtok.verbs.vision:statistics",
    "attention": "jaxtok.verbs.vision:attention",
    "segment": "jaxtok.verbs.vision:segment",
}
"""The verbs of `jaxtok vision`."""

VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    **{verb: functools.partial(_call, path, verb) for verb, path in FUNCTIONS.items()},
    "vision": _vision,
    "study": _study,
    "plan": _plan,
    "list": _list,
}


if __name__ == "__main__":
    sys.exit(main())

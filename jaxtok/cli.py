"""The `jaxtok` command: thin, every verb is a function that can be imported."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jaxtok
from jaxtok import systems

HELP = """\
jaxtok {version}: systems about tokens, in JAX

  jaxtok train CONFIG|RUN     trains what a config describes, or resumes a run
  jaxtok eval MODEL           measures loss, perplexity and bits per byte on any corpus
  jaxtok generate MODEL       continues prompts
  jaxtok grow RUN             makes a new run whose model has more parameter tokens
  jaxtok adapt MODEL          makes a new run that trains a LoRA adapter of a model
  jaxtok convert FROM TO      reads and writes the formats of others
  jaxtok tokenizer FILE       trains a SentencePiece tokenizer on a corpus
  jaxtok vision VERB          tokenizes, reconstructs and generates images, and measures their tokens
  jaxtok study CONFIG         runs an experiment with its baselines: table and plot
  jaxtok plan CONFIG          says memory and time on a TPU slice (memory on GPUs), without one
  jaxtok recovery             kills a run 50 times, and compares it with one left in peace, bit for bit
  jaxtok bench                measures speed as a fraction of this machine's own matmul rate
  jaxtok list [PATTERN]       shows systems, configs and published sizes

`jaxtok VERB --help` tells the rest. Fields of a config are set by their dotted names:
  jaxtok train tokenformer_small --train.steps 100 --task.model.d-model 256
"""

TRAINING = """
A new run starts with new parameters, or with those of another model:
  --start MODEL     a run, RUN/checkpoints/STEP or a Hugging Face folder; where the model is of another kind, `start` in
                    the config is the surgery that leads to the run's. A run that is resumed does not open it again.

Of a run of several processes, each is started with the same command. They find each other by what Slurm or a TPU pod
sets, by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by
  --coordinator HOST:PORT --num-processes N --process-id I
  --distributed     ask the TPU VM (where it sets no variables, as in a shell on a Cloud TPU)
SIGTERM on any of them saves and ends all with exit code 75: start the same command again. See tpu_scripts/.
"""

PLANNING = """
Options of its own:
  --topology T      CHIP:AxB or CHIP:AxBxC with v4, v5e, v5p or v6e, such as v5e:16x16, or v5e-256, v5p-512, v6e-256;
                    or GPU:N or GPU:HOSTSxN with a100, h100 or h200, such as h100:8
  --sweep           try meshes and remat policies (fifteen compilations for 256 chips), and print the best first
  --output FILE     also write the numbers as JSON
The step is compiled by the TPU compiler (pip install libtpu), or by XLA for a GPU (pip install jax-cuda12-plugin);
neither needs the device. The GPU's says what memory is needed and what is exchanged, and nothing of time.
Exit code 1: it does not fit.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns the exit code: 0; 1 for an error that its message explains (set JAXTOK_TRACEBACK=1 to see where); 2 for
    unknown options; 75 for a run that was interrupted, saved, and can be resumed; 130 for Ctrl-C elsewhere.
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
    try:
        return VERBS[verb](rest)
    except BrokenPipeError:  # the reader of the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("JAXTOK_TRACEBACK"):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130


def _cache_compilations() -> None:
    """Keeps compiled programs between calls, unless JAX is told otherwise by its own environment variables."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtok" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _fail(message: str) -> int:
    import rich.console
    import rich.markup

    rich.console.Console(stderr=True).print(f"[red]error:[/] {rich.markup.escape(message)}", highlight=False)
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
    """Joins the other processes of the run; returns the arguments without those that say which they are."""
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
    ours, rest = parser.parse_known_args(arguments)
    experiment = _config(rest, "plan")
    if experiment is None:
        print(PLANNING, end="")
        return 0
    from jaxtok.plan import plan

    rows = plan(experiment, ours.topology, sweep=ours.sweep, output=ours.output)
    return 0 if rows[0]["fits"] else 1


def _config(arguments: list[str], verb: str) -> Any:
    """The config named first on the command line, with the overrides after it; None if help was asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: jaxtok {verb} CONFIG|RUN [--FIELD VALUE ...]\n")
        print("CONFIG is one of these names, a Python file that defines one, or FILE:NAME where it defines several.\n")
        print(systems.configs_text("study" if verb == "study" else "train"))
        print(f"`jaxtok {verb} CONFIG --help` lists the fields of one and their values.")
        if verb == "train":
            print(TRAINING, end="")
        return None
    from jaxtok.configuration import override
    from jaxtok.door import experiment_of, study_of

    name = arguments[0]
    config = study_of(name) if verb == "study" else experiment_of(name, verb)
    return override(config, arguments[1:], prog=f"jaxtok {verb} {name}")


def _vision(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jaxtok vision VERB ...\n")
        for name, place in VISION.items():
            print(f"  {name:<12} {(_function(place).__doc__ or '').splitlines()[0]}")
        print("\n`jaxtok vision VERB --help` tells the rest.")
        return 0
    verb, *rest = arguments
    if verb not in VISION:
        hint = systems.nearest(verb, VISION, f"; use {', '.join(VISION)}")
        return _fail(f"there is no verb {verb!r} of vision{hint}")
    if verb == "generate":  # whose options are also those of the run
        _print(_function("jaxtok.verbs.vision:generate_from_arguments")(rest))
        return 0
    return _call(VISION[verb], f"vision {verb}", rest)


def _list(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("jaxtok list", description="Shows systems, configs and published sizes.")
    parser.add_argument("pattern", nargs="?", default="*", help='Only names that match it are shown, such as "*byte*".')
    pattern = parser.parse_args(arguments).pattern
    found = systems.find(pattern)
    if not found:
        return _fail(f"nothing has a name like {pattern!r}; `jaxtok list` shows all there is.")
    print(found)
    return 0


def _function(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _call(place: str, verb: str, arguments: list[str]) -> int:
    """Calls a function with a command line, of which its signature and docstring make the options and the help."""
    import tyro

    result = tyro.cli(_function(place), args=arguments, prog=f"jaxtok {verb}")
    _print(f"jaxtok train {result}" if verb in ("grow", "adapt") else result)
    return 0


def _print(result: Any) -> None:
    """Numbers as a table, and a folder or file as its path; what else there is was shown as it came."""
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
"""Verbs that are a function, by its module and name; they are imported when they are called."""

VISION = {
    "tokenize": "jaxtok.verbs.vision:tokenize",
    "reconstruct": "jaxtok.verbs.vision:reconstruct",
    "generate": "jaxtok.verbs.vision:generate",
    "statistics": "jaxtok.verbs.vision:statistics",
    "attention": "jaxtok.verbs.vision:attention",
}
"""The verbs of `jaxtok vision`."""

VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    **{verb: functools.partial(_call, place, verb) for verb, place in FUNCTIONS.items()},
    "vision": _vision,
    "study": _study,
    "plan": _plan,
    "list": _list,
}


if __name__ == "__main__":
    sys.exit(main())

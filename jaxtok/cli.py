"""The `jaxtok` command: thin, every verb is a function that can be imported."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.markup
import rich.table

import jaxtok

HELP = """\
jaxtok {version}: systems about tokens, in JAX

  jaxtok train CONFIG|RUN     train what a config file describes, or resume it
  jaxtok eval RUN             loss, perplexity and bits per byte on any corpus
  jaxtok generate RUN         continue prompts
  jaxtok grow RUN             a new run whose model has more parameter tokens
  jaxtok adapt RUN            a new run that trains a LoRA adapter of a model
  jaxtok convert FROM TO      models from and to the formats of others
  jaxtok tokenizer FILE       train a SentencePiece tokenizer on a corpus
  jaxtok vision VERB          tokenize, reconstruct and generate images; statistics of their tokens
  jaxtok study CONFIG         an experiment with its baselines: table and plot
  jaxtok plan CONFIG          memory and time on a TPU slice (memory on GPUs), without one
  jaxtok recovery             does a run survive being killed? 50 times, and compared bit for bit
  jaxtok bench                speed, as a fraction of this machine's own matmul rate

`jaxtok VERB --help` tells the rest. Fields of a config are set by their dotted names:
  jaxtok train configs/lm/tokenformer_small.py --train.steps 100 --task.model.d-model 256
"""

TRAINING = """
A new run starts with new parameters, or with those of another model:
  --start MODEL     a run, RUN/checkpoints/STEP or a Hugging Face folder. Where the model is of another kind, `start` in
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
        near = difflib.get_close_matches(verb, VERBS, n=1)
        return _fail(
            f"there is no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"use {', '.join(VERBS)}.")
        )
    _cache_compilations()
    try:
        return VERBS[verb](rest)
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
    rich.console.Console(stderr=True).print(f"[red]error:[/] {rich.markup.escape(message)}", highlight=False)
    return 1


def _train(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--start", type=Path)
    ours, arguments = parser.parse_known_args(_join_processes(arguments))
    experiment = _config(arguments, "train")
    if experiment is None:
        return 0
    from jaxtok.training.distributed import is_main
    from jaxtok.training.loop import INTERRUPTED, count, train

    def start():
        from jaxtok.model import Model
        from jaxtok.verbs import open_model

        opened = open_model(ours.start)
        return Model(task=opened.task, params=opened.params, data=opened.data, path=ours.start)

    result = train(experiment, start=start if ours.start else None)
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
    if not {"-h", "--help"} & set(rest):
        from jaxtok.training.distributed import initialize

        initialize(ours.coordinator, ours.num_processes, ours.process_id, ours.distributed)
    return rest


def _study(arguments: list[str]) -> int:
    study = _config(arguments, "study")
    if study is None:
        return 0
    from jaxtok.training.loop import INTERRUPTED

    return 0 if study.run() else INTERRUPTED


def _recovery(arguments: list[str]) -> int:
    from jaxtok.studies.recovery import recovery

    _show(_call(recovery, "recovery", arguments))
    return 0


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
    """The config named first on the command line, with the overrides behind it; None if help was asked for."""
    if not arguments or arguments[0] in ("-h", "--help"):
        known = "".join(f"\n  {path}" for path in sorted(Path("configs").rglob("*.py")))
        print(f"usage: jaxtok {verb} CONFIG|RUN [--FIELD VALUE ...]\n\nConfigs here:{known or ' none'}\n")
        print(f"`jaxtok {verb} CONFIG --help` lists the fields of one and their values.")
        if verb == "train":
            print(TRAINING, end="")
        return None
    from jaxtok.configuration import load_config, override
    from jaxtok.training.checkpoints import read_config

    path = Path(arguments[0])
    config = read_config(path) if path.is_dir() else load_config(path)
    return override(config, arguments[1:], prog=f"jaxtok {verb} {path}")


def _eval(arguments: list[str]) -> int:
    from jaxtok import verbs

    _show(_call(verbs.evaluate, "eval", arguments))
    return 0


def _generate(arguments: list[str]) -> int:
    from jaxtok import verbs

    _call(verbs.generate, "generate", arguments)
    return 0


def _grow(arguments: list[str]) -> int:
    from jaxtok import verbs

    run = _call(verbs.grow, "grow", arguments)
    print(f"jaxtok train {run}")
    return 0


def _adapt(arguments: list[str]) -> int:
    from jaxtok import verbs

    run = _call(verbs.adapt, "adapt", arguments)
    print(f"{run}\ntrain it with: jaxtok train {run}")
    return 0


def _convert(arguments: list[str]) -> int:
    from jaxtok.convert import convert

    print(_call(convert, "convert", arguments))
    return 0


def _tokenizer(arguments: list[str]) -> int:
    from jaxtok import verbs

    _show(_call(verbs.tokenizer, "tokenizer", arguments))
    return 0


def _vision(arguments: list[str]) -> int:
    from jaxtok import vision_verbs

    known = {
        "tokenize": vision_verbs.tokenize,
        "reconstruct": vision_verbs.reconstruct,
        "generate": vision_verbs.generate,
        "statistics": vision_verbs.statistics,
        "attention": vision_verbs.attention,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jaxtok vision VERB ...\n")
        for name, function in known.items():
            print(f"  {name:<12} {(function.__doc__ or '').splitlines()[0]}")
        print("\n`jaxtok vision VERB --help` tells the rest.")
        return 0
    if arguments[0] not in known:
        return _fail(f"there is no verb {arguments[0]!r} of vision; use {', '.join(known)}.")
    if arguments[0] == "generate":  # whose options are also those of the run
        result = vision_verbs.generate_from_arguments(arguments[1:])
    else:
        result = _call(known[arguments[0]], f"vision {arguments[0]}", arguments[1:])
    if isinstance(result, dict):
        _show(result)
    else:
        print(result)
    return 0


def _bench(arguments: list[str]) -> int:
    from jaxtok.bench import bench

    _call(bench, "bench", arguments)
    return 0


def _call(function: Callable, verb: str, arguments: list[str]) -> Any:
    """Calls the function with a command line, of which its signature and docstring make the options and the help."""
    import tyro

    return tyro.cli(function, args=arguments, prog=f"jaxtok {verb}")


def _show(values: dict[str, Any]) -> None:
    table = rich.table.Table(show_header=False, box=None)
    for name, value in values.items():
        if isinstance(value, int | float):
            value = f"{value:.4f}" if value % 1 else f"{value:,.0f}"
        table.add_row(name.replace("_", " "), str(value))
    rich.console.Console().print(table)


VERBS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "eval": _eval,
    "generate": _generate,
    "grow": _grow,
    "adapt": _adapt,
    "convert": _convert,
    "tokenizer": _tokenizer,
    "vision": _vision,
    "study": _study,
    "plan": _plan,
    "recovery": _recovery,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())

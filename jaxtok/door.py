"""The front door: what `import jaxtok` gives."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from jaxtok import systems
from jaxtok.configuration import load_config, replaced
from jaxtok.interop.formats import format_of
from jaxtok.interop.peft import apply_adapter
from jaxtok.model import Model, Split
from jaxtok.pretrained import pretrained
from jaxtok.runs import is_run, open_run, with_data
from jaxtok.training.checkpoints import read_config
from jaxtok.training.experiment import Experiment
from jaxtok.transfer.lora import Lora


def open_model(
    path: str | Path, adapter: str | Path | None = None, ema: bool = False, config: str | Path | None = None
) -> Model:
    """Opens a model: task, parameters, tokenizer and data.

    >>> model = jaxtok.open(run)
    >>> text = model.generate("number ")
    >>> model.logits("number 1").shape
    (9, 384)

    Args:
      path: a run's folder (its newest checkpoint is opened), RUN/checkpoints/STEP, a folder or file in another format
        (Hugging Face's, GGUF, ...), the name of a pretrained model (smollm2), which is fetched once, or the name of a
        config that was trained here. A run that trains an adapter gives the model with the adapter merged in.
      adapter: a PEFT folder of LoRA, whose differences are added to the model.
      ema: take the moving average of the parameters, if the run keeps one (optimizer.ema_decay).
      config: the name or file of the model's config, for a file that holds only tensors.

    Raises:
      FileNotFoundError: there is nothing at the path.
      ValueError: what is there is not a model, or not the config's, or has no moving average.
    """
    location = location_of(path)
    if is_run(location):
        model = open_run(location, ema)
    else:
        known = experiment_of(config, "convert") if config else None
        like = known.task if known else None
        form = format_of(location, like)
        if ema:
            raise ValueError(f"{path} is not a run, so it has no moving average; leave out ema.")
        model = form.read(location, like)
        if known and model.data is None:
            model = with_data(model, known.data)
    if isinstance(model.task, Lora):
        model = dataclasses.replace(model, task=model.task.task, params=model.task.merged(model.params))
    if adapter is not None:
        body, params = apply_adapter(Path(adapter), model.task.model, model.params)
        model = dataclasses.replace(model, task=dataclasses.replace(model.task, model=body), params=params)
    return model


def location_of(path: str | Path) -> Path:
    """Returns where a model is: the path, the pretrained model of this name, or the run of the config of this name.

    Raises:
      FileNotFoundError: there is nothing there, or the pretrained model cannot be fetched.
      ValueError: the name is that of a study.
    """
    location, name = Path(path), str(path)
    if location.exists():
        return location
    if name in systems.PRETRAINED:
        return pretrained(name)
    if name in systems.configs():
        run = getattr(load_config(name), "directory", None)
        if run is None:
            raise ValueError(f"{name} is a study, which has several models; run `jaxtok study {name}` and open one.")
        if not is_run(run):
            raise FileNotFoundError(f"{name} has not been trained here: there is no {run}; run `jaxtok train {name}`.")
        return run
    if any(name.rsplit("/", 1)[-1].lower() in row.published for row in systems.SYSTEMS):
        raise FileNotFoundError(
            f"there is no folder {name}, and nothing is downloaded; give the folder that has this size's weights."
        )
    others = [str(other) for other in location.parent.glob("*") if other.is_dir()]
    hint = systems.nearest(
        name,
        [*others, *systems.configs(), *systems.PRETRAINED],
        "; give a run's folder, or a folder or file of a model",
    )
    raise FileNotFoundError(f"there is nothing at {name}{hint}")


def train(config: str | Path | Experiment, start: Model | str | Path | None = None, **overrides: Any) -> Model:
    """Trains what a config describes, or resumes its run, as `jaxtok train` does; returns the trained model.

    >>> model = jaxtok.train(config, train__steps=2, workdir="short")
    >>> model.step
    2

    Args:
      config: the name of a config (`jaxtok.list` shows them), its file or FILE:NAME, a run's folder, or an Experiment.
      start: the model whose parameters a new run begins with, or what `jaxtok.open` takes; see `Experiment.start`.
      overrides: fields to change, with two underscores for each dot: `train__steps=100`, `task__model__d_model=256`.

    Raises:
      FileNotFoundError, ValueError: there is no such config, it is a study, or it has no such field.
    """
    from jaxtok.training.loop import train as run_loop

    experiment = config if isinstance(config, Experiment) else experiment_of(config)
    changes = {name.replace("__", "."): value for name, value in overrides.items()}
    begin = None if start is None else lambda: _opened(start)
    return open_model(run_loop(replaced(experiment, changes), start=begin).directory)


def experiment_of(config: str | Path, verb: str = "train") -> Experiment:
    """Returns the experiment of a name, a file or a run's folder.

    Raises:
      FileNotFoundError, ValueError: there is none; if there is something else, the message names the verb for it.
    """
    value = _read(config)
    if not isinstance(value, Experiment):
        what = "a study" if hasattr(value, "run") else f"of {type(value).__name__}"
        hint = f"run it with `jaxtok study {config}`" if hasattr(value, "run") else "give an Experiment"
        raise ValueError(f"{config} is {what}, which `jaxtok {verb}` does not take; {hint}.")
    return value


def study_of(config: str | Path) -> Any:
    """Returns the study of a name or a file.

    Raises:
      FileNotFoundError, ValueError: as `experiment_of`.
    """
    value = _read(config)
    if not hasattr(value, "run"):
        raise ValueError(f"{config} is an experiment, not a study; run it with `jaxtok train {config}`.")
    return value


def _read(config: str | Path) -> Any:
    folder = Path(config)
    if str(config) in systems.PRETRAINED and not folder.exists():
        raise ValueError(
            f"{config} is a pretrained model; make a run of it with `jaxtok adapt {config}` (LoRA) or "
            f"`jaxtok convert {config} RUN`, and train that."
        )
    if str(config) in systems.configs() or not folder.is_dir():
        return load_config(config)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a run: it has no config.json; give what `jaxtok train` made.")
    try:
        return read_config(folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not a run's config; give what `jaxtok train` made.") from error


def published(name: str) -> Any:
    """Returns the config of a published size; `jaxtok.list` shows their names.

    >>> jaxtok.published("mrt5-small").d_model
    1472
    >>> jaxtok.published("mrt5-smal")
    Traceback (most recent call last):
    ValueError: there is no published size 'mrt5-smal'; did you mean mrt5-small?

    Raises:
      ValueError: there is none of this name.
    """
    rows = {size: row for row in systems.SYSTEMS for size in row.published}
    if name not in rows:
        hint = systems.nearest(name, rows, "; `jaxtok list` shows them")
        raise ValueError(f"there is no published size {name!r}{hint}")
    row = rows[name]
    module = importlib.import_module("jaxtok." + row.modules[0].removesuffix(".py").replace("/", "."))
    return module.PUBLISHED[name.removeprefix(row.prefix)]


@overload
def generate(model: Model | str | Path, prompt: str | bytes = "", **options: Any) -> str: ...
@overload
def generate(model: Model | str | Path, prompt: Sequence[str | bytes], **options: Any) -> list[str]: ...
def generate(model, prompt="", **options):
    """Continues a prompt, or several as a batch.

    >>> text = jaxtok.generate(run, "number ", max_new_tokens=5, temperature=0.0)
    >>> text == jaxtok.open(run).generate("number ", max_new_tokens=5, temperature=0.0)
    True

    Args:
      model: a model, or what `jaxtok.open` takes.
      prompt: a text, or several.
      options: of `jaxtok.model.Model.generate`.
    """
    return _opened(model).generate(prompt, **options)


def evaluate(
    model: Model | str | Path, corpus: str = "", split: Split = "validation", batches: int = 0
) -> dict[str, float]:
    """Measures a model on a split of a corpus.

    >>> sorted(jaxtok.evaluate(run, batches=1))
    ['bits_per_byte', 'bytes', 'loss', 'perplexity', 'tokens']

    Args:
      model: a model, or what `jaxtok.open` takes.
      corpus, split, batches: of `jaxtok.model.Model.evaluate`.
    """
    return _opened(model).evaluate(corpus, split, batches)


def _opened(model: Model | str | Path) -> Model:
    return model if isinstance(model, Model) else open_model(model)

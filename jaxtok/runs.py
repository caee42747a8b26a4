"""Models from runs, and runs from models."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from jaxtok.data.text import TextData
from jaxtok.interop.texts import copy_tokenizer, named_texts, read_record, write_record
from jaxtok.model import Model
from jaxtok.training.checkpoints import begin, find_run, load, must_be_free
from jaxtok.training.experiment import Experiment


def is_run(path: Path) -> bool:
    """Whether the path is a run's folder, or RUN/checkpoints/STEP."""
    return (find_run(path)[0] / "checkpoints").is_dir()


def open_run(path: Path, ema: bool = False) -> Model:
    """Opens the model of a run.

    Raises:
      FileNotFoundError, ValueError: as `jaxtok.training.checkpoints.load`.
    """
    loaded = load(path, ema)
    model = Model(task=loaded.task, params=loaded.params, data=None, path=Path(path), step=loaded.meta.step)
    return dataclasses.replace(with_data(model, loaded.data), **read_record(loaded.directory))


def with_data(model: Model, data: Any) -> Model:
    """A model with the data that it was trained on, and with their tokenizer where they are text."""
    facts = named_texts(data.tokenizer).facts() if isinstance(data, TextData) else {}
    return dataclasses.replace(model, data=data, **facts)


def write_run(target: Path, model: Model, experiment: Experiment | None = None) -> Path:
    """Writes step 0 of a run with a model's parameters and tokenizer; a failure leaves no folder.

    Args:
      target: the run's folder.
      model: the model, whose task is the run's.
      experiment: what the run is apart from its task; default: one with the model's own data.

    Raises:
      FileExistsError: there is something at the target already.
    """
    must_be_free(target)
    data = model.data if experiment is None or experiment.data is None else experiment.data
    train = experiment.train if experiment else Experiment(task=model.task, data=data).train
    if parts := train.optimizer.parts:
        held = tuple(part for part in parts if part.part in model.params)
        train = dataclasses.replace(train, optimizer=dataclasses.replace(train.optimizer, parts=held))
    target.mkdir(parents=True, exist_ok=True)
    try:
        task: Any = model.task
        if model.tokenizer is not None:
            name = copy_tokenizer(str(model.data.tokenizer), target)
            spec = str((target / name).absolute()) if (target / name).is_file() else name
            data = dataclasses.replace(data, tokenizer=spec)
            task = task.fit(data, train)
            write_record(target, model)
        experiment = experiment or Experiment(task=task, data=data)
        run = {"task": task, "data": data, "train": train, "name": target.name, "workdir": str(target)}
        return begin(dataclasses.replace(experiment, **run), model.params)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise

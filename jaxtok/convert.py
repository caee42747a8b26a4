"""Models between runs of jaxtok and the formats of others."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from jaxtok.configuration import load_config
from jaxtok.interop.formats import format_for, format_named, format_of
from jaxtok.interop.texts import copy_tokenizer, named_texts, read_record, write_record
from jaxtok.model import Model
from jaxtok.training.checkpoints import begin, find_run, load, must_be_free
from jaxtok.training.experiment import Experiment


def convert(
    source: Positional[Path],
    target: Positional[Path],
    config: Path | None = None,
    format: str = "",
    which: Literal["", "model", "ema"] = "",
    ema: bool = False,
    tokenizer: str = "",
    base: str = "",
    torch_bin: bool = False,
) -> Path:
    """Models between runs and the formats of others, in the direction that the source asks for.

    What is in another format becomes a run that every verb takes: folders of Hugging Face (GPT-2, Llama, Mistral,
    Qwen2, Gemma, BERT, RoBERTa, XLM-R, ELECTRA, T5, mT5, ByT5, the released HATs), of PEFT, of the authors of
    TokenFormer, MrT5 and Learn Your Tokens, and files of the authors of ELECTRA, VQGAN, BAE and ELM. A run becomes such
    a folder or file, by its kind of model (of ELECTRA, the discriminator).

    Args:
      source: the folder or file; or a run, or RUN/checkpoints/STEP.
      target: what to write, which must not exist. A file's suffix says its kind: .safetensors, .npz, .pth, .th, .pt.
      config: the config of the model, where the files are bare tensors (ELM, VQGAN, BAE, ELECTRA's variables); the
        new run is then as it says. With that of a Byte2Word, the folder of a BERT lends its layers.
      format: the name of the format, where several can hold the model.
      which: of a file of a training, the parameters or their moving average.
      ema: of a run, take the moving average of the parameters.
      tokenizer: of a folder that has none: bytes, byt5, or a tokenizer's file.
      base: of an adapter, the folder (or, to be written down, the name) of the model that it is for.
      torch_bin: write pytorch_model.bin (needs PyTorch) instead of model.safetensors.
    """
    must_be_free(target)
    if is_run(source):
        model = open_run(source, ema)
        form = format_named(format) if format else _format_for(source, model, target)
        if not form.owns(model.task):
            raise ValueError(f"format is {form.name}, which does not hold a {type(model.task).__name__}.")
        return form.write(target, model, base=base, torch_bin=torch_bin)
    if ema:
        raise ValueError(f"{source} is no run, so it has no moving average; leave out ema.")
    experiment = load_config(config) if config else None
    task = experiment.task if experiment else None
    form = format_named(format) if format else format_of(source, task)
    given = {"which": which, "tokenizer": tokenizer, "base": base}
    options = {name: value for name, value in given.items() if value}
    try:
        model = form.read(source, task, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ValueError(f"the format {form.name} has no use for {' or '.join(options)}; leave it out.") from None
    return write_run(target, model, experiment)


def is_run(path: Path) -> bool:
    """Whether it is a run's folder, or RUN/checkpoints/STEP."""
    return (find_run(path)[0] / "checkpoints").is_dir()


def open_run(path: Path, ema: bool = False) -> Model:
    """The model of a run.

    Raises:
      FileNotFoundError, ValueError: as `jaxtok.training.checkpoints.load`.
    """
    loaded = load(path, ema)
    data = loaded.data
    facts = named_texts(data.tokenizer).facts() | read_record(loaded.directory) if hasattr(data, "tokenizer") else {}
    return Model(
        task=loaded.task, params=loaded.params, data=data, path=loaded.directory, step=loaded.meta.step, **facts
    )


def write_run(target: Path, model: Model, experiment: Experiment | None = None) -> Path:
    """Step 0 of a run with a model's parameters and tokenizer; after a failure there is no folder.

    Args:
      target: the run's folder.
      model: what was read.
      experiment: what the run is, but for the task; default: the model's own data.

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
            if hasattr(task, "tokenizer"):
                task = dataclasses.replace(task, tokenizer=spec)
            write_record(target, model)
        experiment = experiment or Experiment(task=task, data=data)
        run = {"task": task, "data": data, "train": train, "name": target.name, "workdir": str(target)}
        return begin(dataclasses.replace(experiment, **run), model.params)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _format_for(source: Path, model: Model, target: Path) -> Any:
    try:
        return format_for(model.task, target)
    except ValueError as error:
        raise ValueError(f"{source} cannot be written in another format: {error}") from error

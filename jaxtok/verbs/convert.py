"""Models between runs of jaxtok and the formats of others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from jaxtok.door import experiment_of
from jaxtok.interop.formats import format_for, format_named, format_of
from jaxtok.model import Model
from jaxtok.protocols import Format
from jaxtok.runs import is_run, open_run, write_run
from jaxtok.training.checkpoints import must_be_free


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
      source: The folder or file to read; or a run, or RUN/checkpoints/STEP.
      target: The folder or file to write, which must not exist. A file's suffix says its kind: .safetensors, .npz,
        .pth, .th or .pt.
      config: The name or file of the model's config, where the files are bare tensors (ELM, VQGAN, BAE, ELECTRA's
        variables); the new run is then as it says. With the config of a Byte2Word, the folder of a BERT lends its
        layers.
      format: The name of the format, where several can hold the model.
      which: Whether the parameters of a file of a training are read, or their moving average.
      ema: Takes the moving average of a run's parameters.
      tokenizer: The tokenizer of a folder that has none: bytes, byt5, or a tokenizer's file.
      base: The folder (or, to be written down, the name) of the model that an adapter is for.
      torch_bin: Writes pytorch_model.bin (needs PyTorch) instead of model.safetensors.
    """
    must_be_free(target)
    if is_run(source):
        model = open_run(source, ema)
        form = format_named(format) if format else _format_for(source, model, target)
        if not form.owns(model.task):
            raise ValueError(f"format is {form.name}, which does not hold a {type(model.task).__name__}.")
        return form.write(target, model, **_options(form, form.write, base=base, torch_bin=torch_bin))
    if ema:
        raise ValueError(f"{source} is no run, so it has no moving average; leave out ema.")
    experiment = experiment_of(config, "convert") if config else None
    task = experiment.task if experiment else None
    form = format_named(format) if format else format_of(source, task)
    options = _options(form, form.read, which=which, tokenizer=tokenizer, base=base)
    return write_run(target, form.read(source, task, **options), experiment)


def _options(form: Format, function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those options that are set; raises a ValueError where the format's function has no such option."""
    found = {name: value for name, value in options.items() if value}
    if unknown := [name for name in found if name not in inspect.signature(function).parameters]:
        raise ValueError(f"the format {form.name} has no use for {' or '.join(unknown)}; leave it out.")
    return found


def _format_for(source: Path, model: Model, target: Path) -> Any:
    try:
        return format_for(model.task, target)
    except ValueError as error:
        raise ValueError(f"{source} cannot be written in another format: {error}") from error

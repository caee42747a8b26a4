"""Conversion of models between runs of jaxtok and other formats."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from jaxtok.door import experiment_of, location_of
from jaxtok.interop.formats import format_for, format_named, format_of
from jaxtok.model import Model
from jaxtok.protocols import Format
from jaxtok.runs import is_run, open_run, write_run
from jaxtok.systems import PRETRAINED
from jaxtok.training.checkpoints import must_be_free


def convert(
    source: Positional[Annotated[Path, arg(metavar="FROM")]],
    target: Positional[Annotated[Path, arg(metavar="TO")]],
    config: Annotated[Path | None, arg(metavar="CONFIG")] = None,
    format: str = "",
    which: Annotated[Literal["", "model", "ema"], arg(metavar="model|ema")] = "",
    ema: bool = False,
    tokenizer: str = "",
    base: str = "",
    torch_bin: bool = False,
) -> Path:
    """Converts a model: from another format to a run, or from a run to another format.

    A model in another format becomes a run that every verb takes. These formats are known:
      - folders of Hugging Face: GPT-2, Llama, Mistral, Qwen2, Gemma, BERT, RoBERTa, XLM-R, ELECTRA,
        T5, mT5, ByT5, the released HATs
      - folders of PEFT, and of the authors of TokenFormer, MrT5 and Learn Your Tokens
      - files of llama.cpp (GGUF), which are read only: Llama, Qwen2, Gemma, GPT-2
      - files of the authors of ELECTRA, VQGAN, BAE, ELM, SEED, TokenBridge and TokenUnify; of FlexTok,
        a folder or a file with its config inside
      - KL-VAEs: files of latent diffusion, folders of diffusers

    A run becomes the folder or file that fits its model (for ELECTRA, that of the discriminator).

    Args:
      source: The folder or file to read: a run, RUN/checkpoints/STEP, a model in another format, or the name of a
        pretrained model (smollm2).
      target: The folder or file to write, which must not exist. The suffix of a file says its kind: .safetensors, .npz,
        .pth, .th or .pt.
      config: The name or file of the model's config, if the files are bare tensors (ELM, VQGAN, BAE, SEED, KL-VAE,
        TokenBridge, TokenUnify, ELECTRA's variables); the new run then has this config. With the config of a Byte2Word,
        the folder of a BERT gives its layers.
      format: The name of the format, if several can hold the model.
      which: Whether the parameters are read or their moving average, from a file that holds both.
      ema: Whether the moving average of a run's parameters is taken.
      tokenizer: The tokenizer for a folder that has none: bytes, byt5, or a tokenizer's file.
      base: The model that an adapter is for: its folder, or the name to write into the adapter's config.
      torch_bin: Whether pytorch_model.bin (needs PyTorch) is written instead of model.safetensors.
    """
    must_be_free(target)
    if str(source) in PRETRAINED:
        source = location_of(source)
    if is_run(source):
        model = open_run(source, ema)
        form = format_named(format) if format else _format_for(source, model, target)
        if not form.owns(model.task):
            raise ValueError(
                f"format is {form.name}, which cannot hold a {type(model.task).__name__}; leave out --format."
            )
        return form.write(target, model, **_options(form, form.write, base=base, torch_bin=torch_bin))
    if ema:
        raise ValueError(f"{source} is not a run, so it has no moving average; leave out ema.")
    experiment = experiment_of(config, "convert") if config else None
    task = experiment.task if experiment else None
    form = format_named(format) if format else format_of(source, task)
    options = _options(form, form.read, which=which, tokenizer=tokenizer, base=base)
    return write_run(target, form.read(source, task, **options), experiment)


def _options(form: Format, function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Returns the options that are set; raises a ValueError if the format's function has no such option."""
    found = {name: value for name, value in options.items() if value}
    if unknown := [name for name in found if name not in inspect.signature(function).parameters]:
        raise ValueError(f"the format {form.name} does not take {' or '.join(unknown)}; leave it out.")
    return found


def _format_for(source: Path, model: Model, target: Path) -> Any:
    try:
        return format_for(model.task, target)
    except ValueError as error:
        raise ValueError(f"{source} cannot be written in another format: {error}") from error

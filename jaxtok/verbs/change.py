"""New runs from a changed model: one that has grown, or one with an adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
from tyro.conf import Positional, arg

from jaxtok.door import open_model
from jaxtok.interop.texts import copy_record
from jaxtok.nn.lora import LoraConfig
from jaxtok.nn.parameter_attention import GROUPS, ParameterAttentionStack, TokenCounts
from jaxtok.runs import is_run, write_run
from jaxtok.training.checkpoints import find_run, fork, must_be_free
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.growth import Growth
from jaxtok.transfer.lora import AddLora


def grow(
    checkpoint: Positional[Annotated[Path, arg(metavar="RUN")]],
    to: TokenCounts = TokenCounts(),
    output: Annotated[Path | None, arg(metavar="RUN")] = None,
    times: float = 0.0,
    init: Literal["zero_keys", "copy", "random"] = "zero_keys",
    scale: Literal["auto", "fixed", "current"] = "auto",
    optimizer: Literal["keep", "reset"] = "reset",
    train: Literal["all", "new"] = "all",
    steps: int = 0,
    seed: int = 0,
) -> Path:
    """Makes a new run whose model has more parameter tokens; `jaxtok train OUTPUT` goes on training it.

    Args:
      checkpoint: A run's folder, or RUN/checkpoints/STEP.
      to: How many parameter tokens each group has afterwards; 0 leaves a group as it is.
      output: The new run's folder; by default it is RUN-grown.
      times: The factor by which every group grows; it replaces `to` if it is above 1.
      init: How the new tokens begin. zero_keys preserves the function (with all normalisations but softmax and
        gelu_layer_norm), copy preserves it for whole multiples, and random is the authors' released recipe, which
        perturbs the model.
      scale: Whether the normalisation is fixed at the old number of tokens or follows the current one; auto takes the
        one that preserves the function.
      optimizer: Whether the moments of the old tokens are kept (those of the new ones are 0), or all are reset.
      train: Whether all parameters are trained afterwards, or only the new tokens.
      steps: How many steps the new run trains; 0 means as many as the old run.
      seed: The seed of the new tokens.
    """
    model = getattr(open_model(checkpoint).task, "model", None)
    if not isinstance(model, ParameterAttentionStack):
        raise ValueError(f"{checkpoint} has no parameter tokens, so it cannot grow; give a run of a TokenFormer.")
    if not is_run(checkpoint):
        raise ValueError(f"{checkpoint} is not a run; make one with `jaxtok convert {checkpoint} RUN`, and grow that.")
    if times:
        if times <= 1:
            raise ValueError(f"times is {times}; it must be above 1.")
        to = TokenCounts(**{g: round(getattr(model.tokens, g) * times) for g in GROUPS})
    growth = Growth(to=to, init=init, scale=scale, optimizer=optimizer, train=train, steps=steps or 1)
    output = output or Path(f"{str(checkpoint).rstrip('/')}-grown")
    fork(checkpoint, output, steps=steps, surgery=growth, seed=seed)
    copy_record(find_run(checkpoint)[0], output)
    return output


def adapt(
    checkpoint: Positional[Annotated[Path, arg(metavar="MODEL")]],
    output: Annotated[Path | None, arg(metavar="RUN")] = None,
    lora: LoraConfig = LoraConfig(),
    adapter: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    corpus: str = "",
    steps: int = 1000,
    learning_rate: float = 2e-4,
    batch_size: int = 0,
    length: int = 0,
    seed: int = 0,
) -> Path:
    """Makes a new run that trains a LoRA adapter of a model.

    `jaxtok train OUTPUT` trains the adapter; then `jaxtok convert OUTPUT FOLDER` writes it for PEFT.

    Args:
      checkpoint: A run's folder, RUN/checkpoints/STEP, a folder or file in another format, the name of a pretrained
        model (smollm2), or that of a config that was trained here.
      output: The new run's folder; by default it is MODEL-adapted.
      lora: Which matrices get a difference, and of which rank.
      adapter: A PEFT folder of LoRA, whose differences are added to the model first.
      corpus: The corpus to train on: python, a file or folder, tfds:NAME or arrayrecord:PATTERN. By default it is
        the one that the model was trained on.
      steps: How many steps the adapter is trained.
      learning_rate: The highest learning rate; it ends at a tenth of it.
      batch_size: How many rows a batch has; 0 means as many as in the run (8 for a Hugging Face folder).
      length: How many tokens a row has; 0 means as many as in the run (for a Hugging Face folder, as many as the
        model's context holds, but at most 1024).
      seed: The seed of the adapter and the data.
    """
    output = output or Path(f"{str(checkpoint).rstrip('/')}-adapted")
    must_be_free(output)
    opened = open_model(checkpoint, adapter)
    if opened.tokenizer is None:
        raise ValueError(f"{checkpoint} is a model of {type(opened.task).__name__}; adapters are for models of text.")
    changes = {"corpus": corpus, "batch_size": batch_size, "length": length}
    data = dataclasses.replace(opened.data, seed=seed, **{name: new for name, new in changes.items() if new})
    surgery = AddLora(lora=lora)
    task, data = surgery.task(opened.task, data)
    params, _ = surgery.params(opened.task, data, opened.params, None, jax.random.key(seed))
    optimizer = OptimizerConfig(
        learning_rate=learning_rate, min_learning_rate=learning_rate / 10, warmup=0.03, weight_decay=0.0
    )
    train = TrainConfig(steps=steps, optimizer=optimizer, seed=seed)
    experiment = Experiment(task=task, data=data, name=output.name, workdir=str(output), train=train)
    return write_run(output, dataclasses.replace(opened, task=task, data=data, params=params), experiment)

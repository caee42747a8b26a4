"""ELECTRA in two layouts: Hugging Face's folders, and the variables of `google-research/electra` (TensorFlow 1).

The authors' checkpoint is read where its variables are an .npz or .safetensors file, by their names:

    reader = tf.train.load_checkpoint(path)
    numpy.savez(file, **{name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()})
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxtok.interop import encoders
from jaxtok.interop.files import has_tensors, read_file, write_file
from jaxtok.interop.folders import FolderFormat, Options
from jaxtok.interop.tensors import Place, Source, read_params, shapes_of, write_params
from jaxtok.interop.texts import Texts
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.electra import ElectraConfig, ReplacedTokens
from jaxtok.lm.masked_words import MaskedWords
from jaxtok.lm.text_classification import TextClassification
from jaxtok.model import Model
from jaxtok.protocols import Params

Variables = Mapping[str, np.ndarray]


def task_and_data(config: ElectraConfig, texts: Texts, options: Options) -> tuple[Any, Any]:
    """Returns task and data as for other encoders; a discriminator alone is trained with uniformly drawn words.

    Raises:
      ValueError: as `jaxtok.interop.encoders.task_and_data`.
    """
    if config.num_classes or not config.replaced_head:
        return encoders.task_and_data(config, texts, options)
    words, data = encoders.task_and_data(dataclasses.replace(config, mask_head=True), texts, options)
    model = dataclasses.replace(config, mask_head=False)
    return ReplacedTokens(model=model, masking=words.masking, generator="uniform"), data


def params_of(task: Any, params: Params) -> Params:
    """Returns a task's parameters, with the model that was read; those of the task's generator are new.

    Raises:
      ValueError: the task's objective needs other heads than the discriminator's.
    """
    if not isinstance(task, ReplacedTokens):
        return params
    if task.discriminator_config != task.model:
        raise ValueError(f"objective is {task.objective!r}; it must be that of a discriminator, such as replaced.")
    if task.generator == "uniform":
        return {"discriminator": params}
    new = jax.jit(task.init)(jax.random.key(0), {"tokens": np.zeros((1, 1), np.int32)})
    return {**nn.meta.unbox(new), "discriminator": params}


def facts(model: Model) -> dict[str, int]:
    """Returns the symbols of a model's rows."""
    own = {"mask_id": model.task.masking.mask_id} if isinstance(model.task, ReplacedTokens) else {}
    return encoders.facts(model) | own


ELECTRA = FolderFormat(
    name="electra",
    holds="ELECTRA",
    owns=lambda task: (
        type(task) is ReplacedTokens
        or (type(task) in (MaskedWords, TextClassification) and isinstance(task.model, ElectraConfig))
    ),
    has=lambda options: options.get("model_type") == "electra",
    config_from=encoders.config_from,
    options_of=encoders.config_json,
    params_from=encoders.params_from,
    params_to=encoders.params_to,
    task_and_data=task_and_data,
    model_of=lambda task, params: task.export(params) if isinstance(task, ReplacedTokens) else (task.model, params),
    params_of=params_of,
    facts=facts,
)


def variables(task: ReplacedTokens | MaskedWords) -> dict[Place, Source]:
    """Returns our parameter paths to their variables.

    Raises:
      ValueError: the task has parameters that their code does not have.
    """
    if isinstance(task, MaskedWords):
        return _names(task.model, "electra")
    if task.objective not in ("replaced", "electric"):
        raise ValueError(f"objective is {task.objective!r}; the authors' code has only replaced and electric.")
    found = {("discriminator", *path): name for path, name in _names(task.discriminator_config, "electra").items()}
    if task.generator == "uniform":
        return found
    if task.generator == "encoder":
        towers = {("generator",): (task.generator_config, "generator")}
    else:
        left, right = task.generator_config, dataclasses.replace(task.generator_config, mask_head=False)
        towers = {("generator", "left"): (left, "generator_ltr"), ("generator", "right"): (right, "generator_rtl")}
    for place, (config, scope) in towers.items():
        found |= {(*place, *path): name for path, name in _names(config, scope).items() if task.owns(path[0])}
    return found


def _names(config: BertConfig, scope: str) -> dict[Place, Source]:
    if not isinstance(config, ElectraConfig):
        raise ValueError(f"the model is a {type(config).__name__}; the authors' code has only that of ElectraConfig.")
    return {path: Source(_name(source.name, scope)) for path, source in encoders.sources(config).items()}


def _name(name: str, scope: str) -> str:
    name = name.replace("generator_lm_head.bias", "generator_predictions.output_bias")
    name = name.replace("dense_prediction.", "dense_1.").replace("layer.{layer}", "layer_{layer}")
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    name = name.replace("_embeddings.weight", "_embeddings").replace(".weight", ".kernel")
    first, *rest = name.split(".")
    return "/".join([scope if first == "electra" else first, *rest])


def from_official(task: ReplacedTokens | MaskedWords, theirs: Variables) -> Params:
    """Returns our parameter tree from their variables; those of the optimizer are left out.

    Raises:
      ValueError: a variable is missing, unknown or of another shape.
    """
    tokens = {"tokens": np.zeros((1, 1), np.int32)}
    shapes = shapes_of(lambda: task.init(jax.random.key(0), tokens))
    return read_params(variables(task), shapes, theirs, ignored=_is_the_optimizers)


def _is_the_optimizers(name: str) -> bool:
    return name.endswith(("/adam_m", "/adam_v")) or name == "global_step"


def to_official(task: ReplacedTokens | MaskedWords, params: Params) -> dict[str, np.ndarray]:
    """Returns their variables from our parameter tree."""
    return write_params(variables(task), params)


@dataclasses.dataclass(frozen=True)
class TensorFlowVariables:
    """The authors' variables in a file; the sizes come from a task."""

    name: str = "electra_tensorflow"
    holds: str = "the variables of ELECTRA's authors"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        if isinstance(task, ReplacedTokens):
            return task.objective in ("replaced", "electric")
        return type(task) is MaskedWords and isinstance(task.model, ElectraConfig)

    def recognises(self, path: Path) -> bool:
        return has_tensors(path, lambda names: "electra/embeddings/word_embeddings" in names)

    def read(self, path: Path, like: Any = None) -> Model:
        """Returns the model in a file.

        Args:
          path: .npz or .safetensors.
          like: the task that was trained.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: no task is given, or its variables are others.
        """
        params = from_official(like, read_file(path, like))
        return Model(task=like, params=params, data=None, path=Path(path))

    def write(self, path: Path, model: Model) -> Path:
        """Writes an .npz or .safetensors file.

        Raises:
          FileExistsError: there is such a file already.
          ValueError: the authors' code has no such model, or the file's name has another suffix.
        """
        return write_file(path, to_official(model.task, model.params))


TENSORFLOW = TensorFlowVariables()

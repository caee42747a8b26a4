"""What formats that are a folder of config.json and named tensors have in common."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxtok.interop.tensors import Shapes, Table, read_params, read_tensors, save_tensors, whole_folder
from jaxtok.interop.texts import Texts, named_texts, read_json, read_texts, write_texts
from jaxtok.model import Model
from jaxtok.nn.norms import NORMS
from jaxtok.protocols import Params

Options = Mapping[str, Any]
"""The content of a config.json."""


@dataclasses.dataclass(frozen=True)
class FolderFormat:
    """A `Format` that is a folder; its functions are what is particular to it."""

    name: str
    holds: str
    """The kinds of models that it holds, for messages."""
    owns: Callable[[Any], bool]
    """Whether a model of this task can be written in this format."""
    has: Callable[[Options], bool]
    """Whether a config.json is of this format."""
    config_from: Callable[[Options, Mapping[str, np.ndarray]], Any]
    """The model's config; the tensors say what config.json does not."""
    options_of: Callable[[Any], dict[str, Any]]
    """The inverse: the content of config.json. Raises a ValueError for a model that the format cannot express."""
    params_from: Callable[[Any, Mapping[str, np.ndarray]], Params]
    params_to: Callable[[Any, Params], dict[str, np.ndarray]]
    task_and_data: Callable[[Any, Texts | None, Options], tuple[Any, Any]]
    """How a model that was read is trained and evaluated."""
    model_of: Callable[[Any, Params], tuple[Any, Params]] = lambda task, params: (task.model, params)
    """The part of a task that is written."""
    params_of: Callable[[Any, Params], Params] = lambda task, params: params
    """The task's parameters, from those that were read."""
    facts: Callable[[Model], dict[str, Any]] = lambda model: {}
    """What else `task_and_data` needs, for the entry `jaxtok` of config.json."""
    has_texts: bool = True
    """Whether the folder has a tokenizer; otherwise that of the data is the only one."""
    default_tokenizer: str = ""
    """The tokenizer of a folder without any."""
    is_file: bool = False

    def recognises(self, path: Path) -> bool:
        """Whether the folder is in this format, by its config.json."""
        try:
            return self.has(read_options(path))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False

    def read(self, path: Path, like: Any = None, *, tokenizer: str = "") -> Model:
        """Returns the model in a folder.

        Args:
          path: the folder.
          like: a task of the same kind, whose other settings are taken.
          tokenizer: the tokenizer to take instead of the folder's, as `jaxtok.tokenizers.load_tokenizer` takes it.

        Raises:
          FileNotFoundError: the folder, its config.json, its weights or its tokenizer are missing.
          ValueError: they do not fit each other, or the kind of model is not known here.
        """
        path = Path(path)
        options = read_options(path)
        texts = read_texts(path, options, self.default_tokenizer, tokenizer) if self.has_texts else None
        config, params = self.read_model(path)
        task, data = self.task_and_data(config, texts, options)
        if like is not None:
            if type(like) is not type(task):
                raise ValueError(f"{path} holds a {type(task).__name__}; the config must be that of one too.")
            task = dataclasses.replace(like, model=task.model)
        texts = texts or named_texts(data.tokenizer)
        return Model(task=task, params=self.params_of(task, params), data=data, path=path, **texts.facts())

    def write(self, path: Path, model: Model, *, shard_bytes: int = 5 * 10**9, torch_bin: bool = False) -> Path:
        """Writes a folder; a failure leaves none.

        Args:
          path: the folder.
          model: of a task that this format owns.
          shard_bytes: the largest number of bytes in one file of weights.
          torch_bin: write pytorch_model.bin (needs PyTorch) instead of model.safetensors.

        Raises:
          ValueError: the format has no names or options for this model.
        """
        config, params = self.model_of(model.task, model.params)
        return self.write_model(path, config, params, model=model, shard_bytes=shard_bytes, torch_bin=torch_bin)

    def read_model(self, folder: str | Path) -> tuple[Any, Params]:
        """Returns only config and parameters; raises as `read`."""
        folder = Path(folder)
        options = read_options(folder)
        if quantized := options.get("quantization_config"):
            kind = quantized.get("quant_method", "some kind") if isinstance(quantized, dict) else quantized
            raise ValueError(f"{folder} is quantised ({kind} in its config.json); it must hold the original weights.")
        tensors = read_tensors(folder)
        config = self.config_from(options, tensors)
        return config, self.params_from(config, tensors)

    def write_model(
        self,
        folder: str | Path,
        config: Any,
        params: Params,
        *,
        model: Model | None = None,
        shard_bytes: int = 5 * 10**9,
        torch_bin: bool = False,
    ) -> Path:
        """Writes config and parameters, and the tokenizer if a `model` is given; as `write`."""
        folder, options = Path(folder), self.options_of(config)
        tensors = self.params_to(config, params)
        _must_mean(config, self.config_from(options, tensors), self.name)
        with whole_folder(folder) as half_done:
            if model is not None and self.has_texts:
                texts = write_texts(half_done, model)
                own = texts.pop("jaxtok", {}) | self.facts(model)
                options = {name: x for name, x in (texts | options).items() if name != "jaxtok"} | {"jaxtok": own}
            save_tensors(half_done, tensors, shard_bytes, torch_bin)
            (half_done / "config.json").write_text(json.dumps(options, indent=2) + "\n")
        return folder


_MEANING = (
    "num_layers",
    "kv_heads",
    "head_dim",
    "norm",
    "norm_eps",
    "post_norm",
    "causal",
    "mask_keys",
    "window",
    "full_layers",
    "scale_scores",
    "scale_by_layer",
    "qk_norm",
    "rotary_fraction",
    "rotary_base",
    "activation",
    "gated",
    "use_bias",
    "qkv_bias",
    "mlp_bias",
    "learned_positions",
    "relative_buckets",
    "scale_embeddings",
)
"""What a config says of the function that a model computes, beside sizes that its tensors show."""


def _must_mean(config: Any, read: Any, form: str) -> None:
    """Raises a ValueError if a config.json would be read as another model's."""
    for name in _MEANING:
        ours, theirs = _meaning(config, name), _meaning(read, name)
        if ours != theirs:
            raise ValueError(
                f"{name} is {ours!r}; it must be {theirs!r} for a model that is written in the format {form}."
            )


def _meaning(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    if value is None and name in ("qkv_bias", "mlp_bias"):
        return getattr(config, "use_bias", None)
    if value == 0 and name == "norm_eps":
        return NORMS[config.norm]
    needs = {"full_layers": "window", "rotary_base": "rotary_fraction"}.get(name)
    return value if needs is None or getattr(config, needs, None) else None


def read_options(folder: str | Path) -> dict[str, Any]:
    """Returns the content of a folder's config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder with config.json and the weights.")
    return read_json(path)


_IGNORED = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.position_ids$"
    r"|^(encoder|decoder)\.embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$"
)
_COPIES = {
    "lm_head.weight",
    "generator_lm_head.weight",
    *(f"{head}.decoder.{leaf}" for head in ("lm_head", "cls.predictions") for leaf in ("weight", "bias")),
}
"""The tensors of a head that is the embedding."""


def read_hub_params(
    table: Table, shapes: Shapes, tensors: Mapping[str, np.ndarray], *, dtype: str, tied: bool
) -> Params:
    """Calls `read_params` for files as Hugging Face writes them: with buffers, copies of tied tensors, and old names.

    Raises:
      ValueError: as `read_params`.
    """

    def ignored(name: str) -> bool:
        return bool(_IGNORED.search(name)) or (tied and name in _COPIES)

    return read_params(table, shapes, tensors, dtype=dtype_of(dtype), aliases=hub_names, ignored=ignored)


def hub_names(name: str) -> list[str]:
    """Returns a name, that without the model's prefix (as in files of base models), and the old names of norms."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return [name, name.split(".", 1)[1], old, old.split(".", 1)[1]]


def dtype_of(name: str) -> np.dtype:
    """Returns NumPy's dtype for a config's `param_dtype`."""
    return np.dtype(jnp.dtype(name))


def stored_dtype(options: Options) -> str:
    """Returns the `param_dtype` that a config.json asks for."""
    dtype = options.get("torch_dtype") or options.get("dtype") or "float32"
    return "bfloat16" if dtype == "bfloat16" else "float32"

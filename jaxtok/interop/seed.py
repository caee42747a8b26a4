"""Checkpoints of SEED's tokenizer as its authors write them: stage I (BLIP-2's layout), stage II, and inference.

Names are `visual_encoder.blocks.0...`, `ln_vision...`, `query_tokens`, `Qformer.bert...`, `quantize.embedding.weight`,
`encode_task_layer.0...`, `blocks_image.0...`, in .pt or .pth (PyTorch, tensors only) or .safetensors. The Q-Former's
switch for causality is its number of queries there (32); here it is `QFormerConfig.causal`, which the caller sets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.interop.files import has_tensors, read_file, write_file
from jaxtok.interop.tensors import CONVOLUTION, Place, Source, read_params, shapes_of, write_params
from jaxtok.model import Model
from jaxtok.nn.quantizers import CodebookAverages
from jaxtok.protocols import FROZEN, Params
from jaxtok.vision.eva_vit import EvaViTConfig, resize_positions
from jaxtok.vision.qformer import QFormerConfig
from jaxtok.vision.seed import DOWN, Seed, SeedConfig
from jaxtok.vision.seed_alignment import SeedAlignment

Tensors = Mapping[str, np.ndarray]
Names = dict[Place, Source]

_TIED = {
    "Qformer.cls.predictions.decoder.weight": "Qformer.bert.embeddings.word_embeddings.weight",
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
"""Second names of tensors, under which some files hold them again."""
_UNUSED = ("clip_model.", "text_encoder.")
"""How the names begin of models that only made the targets of training."""


def _linear(place: Place, name: str, bias: bool = True) -> Names:
    found = {(*place, "kernel"): Source(f"{name}.weight", transpose=True)}
    return found | ({(*place, "bias"): Source(f"{name}.bias")} if bias else {})


def _norm(place: Place, name: str) -> Names:
    return {(*place, "scale"): Source(f"{name}.weight"), (*place, "bias"): Source(f"{name}.bias")}


def block_names(place: Place, name: str, key_bias: bool = True) -> Names:
    """The names of timm's ViT blocks `NAME.0`, `NAME.1`, ..., and of EVA's, which have no bias of keys."""
    place, name = (*place, "blocks"), f"{name}.{{layer}}"
    found = _norm((*place, "norm_attention"), f"{name}.norm1") | _norm((*place, "norm_ffn"), f"{name}.norm2")
    for part, ours in enumerate(("query", "key", "value")):
        at = (*place, "attention", ours)
        found[*at, "kernel"] = Source(f"{name}.attn.qkv.weight", transpose=True, part=part, axis=0)
        if key_bias:
            found[*at, "bias"] = Source(f"{name}.attn.qkv.bias", part=part, axis=0)
        elif ours != "key":
            found[*at, "bias"] = Source(f"{name}.attn.{ours[0]}_bias")
    found |= _linear((*place, "attention", "output"), f"{name}.attn.proj")
    return (
        found | _linear((*place, "ffn", "up"), f"{name}.mlp.fc1") | _linear((*place, "ffn", "down"), f"{name}.mlp.fc2")
    )


def vision_names(place: Place = (), name: str = "") -> Names:
    """The names of EVA's ViT; `name` ends with a point, or is empty."""
    return block_names((*place, "stack"), f"{name}blocks", key_bias=False) | {
        (*place, "patch_kernel"): Source(f"{name}patch_embed.proj.weight", axes=CONVOLUTION),
        (*place, "patch_bias"): Source(f"{name}patch_embed.proj.bias"),
        (*place, "class_token"): Source(f"{name}cls_token", ones=1),
        (*place, "position_embedding"): Source(f"{name}pos_embed", ones=1),
    }


def qformer_names(config: QFormerConfig, place: Place, name: str = "Qformer", queries: str = "query_tokens") -> Names:
    """The names of a Q-Former, with what reads texts if it has a vocabulary."""
    bert, every = f"{name}.bert", config.cross_every
    found = {(*place, "queries"): Source(queries, ones=1)}
    found |= _norm((*place, "norm_embedding"), f"{bert}.embeddings.LayerNorm")
    for number in range(config.num_layers):
        group, inside = divmod(number, every)
        whole = group < config.num_layers // every
        if whole and group:
            continue  # it is one of a stack
        at = (*place, "groups" if whole else "rest", f"layer_{inside}")
        layer = _layer_names(config, at, f"{bert}.encoder.layer.{'{layer}' if whole else number}", inside == 0)
        found |= {p: dataclasses.replace(s, first=inside, step=every) for p, s in layer.items()}
    if not config.vocab_size:
        return found
    head = f"{name}.cls.predictions"
    found |= {
        (*place, "embedding"): Source(f"{bert}.embeddings.word_embeddings.weight"),
        (*place, "position_embedding"): Source(f"{bert}.embeddings.position_embeddings.weight"),
        (*place, "head_bias"): Source(f"{head}.bias"),
    }
    found |= _linear((*place, "head_dense"), f"{head}.transform.dense")
    return found | _norm((*place, "head_norm"), f"{head}.transform.LayerNorm")


def _layer_names(config: QFormerConfig, at: Place, name: str, cross: bool) -> Names:
    found: Names = {}
    for ours, theirs in (("attention", "attention"), *([("cross", "crossattention")] if cross else [])):
        for part in ("query", "key", "value"):
            found |= _linear((*at, ours, part), f"{name}.{theirs}.self.{part}")
        found |= _linear((*at, ours, "output"), f"{name}.{theirs}.output.dense")
        found |= _norm((*at, f"norm_{ours}"), f"{name}.{theirs}.output.LayerNorm")
    for ours, theirs in (("query", "_query"), *([("text", "")] if config.vocab_size else [])):
        found |= _linear((*at, f"{ours}_ffn", "up"), f"{name}.intermediate{theirs}.dense")
        found |= _linear((*at, f"{ours}_ffn", "down"), f"{name}.output{theirs}.dense")
        found |= _norm((*at, f"norm_{ours}"), f"{name}.output{theirs}.LayerNorm")
    return found


def _reading_names(config: SeedConfig, vision: Place, reader: Place, text: bool) -> Names:
    qformer = config.qformer if text else config.qformer.without_text()
    found = qformer_names(qformer, (*reader, "qformer"))
    if isinstance(config.vision, EvaViTConfig):
        found |= vision_names(vision, "visual_encoder.")
    return found | (_norm((*reader, "vision_norm"), "ln_vision") if config.vision_norm else {})


def _code_names(config: SeedConfig) -> Names:
    kind = "text" if config.head == "text77" else "image"
    found = {
        ("codes", "quantizer", "embedding"): Source("quantize.embedding.weight"),
        ("codes", "positions"): Source("pos_embed", ones=1),
        ("codes", "image_positions"): Source(f"pos_embed_{kind}", ones=1),
    }
    for ours, theirs in (("encode", "encode_task_layer"), ("decode", "decode_task_layer")):
        found |= _linear(("codes", f"{ours}_hidden"), f"{theirs}.0") | _linear(("codes", f"{ours}_out"), f"{theirs}.2")
    found |= block_names(("codes", "blocks"), "blocks") | block_names(("codes", "image_blocks"), f"blocks_{kind}")
    if config.head == "mlp":
        for number in range(len(DOWN)):
            found |= _linear(("codes", f"down_{number}"), f"image_down.{2 * number}", bias=False)
    else:
        end = "_text" if kind == "text" else ""
        found |= qformer_names(config.reverse(), ("codes", "reverse"), f"Reverse_Qformer{end}", f"reverse_tokens{end}")
    return found | _linear(("codes", "head"), f"distill_{kind}_proj")


def names_of(task: SeedAlignment | Seed) -> Names:
    """The places of our parameters of a task, and their names of them."""
    if isinstance(task, Seed):
        frozen = (FROZEN,)
        return _reading_names(task.model, (FROZEN, "vision"), (*frozen, "reader"), False) | _code_names(task.model)
    vision = ("vision",) if task.train_vision else (FROZEN, "vision")
    found = _reading_names(task.model, vision, ("aligner",), True)
    found |= _linear(("aligner", "vision_proj"), "vision_proj") | _linear(("aligner", "text_proj"), "text_proj")
    found["aligner", "temperature"] = Source("temp")
    return found | (_linear(("aligner", "match_head"), "itm_head") if task.matching else {})


def from_official(task: SeedAlignment | Seed, tensors: Tensors) -> Params:
    """Returns the task's parameters from the tensors of a whole checkpoint.

    Positions of the image encoder are interpolated if the checkpoint has images of another size. The buffers
    `position_ids`, the models that made the targets, and a matching head that the task does not have are left out.

    Raises:
      ValueError: tensors are missing or unknown, or have another shape; or the caption head is not tied.
    """
    tensors, names = dict(tensors), names_of(task)
    for again, name in _TIED.items() if isinstance(task, SeedAlignment) else ():
        held = tensors.pop(again, None)
        if held is not None and name in tensors and not np.array_equal(np.asarray(held), np.asarray(tensors[name])):
            raise ValueError(f"{again} is not {name}; here the caption head is tied to the word embedding.")
    positions = "visual_encoder.pos_embed"
    if isinstance(task.model.vision, EvaViTConfig) and positions in tensors:
        rows = np.asarray(tensors[positions])
        if rows.ndim == 3 and rows.shape[1] != (count := 1 + task.model.vision.num_patches):
            tensors[positions] = resize_positions(rows[0], count)[None]
    task_alone = dataclasses.replace(task, ema_decay=0.0) if isinstance(task, Seed) else task
    shapes = shapes_of(lambda: task_alone.init(jax.random.key(0), {}))

    def ignored(name: str) -> bool:
        matching = name.startswith("itm_head.") and not getattr(task, "matching", False)
        return (
            name.endswith("position_ids") or name.startswith(_UNUSED) or (matching and isinstance(task, SeedAlignment))
        )

    params = read_params(names, shapes, tensors, ignored=ignored)
    if isinstance(task, Seed) and task.ema_decay:
        params["averages"] = CodebookAverages.init(jnp.asarray(params["codes"]["quantizer"]["embedding"]))
    return params


def to_official(task: SeedAlignment | Seed, params: Params) -> dict[str, np.ndarray]:
    """Returns the inverse, without what `from_official` leaves out."""
    return write_params(names_of(task), {name: part for name, part in params.items() if name != "averages"})


@dataclasses.dataclass(frozen=True)
class SeedFile:
    """A file of the authors' weights; its sizes come from a task."""

    name: str = "seed"
    holds: str = "SEED's tokenizer"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        return isinstance(task, SeedAlignment | Seed)

    def recognises(self, path: Path) -> bool:
        return has_tensors(path, lambda names: {"query_tokens", "visual_encoder.cls_token"} <= set(names))

    def read(self, path: Path, like: Any = None, *, which: str = "") -> Model:
        """Returns the model in a file.

        Args:
          path: .safetensors, .npz, or PyTorch's (needs PyTorch).
          like: a task whose model has the file's sizes.
          which: the part of a checkpoint that holds the tensors, such as `model`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: no task is given, or its sizes are others.
        """
        return Model(task=like, params=from_official(like, read_file(path, like, which)), data=None, path=Path(path))

    def write(self, path: Path, model: Model) -> Path:
        """Writes a file.

        Raises:
          FileExistsError: there is such a file already.
        """
        return write_file(path, to_official(model.task, model.params))


SEED = SeedFile()

"""TokenBridge's checkpoints in the authors' layout: checkpoint-last.pth, or the same tensors as safetensors.

A .pth of a training run holds {model, model_ema, optimizer, ...}, each by name; `which` chooses, by default the moving
average, as the authors' evaluation does. A file does not tell the numbers of heads, the order of the channels, nor the
range of the quantiser: these come from a task. Its table of levels is compared with the task's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxtok.interop.files import has_tensors, read_file, write_file
from jaxtok.interop.folders import dtype_of
from jaxtok.interop.tensors import Place, Shapes, Source, read_params, shapes_of, write_params
from jaxtok.model import Model
from jaxtok.protocols import Params
from jaxtok.vision.tokenbridge import KL16_ORDER, TokenBridgeConfig, TokenBridgeModeling, init_params
from jaxtok.vision.tokenbridge_tokenizer import DimensionwiseQuantizer

Tensors = Mapping[str, np.ndarray]

BUFFERS = ("channel_mask", "boundaries", "reconstruction_values")
"""What their files have beside parameters."""

_BLOCK = {
    "norm_attention": "norm1",
    "norm_ffn": "norm2",
    "attention/output": "attn.proj",
    "ffn/up": "mlp.fc1",
    "ffn/down": "mlp.fc2",
}
_MODULATED = _BLOCK | {
    "attention/query_norm": "attn.q_norm",
    "attention/key_norm": "attn.k_norm",
    "modulation": "adaLN_modulation.1",
}


def official_config(
    *,
    img_size: int = 256,
    vae_stride: int = 16,
    patch_size: int = 1,
    encoder_embed_dim: int = 1024,
    encoder_depth: int = 16,
    encoder_num_heads: int = 16,
    decoder_embed_dim: int = 1024,
    decoder_depth: int = 16,
    decoder_num_heads: int = 16,
    channel_embed_dim: int = 256,
    channel_depth: int = 4,
    channel_heads: int = 8,
    quant_levels: int = 32,
    vae_embed_dim: int = 16,
    class_num: int = 1000,
    buffer_size: int = 64,
    quant_min: float = -5.0,
    quant_max: float = 5.0,
    std_range: float = 3.0,
    channel_order: tuple[int, ...] = KL16_ORDER,
    **options: Any,
) -> TokenBridgeConfig:
    """Returns our config from the arguments of the authors' class, with its defaults, and fields of ours.

    Raises:
      ValueError: patches have several positions, for which the authors' code cannot draw; or a number is impossible.
    """
    if patch_size != 1:
        raise ValueError(f"patch_size is {patch_size}; it must be 1, as the authors' code draws single positions only.")
    if img_size % vae_stride:
        raise ValueError(f"img_size is {img_size}; it must be a multiple of vae_stride = {vae_stride}.")
    return TokenBridgeConfig(
        grid=img_size // vae_stride,
        channels=vae_embed_dim,
        quantizer=DimensionwiseQuantizer(levels=quant_levels, low=quant_min, high=quant_max, reach=std_range),
        channel_order=tuple(channel_order),
        num_classes=class_num,
        buffer=buffer_size,
        encoder_width=encoder_embed_dim,
        encoder_layers=encoder_depth,
        encoder_heads=encoder_num_heads,
        decoder_width=decoder_embed_dim,
        decoder_layers=decoder_depth,
        decoder_heads=decoder_num_heads,
        head_width=channel_embed_dim,
        head_layers=channel_depth,
        head_heads=channel_heads,
        **options,
    )


def sources(config: TokenBridgeConfig) -> dict[Place, Source]:
    """Returns our parameter paths to their tensors.

    Raises:
      ValueError: the authors have no such head.
    """
    if config.head != "autoregressive":
        raise ValueError(f"head is {config.head!r}; the authors' files are of the autoregressive one.")
    found: dict[Place, Source] = {
        ("class_embedding",): Source("class_emb.weight"),
        ("no_class",): Source("fake_latent"),
        ("encoder_positions",): Source("encoder_pos_embed_learned", ones=1),
        ("decoder_positions",): Source("decoder_pos_embed_learned", ones=1),
        ("output_positions",): Source("output_pos_embed", ones=1),
        ("mask_vector",): Source("mask_token", ones=1),
        ("head", "channel_embedding"): Source("channel_embed", ones=1),
        ("head", "step_embedding"): Source("timesteps_embeddings", ones=1),
        ("head", "tables"): Source("token_embeddings.{layer}.weight"),
        ("head", "kernels"): Source("channel_heads.{layer}.weight", transpose=True),
        ("head", "biases"): Source("channel_heads.{layer}.bias"),
    }
    linears = {
        ("embed",): "z_proj",
        ("decoder_embed",): "decoder_embed",
        ("head", "condition"): "condition_proj",
        ("head", "final_modulation"): "channel_final.adaLN_modulation.1",
    }
    norms = {
        ("embed_norm",): "z_proj_ln",
        ("encoder_norm",): "encoder_norm",
        ("decoder_norm",): "decoder_norm",
        ("head", "final_norm"): "channel_norm",
    }
    stacks = {("encoder",): "encoder_blocks", ("decoder",): "decoder_blocks", ("head", "stack"): "channel_blocks"}
    for place, name in stacks.items():
        block = (*place, "blocks")
        for ours, theirs in (_MODULATED if place[0] == "head" else _BLOCK).items():
            part = (*block, *ours.split("/"))
            (norms if "norm" in ours else linears)[part] = f"{name}.{{layer}}.{theirs}"
        for number, group in enumerate(("query", "key", "value")):
            joined = {"part": number, "axis": 0}
            qkv = f"{name}.{{layer}}.attn.qkv"
            found[*block, "attention", group, "kernel"] = Source(f"{qkv}.weight", transpose=True, **joined)
            found[*block, "attention", group, "bias"] = Source(f"{qkv}.bias", **joined)
    for places, leaf in ((linears, "kernel"), (norms, "scale")):
        for place, name in places.items():
            found[*place, leaf] = Source(f"{name}.weight", transpose=leaf == "kernel")
            found[*place, "bias"] = Source(f"{name}.bias")
    return found


def expected_shapes(config: TokenBridgeConfig) -> Shapes:
    """Returns parameter paths to shapes, without making any array."""
    return shapes_of(lambda: init_params(config, jax.random.key(0)))


def params_from(config: TokenBridgeConfig, tensors: Tensors) -> Params:
    """Returns our parameter tree from their tensors.

    Raises:
      ValueError: as `read_params`; or their table of levels is another one.
    """
    check_levels(config.quantizer, tensors)
    dtype = dtype_of(config.param_dtype)
    return read_params(sources(config), expected_shapes(config), tensors, dtype=dtype, ignored=BUFFERS.__contains__)


def check_levels(quantizer: DimensionwiseQuantizer, tensors: Tensors) -> None:
    """Compares the table of levels in a file, if it has one, with a quantiser's. Theirs is of float32 quantiles.

    Raises:
      ValueError: they differ.
    """
    theirs = tensors.get("reconstruction_values")
    if theirs is None:
        return
    close = 2e-5 if quantizer.levels <= 64 else 3e-5
    if np.shape(theirs) != (quantizer.levels,) or np.max(np.abs(theirs - quantizer.values)) > close:
        raise ValueError(
            f"the file's {np.size(theirs)} levels are not those of the task's quantizer (levels {quantizer.levels}, "
            f"reach {quantizer.reach}, kind {quantizer.kind}); change task.model.quantizer."
        )


def params_to(config: TokenBridgeConfig, params: Params) -> dict[str, np.ndarray]:
    """Returns their tensors from our parameter tree, with the buffers of their class."""
    channels = config.channels
    mask = np.triu(np.full((channels, channels), -np.inf, np.float32), 1)
    buffers = (mask, *(x.astype(np.float32) for x in (config.quantizer.boundaries, config.quantizer.values)))
    return write_params(sources(config), params) | dict(zip(BUFFERS, buffers))


@dataclasses.dataclass(frozen=True)
class TokenBridgeFile:
    """A file of the authors' weights; what it does not tell comes from a task."""

    name: str = "tokenbridge"
    holds: str = "TokenBridge"
    is_file: bool = True

    def owns(self, task: Any) -> bool:
        return isinstance(task, TokenBridgeModeling)

    def recognises(self, path: Path) -> bool:
        return has_tensors(path, lambda names: "timesteps_embeddings" in names)

    def read(self, path: Path, like: Any = None, *, which: str = "model_ema") -> Model:
        """Returns the model in a file.

        Args:
          path: .safetensors, .npz, or PyTorch's (needs PyTorch).
          like: a task whose model has the file's sizes.
          which: for a checkpoint of a training run, `model` or its moving average `model_ema`.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: no task is given, or its sizes or levels are others.
        """
        tensors = read_file(path, like, which)
        return Model(task=like, params=params_from(like.model, tensors), data=None, path=Path(path))

    def write(self, path: Path, model: Model) -> Path:
        """Writes a file; raises as `write_file`, and a ValueError for another head."""
        tensors = params_to(model.task.model, model.params)
        return write_file(path, {name: x.astype(np.float32) for name, x in tensors.items()})


TOKENBRIDGE = TokenBridgeFile()

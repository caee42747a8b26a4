"""Mamba (arXiv 2312.00752): a language model without attention, whose memory of the text is a state of fixed size.

Each block adds a mixer (`jaxtok.nn.mamba`) of the normalised stream to it; there are no positions and no MLPs. What is
kept of a text are, in each layer, N numbers for each channel and the last K inputs of a short convolution, so that
memory while decoding does not grow. Such a state cannot be rewound: drafts are chains of which the accepted part is
read again, and there is nothing to evict.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.axes import constrain
from jaxtok.lm.decoder import TokensToLogits
from jaxtok.nn.cache import check_row, places_of
from jaxtok.nn.mamba import Mixer, MixerConfig
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import REMAT_POLICIES, layer_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """A Mamba language model. Defaults: the published 130M size."""

    num_layers: int = 24
    vocab_size: int = 50280
    """Rows of the embedding; 0: the tokenizer's ids, rounded up to 128."""
    max_length: int = 2048
    """The longest row of tokens in training. A text that is generated ends there too; the state would go on."""
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    residual_in_float32: bool = True
    """Whether the stream between blocks is float32, whatever `dtype` is."""
    init_std: float = 0.02
    """The standard deviation of the initial embedding."""
    remat: Literal["none", "full", "projections", "dots"] = "none"
    """What a block stores for the backward pass; see `jaxtok.nn.transformer.StackConfig`."""
    unroll: int = 1

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("num_layers", 1), ("max_length", 1), ("unroll", 1), ("vocab_size", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat is {self.remat!r}; it must be one of {', '.join(REMAT_POLICIES)}.")

    def module(self) -> nn.Module:
        """The language model."""
        return Mamba(self)

    def flops(self, length: int) -> float:
        """Forward FLOPs of one token, which do not depend on the length of its context."""
        return self.num_layers * self.mixer_flops() + 2 * self.vocab_size * self.d_model


def _size(num_layers: int, d_model: int) -> MambaConfig:
    return MambaConfig(num_layers=num_layers, d_model=d_model)


PUBLISHED = {
    "130m": _size(24, 768),
    "370m": _size(48, 1024),
    "790m": _size(48, 1536),
    "1.4b": _size(48, 2048),
    "2.8b": _size(64, 2560),
}
"""The published sizes by name: 300B tokens of the Pile, with the tokenizer of GPT-NeoX."""


@flax.struct.dataclass
class MambaCache:
    """What is kept of a text: a `jaxtok.protocols.Cache` without slots, whose size does not depend on the length."""

    conv: Float[Array, "layers batch taps channels"]
    """The last K inputs of each layer's convolution; zeros before the text. The oldest one is never read again, but
    other code keeps it too."""
    states: Float[Array, "layers batch channels states"]
    """h of each layer after the newest token, in float32."""
    length: Int[Array, " batch"]
    next_position: Int[Array, " batch"]

    rewindable: ClassVar[bool] = False

    def truncate(self, length):
        raise ValueError(
            "the state of a Mamba cannot be rewound; keep the cache from before (it is a value), or give padding the "
            "position -1."
        )

    def gather(self, index, count=None):
        raise ValueError("the state of a Mamba has no slots for single tokens; nothing can be gathered or evicted.")


class Block(nn.Module):
    """x + mixer(norm(x))."""

    config: MambaConfig

    @nn.compact
    def __call__(self, carry, layer, segments, real):
        x, cache = carry
        cfg = self.config
        norm = Norm("rms", eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype, name="norm")
        kept = {} if cache is None else {"conv": cache.conv[layer], "state": cache.states[layer]}
        mixer = Mixer(cfg, output_scale=cfg.num_layers**-0.5, name="mixer")
        y, conv, state = mixer(norm(x), segments=segments, real=real, **kept)
        if cache is not None:
            conv = conv.astype(cache.conv.dtype)
            cache = cache.replace(conv=cache.conv.at[layer].set(conv), states=cache.states.at[layer].set(state))
        x = constrain(x + y.astype(x.dtype), "d_model")
        self.sow("intermediates", "hidden", x)
        return (x, cache), None


class Mamba(TokensToLogits):
    """Tokens to next-token logits; see `jaxtok.protocols.CausalLM`."""

    config: MambaConfig

    def setup(self):
        cfg = self.config
        super().setup()
        self.stack = Blocks(cfg)
        self.final_norm = Norm("rms", eps=cfg.norm_eps, dtype=cfg.dtype, param_dtype=cfg.param_dtype)

    def hidden(
        self,
        x: Float[Array, "batch length d_model"],
        *,
        positions: Int[Array, "#batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "#batch length length"] | None = None,
        layers: tuple[int, int] | None = None,
        cache: MambaCache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "batch length d_model"], MambaCache | None]:
        """Hidden states after the final norm; see `jaxtok.protocols.CausalLM`.

        Args:
          positions: with a cache, a token at -1 is padding, wherever it is in the row; nothing else in them matters.
          segments: nothing passes from one to the next; not together with a cache.

        Raises:
          ValueError: there is a mask, more tokens than max_length, or segments together with a cache.
        """
        cfg, (batch, length) = self.config, x.shape[:2]
        if mask is not None:
            raise ValueError(
                "a mask is given (as for a tree of drafts), but a Mamba reads tokens one after the other; give drafts "
                "as chains."
            )
        check_row(length, cfg.max_length, segments, cache)
        if cache is not None and cache.length.shape != (batch,):
            raise ValueError(f"the cache is of {len(cache.length)} rows; there are {batch} rows of tokens.")
        first, end = layer_range(layers, cfg.num_layers)
        real = order = None
        if cache is not None and positions is not None:
            positions = jnp.broadcast_to(positions, (batch, length))
            real = positions >= 0
            order = jnp.argsort(~real, axis=1, stable=True)  # padding last, so that the convolution sees none
            x, real = jnp.take_along_axis(x, order[..., None], 1), jnp.take_along_axis(real, order, 1)
        elif cache is not None:
            positions = places_of(x, cache)
        if cache is not None and first == 0:
            cache = cache.replace(
                length=cache.length + length,
                next_position=jnp.maximum(cache.next_position, positions.max(1).astype(jnp.int32) + 1),
            )
        stream = jnp.float32 if cfg.residual_in_float32 else cfg.dtype
        x, cache = self.stack(x.astype(stream), cache, segments, real, (first, end))
        if order is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], 1)
        return self.final_norm(x) if end == cfg.num_layers else x, cache

    def init_cache(self, batch: int, length: int) -> MambaCache:
        """An empty cache. Its size does not depend on `length`."""
        cfg, none = self.config, jnp.zeros(batch, jnp.int32)
        shape = (cfg.num_layers, batch)
        conv = jnp.zeros((*shape, cfg.conv_kernel, cfg.channels), cfg.dtype)
        return MambaCache(conv, jnp.zeros((*shape, cfg.channels, cfg.state_size)), none, none)


class Blocks(nn.Module):
    """The blocks, with their parameters stacked along a first axis and scanned over."""

    config: MambaConfig

    @nn.compact
    def __call__(self, x, cache, segments, real, layers: tuple[int, int]):
        cfg, (first, end) = self.config, layers
        if self.is_initializing():
            first, end = 0, cfg.num_layers
        elif first == end:
            return x, cache
        block: Any = Block
        if cfg.remat != "none":
            block = nn.remat(block, policy=REMAT_POLICIES[cfg.remat], prevent_cse=False)
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=end - first,
            unroll=min(cfg.unroll, end - first),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        if end - first < cfg.num_layers:
            scan = nn.map_variables(scan, "params", lambda params: jax.tree.map(lambda leaf: leaf[first:end], params))
        (x, cache), _ = scan(cfg, name="blocks")((x, cache), jnp.arange(first, end), segments, real)
        return x, cache

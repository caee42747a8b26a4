"""Attention between the tokens of whole rows: the plain definition, and JAX's flash attention for TPUs.

The plain definition writes the weights [batch, heads, length, length] to memory, which on a TPU takes longer than the
products. Flash attention (`jax.experimental.pallas.ops.tpu.splash_attention`) keeps a block of them on the chip, and
skips the blocks that the causal mask empties.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxtok.axes import partition_spec

Implementation = Literal["auto", "xla", "splash", "splash_interpreted"]
IMPLEMENTATIONS = ("auto", "xla", "splash", "splash_interpreted")
_LANES = 128
Segments = Int[Array, "batch length"] | tuple[Int[Array, "batch length"], Int[Array, "batch length"]]


def dot_product_attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    causal: bool = True,
    segments: Segments | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v within segments, with the softmax in float32.

    Args:
      segments: the number of each token's segment; a query sees the keys of its own number. Or a pair, the numbers of
        the queries and those of the keys.
      implementation: xla: as XLA compiles the definition; splash: the kernel (TPU); splash_interpreted: the kernel as
        plain operations, for tests; auto: splash where it is compiled for a TPU and takes the length, else xla.

    Raises:
      ValueError: the kernel was asked for by name, and cannot take these arrays.
    """
    if segments is not None and not isinstance(segments, tuple):
        segments = (segments, segments)
    plain = functools.partial(attention_reference, causal=causal)
    why_not = _why_not_splash(q.shape[1])
    if implementation == "xla" or (implementation == "auto" and why_not):
        return plain(q, k, v, segments)
    if why_not:
        raise ValueError(f"implementation is {implementation}, but {why_not}; use auto or xla.")
    kernel = functools.partial(_splash, causal=causal, interpret=implementation == "splash_interpreted")
    if implementation == "auto":
        return jax.lax.platform_dependent(q, k, v, segments, tpu=kernel, default=plain)
    return kernel(q, k, v, segments)


def attention_reference(q: Array, k: Array, v: Array, segments: tuple[Array, Array] | None, *, causal: bool) -> Array:
    """The definition. The backward pass computes the weights again, as storing them takes longer than the products."""
    mask = None if segments is None else (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    attention = functools.partial(jax.nn.dot_product_attention, mask=mask, is_causal=causal)
    q, k, v = (checkpoint_name(x, "attention") for x in (q, k, v))
    return checkpoint_name(jax.checkpoint(attention, prevent_cse=False)(q, k, v), "attention")


def _why_not_splash(length: int) -> str:
    if length % _LANES:
        return f"the length {length} is no multiple of {_LANES}"
    if jax.sharding.get_abstract_mesh().shape.get("sequence", 1) > 1 and nn.get_logical_axis_rules():
        return "the mesh divides the length"
    return ""


def _splash(q: Array, k: Array, v: Array, segments: Any, *, causal: bool, interpret: bool) -> Array:
    """The kernel's result. On a mesh, each device has rows and heads of its own."""
    # The kernel takes one key head for each query head.
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    call = functools.partial(_splash_local, causal=causal, interpret=interpret)
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty or mesh.size == 1:
        return call(q, k, v, segments)
    spec = partition_spec(("batch", None, "heads", None), q.shape, rules, mesh.shape, "the queries")
    rows = PartitionSpec(spec[0], None)
    specs = (spec, spec, spec, None if segments is None else (rows, rows))
    return jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, segments)


def _splash_local(q: Array, k: Array, v: Array, segments: Any, *, causal: bool, interpret: bool) -> Array:
    length, heads, head_dim = q.shape[1:]
    block, whole = math.gcd(length, 512), math.gcd(length, 2048)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=whole,  # dq is then summed over length / whole parts
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    one = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="attention",
    )
    ids = None if segments is None else splash.SegmentIds(*segments)
    # The backward pass keeps the arrays in the layout that the kernel takes.
    q, k, v = (checkpoint_name(jnp.swapaxes(x, 1, 2), "attention") for x in (q * head_dim**-0.5, k, v))
    in_axes = (0, 0, 0, None if ids is None else 0)
    return jnp.swapaxes(jax.vmap(kernel, in_axes=in_axes)(q, k, v, ids), 1, 2)


def kernel_flops(name: str, shapes: list[tuple[int, ...]]) -> float:
    """FLOPs of one call of the kernel, by its name in a compiled program and the shapes of its operands.

    Attention counts as causal (half of the scores), and a head's channels are rounded up to the chip's lanes. The
    result is 0 for other kernels.
    """
    queries = next((shape for shape in shapes if len(shape) == 4), None)
    if "splash_mha" not in name or queries is None:
        return 0.0
    batch, heads, length, head_dim = queries
    products = 2 if "fwd" in name else 5  # q k^T and w v; backward: both again, and the gradients of q, k, v
    return products * 2 * batch * heads * length * length / 2 * (-(-head_dim // _LANES) * _LANES)

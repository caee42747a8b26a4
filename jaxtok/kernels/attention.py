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
from jaxtyping import Array, Bool, Float, Int

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
    """The definition, for whole rows."""
    visible = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None] if causal else None
    if segments is not None:
        same = (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
        visible = same if visible is None else visible & same
    return masked_attention(q, k, v, visible)


def masked_attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    visible: Bool[Array, "#batch visible_heads length slots"] | None,
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v over the visible keys, with the softmax in float32.

    The number of heads of `visible` is 1, or that of the keys or of the queries.

    The backward pass keeps q, k, v, the result and two numbers for each query and head; it computes the weights again,
    as storing them takes longer than the products (arXiv 2205.14135, appendix B.2). A query that sees no key gets the
    mean of all values.
    """
    groups, (batch, length, heads, head_dim) = k.shape[2], q.shape
    q = (q * head_dim**-0.5).reshape(batch, length, groups, heads // groups, head_dim)
    if visible is not None:
        per_group = -(-visible.shape[1] // groups)
        visible = visible.reshape(visible.shape[0], -1, per_group, *visible.shape[2:])
    # Each head's matrices lie in one piece, which on a CPU takes a quarter less time than products of strided ones.
    q, k, v = jnp.moveaxis(q, 1, 3), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
    y = _attention(*(checkpoint_name(x, "attention") for x in (q, k, v)), visible)
    return jnp.moveaxis(y, 3, 1).reshape(batch, length, heads, head_dim)


@jax.custom_vjp
def _attention(
    q: Float[Array, "batch groups per_group length head_dim"],
    k: Float[Array, "batch groups slots head_dim"],
    v: Float[Array, "batch groups slots head_dim"],
    visible: Bool[Array, "#batch #groups #per_group length slots"] | None,
) -> Float[Array, "batch groups per_group length head_dim"]:
    """Attention with scores q k^T."""
    return _attention_forward(q, k, v, visible)[0]


def _scores(q: Array, k: Array, visible: Array | None) -> Array:
    scores = jnp.einsum("bgpld,bgsd->bgpls", q, k, preferred_element_type=jnp.float32)
    return scores if visible is None else jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _attention_forward(q, k, v, visible):
    scores = _scores(q, k, visible)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    y = jnp.einsum("bgpls,bgsd->bgpld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    y, highest, total = (checkpoint_name(x, "attention") for x in (y.astype(q.dtype), highest, total))
    return y, (q, k, v, visible, y, highest, total)


def _attention_backward(kept, gradient):
    """With w the weights: dv = w^T dy, dw = dy v^T, ds = w (dw - dy . y), dq = ds k, dk = ds^T q."""
    q, k, v, visible, y, highest, total = kept
    weights = jnp.exp(_scores(q, k, visible) - highest) / total
    dv = jnp.einsum("bgpls,bgpld->bgsd", weights.astype(v.dtype), gradient)
    dw = jnp.einsum("bgpld,bgsd->bgpls", gradient, v, preferred_element_type=jnp.float32)
    dot = jnp.sum(gradient.astype(jnp.float32) * y.astype(jnp.float32), -1, keepdims=True)
    ds = (weights * (dw - dot)).astype(q.dtype)
    dq = jnp.einsum("bgpls,bgsd->bgpld", ds, k)
    return dq, jnp.einsum("bgpls,bgpld->bgsd", ds, q), dv, None


_attention.defvjp(_attention_forward, _attention_backward)


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

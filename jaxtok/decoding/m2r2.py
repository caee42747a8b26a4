"""M2R2: mixture of multi-rate residuals (arXiv 2502.02040). A second, faster residual stream leaves a frozen decoder.

Next to the ordinary ("slow") residual stream h runs an accelerated stream p through the same frozen layers, with small
adapters, so that p is near the final representation after few layers. It shares the slow stream's keys and values and
writes none. Its uses: drafts from the first layers that the rest of the model verifies (`SelfSpeculation`, lossless),
and early exit (`generate_early_exit`, which changes the output).

Only the abstract and public summaries of the paper could be read, and no code was released. That there are accelerator
adapters on a frozen model, shared keys and values, a router (ARLA), self-speculation and early exit is the paper's; the
equations are a reconstruction. They are checked against an independent implementation of the same reconstruction.

With L layers of width d and gates E_1 < ... < E_G < L, interval g has the layers from E_(g-1) on and before E_g. At its
start p = h. In its layer i, with adapters D [d, r] and U [r, d] (zero at first, so that p = h) and an RMS norm n,

    p' = p  + Attn(queries of p; keys and values of h) + n(p) D_attn U_attn
    p  = p' + MLP(p') + n(p') D_mlp U_mlp

and the exit's logits are those of the model's own final norm and head on p. The baselines are exits of the same shape:
the logit lens (p = h), and a head, a bottleneck on h at the gate with as many parameters as the interval's adapters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxtok.decoding.engine import CachedTokens, Engine, Piece, new_tokens, padded_prompts
from jaxtok.decoding.protocols import Chooser, SelfDrafter
from jaxtok.decoding.sampling import Sampling
from jaxtok.nn.attention import visible_slots, visible_tokens
from jaxtok.nn.cache import KVCache, entered
from jaxtok.nn.norms import Norm
from jaxtok.nn.transformer import Block, Call, SelfAttention, StackConfig
from jaxtok.protocols import FROZEN, CausalLM, Params

KINDS = ("accelerated", "head", "lens")
ROUTERS = ("arla", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class M2R2Config:
    """Where a model is left, and by what.

    >>> config = M2R2Config(gates=(2, 4))
    >>> config.intervals, config.rates(layers=6)
    (((0, 2), (2, 4)), (3.0, 2.0))
    """

    gates: tuple[int, ...] = (2,)
    """The exits E_1 < E_2 < ..., each by the number of layers that come before it."""
    rank: int = 16
    """The width r of the adapters."""
    latent: int = 16
    """The width z of the router's latents."""
    gamma: int = 3
    """The tokens that the first exit drafts in a round of self-speculation."""
    exits: Literal["accelerated", "head", "lens"] = "accelerated"
    """accelerated: M2R2; its baselines are head, a bottleneck with as many parameters on h at each gate, and lens, the
    logit lens, which has no parameters."""
    router: Literal["arla", "linear"] = "arla"
    """arla: attention over the depths of an interval; linear: a linear function of p."""

    def __post_init__(self):
        object.__setattr__(self, "gates", tuple(self.gates))
        if not self.gates or any(a >= b for a, b in zip((0, *self.gates), self.gates)):
            raise ValueError(f"gates is {self.gates}; it must be numbers of layers in rising order, from 1 on.")
        for field in ("rank", "latent", "gamma"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        for field, allowed in (("exits", KINDS), ("router", ROUTERS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")

    @property
    def intervals(self) -> tuple[tuple[int, int], ...]:
        """(E_(g-1), E_g) of each gate."""
        return tuple(zip((0, *self.gates), self.gates))

    def rates(self, layers: int) -> tuple[float, ...]:
        """R_g = (L - E_(g-1)) / (E_g - E_(g-1)): how many of the model's layers p covers with each of its own."""
        return tuple((layers - a) / (b - a) for a, b in self.intervals)

    def check(self, model: CausalLM) -> None:
        """Raises ValueError if the model cannot be left like this."""
        size = model.config
        ordinary = isinstance(size, StackConfig) and size.block() is Block and size.causal and not size.post_norm
        if not ordinary or getattr(size, "relative_buckets", 0):
            raise ValueError(
                f"the model is a {type(model).__name__} with a {type(size).__name__}; M2R2's second stream needs a "
                "decoder of ordinary pre-norm blocks without a bias of distances, whose keys and values it shares."
            )
        if self.gates[-1] >= size.num_layers:
            raise ValueError(
                f"gates is {self.gates}; the last one must be below the model's num_layers = {size.num_layers}."
            )


# The two streams


class TwoStreamAttention(SelfAttention):
    """Attention of both streams, one after the other along the length, to the keys and values of the first, h."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch both d_model"], cache: KVCache | None, layer, call: Call):
        cfg, positions, length = self.config, call.positions, x.shape[1] // 2
        q = self.heads(x, "query", cfg.num_heads, call.deterministic)
        k, v = (self.heads(x[:, :length], g, cfg.kv_heads, call.deterministic) for g in ("key", "value"))
        (slow, k), (fast, _) = (
            cfg.scored(*cfg.rotate(part, k, positions), layer) for part in (q[:, :length], q[:, length:])
        )
        window = cfg.window_of(layer)
        if cache is None:
            causal = jnp.tril(jnp.ones((1, length, length), bool))
            visible = visible_tokens(causal, positions, window, call.segments)
        else:
            cache = cache.append(layer, k, v)
            visible = visible_slots(cache, layer, positions, window=window)
            k, v = (stored[layer].astype(q.dtype) for stored in (cache.keys, cache.values))
        q, visible = jnp.concatenate([slow, fast], 1), jnp.concatenate([visible, visible], 2)
        return self.output(self.attend(q, k, v, call.deterministic, visible=visible), call.deterministic), cache


class TwoStreamBlock(Block):
    """A frozen block, under its own parameters, on both streams; the adapters add to the second, p."""

    def parts(self):
        return {"attention": TwoStreamAttention(self.config, name="attention"), "ffn": self.ffn}

    @nn.compact
    def __call__(self, x, cache, layer, call: Call, adapters: Params):
        length = x.shape[1] // 2
        for (name, part), adapter in zip(self.parts().items(), ("attn", "mlp"), strict=True):
            p = x[:, length:]
            x, cache = self.around(name, part, x, cache, layer, call)
            down, up = adapters[f"{adapter}_down"], adapters[f"{adapter}_up"]
            x = x.at[:, length:].add(_low_rank(_normed(p, adapters["norm"]), down, up))
        return x, cache


class KeysAndValues(SelfAttention):
    """Only what attention writes to the cache."""

    @nn.compact
    def __call__(self, x, cache: KVCache, layer, call: Call):
        cfg = self.config
        k, v = (self.heads(x, group, cfg.kv_heads, call.deterministic) for group in ("key", "value"))
        _, k = cfg.scored(*cfg.rotate(k, k, call.positions), layer)
        return cache.append(layer, k, v)


class Propagation(nn.Module):
    """A frozen block of which only the keys and values are computed, for tokens that have left the model before it."""

    config: StackConfig

    @nn.compact
    def __call__(self, x, cache: KVCache, layer, call: Call):
        normed = self.config.norm_module("norm_attention")(x)
        return KeysAndValues(self.config, name="attention")(normed, cache, layer, call)


def _normed(x: Array, scale: Float[Array, " d_model"]) -> Array:
    return Norm("rms", dtype=x.dtype).apply({"params": {"scale": scale}}, x)


def _low_rank(x: Array, down: Float[Array, "d_model rank"], up: Float[Array, "rank d_model"]) -> Array:
    return x @ down.astype(x.dtype) @ up.astype(x.dtype)


def _layers(params: Params, layers: tuple[int, int]) -> Params:
    """The parameters of some of a decoder's blocks."""
    return jax.tree.map(lambda x: x[slice(*layers)], params["stack"]["blocks"])


class Exit(NamedTuple):
    """Both streams at a gate."""

    slow: Float[Array, "batch length d_model"]
    """h after E_g layers."""
    state: Float[Array, "batch length d_model"]
    """p after E_g layers: what the final norm and the head turn into the exit's logits."""
    trail: Float[Array, "depths batch length d_model"]
    """p after each layer of the interval (for the baselines, only p)."""


def to_gate(
    config: M2R2Config,
    model: CausalLM,
    params: Params,
    exits: Params,
    gate: int,
    h: Float[Array, "batch length d_model"],
    *,
    positions: Int[Array, "#batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
    cache: KVCache | None = None,
    held: tuple[Bool[Array, " batch"], Float[Array, "batch length d_model"]] | None = None,
) -> tuple[Exit, KVCache | None]:
    """Runs the layers of an interval.

    Args:
      params: those of the frozen model.
      exits: those of `init_exits`.
      gate: the number of the gate, from 0 on.
      h: the slow stream after the layers before the interval.
      positions, segments, cache: as `jaxtok.protocols.CausalLM` takes them.
      held: rows that have left the model, and their states, from which their keys and values are made in all layers.
    """
    layers = config.intervals[gate]
    positions, cache = entered(h, positions, cache, layers[0])
    call = Call(jnp.broadcast_to(positions, h.shape[:2]), segments)
    if config.exits == "accelerated":
        adapters = jax.tree.map(lambda x: x[slice(*layers)], exits["adapters"])
        (h, p), cache, trail = _two_streams(model.config, params, adapters, h, layers, call, cache, held)
        return Exit(h, p, trail), cache
    h, cache, _ = _one_stream(model.config, params, h, layers, call, cache, held)
    p = h
    if config.exits == "head":
        own = exits["heads"][f"gate{gate}"]
        inner = _normed(h, own["norm"]) @ own["down"].astype(h.dtype)
        p = h + jax.nn.silu(inner) @ own["up"].astype(h.dtype)
    return Exit(h, p, p[None]), cache


def _two_streams(config, params, adapters, h, layers, call, cache, held):
    """Both streams after some layers, the cache, and p after each of these layers."""
    length = h.shape[1]

    def layer(carry, weights):
        (h, p), cache = carry
        block, adapter, number = weights
        # No gradient goes through h, which does not depend on the adapters.
        x = jnp.concatenate([jax.lax.stop_gradient(h), p], 1)
        x, cache = TwoStreamBlock(config).apply({"params": block}, x, cache, number, call, adapter)
        h, p = _held(x[:, :length], held), x[:, length:]
        return ((h, p), cache), p

    weights = _layers(params, layers), adapters, jnp.arange(*layers)
    layer = jax.checkpoint(layer, prevent_cse=False)
    (streams, cache), trail = jax.lax.scan(layer, ((h, h), cache), weights, unroll=_unroll(config, layers))
    return streams, cache, trail


def _one_stream(config, params, h, layers, call, cache, held):
    """h after some layers, the cache, and h after each of these layers."""

    def layer(carry, weights):
        block, number = weights
        (h, cache), _ = Block(config).apply({"params": block}, carry, number, call)
        h = _held(h, held)
        return (h, cache), h

    weights = _layers(params, layers), jnp.arange(*layers)
    (h, cache), trail = jax.lax.scan(layer, (h, cache), weights, unroll=_unroll(config, layers))
    return h, cache, trail


def _unroll(config: StackConfig, layers: tuple[int, int]) -> int:
    return min(config.unroll, layers[1] - layers[0])


def _held(h, held):
    return h if held is None else jnp.where(held[0][:, None, None], held[1], h)


def _propagated(config, params, x, layers, call, cache):
    """The cache with the keys and values of x in some layers, as if x did not change in them."""

    def layer(cache, weights):
        block, number = weights
        used = {"norm_attention": block["norm_attention"]} if "norm_attention" in block else {}
        used["attention"] = block["attention"]
        return Propagation(config).apply({"params": used}, x, cache, number, call), None

    return jax.lax.scan(layer, cache, (_layers(params, layers), jnp.arange(*layers)))[0]


def _apply(model, params, method, x, **options):
    return model.apply({"params": params}, x, method=method, **options)


def entry(model: CausalLM, params: Params, tokens: Int[Array, "batch length"], **options: Any) -> Array:
    """h before the first layer."""
    return _apply(model, params, "hidden", _apply(model, params, "embed", tokens), layers=(0, 0), **options)[0]


def logits_of(model: CausalLM, params: Params, state: Float[Array, "batch length d_model"]) -> Array:
    """The logits of a state in the middle of the model: its own final norm and head."""
    last = model.config.num_layers
    return _apply(model, params, "head", _apply(model, params, "hidden", state, layers=(last, last))[0])


class Outputs(NamedTuple):
    """What `forward_two_streams` returns."""

    final: Float[Array, "batch length d_model"]
    """The slow stream after the final norm; the model's head makes its logits."""
    exits: tuple[Exit, ...]
    """For each gate."""


def forward_two_streams(
    config: M2R2Config,
    model: CausalLM,
    params: Params,
    exits: Params,
    tokens: Int[Array, "batch length"],
    *,
    positions: Int[Array, "#batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
    cache: KVCache | None = None,
) -> tuple[Outputs, KVCache | None]:
    """The slow stream through the whole model, both streams up to the last gate, and the cache.

    Raises:
      ValueError: the model cannot be left at these gates.
    """
    config.check(model)
    where = {"positions": positions, "segments": segments}
    h, found = entry(model, params, tokens, cache=cache, **where), []
    for gate in range(len(config.gates)):
        out, cache = to_gate(config, model, params, exits, gate, h, cache=cache, **where)
        h = out.slow
        found.append(out)
    rest = (config.gates[-1], model.config.num_layers)
    h, cache = _apply(model, params, "hidden", h, layers=rest, cache=cache, **where)
    return Outputs(h, tuple(found)), cache


# The router


def route(config: M2R2Config, router: Params, exit: Exit, gate: int) -> Float[Array, "batch length"]:
    """The router's logit s at a gate; the token leaves there if sigmoid(s) is above the threshold.

    ARLA attends over depths: from the latent of the last layer to those of all layers of the interval.
    """
    if config.router == "linear":
        return jnp.einsum("bld,d->bl", exit.state.astype(jnp.float32), router["weight"]) + router["bias"]
    end, depths = config.gates[gate], len(exit.trail)
    trail = _normed(exit.trail.astype(jnp.float32), router["norm"])
    z = trail @ router["latent"] + router["depth"][end - depths + 1 : end + 1][:, None, None]
    q, k, v = z[-1] @ router["rq"], z @ router["rk"], z @ router["rv"]
    weights = jax.nn.softmax(jnp.einsum("blz,eblz->ebl", q, k) / math.sqrt(config.latent), axis=0)
    u = jax.nn.silu(jnp.einsum("ebl,eblz->blz", weights, v) @ router["r_hidden"] + router["hidden_bias"])
    return (u @ router["r_out"])[..., 0] + router["r_bias"][0]


# Parameters


def init_exits(config: M2R2Config, model: CausalLM, rng: jax.Array) -> Params:
    """New parameters, in Linen's boxes: {"adapters" or "heads" (none for the lens), "router"}. U is zero, so p = h.

    Raises:
      ValueError: the model cannot be left at these gates.
    """
    config.check(model)
    d, z, layers, rank = model.config.d_model, config.latent, config.gates[-1], config.rank
    keys = iter(jax.random.split(rng, 8 + len(config.gates)))

    def normal(axes, *shape):
        return nn.LogicallyPartitioned(jax.random.normal(next(keys), shape) / math.sqrt(shape[-2]), axes)

    def filled(value, axes, *shape):
        return nn.LogicallyPartitioned(jnp.full(shape, value, jnp.float32), axes)

    exits = {}
    if config.exits == "accelerated":
        down, up = ("layers", "d_model", None), ("layers", None, "d_model")
        exits["adapters"] = {
            "norm": filled(1, ("layers", "channels"), layers, d),
            "attn_down": normal(down, layers, d, rank),
            "attn_up": filled(0, up, layers, rank, d),
            "mlp_down": normal(down, layers, d, rank),
            "mlp_up": filled(0, up, layers, rank, d),
        }
    if config.exits == "head":
        exits["heads"] = {
            f"gate{gate}": {
                "norm": filled(1, ("channels",), d),
                "down": normal(("d_model", None), d, 2 * rank * (end - start)),
                "up": filled(0, (None, "d_model"), 2 * rank * (end - start), d),
            }
            for gate, (start, end) in enumerate(config.intervals)
        }
    if config.router == "linear":
        exits["router"] = {"weight": filled(0, ("channels",), d), "bias": filled(0, ())}
    else:
        square = (None, None)
        exits["router"] = {
            "norm": filled(1, ("channels",), d),
            "latent": normal(("d_model", None), d, z),
            "depth": filled(0, square, model.config.num_layers + 1, z),
            **{name: normal(square, z, z) for name in ("rq", "rk", "rv", "r_hidden")},
            "hidden_bias": filled(0, (None,), z),
            "r_out": filled(0, square, z, 1),
            "r_bias": filled(0, (None,), 1),
        }
    return exits


def check_exits(config: M2R2Config, model: CausalLM, exits: Params) -> None:
    """Raises ValueError if these are not the parameters of such exits."""
    config.check(model)
    expected = jax.eval_shape(lambda: nn.meta.unbox(init_exits(config, model, jax.random.key(0))))
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): x.shape for path, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (expected, exits))
    ]
    for name in shapes[0] | shapes[1]:
        if shapes[0].get(name) != shapes[1].get(name):
            raise ValueError(
                f"the exits' {name} has the shape {shapes[1].get(name)}; for this model and config it must have "
                f"{shapes[0].get(name)}."
            )


# Self-speculation


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfSpeculation(SelfDrafter):
    """The first exit drafts, the layers after it verify. It is lossless.

    Its state is the parameters of the exits (`init_exits`), which `generate` takes as `drafter_state`; the logit lens
    needs none.

    >>> from jaxtok.decoding import generate
    >>> from jaxtok.lm.decoder import Decoder, init_params
    >>> from jaxtok.lm.llama import LlamaConfig
    >>> model = Decoder(LlamaConfig(num_layers=3, d_model=8, num_heads=2, mlp_dim=8, vocab_size=16, max_length=32))
    >>> params = init_params(model, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> options = {"max_new_tokens": 8, "chooser": Sampling(temperature=0)}
    >>> config = M2R2Config(gates=(1,), rank=2, latent=2)
    >>> exits = nn.meta.unbox(init_exits(config, model, jax.random.key(1)))
    >>> fast = generate(model, params, [[3, 1]], drafter=SelfSpeculation(config=config), drafter_state=exits, **options)
    >>> fast.tokens == generate(model, params, [[3, 1]], **options).tokens
    True
    """

    config: M2R2Config = M2R2Config()

    @property
    def nodes(self) -> int:
        return 1 + self.config.gamma

    @property
    def layers(self) -> int:
        return self.config.gates[0]

    def init(self, batch: int, room: int, vocab: int) -> Params:
        """Raises ValueError if the exits have parameters."""
        if self.config.exits != "lens":
            raise ValueError(
                f"the drafts come from exits of the kind {self.config.exits}, whose parameters are missing; give them "
                "as drafter_state."
            )
        return {}

    def draft(self, model, params, state, newest, cache, positions):
        """gamma steps of one token in both streams, and one of the slow stream for the last draft."""
        config = self.config
        config.check(model)
        if state:
            check_exits(config, model, state)

        def one(carry, position):
            token, cache = carry
            h = entry(model, params, token[:, None], positions=position[:, None], cache=cache)
            exit, cache = to_gate(config, model, params, state, 0, h, positions=position[:, None], cache=cache)
            following = logits_of(model, params, exit.state)[:, 0].argmax(-1).astype(token.dtype)
            return (following, cache), (token, exit.slow[:, 0])

        (last, cache), (tokens, hidden) = jax.lax.scan(one, (newest, cache), positions[:, :-1].T)
        options = {"positions": positions[:, -1:], "cache": cache}
        embedded = _apply(model, params, "embed", last[:, None])
        h, cache = _apply(model, params, "hidden", embedded, layers=(0, self.layers), **options)
        tokens = jnp.concatenate([tokens.T, last[:, None]], 1)
        return tokens, jnp.concatenate([jnp.moveaxis(hidden, 0, 1), h], 1), cache


# Early exit


@flax.struct.dataclass
class Leaving:
    """The state of `EarlyExit`."""

    cache: KVCache
    counts: Int[Array, "batch exits"]
    """How many tokens of each row left at each gate; the last entry: how many went through all layers."""
    threshold: Float[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class EarlyExit(CachedTokens):
    """A `TokenModel` whose tokens leave at the first gate that is sure enough. It is not lossless.

    The parameters are {"frozen": the model's, "exits": `init_exits`}. A batch runs a layer as long as one of its rows
    needs it. Rows that have left keep their state p, from which the keys and values of the layers they skip are made.
    """

    config: M2R2Config
    by: Literal["router", "confidence"] = "router"
    """What has to be above the threshold: the router's probability, or that of the exit's likeliest token."""

    def __post_init__(self):
        if self.by not in ("router", "confidence"):
            raise ValueError(f"by is {self.by!r}; it must be one of router, confidence.")
        self.config.check(self.model)

    def step(self, params, tokens, state, live):
        config, model, base, exits = self.config, self.model, params[FROZEN], params["exits"]
        before, size = state.cache.length, model.config
        h = entry(model, base, tokens[:, None], cache=state.cache)
        positions, cache = entered(h, None, state.cache, 0)
        gone, kept = ~live, h
        logits = jnp.zeros((len(tokens), size.vocab_size), jnp.float32)
        left = []
        for gate, layers in enumerate(config.intervals):
            # The first interval enters the tokens into the cache, so it starts from the one without them.
            def run(h, cache, kept, logits, gone, gate=gate):
                cache = state.cache if gate == 0 else cache
                held = (gone, kept)
                exit, cache = to_gate(config, model, base, exits, gate, h, positions=positions, cache=cache, held=held)
                found = logits_of(model, base, exit.state)[:, 0].astype(jnp.float32)
                if self.by == "router":
                    sure = jax.nn.sigmoid(route(config, exits["router"], exit, gate)[:, 0])
                else:
                    sure = jax.nn.softmax(found).max(-1)
                leaves = ~gone & (sure > state.threshold)
                kept = jnp.where(leaves[:, None, None], exit.state, kept)
                return exit.slow, cache, kept, jnp.where(leaves[:, None], found, logits), leaves

            if gate == 0:
                h, cache, kept, logits, leaves = run(h, cache, kept, logits, gone)
            else:
                h, cache, kept, logits, leaves = jax.lax.cond(
                    gone.all(), self._skip(base, layers, positions), run, h, cache, kept, logits, gone
                )
            left.append(leaves)
            gone |= leaves
        layers = (config.gates[-1], size.num_layers)

        def rest(h, cache, kept, logits, gone):
            call = Call(positions)
            h, cache, _ = _one_stream(size, base, h, layers, call, cache, (gone, kept))
            found = logits_of(model, base, h)[:, 0].astype(jnp.float32)
            return h, cache, kept, jnp.where(gone[:, None], logits, found), ~gone

        skip = self._skip(base, layers, positions)
        _, cache, _, logits, whole = jax.lax.cond(gone.all(), skip, rest, h, cache, kept, logits, gone)
        left.append(whole)
        cache = cache.truncate(jnp.where(live, cache.length, before))
        counts = state.counts + jnp.stack(left, 1).astype(jnp.int32)
        return logits, state.replace(cache=cache, counts=counts), live

    def _skip(self, base, layers, positions):
        """What replaces layers that no row needs."""

        def skip(h, cache, kept, logits, gone):
            cache = _propagated(self.model.config, base, kept, layers, Call(positions), cache)
            return h, cache, kept, logits, jnp.zeros_like(gone)

        return skip


@dataclasses.dataclass(frozen=True)
class EarlyExitGeneration:
    """The result of `generate_early_exit`."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    """By the distribution of the exit at which a token left."""
    exits: Int[np.ndarray, "batch exits"]
    """How many tokens of each row left at each gate; the last entry: how many went through all layers."""
    mean_layers: float
    """The mean number of layers of a new token, both streams counted as one."""


def generate_early_exit(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    config: M2R2Config,
    threshold: float,
    by: Literal["router", "confidence"] = "router",
    max_new_tokens: int,
    chooser: Chooser = Sampling(temperature=0),
    rng: jax.Array | None = None,
    stop_tokens: Collection[int] = (),
    num_ids: int | None = None,
    on_tokens: Callable[[Piece], None] | None = None,
    chunk: int = 16,
) -> EarlyExitGeneration:
    """Continues prompts with early exit. NOT lossless: the output differs from the model's own. See `EarlyExit`.

    Prompts go through all layers. A row's tokens depend only on its prompt, `rng` and its number in the batch.

    Args:
      params: {"frozen": the model's, "exits": `init_exits`}.
      threshold: how sure a gate must be, in [0, 1]; 1: no token leaves early.
      The others are as in `jaxtok.decoding.generate`.

    Raises:
      ValueError: as `jaxtok.decoding.generate`, or the exits do not fit the model, or the threshold is impossible.
    """
    check_exits(config, model, params["exits"])
    size = model.config
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be in [0, 1].")
    if max_new_tokens < 1 or chunk < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and chunk is {chunk}; both must be at least 1.")
    tokens, lengths = padded_prompts(prompts, size.vocab_size, size.max_length, max_new_tokens)
    options = {"chooser": chooser, "num_ids": None if num_ids == size.vocab_size else num_ids}
    begun = Engine(model=CachedTokens(model), **options).prefill(
        params[FROZEN], tokens, lengths, new=max_new_tokens, rng=rng, stop=sorted(stop_tokens)
    )
    counts = jnp.zeros((len(prompts), 1 + len(config.gates)), jnp.int32)
    state = begun.replace(model=Leaving(begun.model, counts, jnp.full(len(prompts), threshold, jnp.float32)))
    engine = Engine(model=EarlyExit(model, config, by), **options)
    for piece, state in engine.stream(params, state, chunk if on_tokens else None):  # noqa: B007, B020
        if on_tokens:
            on_tokens(piece)
    counts = np.asarray(state.model.counts)
    layers = counts.sum(0) @ np.array([*config.gates, size.num_layers]) / counts.sum()
    return EarlyExitGeneration(*new_tokens(state), counts, float(layers))


# What it costs, and what it shows


def flops_of_a_token(config: M2R2Config, model: CausalLM, context: int) -> tuple[tuple[float, float], float, float]:
    """Forward FLOPs of a token at a context of `context` tokens.

    Returns:
      ((those of the slow stream up to the last gate, after it), those that the second stream adds, those of a head).
    """
    size = model.config
    layer = size.stack_flops(context) / size.num_layers
    last, vocabulary = config.gates[-1], 2 * size.vocab_size * size.d_model
    return (layer * last, layer * (size.num_layers - last)), _added(config, size, context) * last, vocabulary


def _added(config: M2R2Config, size: StackConfig, context: int) -> float:
    """The FLOPs that an exit adds to a layer: queries, scores, output and MLP once more, and the adapters (2 FLOPs a
    number; there are 4 r d)."""
    adapters = 0 if config.exits == "lens" else 8 * config.rank * size.d_model
    if config.exits != "accelerated":
        return adapters
    x = jax.ShapeDtypeStruct((1, size.d_model), jnp.float32)

    def count(group: str) -> int:
        module = size.projection(group, size.kv_heads * size.head_dim)
        shapes = jax.eval_shape(lambda x: module.init(jax.random.key(0), x), x)
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    return size.stack_flops(context) / size.num_layers - 2 * (count("key") + count("value")) + adapters


def round_flops(config: M2R2Config, model: CausalLM, context: int) -> float:
    """Forward FLOPs of a round of self-speculation, for one row: gamma steps of both streams through E_1 layers, each
    with a head; one of the slow stream; and a pass of gamma + 1 tokens through the other layers, with the head."""
    size, gamma, first = model.config, config.gamma, config.gates[0]
    layer, head = size.stack_flops(context) / size.num_layers, 2 * size.vocab_size * size.d_model
    draft = gamma * (first * (layer + _added(config, size, context)) + head) + first * layer
    return draft + (gamma + 1) * ((size.num_layers - first) * layer + head)


def velocity(
    config: M2R2Config, model: CausalLM, params: Params, exits: Params, tokens: Int[Array, "batch length"]
) -> dict[str, Float[Array, " layers"]]:
    """How the streams move, layer by layer, as means over tokens.

    Returns:
      change: |h_(i+1) - h_i| / |h_i| for i = 0 to L - 1; slow: cosine(h_i, h_L) for i = 1 to L; fast: cosine(p_i, h_L)
      for i = 1 to E_G, where p begins anew from h after each gate (for the baselines: at the gates only).
    """
    config.check(model)
    h, size = entry(model, params, tokens), model.config
    call = Call(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    slow = jnp.concatenate([h[None], _one_stream(size, params, h, (0, size.num_layers), call, None, None)[2]])
    starts = [slow[start] for start, _ in config.intervals]
    trails = [to_gate(config, model, params, exits, gate, start)[0].trail for gate, start in enumerate(starts)]
    fast = jnp.concatenate(trails)

    def cosine(x, y):
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        return ((x * y).sum(-1) / norms).mean((-2, -1))

    change = jnp.linalg.norm(slow[1:] - slow[:-1], axis=-1) / jnp.linalg.norm(slow[:-1], axis=-1)
    return {"change": change.mean((-2, -1)), "slow": cosine(slow[1:], slow[-1]), "fast": cosine(fast, slow[-1])}

"""Keyformer against an independent NumPy implementation of algorithm 1, and against the authors' code.

See `tests/goldens/keyformer/README.md`. The authors' code masks instead of evicting, sums the scores over the batch,
and lets no token after the prompt become a key token; `masked` has these rules, around our scores and models.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decoding.eviction import Eviction, Seen, sown_queries
from jaxtok.decoding.keyformer import H2O, Keyformer
from jaxtok.decoding.scorers import Recency
from jaxtok.interop.huggingface import params_from
from jaxtok.lm.decoder import Decoder, DecoderConfig
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.nn.attention import attend, visible_slots
from jaxtok.nn.cache import EMPTY, KVCache
from jaxtok.nn.linear import LinearStack
from jaxtok.nn.rotary import apply_rotary
from jaxtok.nn.transformer import Block, SelfAttention


def alibi(q, k, positions, slopes):
    """ALiBi in a further channel: the score of a key gets slope * position, which softmax takes for a distance."""
    q = q.at[..., -1].set(jnp.asarray(slopes, q.dtype)[: q.shape[2]] * q.shape[-1] ** 0.5)
    return q, k.at[..., -1].add(positions[..., None].astype(k.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class Streams:
    """Stands for the config of a model of one layer, whose queries, keys and values are given.

    Heads have a channel more than the file's, for ALiBi and, in the values, for the token's number.
    """

    num_heads: int
    mode: str
    dim: int
    base: float
    slopes: np.ndarray

    def rotate(self, q, k, positions):
        if self.mode == "alibi":
            return alibi(q, k, positions, self.slopes)
        if self.mode == "rope":
            turn = {"fraction": self.dim / (self.dim + 1), "base": self.base}
            return apply_rotary(q, positions, **turn), apply_rotary(k, positions, **turn)
        return q, k


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn(Keyformer):
    """Keyformer with noise from a table; the values of the cache say which token is in a slot."""

    table: object = None
    fixed: bool = False

    @property
    def original_only(self):
        return False

    def drawn(self, layer, number, cache, shape):
        _, heads, group, _, _ = shape
        tokens = jnp.moveaxis(cache.values[layer, ..., -1], 2, 1).astype(jnp.int32)  # [batch, heads, slots]
        if self.fixed:
            zeta = self.table[:, tokens[0]]  # [all heads, heads, slots]
            own = zeta.reshape(heads, group, heads, -1)
            return jnp.moveaxis(jnp.diagonal(own, axis1=0, axis2=2), -1, 0)[None, :, :, None]
        zeta = self.table[number[0]].reshape(number.shape[1], heads, group, -1)
        zeta = jnp.take_along_axis(zeta, tokens[0][None, :, None, :], axis=-1)
        return jnp.moveaxis(zeta, 0, 2)[None]


@pytest.mark.parity("keyformer/numpy_algorithm1*.npz")
def test_algorithm_1(golden, parity):
    """Kept tokens, scores and outputs of every run in the file, step by step."""
    cfg, n = golden.config, golden.config["prompt_len"]
    steps, dim, budget = cfg["steps"], cfg["head_dim"], cfg["budget"]
    tau = {"tau_init": cfg["tau_init"], "tau_end": cfg["tau_end"], "steps": steps}
    np.testing.assert_allclose(Keyformer(**tau).tau(jnp.arange(steps + 1)), golden["in/taus"], rtol=1e-6)
    noise = np.zeros((n + steps, cfg["heads"], n + steps), np.float32)
    noise[:n, :, :n] = golden["in/noise_prompt"].transpose(1, 0, 2)
    noise[n:] = golden["in/noise_decode"]
    gumbel = Drawn(**tau, table=jnp.asarray(noise))
    scorers = {
        "keyformer_fixednoise": Drawn(**tau, table=jnp.asarray(golden["in/noise_fixed_per_token"]), fixed=True),
        "keyformer_nonoise": Keyformer(**tau, noise="none"),
        "h2o": H2O,
        "window": Recency(),
        "sink": Recency(),
        "full": Recency(),
    }
    streams = [golden[f"in/{x}"].swapaxes(0, 1)[None] for x in "qkv"]
    q, k, v = (np.pad(x, [(0, 0)] * 3 + [(0, 1)]) for x in streams)
    q *= ((dim + 1) / dim) ** 0.5
    v[..., -1] = np.arange(n + steps)[:, None]
    runs = sorted({key.split("/")[1] for key in golden.arrays if key.startswith("out/")})
    for run in runs:
        mode = run.split("_")[1] if run.split("_")[-1] in ("org", "new") else "none"
        evictor = Eviction(
            scorer=scorers.get(run, gumbel),
            budget=n + steps if run == "full" else budget,
            recent=1 if run in ("window", "sink", "full") else cfg["recent"],
            sinks=cfg["sinks"] if run == "sink" else 0,
            positions="new" if run.endswith("new") else "original",
            config=Streams(cfg["heads"], mode, dim, cfg["rope_theta"], golden["in/alibi_slopes"]),
        )
        outs, kept, scores = through(evictor, n, *(jnp.asarray(x) for x in (q, k, v)))
        for step, theirs in enumerate(golden[f"out/{run}/kept_positions"]):
            for ours, head in zip(kept[step], theirs):
                found, expected = (sorted(x[x >= 0].tolist()) for x in (ours, head))
                assert found == expected, (run, step)
        parity(f"{run}: output", outs[..., :dim], golden[f"out/{run}/attn_out"], rtol=2e-5)
        if f"out/{run}/score" in golden.arrays:
            ours = np.zeros_like(golden[f"out/{run}/score"])
            step, head, slot = np.nonzero(kept >= 0)
            ours[step, head, kept[step, head, slot]] = scores[step, head, slot]
            parity(f"{run}: score", ours, golden[f"out/{run}/score"], rtol=2e-5)


def through(evictor, n, q, k, v):
    """The outputs of all steps; the tokens that are kept after each, and their scores."""
    config, (_, _, heads, dim) = evictor.config, k.shape

    def appended(cache, new):
        places = cache.next_position[:, None] + jnp.arange(new[0].shape[1])
        queries, keys = config.rotate(new[0], new[1], places)
        cache = cache.advance(places).append(0, keys, new[2])
        return queries, cache, visible_slots(cache, 0, places)

    def told(cache, state):
        tokens = jnp.where(cache.positions[0, 0] == EMPTY, -1, cache.values[0, 0, ..., -1].astype(jnp.int32)).T
        return tokens, () if state.scores is None else state.scores[0, 0]

    def decode(carry, new):
        cache, state = carry
        queries, cache, visible = appended(cache, new)
        y = attend(queries, cache.keys[0], cache.values[0], visible=visible)[0, 0]
        cache, state = evict(cache, observed(state, cache, queries))
        return (cache, state), (y, *told(cache, state))

    def observed(state, cache, queries):
        if not evictor.observes:
            return state
        sown, new = {"attention": {"queries": (queries[None],)}}, queries.shape[1]
        return evictor.observe(state, cache, sown, jnp.arange(new)[None], jnp.array([new]))

    def evict(cache, state):
        return evictor.evict(state, cache, cache.length > state.budget, evictor.slots + 1)

    @jax.jit
    def all_steps():
        queries, cache, _ = appended(KVCache.init(1, 1, n, heads, dim), [x[:, :n] for x in (q, k, v)])
        state = evictor.init(cache.replace(length=cache.length - 1))
        cache, state = evict(cache, observed(state, cache, queries))
        later = [jnp.moveaxis(x[:, n:, None], 1, 0) for x in (q, k, v)]
        _, (y, *rest) = jax.lax.scan(decode, (cache, state), later)
        return y, *jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), told(cache, state), tuple(rest))

    return jax.tree.map(np.asarray, all_steps())


class Parallel(Block):
    """GPT-J's block: attention and MLP have the same input, after one norm."""

    @nn.compact
    def __call__(self, carry, layer, call):
        x, cache = carry
        y = self.config.norm_module("norm_attention")(x)
        attended, cache = SelfAttention(self.config, name="attention")(y, cache, layer, call)
        return (x + attended + self.ffn(y, cache, layer, call)[0], cache), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTJ(LinearStack, DecoderConfig):
    def block(self):
        return Parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPT(LinearStack, DecoderConfig):
    """With ALiBi in a further channel of each head."""

    slopes: tuple[float, ...] = ()

    def rotate(self, q, k, positions):
        dim = self.head_dim
        return alibi(q * (dim / (dim - 1)) ** 0.5, k, positions, self.slopes)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """2^(-8i / H) for i = 1, ..., H; for other H, the even ones of the next power of two come first."""
    power = 1 << (heads - 1).bit_length()
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return tuple(slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads])


def loaded(golden):
    """The config of a file's model, its parameters, and the bias of its head."""
    arch, size, given = golden.config["arch"], golden.config["model"], golden.under("params")
    common = {
        "num_layers": size["layers"],
        "d_model": size["width"],
        "num_heads": size["heads"],
        "vocab_size": size["vocab"],
        "max_length": 128,
        "norm_eps": golden.config["layernorm_eps"],
    }
    if arch == "gpt2":
        config = GPT2Config(**common, mlp_dim=given["transformer.h.0.mlp.c_fc.weight"].shape[1])
        return config, params_from(config, given), 0.0
    layers, heads, dim = range(size["layers"]), size["heads"], size["width"] // size["heads"]
    common |= {"norm": "layernorm"}

    def stacked(name):
        return jnp.stack([given[f"transformer.{name}".replace("#", str(layer))] for layer in layers])

    def kernel(name):
        return stacked(f"{name}.weight").swapaxes(1, 2)

    def linear(name):
        return {"kernel": kernel(name), "bias": stacked(f"{name}.bias")}

    def norm(name):
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    if arch == "gptj":
        rotary = size["rotary"]
        config = GPTJ(
            **common,
            mlp_dim=given["transformer.h.0.mlp.fc_in.weight"].shape[0],
            rotary_fraction=rotary / dim,
            use_bias=False,
            mlp_bias=True,
            activation="gelu_tanh",
            tie_embeddings=False,
        )
        # Its pairs of channels are neighbours, ours are half of the rotated channels apart.
        order = np.concatenate([np.arange(0, rotary, 2), np.arange(1, rotary, 2), np.arange(rotary, dim)])
        order = (np.arange(heads)[:, None] * dim + order).ravel()
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
        attention = {ours: {"kernel": kernel(f"h.#.attn.{theirs}")} for ours, theirs in names.items()}
        for group in ("query", "key"):
            attention[group]["kernel"] = attention[group]["kernel"][..., order]
        blocks = {
            "attention": attention,
            "norm_attention": norm("h.#.ln_1"),
            "ffn": {"up": linear("h.#.mlp.fc_in"), "down": linear("h.#.mlp.fc_out")},
        }
        final, head = "ln_f", {"head_matrix": given["lm_head.weight"]}
    else:
        config = MPT(
            **common,
            mlp_dim=given["transformer.blocks.0.ffn.up_proj.weight"].shape[0],
            head_size=dim + 1,
            rotary_fraction=0.0,
            slopes=alibi_slopes(heads),
        )

        def wider(x, axis):  # a channel more in each head
            shape = (*x.shape[:axis], heads, dim, *x.shape[axis + 1 :])
            padded = jnp.pad(x.reshape(shape), [(0, int(i == axis + 1)) for i in range(len(shape))])
            return padded.reshape(*x.shape[:axis], heads * (dim + 1), *x.shape[axis + 1 :])

        fused = linear("blocks.#.attn.Wqkv")
        attention = {}
        for part, group in enumerate(("query", "key", "value")):
            third = {leaf: jnp.split(x, 3, -1)[part] for leaf, x in fused.items()}
            attention[group] = {leaf: wider(x, x.ndim - 1) for leaf, x in third.items()}
        out = linear("blocks.#.attn.out_proj")
        attention["output"] = out | {"kernel": wider(out["kernel"], 1)}
        blocks = {
            "attention": attention,
            "norm_attention": norm("blocks.#.norm_1"),
            "norm_ffn": norm("blocks.#.norm_2"),
            "ffn": {"up": linear("blocks.#.ffn.up_proj"), "down": linear("blocks.#.ffn.down_proj")},
        }
        final, head = "norm_f", {}
    params = {
        "embedding": given["transformer.wte.weight"],
        "final_norm": {"scale": given[f"transformer.{final}.weight"], "bias": given[f"transformer.{final}.bias"]},
        "stack": {"blocks": blocks},
        **head,
    }
    return config, params, given.get("lm_head.bias", 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(Keyformer):
    """Keyformer with given noise [layers, batch, heads, queries, keys] and temperature, for a cache in which nothing
    moves."""

    table: object = None
    now: object = 1.0

    def tau(self, step):
        return jnp.full(step.shape, self.now)

    def drawn(self, layer, number, cache, shape):
        return self.table[layer].reshape(shape)


@functools.partial(jax.jit, static_argnames="config")
def call(config, params, tokens, positions, cache, scores, noise, tau):
    """One call of the authors' model: logits after the last token, and f with what it adds, summed over the batch."""
    model = Decoder(config)
    (logits, cache), sown = model.apply(
        {"params": params}, tokens, positions=positions, cache=cache, mutable=["intermediates"]
    )
    batch, new = tokens.shape
    path, count = jnp.broadcast_to(jnp.arange(new), tokens.shape), jnp.full(batch, new)
    zeros = jnp.zeros(batch, jnp.int32)
    seen = Seen(cache, sown_queries(sown["intermediates"]), path, count, zeros, zeros, config=config)
    of_rows = jnp.zeros((len(scores), batch, *scores.shape[1:]))
    added, _ = Stored(table=noise, now=tau).observe(of_rows, (), seen)
    return logits[:, -1], cache, scores + added.sum(1)


def masked(scores, mask, length, recent, key):
    """The authors' new mask over `length` entries and the coming one, and the scores, which are zero where dropped.

    The last `recent` of these length + 1 entries stay, and the best `key` of the first length - recent. So the entry
    between them goes, and never returns (their off-by-one).
    """
    new = np.zeros_like(mask)
    if length <= recent + key or recent == 0:
        new[..., : length + 1] = 1
    else:
        new[..., length + 1 - recent : length + 1] = 1
        if key:
            best = np.argsort(-scores[..., : length - recent], axis=-1, kind="stable")[..., :key]
            np.put_along_axis(new, best, 1, -1)
    new[..., :length] &= mask[..., :length]
    return new, np.where(new[..., :-1], scores, 0)


@pytest.mark.parity("keyformer/official_*.npz")
def test_reference(golden, parity):
    config, params, bias = loaded(golden)
    prompt, later, options = golden["in/prompt"], golden["in/decode_tokens"], golden.config["keyformer"]
    (batch, n), steps = prompt.shape, later.shape[1]
    budget = int(n * options["kv_cache"] / 100)
    recent = int(budget * options["recent"] / 100)
    assert golden["out/req_tokens_recent_key"].tolist()[-2:] == [recent, budget - recent]
    shape = (config.num_layers, config.num_heads, n + steps)
    scores, mask = np.zeros(shape, np.float32), np.ones((*shape[:2], n + steps + 1), np.int8)
    cache = Decoder(config).init_cache(batch, n + steps)
    cache = cache.replace(positions=jnp.full(cache.keys.shape[:4], EMPTY, jnp.int32))
    found = {"logits": [], "score": [], "keep_mask": []}
    for step in range(steps + 1):
        first, length = (0, n) if step == 0 else (n + step - 1, n + step)
        tokens = prompt if step == 0 else later[:, step - 1 : step]
        noise = np.zeros((config.num_layers, batch, config.num_heads, length - first, n + steps), np.float32)
        if "in/noise_prompt" in golden.arrays:
            if step == 0:
                noise[..., :n] = golden["in/noise_prompt"]
            else:
                noise[..., 0, :length] = golden["in/noise_decode"][step - 1][..., :length]
        tau = options["tau_init"] + step * options["tau_delta"]
        np.testing.assert_allclose(tau, golden["out/taus"][step], rtol=1e-6)
        positions = jnp.arange(first, length)[None]
        logits, cache, scores = call(config, params, tokens, positions, cache, scores, noise, np.float32(tau))
        mask, scores = masked(np.asarray(scores), mask, length, recent, budget - recent)
        kept = jnp.asarray(mask[..., :-1].transpose(0, 2, 1)[:, None])  # [layers, 1, slots, heads]
        cache = cache.replace(positions=jnp.where(kept == 1, cache.positions, EMPTY))
        for name, value in (("logits", logits + bias), ("score", scores), ("keep_mask", mask.copy())):
            found[name].append(value)
    for step, theirs in enumerate(golden["out/keep_mask"]):
        known = n + step + 1
        np.testing.assert_array_equal(found["keep_mask"][step][..., :known], theirs[..., :known], str(step))
    parity("logits", np.stack(found["logits"]), golden["out/logits"], rtol=2e-5)
    parity("scores", np.stack(found["score"]), golden["out/score"], rtol=2e-5)

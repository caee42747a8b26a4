"""Adaptive weighted rejection sampling, and sequential Monte Carlo over texts with it (arXiv 2504.05410).

A token is drawn from p(x) c(x) / Z, where p is the model's next-token distribution, c(x) in {0, 1} says what a
constraint allows, and Z = sum_x p(x) c(x). Instead of masking the whole vocabulary, tokens are visited in the order in
which sampling without replacement would draw them, and checked one by one. What is rejected on the way also gives an
unbiased estimate W of Z (`AWRS`): the sample is *proper*, E[W f(X)] = sum_x p(x) c(x) f(x).

These estimates are the weights of particles (`SMC`). Unlike locally constrained decoding, which masks and renormalises,
and so walks into dead ends, the weighted texts are then distributed as p(text | text satisfies the constraint), and
`Sampled.log_evidence` estimates log p(constraint), without bias before the logarithm.

The paper's symbols: X `tokens`, W exp(`log_weights`), R the tokens that were rejected.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtok.decoding.constraints import Constraint, Place, Visited, Vocabulary
from jaxtok.decoding.engine import CachedTokens, Engine, check_prompts, pad_prompts
from jaxtok.decoding.protocols import TokenModel
from jaxtok.decoding.sampling import Sampling, row_keys, token_keys
from jaxtok.protocols import CausalLM, Params

PEAKED = 2 / 3
"""If a token's probability is at least this, drawing twice with replacement needs fewer than two distinct checks."""


class Noise(Protocol):
    """What an `AWRS` sample depends on besides the logits."""

    def gumbel(self, rounds: Int[Array, " batch"], vocab: int) -> Float[Array, "batch vocab"]:
        """Standard Gumbel variables, new ones in each round of a row."""
        ...

    def phantoms(
        self, number: Int[Array, "batch block"], log_rejected: Float[Array, "batch block"]
    ) -> Float[Array, "batch block"]:
        """Draw number `number` of how often a rejected token comes before another one, by the rejected mass's log."""
        ...


class RandomNoise(NamedTuple):
    """`Noise` from a key for each row."""

    keys: Key[Array, " batch"]

    def gumbel(self, rounds, vocab):
        return jax.vmap(lambda key: jax.random.gumbel(key, (vocab,)))(token_keys(self.keys, 2 * rounds))

    def phantoms(self, number, log_rejected):
        keys = jax.vmap(token_keys, (None, 1), 1)(token_keys(self.keys, 1), number)
        uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, minval=1e-37)))(keys)
        return jnp.floor(jnp.log(uniform) / log_rejected)


class Drawn(NamedTuple):
    """A properly weighted token for each row."""

    tokens: Int[Array, " batch"]
    """Of a row without weight (minus infinity): a rejected token."""
    log_weights: Float[Array, " batch"]
    checks: Int[Array, " batch"]
    place: Place


@flax.struct.dataclass
class _Walk:
    """Rows on their way through their tokens."""

    order: Float[Array, "batch vocab"]
    """The keys of this round; minus infinity: not to be visited (again)."""
    rejected: Bool[Array, "batch vocab"]
    rejects: Int[Array, " batch"]
    """How many distinct tokens were rejected, |R|."""
    token: Int[Array, " batch"]
    """The first accepted token; until there is one, a rejected token."""
    accepts: Int[Array, " batch"]
    failures: Float[Array, " batch"]
    """Rejections with replacement: those of tokens that were rejected already (phantoms) included."""
    phantoms: Int[Array, " batch"]
    """How many numbers of phantoms were drawn."""
    left: Float[Array, " batch"]
    """log(1 - p(R)) before the first accepted token."""
    log_weight: Float[Array, " batch"]
    going: Bool[Array, " batch"]
    checks: Int[Array, " batch"]
    place: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWRS:
    """The sampler of a token (section 3): which estimator of Z, and its limits.

    recursive  One round (the default where no token is likely). X is the first accepted token, and Y the next one in
               the order: W = 1 - p(R) if Y is accepted, else p(X). Two checks at least.
    geometric  `max_accepts` rounds over the tokens not yet rejected. The counts of sampling with replacement are
               reconstructed by drawing how often a rejected token would have come again: with a accepts and b
               rejections, W = min(max_accepts - 1, a) / (a + b - 1).
    auto       geometric if max_accepts > 2 or some p(x) >= 2/3, else recursive.
    paper      The paper's experiment code: two rounds, W = (1 - p(R)) / (1 + all distinct rejections).
    local      Locally constrained decoding: one round, W = 1, whatever the logits sum to. It is not proper.

    The authors' code gives up when p(R) >= 1 - 1e-5, which is biased where Z is smaller; here see `tolerance`.
    """

    estimator: Literal["auto", "recursive", "geometric", "paper", "local"] = "auto"
    max_accepts: int = 2
    max_rejects: int = 0
    """A row dies when so many were rejected; 0: no limit, and no row dies while anything is allowed."""
    tolerance: float = 0.0
    """A row dies when no more than this probability is left: faster, and biased where Z is smaller."""
    block: int = 64
    """The number of tokens of a row that are sent to the host at a time. The result does not depend on it."""

    def __post_init__(self):
        kinds = ("auto", "recursive", "geometric", "paper", "local")
        if self.estimator not in kinds:
            raise ValueError(f"estimator is {self.estimator!r}; it must be one of {', '.join(kinds)}.")
        if self.max_accepts < 2:
            raise ValueError(f"max_accepts is {self.max_accepts}; it must be at least 2.")
        if self.max_rejects and self.max_rejects < (1 if self.estimator == "local" else 2):
            raise ValueError(f"max_rejects is {self.max_rejects}; it must be at least 2, or 0 for no limit.")
        if self.estimator == "paper" and (self.max_accepts != 2 or self.max_rejects):
            raise ValueError("estimator is paper; it has two rounds and no limit: leave out max_accepts, max_rejects.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it must be at least 0 and below 1.")
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be at least 1.")

    def sample(self, logits: Float[Array, "batch vocab"], noise: Noise, place: Any, visit: Any) -> Drawn:
        """A token for each row, and its weight.

        Args:
          logits: unnormalised log weights l, of which p = softmax(l); log W is that of sum_x exp(l(x)) c(x). Minus
            infinity: not allowed, without a check.
          visit: a function as `Vocabulary.visit`, for `place`.
        """
        total = jax.nn.logsumexp(logits, -1)
        logp = jnp.where(logits > -jnp.inf, logits - jnp.where(jnp.isfinite(total), total, 0.0)[:, None], -jnp.inf)
        batch, vocab = logp.shape
        if self.estimator == "auto":
            with_replacement = (self.max_accepts > 2) | (logp.max(-1) >= jnp.log(PEAKED).astype(logp.dtype))
        else:
            with_replacement = jnp.full(batch, self.estimator == "geometric")
        ints, floats = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, logp.dtype)
        walk = _Walk(
            order=logp + noise.gumbel(ints, vocab),
            rejected=jnp.zeros(logp.shape, bool),
            rejects=ints,
            token=ints,
            accepts=ints,
            failures=floats,
            phantoms=ints,
            left=floats,
            log_weight=jnp.full_like(floats, -jnp.inf),
            going=jnp.ones(batch, bool),
            checks=ints,
            place=place,
        )
        step = functools.partial(self._block, logp, noise, with_replacement, visit)
        # The first block is outside the loop, as the host turns the place into its lasting form.
        walk = jax.lax.while_loop(lambda walk: walk.going.any(), step, step(walk))
        weight = walk.log_weight if self.estimator == "local" else walk.log_weight + total
        return Drawn(walk.token, weight, walk.checks, walk.place)

    def _block(self, logp, noise: Noise, with_replacement, visit, walk: _Walk) -> _Walk:
        """Visits the next tokens of each row, up to an accepted one."""
        vocab, rows = logp.shape[1], jnp.arange(len(logp))
        block, most = min(self.block, vocab), self.max_rejects or jnp.inf
        best, ids = jax.lax.top_k(walk.order, min(block + 1, vocab))  # one more, which may be the Y of the last
        # Without the barrier, the slices below hide from XLA that few are needed, and it sorts the whole vocabulary.
        best, ids = jax.lax.optimization_barrier((best, ids))
        if block == vocab:
            best, ids = jnp.pad(best, ((0, 0), (0, 1)), constant_values=-jnp.inf), jnp.pad(ids, ((0, 0), (0, 1)))
        exists = best > -jnp.inf
        logs = jnp.where(exists, jnp.take_along_axis(logp, ids, 1), -jnp.inf)
        beyond = jnp.where(walk.order > -jnp.inf, logp, -jnp.inf)
        beyond = beyond.at[rows[:, None], jnp.where(exists, ids, vocab)].set(-jnp.inf, mode="drop")
        # log(1 - p(R)) before each token, if all before it in the block are rejected; never as a difference from 1.
        remaining = _suffix_logsumexp(jnp.concatenate([logs, jax.nn.logsumexp(beyond, -1)[:, None]], 1))[:, :-1]
        number = jnp.arange(block)
        before = walk.rejects[:, None] + number

        # Sampling with replacement would have drawn rejected tokens again before each of these.
        draws = (before > 0) & with_replacement[:, None]
        first_draw = walk.phantoms[:, None] + number - (walk.rejects == 0)[:, None]
        failures = walk.failures[:, None] + number
        if self.estimator in ("auto", "geometric"):
            drawn = noise.phantoms(jnp.maximum(first_draw, 0), _log1mexp(remaining[:, :block]))
            failures += jnp.cumsum(jnp.where(draws & exists[:, :block], drawn, 0.0), 1)

        counted = jnp.where(with_replacement[:, None], failures, before)
        allowed = exists[:, :block] & (counted < most)
        if self.tolerance:
            allowed &= remaining[:, :block] > math.log(self.tolerance)
        limit = jnp.where(walk.going, jnp.cumprod(allowed, 1).sum(1), 0)
        once = ~with_replacement & (self.estimator in ("auto", "recursive"))
        next_too = once[:, None] & exists[:, 1:] & (before + 1 != most)
        seen: Visited = visit(walk.place, ids, limit, next_too)

        first, found = seen.first, walk.going & (seen.first < limit)
        here = jnp.minimum(first, block - 1)
        rejected = number < jnp.where(walk.going, first, 0)[:, None]
        gone = walk.rejected.at[rows[:, None], jnp.where(rejected, ids[:, :block], vocab)].set(True, mode="drop")
        ends = walk.going & ~found & (limit < block)
        last, stop = jnp.maximum(limit - 1, 0), jnp.minimum(limit, block - 1)
        reached = jnp.where(limit > 0, failures[rows, last] + 1, walk.failures)
        reached = jnp.where(ends & exists[rows, stop], failures[rows, stop], reached)
        reached = jnp.where(found, failures[rows, here], reached)
        new = walk.replace(
            rejected=gone,
            rejects=walk.rejects + rejected.sum(1, dtype=jnp.int32),
            accepts=walk.accepts + found,
            failures=jnp.minimum(reached, most),
            phantoms=walk.phantoms + (draws & (number < (first + found)[:, None])).sum(1, dtype=jnp.int32),
            checks=walk.checks + seen.checks,
            place=seen.place,
        )

        # X, or until there is one, a rejected token: the first one with replacement, otherwise the last one.
        newly = found & (walk.accepts == 0)
        keep = (walk.accepts > 0) | (with_replacement & (walk.rejects > 0))
        tried = jnp.where(with_replacement, ids[:, 0], ids[rows, last])
        token = jnp.where(newly, ids[rows, here], jnp.where(keep | (limit == 0), walk.token, tried))
        new = new.replace(token=token, left=jnp.where(newly, remaining[rows, here], walk.left))

        rounds = {"local": 1, "paper": 2}.get(self.estimator)
        rounds = jnp.where(with_replacement, self.max_accepts, 1) if rounds is None else rounds
        done = walk.going & ((found & (new.accepts == rounds)) | ends)
        weight = self._log_weight(new, logs[rows, here], seen.next_too, next_too[rows, here], with_replacement)
        weight = jnp.where(new.accepts > 0, weight, -jnp.inf)
        if self.estimator == "paper":  # a second round cannot fail
            weight = jnp.where(new.accepts > 1, weight, -jnp.inf)
        again = found & ~done
        order = walk.order.at[rows[:, None], jnp.where(exists[:, :block], ids[:, :block], vocab)].set(
            -jnp.inf, mode="drop"
        )
        order = jax.lax.cond(
            again.any(),
            lambda: jnp.where(
                again[:, None], jnp.where(gone, -jnp.inf, logp + noise.gumbel(new.accepts, vocab)), order
            ),
            lambda: order,
        )
        return new.replace(order=order, going=walk.going & ~done, log_weight=jnp.where(done, weight, walk.log_weight))

    def _log_weight(self, walk: _Walk, log_x, next_accepted, next_visited, with_replacement):
        if self.estimator == "local":
            return jnp.zeros_like(walk.left)
        if self.estimator == "paper":
            return walk.left - jnp.log1p(walk.rejects.astype(walk.left.dtype))
        accepts = walk.accepts.astype(walk.left.dtype)
        trials = jnp.maximum(accepts + walk.failures - 1, 1)
        geometric = jnp.log(jnp.minimum(self.max_accepts - 1, accepts)) - jnp.log(trials)
        recursive = jnp.where(next_accepted | ~next_visited, walk.left, log_x)
        return jnp.where(with_replacement, geometric, recursive)


def _log1mexp(x: Float[Array, "batch block"]) -> Float[Array, "batch block"]:
    """log(1 - exp(x)) of x <= 0."""
    return jnp.where(x > -math.log(2), jnp.log(-jnp.expm1(jnp.minimum(x, 0.0))), jnp.log1p(-jnp.exp(x)))


def _suffix_logsumexp(x: Float[Array, "batch block"]) -> Float[Array, "batch block"]:
    """The logsumexp of each entry and all after it."""
    top = jnp.maximum(x.max(-1, keepdims=True), jnp.finfo(x.dtype).min)
    return jax.lax.cumlogsumexp(x - top, axis=1, reverse=True) + top


RESAMPLING = ("multinomial", "stratified", "systematic", "residual")


def resample(
    weights: Float[Array, " particles"], uniforms: Float[Array, " particles"], method: str
) -> Int[Array, " particles"]:
    """The ancestors of new particles, each with a mean number of copies of its weight times the number of particles.

    Args:
      weights: they sum to 1.
      uniforms: in [0, 1). Systematic takes the first one, residual the first ones.

    >>> resample(jnp.array([0.5, 0.25, 0.25, 0.0]), jnp.full(4, 0.5), "systematic").tolist()
    [0, 0, 1, 2]
    """
    count = len(weights)
    if method == "residual":
        expected = count * weights
        copies = jnp.floor(expected).astype(jnp.int32)
        fixed, rest = copies.sum(), expected - copies
        cumulative = jnp.cumsum(rest / jnp.maximum(rest.sum(), jnp.finfo(rest.dtype).tiny))
        drawn = jnp.searchsorted(cumulative, jnp.roll(uniforms, fixed), side="left")
        copied = jnp.repeat(jnp.arange(count), copies, total_repeat_length=count)
        return jnp.where(jnp.arange(count) < fixed, copied, jnp.minimum(drawn, count - 1)).astype(jnp.int32)
    cumulative = jnp.cumsum(weights)
    if method == "multinomial":
        points = uniforms
    else:
        points = (jnp.arange(count) + (uniforms[0] if method == "systematic" else uniforms)) / count
        cumulative = cumulative.at[-1].set(1.0)
    return jnp.minimum(jnp.searchsorted(cumulative, points, side="right"), count - 1).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SMC:
    """The options of sequential Monte Carlo: `PRESETS` has the paper's methods."""

    particles: int = 5
    constrain: Literal["awrs", "mask", "critic", "none"] = "awrs"
    """How the constraint enters. awrs: tokens are checked one by one, and weighted by the estimate of Z. mask: the
    whole vocabulary is checked, and Z is exact. critic: tokens are the model's own, and weigh nothing if they are
    forbidden. none: not at all."""
    awrs: AWRS = AWRS()
    ess_threshold: float = 0.5
    """Particles are resampled if their effective number is below this share of them; 0: never. A critic judges
    beginnings of texts only if it is above 0."""
    resampling: Literal["multinomial", "stratified", "systematic", "residual"] = "stratified"
    temperature: float = 1.0
    """Of the model, as a part of the distribution that is sampled from."""

    def __post_init__(self):
        if self.particles < 1:
            raise ValueError(f"particles is {self.particles}; it must be at least 1.")
        if not 0 <= self.ess_threshold <= 1:
            raise ValueError(f"ess_threshold is {self.ess_threshold}; it must be from 0 to 1.")
        if self.constrain not in ("awrs", "mask", "critic", "none"):
            raise ValueError(f"constrain is {self.constrain!r}; it must be awrs, mask, critic or none.")
        if self.resampling not in RESAMPLING:
            raise ValueError(f"resampling is {self.resampling!r}; it must be one of {', '.join(RESAMPLING)}.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be positive.")
        if self.constrain == "awrs" and self.awrs.estimator == "local" and self.ess_threshold:
            raise ValueError(
                f"ess_threshold is {self.ess_threshold} and the estimator is local, whose weights are no evidence; "
                "ess_threshold must be 0."
            )


PRESETS: Mapping[str, SMC] = {
    "model": SMC(particles=1, constrain="none", ess_threshold=0),
    "local": SMC(particles=1, awrs=AWRS(estimator="local"), ess_threshold=0),
    "rejection": SMC(particles=10, constrain="critic", ess_threshold=0),
    "twisted": SMC(particles=10, constrain="critic", ess_threshold=0.9),
    "awrs": SMC(),
    "mask": SMC(constrain="mask"),
}
"""model: the model alone. local: locally constrained decoding. rejection: whole texts are drawn, and those that are
allowed are kept (the paper's sample-rerank, whose weights are 0 and 1 here). twisted: the constraint judges the
beginnings of the model's own texts. awrs: the paper's method. mask: the same with exact weights from whole masks."""


@flax.struct.dataclass
class Particles:
    """All rows, grouped by prompts: row g * particles + n is particle n of prompt g."""

    model: Any
    proposal: Any
    newest: Int[Array, " rows"]
    text: Int[Array, "rows max_tokens"]
    length: Int[Array, " rows"]
    """The number of new tokens, with the one that ended the text."""
    log_weights: Float[Array, " rows"]
    """With `twist` in them."""
    twist: Float[Array, " rows"]
    """The critic's log weight of the beginning, which is taken out again before the next token."""
    live: Bool[Array, " rows"]
    place: Any
    critic: Any
    keys: Key[Array, " rows"]
    checks: Int[Array, " rows"]
    resampled: Int[Array, " prompts"]
    number: Int[Array, ""]
    """How many tokens the live rows have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """The static part of SMC: one step draws a token for every particle, weighs it, and resamples."""

    model: TokenModel
    """It also has `take(state, rows)`, the state with these rows; as `CachedTokens` has."""
    vocabulary: Vocabulary
    options: SMC
    max_tokens: int
    proposal: TokenModel | None = None
    """Draws the tokens in place of the model, which still weighs them."""

    def begin(
        self,
        model: Any,
        newest: Int[Array, " rows"],
        rng: jax.Array,
        place: Place | None,
        critic: Place | None,
        proposal: Any = None,
        log_weights: Float[Array, " rows"] | None = None,
    ) -> Particles:
        """The particles before the first token, from the models' states and the newest tokens of the prompts."""
        rows = len(newest)
        zeros, weights = jnp.zeros(rows, jnp.int32), jnp.zeros(rows)
        return Particles(
            model=model,
            proposal=proposal,
            newest=newest,
            text=jnp.zeros((rows, self.max_tokens), jnp.int32),
            length=zeros,
            log_weights=weights if log_weights is None else log_weights,
            twist=weights,
            live=jnp.ones(rows, bool),
            place=place,
            critic=critic,
            keys=row_keys(rng, rows),
            checks=zeros,
            resampled=jnp.zeros(rows // self.options.particles, jnp.int32),
            number=jnp.zeros((), jnp.int32),
        )

    @functools.partial(jax.jit, static_argnames="self")
    def run(self, params: Any, particles: Particles) -> Particles:
        """Steps until all particles have ended. `params` are the model's and the proposal's."""
        return jax.lax.while_loop(lambda x: x.live.any(), functools.partial(self.step, params), particles)

    def step(self, params: Any, particles: Particles) -> Particles:
        keys = token_keys(particles.keys, jnp.full(len(particles.keys), particles.number))
        particles, token, log_weight = self.draw(params, particles, token_keys(keys, 0))
        particles = self.weigh(particles, token, log_weight)
        uniforms = jax.vmap(jax.random.uniform)(token_keys(keys, 1))
        return self.resample(particles, uniforms)[0]

    def draw(self, params: Any, particles: Particles, keys) -> tuple[Particles, Array, Array]:
        """A token for each row, properly weighted; at the last place, the end of the text."""
        logits, model = self._logits(self.model, params[0], particles.model, particles)
        particles, target = particles.replace(model=model), logits
        if self.proposal is not None:
            logits, proposal = self._logits(self.proposal, params[1], particles.proposal, particles)
            particles = particles.replace(proposal=proposal)
        rows, ends = jnp.arange(len(logits)), jnp.array(self.vocabulary.eos, jnp.int32)

        def free(particles: Particles):
            drawn = self._drawn(logits, keys, particles)
            weight = drawn.log_weights
            if self.proposal is not None:
                # A token that the model excludes weighs nothing, and one of no weight stays so.
                ratio = target[rows, drawn.tokens] - logits[rows, drawn.tokens]
                weight = jnp.where(weight > -jnp.inf, weight + ratio, -jnp.inf)
            return drawn.tokens, weight, drawn.place, particles.checks + drawn.checks

        def forced(particles: Particles):
            weight, place, checks = jax.nn.logsumexp(target[:, ends], -1), particles.place, particles.checks
            if self.options.constrain in ("awrs", "mask"):
                score, checked, place = self.vocabulary.scores(place, particles.live, complete=True)
                weight, checks = weight + score, checks + checked
            return jnp.full(len(rows), ends[0]), weight, place, checks

        full = particles.number == self.max_tokens - 1
        token, weight, place, checks = jax.lax.cond(full, forced, free, particles)
        if place is not None:
            place = place.then(jnp.where(particles.live, token, -1))
        return particles.replace(place=place, checks=checks), token, weight

    def _logits(self, model: TokenModel, params: Params, state: Any, particles: Particles):
        """log p of the next token; minus infinity for those that stand for nothing."""
        logits, state, _ = model.step(params, particles.newest, state, particles.live)
        logits = jax.nn.log_softmax(logits / self.options.temperature)
        known = np.zeros(logits.shape[-1], bool)
        known[: len(self.vocabulary.known)] = self.vocabulary.known[: len(known)]
        return jnp.where(known | jnp.isnan(logits), logits, -jnp.inf), state

    def _drawn(self, logits, keys, particles: Particles) -> Drawn:
        options, place = self.options, particles.place
        if options.constrain == "awrs":
            logits = jnp.where(particles.live[:, None], logits, -jnp.inf)  # the others are not visited
            return options.awrs.sample(logits, RandomNoise(keys), place, self.vocabulary.visit)
        checks = jnp.zeros(len(logits), jnp.int32)
        if options.constrain == "mask":
            allowed, place = self.vocabulary.mask(place, logits.shape[-1])
            logits = jnp.where(allowed, logits, -jnp.inf)
            checks += particles.live * logits.shape[-1]
        tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        return Drawn(tokens, jax.nn.logsumexp(logits, -1), checks, place)

    def weigh(self, particles: Particles, token: Int[Array, " rows"], log_weight: Float[Array, " rows"]) -> Particles:
        """The particles with one more token, and its weight and the critic's."""
        live, weights = particles.live, particles.log_weights - particles.twist
        weights = jnp.where(live, weights + log_weight, particles.log_weights)
        ended = live & jnp.isin(token, jnp.array(self.vocabulary.eos))
        going, twist = live & ~ended & (weights > -jnp.inf), jnp.zeros_like(weights)
        critic, checks = particles.critic, particles.checks
        if critic is not None:
            asked = (ended | going) if self.options.ess_threshold else ended
            score, checked, critic = self.vocabulary.scores(critic.then(jnp.where(live, token, -1)), asked)
            score = jnp.where(asked, score, 0.0).astype(weights.dtype)
            weights, checks = weights + score, checks + checked
            going &= weights > -jnp.inf
            twist = jnp.where(going, score, 0.0)
        place = jnp.where(live, particles.number, self.max_tokens)
        rows = jnp.arange(len(token))
        return particles.replace(
            newest=jnp.where(live, token, particles.newest),
            text=particles.text.at[rows, place].set(token, mode="drop"),
            length=particles.length + live,
            log_weights=weights,
            twist=twist,
            live=going,
            critic=critic,
            checks=checks,
            number=particles.number + 1,
        )

    def resample(
        self, particles: Particles, uniforms: Float[Array, " rows"]
    ) -> tuple[Particles, tuple[Array, Array, Array]]:
        """Resamples the prompts' particles whose effective number is low; and that number, whether, and ancestors."""
        count, threshold = self.options.particles, self.options.ess_threshold
        weights = particles.log_weights.reshape(-1, count)
        total = jax.nn.logsumexp(weights, -1, keepdims=True)
        alive = jnp.isfinite(total)
        normal = weights - jnp.where(alive, total, 0.0)
        log_ess = -jax.nn.logsumexp(2 * normal, -1)
        low = alive[:, 0] & (log_ess < math.log(threshold * count)) if threshold else jnp.zeros(len(weights), bool)
        one = jnp.arange(count)
        ancestors = jax.vmap(functools.partial(resample, method=self.options.resampling))(
            jnp.exp(normal), uniforms.reshape(-1, count)
        )
        ancestors = jnp.where(low[:, None], ancestors, one) + count * jnp.arange(len(weights))[:, None]
        index = ancestors.reshape(-1)

        def taken(x: Particles) -> Particles:
            fields = ("newest", "text", "length", "twist", "live", "place", "critic")
            moved = {name: jax.tree.map(lambda leaf: leaf[index], getattr(x, name)) for name in fields}
            proposal = x.proposal if self.proposal is None else self.proposal.take(x.proposal, index)
            return x.replace(model=self.model.take(x.model, index), proposal=proposal, **moved)

        if threshold:
            particles = jax.lax.cond(low.any(), taken, lambda x: x, particles)
        equal = jnp.where(low[:, None], total - math.log(count), weights)
        particles = particles.replace(log_weights=equal.reshape(-1), resampled=particles.resampled + low)
        return particles, (jnp.exp(log_ess), low, ancestors % count)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """The weighted texts that continue a prompt."""

    tokens: list[list[int]]
    """The new tokens of each particle, with the one that ended its text."""
    log_weights: list[float]
    """In nats; minus infinity: the text is not allowed, or was given up."""
    checks: int
    """How many tokens (and for a critic, texts) were checked, whose answer was not yet known."""
    resampled: int
    """How often the particles were resampled."""

    @property
    def log_evidence(self) -> float:
        """The log of an unbiased estimate of the probability that the model continues the prompt, in max_tokens tokens
        with the one that ends the text, by a text that is allowed (times the critic's weight)."""
        weights = np.array(self.log_weights)
        return float(np.logaddexp.reduce(weights) - np.log(len(weights))) if len(weights) else -math.inf

    @property
    def effective(self) -> float:
        """The effective number of particles, 1 / sum of squares of the normalised weights; 0: all died."""
        if not np.isfinite(total := np.logaddexp.reduce(self.log_weights)):
            return 0.0
        return float(np.exp(-np.logaddexp.reduce(2 * (np.array(self.log_weights) - total))))

    def posterior(self) -> dict[tuple[int, ...], float]:
        """The probability of each text, the likeliest first; empty if all particles died."""
        if not np.isfinite(total := np.logaddexp.reduce(self.log_weights)):
            return {}
        found: dict[tuple[int, ...], float] = {}
        for tokens, weight in zip(self.tokens, self.log_weights):
            if weight > -math.inf:
                found[tuple(tokens)] = found.get(tuple(tokens), 0.0) + math.exp(weight - total)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def sample_texts(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    constraints: Constraint | Sequence[Constraint],
    *,
    vocabulary: Vocabulary,
    max_tokens: int,
    rng: jax.Array,
    options: SMC = PRESETS["awrs"],
    critic: Constraint | None = None,
    proposal: tuple[CausalLM, Params] | None = None,
) -> list[Sampled]:
    """Weighted texts that continue each prompt under its constraint.

    All particles of all prompts are the rows of one batch, in one compiled loop, which asks the host for checks.

    Args:
      prompts: token ids, none of them empty.
      constraints: one for each prompt, or one for all.
      vocabulary: of the model's tokenizer. The same one in later calls saves compiling again.
      max_tokens: the most new tokens, with the one that ends the text; at the last place, the end is forced.
      critic: weighs whole texts, and guides the search by its weights of their beginnings.
      proposal: another model of the same vocabulary, with its parameters. It draws the tokens. It must not exclude
        what the model allows.

    Raises:
      ValueError: a prompt is empty or too long, a constraint rejects the empty text or is not Boolean, the proposal has
        another vocabulary, or the logits are NaN.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1.")
    lengths = check_prompts(prompts, model.config.vocab_size)
    longest = min(each.config.max_length for each in (model, *(proposal or ())[:1]))
    if max(lengths) + max_tokens > longest:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and max_tokens = {max_tokens} exceed the model's max_length = "
            f"{longest}; shorten one of them."
        )
    if proposal is not None and options.awrs.estimator == "local":
        raise ValueError("a proposal was given, but the estimator is local, which corrects no weights.")
    if proposal is not None and proposal[0].config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"the proposal has {proposal[0].config.vocab_size} ids and the model {model.config.vocab_size}; their "
            "vocabularies must be equal."
        )
    known = vocabulary.known[: model.config.vocab_size].sum()
    if known < 0.1 * model.config.vocab_size:
        warnings.warn(f"only {known} of the model's {model.config.vocab_size} ids stand for text.", stacklevel=2)
    if critic is not None and options.constrain == "critic":
        raise ValueError("a critic was given, and constrain is critic; give one of them.")
    each = list(constraints) if isinstance(constraints, Sequence) else [constraints] * len(prompts)
    if len(each) != len(prompts):
        raise ValueError(f"there are {len(each)} constraints and {len(prompts)} prompts; give one for each, or one.")

    count = options.particles
    sampler = Sampler(
        model=CachedTokens(model),
        vocabulary=vocabulary,
        options=options,
        max_tokens=max_tokens,
        proposal=None if proposal is None else CachedTokens(proposal[0]),
    )
    with vocabulary.errors():
        place, judge = None, None
        many = [one for one in each for _ in range(count)]
        if options.constrain in ("awrs", "mask"):
            place = vocabulary.start(many)
        if options.constrain == "critic" or critic is not None:
            judge = vocabulary.start([critic] * len(many) if critic is not None else many)
        if options.constrain != "none" and any(one.score(one.start(vocabulary), False) == -math.inf for one in each):
            raise ValueError("a constraint rejects the empty text, with which all texts begin.")
        tokens = pad_prompts(prompts, model.config.max_length)
        index = np.repeat(np.arange(len(prompts)), count)

        def prefilled(which: CachedTokens, params: Params) -> Any:
            engine = Engine(model=which, chooser=Sampling(temperature=0))
            return which.take(engine.prefill(params, tokens, np.array(lengths), new=max_tokens).model, index)

        every = (jax.device_put(params), None if proposal is None else jax.device_put(proposal[1]))
        particles = sampler.begin(
            prefilled(sampler.model, every[0]),
            jnp.array([prompt[-1] for prompt in prompts], jnp.int32)[index],
            rng,
            place,
            judge,
            None if proposal is None else prefilled(sampler.proposal, every[1]),
        )
        done = jax.device_get(sampler.run(every, particles).replace(model=None, proposal=None, keys=None))
    if np.isnan(done.log_weights).any():
        raise ValueError("the logits are not numbers (NaN); check the parameters.")
    rows = [slice(first, first + count) for first in range(0, len(many), count)]
    return [
        Sampled(
            [text[:length].tolist() for text, length in zip(done.text[span], done.length[span])],
            done.log_weights[span].tolist(),
            int(done.checks[span].sum()),
            int(done.resampled[number]),
        )
        for number, span in enumerate(rows)
    ]

"""The decoding engine: prefill, then steps, each of which reads any number of new tokens a row.

One loop runs all of decoding: a step asks the drafter for a tree of tokens, the model reads it in one pass, and a walk
from the root draws a token after each node that it reaches, as plain decoding would, and goes on to the child that
holds this token (arXiv 2305.09781). Without a drafter, the tree is only its root. Shapes are static, rows may differ in
length, and the loop is compiled once.

A row's tokens depend only on its prompt, on the key and on its number in the batch. The draw for new token n of row b
has the key fold_in(fold_in(key, b), n), whatever else is in the batch, however the tokens are streamed, and with or
without drafts. So output with drafts equals output without them, token for token, sampled or greedy, except at near
ties, where the arithmetic of several tokens in one pass may round differently.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtok.decoding.protocols import Chooser, Drafter, Evictor, Prompted, SelfDrafter, TokenModel, Verified
from jaxtok.decoding.sampling import Sampling, row_keys, sampling_key, token_keys
from jaxtok.nn.transformer import layers_apart
from jaxtok.protocols import CausalLM, Params

_BUCKET = 64  # prompts are padded to a multiple of this, so that those of similar length share a compiled loop


@flax.struct.dataclass
class State:
    """All that decoding knows between two steps: a pytree of static shapes."""

    model: Any
    """The model's own state. For a CausalLM it is the cache, which holds all tokens of a row except the newest."""
    text: Int[Array, "batch room ..."]
    """The prompt and then the new tokens of each row."""
    logprobs: Float[Array, "batch room"]
    """The log probabilities of the new tokens in nats, by the model's own distribution, before temperature, top_k,
    top_p, `num_ids` or any constraint; summed over a token's parts."""
    start: Int[Array, " batch"]
    """Where the new tokens begin."""
    length: Int[Array, " batch"]
    """The number of tokens in a row so far."""
    limit: Int[Array, " batch"]
    """The length at which a row stops."""
    live: Bool[Array, " batch"]
    """Whether a row has not stopped yet."""
    steps: Int[Array, " batch"]
    """The number of steps that gave the row tokens; (length - start) / steps is the mean number of tokens per step."""
    stop: Int[Array, " stops"]
    """The tokens that end a row."""
    keys: Key[Array, " batch"]
    """The key of each row: that of the generation, folded with the number of the row."""
    chooser: Any
    drafter: Any
    evictor: Any


class Piece(NamedTuple):
    """The tokens that a part of a generation added to each row."""

    tokens: list[list[Any]]
    logprobs: list[list[float]]
    """See `State.logprobs`."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of `generate`."""

    tokens: list[list[int]]
    """The new tokens of each row, without the prompt, with the stop token that ended the row if one did."""
    logprobs: list[list[float]]
    """The log probability of each new token in nats; see `State.logprobs`."""
    steps: list[int]
    """The number of passes of the model that gave the row tokens."""
    state: State
    """The last state, with those of drafter and chooser; the model's own is None."""


@dataclasses.dataclass(frozen=True)
class CachedTokens:
    """A CausalLM as a `TokenModel` that can also verify drafts. Its state is the cache."""

    model: CausalLM

    @property
    def rewindable(self) -> bool:
        """Whether tokens can be taken out of the cache again."""
        return jax.eval_shape(lambda: self.model.init_cache(1, 1)).rewindable

    def read(
        self,
        params: Params,
        tokens: Int[Array, "batch new"],
        cache: Any,
        positions: Int[Array, "batch new"] | None = None,
        mask: Bool[Array, "batch new new"] | None = None,
        sow: bool = False,
    ) -> tuple[Float[Array, "batch new vocab"], Any, Any]:
        """Logits after each token, the cache with all of them, and the model's intermediates if `sow` (else None)."""
        # A token after the end of the context is never accepted, but its position must exist.
        positions = None if positions is None else jnp.minimum(positions, self.model.config.max_length - 1)
        given = {"positions": positions, "mask": mask}
        options: dict[str, Any] = {"cache": cache} | {name: x for name, x in given.items() if x is not None}
        if not sow:
            return *self.model.apply({"params": params}, tokens, **options), None
        out, sown = self.model.apply({"params": params}, tokens, mutable=["intermediates"], **options)
        return *out, sown["intermediates"]

    def resume(
        self,
        params: Params,
        hidden: Float[Array, "batch new d_model"],
        cache: Any,
        positions: Int[Array, "batch new"],
        first: int,
    ) -> tuple[Float[Array, "batch new vocab"], Any]:
        """What `read` gives, from the states of the newest tokens of the cache after its first layers."""
        layers = (first, self.model.config.num_layers)
        options: dict[str, Any] = {"layers": layers, "cache": cache, "positions": positions, "method": "hidden"}
        hidden, cache = self.model.apply({"params": params}, hidden, **options)
        return self.model.apply({"params": params}, hidden, method="head"), cache

    def step(self, params: Params, tokens, state, live):
        positions = jnp.where(live, state.next_position, -1)  # -1 is padding, which leaves no trace
        logits, cache, _ = self.read(params, tokens[:, None], state, positions[:, None])
        if self.rewindable:
            cache = cache.truncate(jnp.where(live, cache.length, state.length))
        return logits[:, 0], cache, live

    def take(self, state: Any, rows: Int[Array, " rows"]) -> Any:
        """The state with these rows of the batch, some of them perhaps several times."""
        one, two = (jax.tree.leaves(jax.eval_shape(lambda n=n: self.model.init_cache(n, 1))) for n in (1, 2))
        axes = [next((i for i in range(a.ndim) if a.shape[i] != b.shape[i]), None) for a, b in zip(one, two)]
        leaves, structure = jax.tree.flatten(state)
        taken = [x if axis is None else jnp.take(x, rows, axis) for x, axis in zip(leaves, axes, strict=True)]
        return structure.unflatten(taken)

    def keep(
        self,
        params: Params,
        tokens: Int[Array, "batch nodes"],
        before: Any,
        after: Any,
        path: Int[Array, "batch nodes"],
        count: Int[Array, " batch"],
        chain: bool,
    ) -> Any:
        """The cache with the accepted nodes only: the first `count` of `path`."""
        nodes = jnp.arange(tokens.shape[1])
        if not self.rewindable:  # the accepted nodes are read once more
            positions = jnp.where(nodes < count[:, None], before.next_position[:, None] + nodes, -1)
            return self.read(params, tokens, before, positions)[1]
        return after.truncate(before.length + count) if chain else after.keep_newest(len(nodes), path, count)


def ancestors(parents: Int[Array, "batch nodes"]) -> Bool[Array, "batch nodes nodes"]:
    """Whether node j is node i or one of its ancestors. A node without a parent counts as a child of the root.

    >>> import jax.numpy as jnp
    >>> ancestors(jnp.array([[-1, 0, 0, 1]]))[0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    """
    nodes = parents.shape[1]
    reach = jnp.eye(nodes, dtype=bool) | (jnp.arange(nodes) == jnp.maximum(parents, 0)[..., None])
    for _ in range(max(nodes - 1, 1).bit_length()):  # paths of up to 2, 4, 8, ... edges
        reach = jnp.einsum("bij,bjk->bik", reach.astype(jnp.float32), reach.astype(jnp.float32)) > 0
    return reach


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The static part of decoding: a model and what it is combined with. `generate` wraps it for prompts as lists.

    >>> import jax, jax.numpy as jnp
    >>> from jaxtok.lm.decoder import Decoder, init_params
    >>> from jaxtok.lm.llama import LlamaConfig
    >>> size = LlamaConfig(num_layers=1, d_model=8, num_heads=2, mlp_dim=8, vocab_size=16, max_length=32)
    >>> params = init_params(Decoder(size), jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> engine = Engine(model=CachedTokens(Decoder(size)), chooser=Sampling(temperature=0))
    >>> state = engine.prefill(params, jnp.array([[3, 1, 4], [1, 5, 0]]), jnp.array([3, 2]), new=4)
    >>> state = engine.step(params, state)
    >>> state.length.tolist(), state.model.length.tolist()
    ([4, 3], [3, 2])
    >>> pieces = [piece for piece, _ in engine.stream(params, state, chunk=2)]
    >>> [[len(row) for row in piece.tokens] for piece in pieces]
    [[2, 2], [1, 1]]
    """

    model: TokenModel
    """The model; a CausalLM is given as `CachedTokens`."""
    chooser: Chooser = Sampling()
    drafter: Drafter | SelfDrafter | None = None
    """Only for `CachedTokens`."""
    evictor: Evictor | None = None
    """Only for `CachedTokens`."""
    num_ids: int | None = None
    """Only ids below this are chosen; None: all."""

    def __post_init__(self):
        for name in ("drafter", "evictor"):
            if (given := getattr(self, name)) is None:
                continue
            if not isinstance(self.model, CachedTokens):
                raise ValueError(f"{name} is {given}; the model must then be a CausalLM, but it is {self.model}.")
            if not self.model.rewindable and not getattr(given, "chain", False):
                must = "must propose chains" if name == "drafter" else "must be None"
                raise ValueError(
                    f"{name} is {given}; it {must}, as tokens cannot be taken out of the cache of "
                    f"{type(self.model.model).__name__}."
                )
        if isinstance(self.drafter, SelfDrafter) and (not self.model.rewindable or self._sow):
            what = f"the evictor {self.evictor}, which observes all layers" if self._sow else f"the model {self.model}"
            raise ValueError(f"drafter is {self.drafter}, which runs some layers itself; it does not go with {what}.")

    @property
    def nodes(self) -> int:
        """The number of tokens of a row that a step reads."""
        return 1 if self.drafter is None else self.drafter.nodes

    def begin(
        self,
        state: Any,
        text: Int[Array, "batch prompt ..."],
        *,
        new: int,
        lengths: Int[Array, " batch"] | None = None,
        rng: jax.Array | None = None,
        stop: Int[Array, " stops"] | Sequence[int] = (),
        chooser: Any = None,
    ) -> State:
        """The state before the first step, from the model's own state.

        Args:
          state: the model's state, which has not seen the newest token of each row. `run` donates its arrays.
          text: the tokens that the rows begin with (at least the newest one), padded.
          new: the most new tokens of a row.
          lengths: the lengths of the rows; default: all of the text.
          rng: a key; needed unless the temperature is 0.
          stop: a row ends after the first of these tokens.
          chooser: the chooser's state; default: a new one.
        """
        text = jnp.asarray(text, jnp.int32)
        batch, longest = text.shape[:2]
        lengths = jnp.asarray(jnp.full(batch, longest) if lengths is None else lengths, jnp.int32)
        return State(
            model=state,
            text=jnp.pad(text, [(0, 0), (0, new), *[(0, 0)] * (text.ndim - 2)]),
            logprobs=jnp.zeros((batch, longest + new), jnp.float32),
            start=lengths,
            length=lengths,
            limit=lengths + new,
            live=jnp.ones(batch, bool),
            steps=jnp.zeros(batch, jnp.int32),
            stop=jnp.asarray(stop, jnp.int32),
            keys=row_keys(sampling_key(rng, self.chooser), batch),
            chooser=self.chooser.init(batch) if chooser is None else chooser,
            drafter=None,
            evictor=None,
        )

    def prefill(
        self,
        params: Params,
        tokens: Int[Array, "batch prompt"],
        lengths: Int[Array, " batch"],
        *,
        new: int,
        rng: jax.Array | None = None,
        stop: Int[Array, " stops"] | Sequence[int] = (),
        chooser: Any = None,
        drafter: Any = None,
        read: int | None = None,
    ) -> State:
        """The state before the first step of a CausalLM that continues prompts, which are padded to one length.

        All tokens of a prompt except the last go to the cache; the last one is the first that a step reads.

        Args:
          read: the model reads only so many tokens of each row; the rest must be padding. Default: all.
          drafter: the drafter's state, from an earlier generation or made by hand; default: a new one.
          new, rng, stop, chooser: as in `begin`.
        """
        stop = jnp.asarray(stop, jnp.int32)
        rng = sampling_key(rng, self.chooser)
        return self._prefill(params, tokens, lengths, rng, stop, chooser, drafter, new=new, read=read)

    @functools.partial(jax.jit, static_argnames=("self", "new", "read"))
    def _prefill(self, params, tokens, lengths, rng, stop, chooser, drafter, *, new, read) -> State:
        model, (batch, longest) = self.model.model, tokens.shape
        if self.nodes > model.config.max_length:
            raise ValueError(
                f"a draft has {self.nodes} tokens, and the model's max_length is {model.config.max_length}; choose a "
                "smaller tree."
            )
        lengths = lengths.astype(jnp.int32)
        room = min(longest + new, model.config.max_length) + self.nodes - 1
        cache = model.init_cache(batch, room if self.evictor is None else longest)
        if isinstance(model, Prompted):
            cache = model.prompted(cache, lengths, new)
        prompts = tokens[:, :read]
        numbers = jnp.broadcast_to(jnp.arange(prompts.shape[1]), prompts.shape)
        # The logits are not used unless a drafter does, so the compiler drops the head; a step reads the last token.
        logits, cache, sown = self.model.read(
            params, prompts, cache, jnp.where(numbers < lengths[:, None] - 1, numbers, -1), sow=self._sow
        )
        cache, evictor = cache.truncate(lengths - 1) if self.model.rewindable else cache, None
        if self.evictor is not None:
            evictor = self.evictor.init(cache)
            if self.evictor.observes:
                evictor = self.evictor.observe(evictor, cache, sown, numbers, lengths - 1)
            rows = cache.length > self.evictor.budget_of(evictor)
            cache, evictor = self.evictor.evict(evictor, cache, rows, self._slots())
        state = self.begin(cache, tokens, new=new, lengths=lengths, rng=rng, stop=stop, chooser=chooser)
        if self.drafter is not None:
            if drafter is None:
                drafter = self.drafter.init(batch, state.text.shape[1], model.config.vocab_size)
            drafter = self.drafter.begin(drafter, state.text, state.length, logits)
        return state.replace(drafter=drafter, evictor=evictor)

    def _slots(self) -> int:
        """The number of slots of a cache with an evictor."""
        return self.evictor.slots + self.evictor.every - 1 + self.nodes

    @property
    def _sow(self) -> bool:
        return self.evictor is not None and self.evictor.observes

    def step(self, params: Params, state: State) -> State:
        """One pass of the model: each row gets the tokens of its draft that are right, and one more."""
        batch = state.length.shape[0]
        rows, last = jnp.arange(batch), state.length - 1
        newest, most, sown = state.text[rows, last], state.limit - state.length, None
        if self.evictor is not None:
            room = self.evictor.budget_of(state.evictor) + self.evictor.every - state.model.length
            most = jnp.minimum(most, room)
        if self.drafter is None:
            tokens, parents = newest[:, None], jnp.full((batch, 1), -1, jnp.int32)
        elif isinstance(self.drafter, SelfDrafter):
            positions = state.model.next_position[:, None] + jnp.arange(self.nodes)
            positions = jnp.minimum(positions, self.model.model.config.max_length - 1)
            tokens, hidden, model = self.drafter.draft(
                self.model.model, params, state.drafter, newest, state.model, positions
            )
            parents = jnp.broadcast_to(jnp.arange(-1, self.nodes - 1), tokens.shape)
        else:
            tokens, parents = self.drafter.propose(state.drafter, state.text, state.length)
            tokens, parents = tokens.at[:, 0].set(newest).astype(jnp.int32), parents.at[:, 0].set(-1)
        chain = self.drafter is None or self.drafter.chain
        if self.drafter is None and self.evictor is None:
            logits, model, ready = self.model.step(params, newest, state.model, state.live)
            logits = logits[:, None]
        elif isinstance(self.drafter, SelfDrafter):
            logits, model = self.model.resume(params, hidden, model, positions, self.drafter.layers)
            ready = state.live
        else:
            seen = None if chain else ancestors(parents)
            depth = jnp.arange(self.nodes) if chain else seen.sum(-1) - 1
            positions = state.model.next_position[:, None] + depth
            logits, model, sown = self.model.read(params, tokens, state.model, positions, seen, sow=self._sow)
            ready = state.live
        walk = self._walk(state, logits, tokens, parents, ready & state.live, most)
        if self.drafter is not None or self.evictor is not None:
            model = self.model.keep(params, tokens, state.model, model, walk.path, walk.count, chain)

        index = state.length[:, None] + jnp.arange(self.nodes)
        index = jnp.where(jnp.arange(self.nodes) < walk.count[:, None], index, state.text.shape[1])
        state = state.replace(
            model=model,
            text=state.text.at[rows[:, None], index].set(walk.chosen, mode="drop"),
            logprobs=state.logprobs.at[rows[:, None], index].set(walk.logprobs, mode="drop"),
            length=state.length + walk.count,
            live=state.live & ~walk.stopped & (state.length + walk.count < state.limit),
            steps=state.steps + (walk.count > 0),
            chooser=walk.chooser,
        )
        if self.drafter is not None:
            verified = Verified(tokens, parents, logits, walk.path, walk.count, walk.chosen, state.live)
            state = state.replace(drafter=self.drafter.observe(state.drafter, verified))
        return state if self.evictor is None else self._evict(state, sown, walk)

    def _evict(self, state: State, sown, walk: _Walk) -> State:
        evictor = state.evictor
        if self.evictor.observes:
            evictor = self.evictor.observe(evictor, state.model, sown, walk.path, walk.count)
        full = state.model.length >= self.evictor.budget_of(evictor) + self.evictor.every
        cache, evictor = jax.lax.cond(
            full.any(),
            lambda cache, evictor: self.evictor.evict(evictor, cache, full, self._slots()),
            lambda cache, evictor: (cache, evictor),
            state.model,
            evictor,
        )
        return state.replace(model=cache, evictor=evictor)

    def _walk(self, state: State, logits, tokens, parents, ready, most) -> _Walk:
        """Walks from the root along the children that hold the chosen tokens, for up to `most` tokens a row."""
        batch, nodes = parents.shape
        rows, valid = jnp.arange(batch), parents >= 0

        def visit(walk: _Walk) -> _Walk:
            here = logits[rows, walk.node].astype(jnp.float32)
            keys = token_keys(state.keys, state.length - state.start + walk.count)
            allowed = here if self.num_ids is None else here[..., : self.num_ids]
            token, chooser = self.chooser.choose(allowed, keys, walk.chooser)
            logprob = jnp.take_along_axis(here, token[..., None], -1)[..., 0] - jax.nn.logsumexp(here, -1)
            logprob = logprob.reshape(batch, -1).sum(-1)
            count = walk.count + walk.going
            stopped = walk.going & jnp.isin(token, state.stop).reshape(batch, -1).any(-1)
            fits = valid & (parents == walk.node[:, None])
            fits &= (tokens == token[:, None]).reshape(batch, nodes, -1).all(-1)

            def put(array, value):
                if nodes == 1:  # a row that waits may be written too, as its entry is not read
                    return value[:, None]
                return array.at[rows, jnp.where(walk.going, walk.count, nodes)].set(value, mode="drop")

            return _Walk(
                node=jnp.argmax(fits, -1).astype(jnp.int32),
                going=walk.going & ~stopped & fits.any(-1) & (count < most),
                path=put(walk.path, walk.node),
                chosen=put(walk.chosen, token),
                logprobs=put(walk.logprobs, logprob),
                count=count,
                stopped=walk.stopped | stopped,
                chooser=jax.tree.map(functools.partial(_of_rows, walk.going), chooser, walk.chooser),
            )

        zeros = jnp.zeros(batch, jnp.int32)
        none = jnp.zeros((batch, nodes), jnp.int32)
        chosen = jnp.zeros_like(tokens)
        walk = _Walk(zeros, ready, none, chosen, none.astype(jnp.float32), zeros, zeros > 0, state.chooser)
        if nodes == 1:
            return visit(walk)
        return jax.lax.while_loop(lambda walk: walk.going.any(), visit, walk)

    def prepared(self, params: Params) -> Params:
        """The parameters as `run` is fastest with: those of a large model on a CPU with its layers apart."""
        reads_stack = self._sow or isinstance(self.drafter, SelfDrafter)
        apart = isinstance(self.model, CachedTokens) and not reads_stack
        return layers_apart(params, self.model.model.config) if apart else params

    def run(self, params: Params, state: State, until: int | Int[Array, ""] | None = None) -> State:
        """The state after steps until each row has `until` new tokens (default: all it may have) or has stopped.

        The arrays of `state.model` are donated to the new state.
        """
        until = jnp.asarray(jnp.iinfo(jnp.int32).max if until is None else until, jnp.int32)
        return self._run(params, state.model, state.replace(model=None), until)

    @functools.partial(jax.jit, static_argnames="self", donate_argnames="model")
    def _run(self, params, model, state: State, until) -> State:
        def goes_on(state: State):
            return (state.live & (state.length - state.start < until)).any()

        return jax.lax.while_loop(goes_on, functools.partial(self.step, params), state.replace(model=model))

    def stream(self, params: Params, state: State, chunk: int | None = None) -> Iterator[tuple[Piece, State]]:
        """Yields what `run` adds, every `chunk` tokens (None: all at once), until all rows have stopped.

        Drafts can give some rows more than `chunk` tokens at a time.

        Raises:
          ValueError: the logits are NaN.
        """
        params = self.prepared(params)
        given, live = jax.device_get((state.length, state.live))
        while live.any():
            until = None if chunk is None else (given - jax.device_get(state.start))[live].min() + chunk
            state = self.run(params, state, until)
            piece = new_tokens(state, given)
            given, live = jax.device_get((state.length, state.live))
            yield piece, state


def new_tokens(state: State, since: Int[np.ndarray, " batch"] | None = None) -> Piece:
    """The tokens of each row after the first `since` of its text; default: after its prompt.

    Raises:
      ValueError: their logits are NaN.
    """
    text, logprobs, start, length = jax.device_get((state.text, state.logprobs, state.start, state.length))
    spans = [slice(*span) for span in zip(start if since is None else since, length)]
    for row, span in zip(logprobs, spans):
        check_numbers(row[span])
    return Piece(*([row[span].tolist() for row, span in zip(rows, spans)] for rows in (text, logprobs)))


def check_numbers(logprobs: np.ndarray) -> None:
    """Raises a ValueError if log probabilities are NaN."""
    if np.isnan(logprobs).any():
        raise ValueError("the logits are not numbers (NaN); check the parameters.")


@flax.struct.dataclass
class _Walk:
    """Where the rows are in their trees, and which tokens they have got on the way."""

    node: Int[Array, " batch"]
    going: Bool[Array, " batch"]
    path: Int[Array, "batch nodes"]
    chosen: Int[Array, "batch nodes ..."]
    logprobs: Float[Array, "batch nodes"]
    count: Int[Array, " batch"]
    stopped: Bool[Array, " batch"]
    chooser: Any


def _of_rows(which: Bool[Array, " batch"], yes: Array, no: Array) -> Array:
    return jnp.where(which.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)


def generate(
    model: CausalLM,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    chooser: Chooser = Sampling(),
    drafter: Drafter | SelfDrafter | None = None,
    evictor: Evictor | None = None,
    rng: jax.Array | None = None,
    stop_tokens: Collection[int] = (),
    num_ids: int | None = None,
    on_tokens: Callable[[Piece], None] | None = None,
    chunk: int = 16,
    chooser_state: Any = None,
    drafter_state: Any = None,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens.

    A row's tokens depend on its prompt, on `rng` and on its number in the batch, not on the other rows, nor on `chunk`
    and `drafter`.

    Args:
      model: with a config that has `vocab_size` and `max_length`; hashable, as Linen modules with frozen configs are.
      params: its parameters.
      prompts: token ids, of any lengths.
      max_new_tokens: the most new tokens for each prompt.
      chooser: chooses each token.
      drafter: proposes several tokens at a time, which makes decoding faster and changes nothing else.
      evictor: keeps the cache at a fixed size; the model then no longer sees all of a long text.
      rng: a key; needed unless the temperature is 0.
      stop_tokens: a row ends after the first of these.
      num_ids: only ids below this are chosen; for a padded vocabulary, it is the tokenizer's vocabulary size.
      on_tokens: called with each row's new tokens and log probabilities, every `chunk` tokens (streaming).
      chunk: the tokens a row gets between two of these calls.
      chooser_state, drafter_state: their first states; default: new ones. The last states are in the returned `state`.

    Raises:
      ValueError: there is no prompt, an empty one or one with an unknown id; the tokens exceed max_length; or rng is
        missing.

    >>> import jax, jax.numpy as jnp
    >>> from jaxtok.decoding import PromptLookup, Sampling, generate
    >>> from jaxtok.lm.decoder import Decoder, init_params
    >>> from jaxtok.lm.llama import LlamaConfig
    >>> size = LlamaConfig(num_layers=1, d_model=8, num_heads=2, mlp_dim=8, vocab_size=16, max_length=64)
    >>> params = init_params(Decoder(size), jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> greedy = {"max_new_tokens": 20, "chooser": Sampling(temperature=0)}
    >>> plain = generate(Decoder(size), params, [[3, 1, 4, 1], [5]], **greedy)
    >>> [len(row) for row in plain.tokens], plain.steps
    ([20, 20], [20, 20])
    >>> drafted = generate(Decoder(size), params, [[3, 1, 4, 1], [5]], drafter=PromptLookup(), **greedy)
    >>> drafted.tokens == plain.tokens, max(drafted.steps) < 20
    (True, True)
    """
    vocab, max_length = model.config.vocab_size, model.config.max_length
    if max_new_tokens < 1 or chunk < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens} and chunk is {chunk}; both must be at least 1.")
    if num_ids is not None and not 1 <= num_ids <= vocab:
        raise ValueError(f"num_ids is {num_ids}; it must be between 1 and the model's vocab_size = {vocab}.")
    if unknown := [token for token in stop_tokens if not 0 <= token < vocab]:
        raise ValueError(f"stop_tokens has {unknown[0]}; ids are 0 to {vocab - 1}.")
    rng = sampling_key(rng, chooser)
    tokens, lengths = padded_prompts(prompts, vocab, max_length, max_new_tokens)
    read = max(8, 1 << (int(lengths.max()) - 1).bit_length())  # less than a bucket for short prompts
    num_ids = None if num_ids == vocab else num_ids
    params = jax.device_put(params)  # once, not with every piece
    evictor = None if evictor is None else evictor.fit(model, tokens.shape[1], max_new_tokens)
    engine = Engine(model=CachedTokens(model), chooser=chooser, drafter=drafter, evictor=evictor, num_ids=num_ids)
    state = engine.prefill(
        params,
        tokens,
        lengths,
        new=max_new_tokens,
        rng=rng,
        stop=sorted(stop_tokens),
        chooser=chooser_state,
        drafter=drafter_state,
        read=min(read, tokens.shape[1]) if read < _BUCKET else None,
    )
    for piece, state in engine.stream(params, state, chunk if on_tokens else None):  # noqa: B007, B020
        if on_tokens:
            on_tokens(piece)
    return Generation(*new_tokens(state), jax.device_get(state.steps).tolist(), state.replace(model=None))


def padded_prompts(
    prompts: Sequence[Sequence[int]], vocab: int, max_length: int, max_new_tokens: int
) -> tuple[Int[np.ndarray, "batch prompt"], Int[np.ndarray, " batch"]]:
    """The prompts as `pad_prompts` gives them, and their lengths.

    Raises:
      ValueError: as `check_prompts`; or the tokens exceed max_length.
    """
    lengths = check_prompts(prompts, vocab)
    if max(lengths) + max_new_tokens > max_length:
        raise ValueError(
            f"a prompt of {max(lengths)} tokens and max_new_tokens = {max_new_tokens} exceed the model's max_length = "
            f"{max_length}; shorten one of them."
        )
    return pad_prompts(prompts, max_length), np.array(lengths, np.int32)


def pad_prompts(prompts: Sequence[Sequence[int]], max_length: int) -> Int[np.ndarray, "batch prompt"]:
    """The prompts, padded to a length that those of similar lengths share, so that they share a compiled function."""
    tokens = np.zeros((len(prompts), min(-(-max(map(len, prompts)) // _BUCKET) * _BUCKET, max_length)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens


def check_prompts(prompts: Sequence[Sequence[int]], vocab: int) -> list[int]:
    """The prompts' lengths.

    Raises:
      ValueError: there is none, or one is empty or has an unknown id.
    """
    if not len(prompts):
        raise ValueError("there is no prompt; give at least one.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty; begin it with the tokenizer's eod_id.")
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= vocab:
            raise ValueError(
                f"prompt {number} has the id {low if low < 0 else high}, but the model's vocabulary has the ids 0 to "
                f"{vocab - 1}; encode it with the model's own tokenizer."
            )
    return [len(prompt) for prompt in prompts]

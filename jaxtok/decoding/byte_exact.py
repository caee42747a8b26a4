"""Exact byte-level probabilities of a tokenized language model (arXiv 2410.09303): any CausalLM as a model of bytes.

A text x of bytes is covered by a valid token sequence t if x begins dec(t), but not dec(t without its last token). Then
(Byte-Token Representation Lemma)

    P(x) = sum over covers t of P(t),        P(next byte b | x) = P(x b) / P(x),

and the covers of x b are those covers of x whose next byte is b, and, for each t that spells x exactly, t with one more
token that begins with b. So a byte costs a new row of the model only for the sequences that it completes: one, as the
encoding of x is unique, or now and then none, or two where a tokenizer looks ahead.

The model and the sums run on the device, batched, with static shapes: `ByteState` keeps a row of log probabilities for
each open sequence, summed over the nodes of the vocabulary's trie. Which sequences a byte completes, and which tokens
are valid after them, depends on the tokenizer, so a callback tells (`jaxtok.decoding.byte_vocabulary`). The sequences
share one cache, in which each sees the slots of its own tokens only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxtok.decoding.byte_vocabulary import POLICIES, ByteVocabulary, Exact, Plan, Policy, Trie
from jaxtok.decoding.engine import check_numbers
from jaxtok.nn.cache import EMPTY
from jaxtok.protocols import CausalLM, Params

NOTHING = -1
"""A symbol that stands for no byte: a row stays as it is."""

_BUCKET = 64  # prompts are padded to a multiple of it, so that those of similar length share a compiled function


@flax.struct.dataclass
class ByteState:
    """What is known of the texts of a batch. A row's anchor is a place in its prompt; see `ByteVocabulary.anchored`."""

    cache: Any
    root: Int[Array, " batch"]
    """The last token before the anchor."""
    start: Int[Array, " batch"]
    """How many tokens come before it; the cache has those, and then an entry for each exact sequence."""
    text: Int[Array, "batch room"]
    """The bytes since the anchor."""
    length: Int[Array, " batch"]
    prompt: Int[Array, " batch"]
    """How many of them are the prompt's; see `ExactBytes.policy`."""
    mass: Float[Array, "batch slots nodes_and_vocab"]
    """For each open sequence, the log probability that the next token begins with a node's bytes; then those of the
    tokens themselves."""
    weight: Float[Array, "batch slots"]
    """The log probability of each open sequence, less `logprob`."""
    node: Int[Array, "batch slots"]
    """The node of the trie that the bytes after each sequence have reached; -1: there is none in this slot."""
    logprob: Float[Array, " batch"]
    """The log probability of the bytes since the anchor, in nats: the logarithm of the sum over their covers."""
    next_mass: Float[Array, " batch"]
    """The same with one more symbol, summed over all. It is less where the model leaks to invalid tokens."""
    next: Float[Array, "batch symbols"]
    """The log probabilities of the next symbol, given the bytes so far."""
    rows: Int[Array, " batch"]
    """How many rows of the model were needed since the anchor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactBytes:
    """A CausalLM as a model of bytes.

    >>> import jax, jax.numpy as jnp
    >>> from jaxtok.decoding.byte_vocabulary import vocabulary_of
    >>> from jaxtok.lm.decoder import Decoder, init_params
    >>> from jaxtok.lm.llama import LlamaConfig
    >>> from jaxtok.tokenizers import ByteTokenizer
    >>> size = LlamaConfig(num_layers=1, d_model=8, num_heads=2, mlp_dim=8, vocab_size=257, max_length=32)
    >>> params = init_params(Decoder(size), jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> model = ExactBytes(model=Decoder(size), vocabulary=vocabulary_of(ByteTokenizer()))
    >>> state = model.prefill(params, [b"ab", b"a"], [[256], [256]], new=4)
    >>> state.next.shape
    (2, 257)

    Raises:
      ValueError: an option is out of range, or the model has fewer ids than the tokenizer.
    """

    model: CausalLM
    vocabulary: ByteVocabulary
    policy: Policy = "truncate"
    """What becomes of the mass that the model gives to invalid next tokens. truncate: it is left out, and the vector of
    next symbols is normalised (the official code); truncate_renormalize: each token's distribution is normalised
    without it (the paper); none: it counts, though sequences that are not valid are lost when a byte completes them;
    prompt: truncate before the end of the prompt, none from there on (the official code's fast mode)."""
    slots: int = 0
    """The most open sequences of a text; 0: two for each byte of the longest token, and at most 32."""
    completes: int = 4
    """The most sequences that a byte completes."""

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; it must be one of {', '.join(POLICIES)}.")
        for field, low in (("slots", 0), ("completes", 1)):
            if getattr(self, field) < low:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {low}.")
        if self.model.config.vocab_size < (ids := self.vocabulary.tokenizer.vocab_size):
            raise ValueError(
                f"the model has {self.model.config.vocab_size} ids, and its tokenizer {ids}; give the model's own."
            )

    @property
    def _slots(self) -> int:
        return self.slots or min(2 * self.vocabulary.longest + 2, 32)

    @property
    def ids(self) -> int:
        """The ids of the tokenizer: rows of the model beyond them are no tokens, and get no probability."""
        return self.vocabulary.tokenizer.vocab_size

    # The beginning.

    def prefill(
        self,
        params: Params,
        prompts: Sequence[bytes],
        contexts: Sequence[Sequence[int]],
        *,
        new: int,
        inside: bool = False,
    ) -> ByteState:
        """The state after prompts of bytes.

        Args:
          prompts: texts, that may end inside a token, or inside a character.
          contexts: the tokens before each of them, at least one: what begins every text, or sentinels and the suffix
            of a gap. They are conditioned on; validity is that of the tokens after them.
          new: the most bytes that will follow.
          inside: whether the prompts go on after their contexts, so that the tokenizer does not write before them what
            it writes before a text (SentencePiece's space).

        Raises:
          ValueError: a context is empty, a prompt is not what the tokenizer can represent, or too long for the model,
            or the logits are NaN.
        """
        chains, rests = [], []
        for number, (text, context) in enumerate(zip(prompts, contexts, strict=True)):
            if not len(context):
                raise ValueError(
                    f"nothing comes before prompt {number}, so its first token has no probability; give a token that "
                    "begins texts."
                )
            tokens, rest = self.vocabulary.anchored(text, inside)
            chains.append([*context, *tokens])
            rests.append(rest)
        longest, least = self.model.config.max_length, max(map(len, chains))
        if least >= longest:
            raise ValueError(f"a prompt has {least} tokens; the model's max_length is {longest}.")
        lengths = np.array([*map(len, chains)], np.int32)
        chain = _padded(chains, min(-(-int(lengths.max()) // _BUCKET) * _BUCKET, longest))
        counts = np.array([*map(len, rests)], np.int32)
        rest = _padded(rests, -(-max(int(counts.max()), 1) // 32) * 32)
        with value_errors():
            state = self._prefill(params, chain, lengths, rest, counts, new=new)
            logprob = np.asarray(state.logprob)
        check_numbers(np.asarray(state.next))
        if len(impossible := np.flatnonzero(np.isneginf(logprob))):
            text = prompts[impossible[0]]
            raise ValueError(f"no tokens of the vocabulary cover prompt {impossible[0]}, which ends in {text[-20:]!r}.")
        return state

    @functools.partial(jax.jit, static_argnames=("self", "new"))
    def _prefill(self, params, chain, lengths, rest, counts, *, new: int) -> ByteState:
        (batch, longest), room = chain.shape, rest.shape[1] + new
        cache = self.model.init_cache(batch, longest + _entries(room))
        if not hasattr(cache, "positions") or not cache.rewindable:
            raise ValueError(
                f"{type(self.model).__name__} keeps a state and not its tokens, so token sequences that share a part "
                "cannot share its cache; exact bytes need a model with a cache of slots."
            )
        numbers = jnp.broadcast_to(jnp.arange(longest), chain.shape)
        positions = jnp.where(numbers < lengths[:, None] - 1, numbers, EMPTY)
        if longest > 1:  # all but the last token, which the first entry reads
            _, cache = self.model.apply({"params": params}, chain, positions=positions, cache=cache)
        cache = cache.truncate(lengths - 1)
        trie, dtype = self.vocabulary.trie, jax.dtypes.canonicalize_dtype(jnp.float64)
        empty = functools.partial(jnp.full, fill_value=-jnp.inf, dtype=dtype)
        state = ByteState(
            cache=cache,
            root=jnp.take_along_axis(chain, lengths[:, None] - 1, 1)[:, 0],
            start=lengths - 1,
            text=jnp.zeros((batch, room), jnp.int32),
            length=jnp.zeros(batch, jnp.int32),
            prompt=counts,
            mass=empty((batch, self._slots, trie.nodes + self.ids)),
            weight=empty((batch, self._slots)),
            node=jnp.full((batch, self._slots), -1),
            logprob=jnp.zeros(batch, dtype),
            next_mass=jnp.zeros(batch, dtype),
            next=empty((batch, self.vocabulary.symbols)),
            rows=jnp.zeros(batch, jnp.int32),
        )
        state = self._covered(params, state, jnp.ones(batch, bool))
        return self._absorb_all(params, state, rest, counts)

    def _absorb_all(self, params: Params, state: ByteState, text, counts) -> ByteState:
        def body(n, state):
            return self.absorb(params, state, text[:, n], n < counts)

        return jax.lax.fori_loop(0, counts.max(), body, state)

    # A byte.

    def absorb(
        self, params: Params, state: ByteState, symbols: Int[Array, " batch"], live: Bool[Array, " batch"]
    ) -> ByteState:
        """The state after another byte of the rows that are live; other symbols leave a row as it is."""
        fresh = live & (symbols >= 0) & (symbols < 256)
        rows, room = jnp.arange(len(symbols)), state.text.shape[1]
        text = state.text.at[rows, jnp.where(fresh, state.length, room)].set(symbols.astype(jnp.int32), mode="drop")
        return self._covered(params, state.replace(text=text, length=state.length + fresh), fresh)

    def _covered(self, params: Params, state: ByteState, fresh: Bool[Array, " batch"]) -> ByteState:
        """The state with the covers of its texts, of which the fresh ones have got longer by a byte."""
        plan = self._plan(state)
        count = jnp.where(fresh, (plan.token >= 0).sum(-1), 0)

        def read(n, state):
            return self._read(params, state, Plan(*(x[:, n] for x in plan[:5]), *plan[5:]), n < count)

        state = jax.lax.fori_loop(0, count.max(), read, state)
        state = state.replace(node=plan.node)
        values = _next_masses(state, plan.ends, self.vocabulary.trie, self.vocabulary.specials)
        # A cover's last token is longer than the node's string, or the sequence spells the text exactly.
        longer = jax.nn.logsumexp(values[..., :256], -1)
        covers = jnp.where(state.node == 0, state.weight, longer)
        total = jnp.where(fresh, jax.nn.logsumexp(covers, -1), 0)
        shift = jnp.where(jnp.isfinite(total), total, 0)
        state = state.replace(weight=state.weight - shift[:, None], logprob=state.logprob + total)
        symbols = jax.nn.logsumexp(values, 1) - shift[:, None]
        total = jax.nn.logsumexp(symbols, -1)
        following = symbols - jnp.where(jnp.isfinite(total), total, 0)[:, None]
        return state.replace(next=following, next_mass=state.logprob + total)

    def _plan(self, state: ByteState) -> Plan:
        """See `ByteVocabulary.plan`, which is a function of the bytes since the anchor."""
        batch, entries = len(state.length), _entries(state.text.shape[1])
        shape, new = jax.ShapeDtypeStruct, self.completes
        result = Plan(
            *[shape((batch, new), np.int32)] * 3,
            shape((batch, new, entries), bool),
            shape((batch, new, self.ids), bool),
            shape((batch, self._slots), np.int32),
            shape((batch, self._slots), bool),
        )

        def plan(text, length, prompt):
            raw = np.asarray(text).astype(np.uint8)
            texts = [row[:count].tobytes() for row, count in zip(raw, np.asarray(length))]
            prompts = np.asarray(prompt).tolist()
            return self.vocabulary.plan(texts, self._slots, entries, self.ids, new, self.policy, prompts)

        return jax.pure_callback(plan, result, state.text, state.length, state.prompt)

    def _read(self, params: Params, state: ByteState, new: Plan, present: Bool[Array, " batch"]) -> ByteState:
        """The state with the row of the model after one more exact sequence a row, whose last token is read.

        Args:
          new: with one sequence a row.
        """
        rows, first = jnp.arange(len(present)), new.parent < 0
        token = jnp.where(first, state.root, new.token)
        cache, place = state.cache, jnp.arange(state.cache.slots)
        entry = place - state.start[:, None]  # of each slot; those before belong to all sequences
        path = jnp.take_along_axis(new.path, jnp.clip(entry, 0, new.path.shape[1] - 1), 1)
        seen = jnp.where(entry < 0, True, path & (entry < new.path.shape[1]))
        position = jnp.where(present, state.start + new.path.sum(-1) - 1, EMPTY)
        visible = cache.replace(positions=jnp.where(seen[None, :, :, None], cache.positions, EMPTY))
        logits, after = self.model.apply({"params": params}, token[:, None], positions=position[:, None], cache=visible)
        old = (place < cache.length[:, None])[None, :, :, None]
        after = after.replace(positions=jnp.where(old, cache.positions, after.positions))
        after = after.truncate(cache.length + present)

        logits = logits[:, 0, : self.ids].astype(state.mass.dtype)
        row = jnp.where(new.follow, jax.nn.log_softmax(logits), -jnp.inf)
        if self.policy == "truncate_renormalize":
            row = jax.nn.log_softmax(row)
        mass = jnp.concatenate([_node_masses(row, self.vocabulary.trie), row], -1)
        parent, nodes = jnp.maximum(new.parent, 0), self.vocabulary.trie.nodes
        weight = jnp.where(first, 0.0, state.weight[rows, parent] + state.mass[rows, parent, nodes + token])
        slot = jnp.where(present, new.slot, self._slots)
        return state.replace(
            cache=after,
            mass=state.mass.at[rows, slot].set(mass, mode="drop"),
            weight=state.weight.at[rows, slot].set(weight, mode="drop"),
            rows=state.rows + present,
        )

    # Covers.

    def draw(
        self, state: ByteState, keys: Key[Array, " batch"], likeliest: bool = False
    ) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
        """A cover of each text, drawn with its probability: the slot of an open sequence, and the token that follows.

        The token is -1 for the sequence that spells the text exactly.

        Args:
          likeliest: take the likeliest cover.
        """
        vocab, batch = self.ids, len(state.node)
        scores = jnp.where(_longer(state.node, self.vocabulary.trie, vocab), state.mass[..., -vocab:], -jnp.inf)
        exact = jnp.where(state.node == 0, 0.0, -jnp.inf)
        scores = jnp.concatenate([scores, exact[..., None]], -1) + state.weight[..., None]
        scores = scores.reshape(batch, -1)
        drawn = scores.argmax(-1) if likeliest else jax.vmap(jax.random.categorical)(keys, scores)
        slot, token = drawn // (vocab + 1), drawn % (vocab + 1)
        return slot.astype(jnp.int32), jnp.where(token == vocab, NOTHING, token).astype(jnp.int32)

    def open(self, state: ByteState, row: int) -> list[tuple[Exact, int]]:
        """The open sequences of a row, each with the node of the trie that it has reached."""
        text = np.asarray(state.text[row, : int(state.length[row])]).astype(np.uint8).tobytes()
        covers = self.vocabulary.covers(text, self._slots, self.policy, int(state.prompt[row]))
        return list(covers.open)

    def covers(self, state: ByteState, row: int) -> dict[tuple[int, ...], float]:
        """The covers of a row's text, as their tokens after the anchor, with their log probabilities in nats."""
        trie, found = self.vocabulary.trie, {}
        mass, weight = np.asarray(state.mass[row]), np.asarray(state.weight[row]) + float(state.logprob[row])
        for open_, node in self.open(state, row):
            if node == 0:
                found[open_.tokens] = float(weight[open_.slot])
                continue
            for token in trie.order[trie.low[node] + len(trie.ending[node]) : trie.high[node]]:
                if (logprob := weight[open_.slot] + mass[open_.slot, trie.nodes + token]) > -np.inf:
                    found[*open_.tokens, int(token)] = float(logprob)
        return found


def _entries(room: int) -> int:
    """The room for exact sequences of a text; a byte completes about one."""
    return room + room // 4 + 8


def _node_masses(row: Float[Array, "batch vocab"], trie: Trie) -> Float[Array, "batch nodes"]:
    """The log of the summed probabilities of the tokens that begin with each node's bytes.

    In float32, a token that is exp(87) times less likely than the likeliest one counts as impossible.
    """
    most = row.max(-1, keepdims=True)
    most = jnp.where(jnp.isfinite(most), most, 0)
    share = jnp.exp(row - most)[:, jnp.asarray(trie.token_of)]
    total = functools.partial(jax.ops.segment_sum, num_segments=trie.nodes, indices_are_sorted=True)
    return most + jnp.log(jax.vmap(total, (0, None))(share, jnp.asarray(trie.node_of)))


def _next_masses(
    state: ByteState, ends: Bool[Array, "batch slots"], trie: Trie, specials: Sequence[int]
) -> Float[Array, "batch slots symbols"]:
    """The log masses of the next symbols after each open sequence: of the 256 bytes, then of the special tokens."""
    batch, slots = state.node.shape
    rows, node = jnp.arange(batch)[:, None, None], jnp.maximum(state.node, 0)
    child = jnp.arange(256)
    index = jnp.minimum(jnp.asarray(trie.first)[node][..., None] + child, trie.nodes - 1)
    there = (child < jnp.asarray(trie.count)[node][..., None]) & (state.node >= 0)[..., None]
    values = state.mass[rows, jnp.arange(slots)[:, None], index] + state.weight[..., None]
    symbol = jnp.where(there, jnp.asarray(trie.symbol)[index], 256)
    spread = jnp.full((batch, slots, 256), -jnp.inf, values.dtype)
    spread = spread.at[rows, jnp.arange(slots)[:, None], symbol].set(values, mode="drop")
    special = state.mass[..., trie.nodes + jnp.asarray(specials, jnp.int32)] + state.weight[..., None]
    special = jnp.where(ends[..., None], special, -jnp.inf)
    return jnp.concatenate([spread, special], -1)


def _longer(node: Int[Array, "batch slots"], trie: Trie, vocab: int) -> Bool[Array, "batch slots vocab"]:
    """Which tokens are longer than the strings of the nodes that they begin with; none at the root."""
    place = np.full(vocab, -1, np.int32)
    place[trie.order] = np.arange(len(trie.order))
    low = jnp.asarray(trie.low + np.array([*map(len, trie.ending)], np.int32))[jnp.maximum(node, 0)]
    high = jnp.asarray(trie.high)[jnp.maximum(node, 0)]
    place = jnp.asarray(place)
    return (place >= low[..., None]) & (place < high[..., None]) & (node > 0)[..., None]


def _padded(rows: Sequence[Sequence[int]], length: int) -> Int[np.ndarray, "batch length"]:
    array = np.zeros((len(rows), length), np.int32)
    for row, values in zip(array, rows):
        row[: len(values)] = list(values)
    return array


@contextlib.contextmanager
def value_errors() -> Iterator[None]:
    """Raises the ValueError of a callback as one."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _, found, message = str(error).rpartition("ValueError: ")
        if not found:
            raise
        raise ValueError(message.strip().splitlines()[0]) from None

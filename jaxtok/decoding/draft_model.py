"""A second, smaller model of the same vocabulary as a drafter (speculative decoding, arXiv 2211.17192 and 2302.01318).

It drafts a chain greedily. The papers draw drafts from the small model's distribution and accept them by the ratio of
both; here, as with every drafter, the target draws each token itself, and a draft is right if it is that token. That
gives the same distribution, and the same tokens as without drafts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtok.decoding.engine import CachedTokens
from jaxtok.decoding.protocols import Drafter, Verified
from jaxtok.protocols import CausalLM, Params


@flax.struct.dataclass
class DraftModelState:
    """The draft model's parameters, and its cache, which holds all tokens of a row except the newest."""

    params: Params
    cache: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftModel(Drafter):
    """A `jaxtok.decoding.protocols.Drafter`. `generate` takes its `first_state(params)` as `drafter_state`.

    In a round it reads `tokens` tokens one by one, and then, in one pass, the tokens that were accepted; only these
    stay in its cache. Where a text is longer than its context, it drafts nothing.

    >>> import jax, jax.numpy as jnp
    >>> from jaxtok.decoding import Sampling, generate
    >>> from jaxtok.lm.decoder import Decoder, init_params
    >>> from jaxtok.lm.llama import LlamaConfig
    >>> size = LlamaConfig(num_layers=1, d_model=8, num_heads=2, mlp_dim=8, vocab_size=16, max_length=64)
    >>> params = init_params(Decoder(size), jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    >>> drafter = DraftModel(model=Decoder(size), tokens=3)  # itself, which is always right
    >>> options = {"drafter": drafter, "drafter_state": drafter.first_state(params), "chooser": Sampling(temperature=0)}
    >>> generate(Decoder(size), params, [[3, 1, 4], [5]], max_new_tokens=12, **options).steps
    [3, 3]
    """

    model: CausalLM
    tokens: int = 4
    """The number of tokens of a draft."""

    chain = True

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 1.")

    @property
    def nodes(self) -> int:
        return 1 + self.tokens

    def first_state(self, params: Params) -> DraftModelState:
        """The state before a generation."""
        return DraftModelState(params)

    def init(self, batch: int, room: int, vocab: int) -> DraftModelState:
        raise ValueError("the draft model has no parameters; give its first_state(params) as drafter_state.")

    def begin(
        self,
        state: DraftModelState,
        text: Int[Array, "batch room"],
        length: Int[Array, " batch"],
        logits: Float[Array, "batch prompt vocab"],
    ) -> DraftModelState:
        vocab, longest = self.model.config.vocab_size, self.model.config.max_length
        if vocab != logits.shape[-1]:
            raise ValueError(
                f"the draft model has a vocabulary of {vocab} tokens, and the model one of {logits.shape[-1]}; "
                "they must have the same tokenizer."
            )
        cache = self.model.init_cache(text.shape[0], min(text.shape[1], longest) + self.nodes)
        prompt = text[:, : min(logits.shape[1], longest)]
        return state.replace(cache=self._append(state.params, prompt, cache, length - 1))

    def propose(
        self, state: DraftModelState, text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        def draft(carry, number):
            token, cache = carry
            logits, cache, _ = CachedTokens(self.model).read(
                state.params, token[:, None], cache, (length - 1 + number)[:, None]
            )
            token = logits[:, 0].argmax(-1).astype(jnp.int32)
            return (token, cache), token

        newest = text[jnp.arange(text.shape[0]), length - 1]
        _, drafted = jax.lax.scan(draft, (newest, state.cache), jnp.arange(self.tokens))
        number = jnp.arange(self.nodes)
        # Node n was drafted from the token at position length - 2 + n.
        known = (number > 0) & (length[:, None] - 2 + number < self.model.config.max_length)
        return jnp.concatenate([newest[:, None], drafted.T], 1), jnp.where(known, number - 1, -1)

    def observe(self, state: DraftModelState, verified: Verified) -> DraftModelState:
        """Reads the root and the tokens that the row got except the newest, `nodes` at a time: in a union there may be
        more of them than this drafter has proposed, but rarely as many as the tree has nodes."""
        tokens = jnp.concatenate([verified.tokens[:, :1], verified.chosen], 1)
        tokens = jnp.pad(tokens, ((0, 0), (0, self.nodes)))

        def more(carry):
            first, cache = carry
            block = jax.lax.dynamic_slice_in_dim(tokens, first, self.nodes, 1)
            return first + self.nodes, self._append(state.params, block, cache, verified.count - first)

        carry = jnp.int32(0), state.cache
        _, cache = jax.lax.while_loop(lambda carry: (carry[0] < verified.count).any(), more, carry)
        return state.replace(cache=cache)

    def _append(self, params: Params, tokens: Int[Array, "batch new"], cache: Any, count: Int[Array, " batch"]) -> Any:
        """The cache with the first `count` tokens of each row, up to the end of the context."""
        reader, number = CachedTokens(self.model), jnp.arange(tokens.shape[1])
        positions = cache.next_position[:, None] + number
        read = (number < count[:, None]) & (positions < self.model.config.max_length)
        _, after, _ = reader.read(params, tokens, cache, jnp.where(read, positions, -1))
        return after.truncate(cache.length + read.sum(1)) if reader.rewindable else after

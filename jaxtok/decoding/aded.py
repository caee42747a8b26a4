"""ADED (Liu et al. 2025, arXiv 2407.12021): drafts from a table of trigrams that adapts to the text as it is produced.

A table says which tokens follow a bigram (`jaxtok.decoding.trigram_table`). Before each step of the model, the newest
trigrams of the text are strengthened in it, and a Monte-Carlo tree search looks for the most promising continuations of
the newest bigram; the model verifies them as one tree. Nothing is trained, and nothing is learnt from drafts that were
rejected.

The authors' code (Adaptix, and its drafter `draftretriever`) is followed, with these differences. The reward of a
sentence adds the scores of its trigrams, as the paper describes; the code looks up another token by mistake
(`reward="published"`). What the code does in the order of a hash map is done in the order of scores. A bigram without a
row gives no draft; the code guesses a token then. Sampling is exact (the engine's own), which the code's is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxtok.decoding.protocols import Drafter, Verified
from jaxtok.decoding.trigram_table import TrigramTable

Rows = Callable[[Int[Array, "*queries 2"]], tuple[Int[Array, "*queries width"], Float[Array, "*queries width"]]]
"""The successors of bigrams, by falling scores, and these scores."""


@flax.struct.dataclass
class ADEDState:
    """The state of `ADED`. `ADEDState(table)` begins with a table of one's own."""

    table: TrigramTable
    """The table that all rows of the batch have in common; with `shared`, it adapts to all of their texts."""
    own: TrigramTable | None = None
    """What the text of each row has changed, a table with a leading axis of rows; None: not begun, or `shared`."""
    recent: Int[Array, "batch window"] | None = None
    """The newest tokens of each row, which have been counted; -1 before its beginning."""


@flax.struct.dataclass
class Search:
    """The nodes of a search, in the order in which they were made; node 0 is the root."""

    parent: Int[Array, " nodes"]
    previous: Int[Array, " nodes"]
    """The token before the node's own: with it, the node's bigram."""
    token: Int[Array, " nodes"]
    depth: Int[Array, " nodes"]
    first: Int[Array, " nodes"]
    """The first child; the others follow it. 0: the node has not been expanded."""
    children: Int[Array, " nodes"]
    visits: Int[Array, " nodes"]
    total: Float[Array, " nodes"]
    """The sum of the rewards of all visits."""
    prior: Float[Array, " nodes"]
    """The score of the node's token after its parent's bigram."""
    reward: Float[Array, " nodes"]
    """The reward of the sentence from the root to the node."""
    count: Int[Array, ""]
    """The number of nodes; entries from here on mean nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADED(Drafter):
    """A `jaxtok.decoding.protocols.Drafter` whose state is a table of trigrams.

    Each row adapts the table for itself: its drafts then depend on nothing but the table and its own text, and not on
    other requests. With `shared`, as published, all texts adapt one table, which can be kept for the next generation
    (`Generation.state.drafter`). The state that a row has adapted for itself is dropped when a new generation begins.

    >>> import jax.numpy as jnp
    >>> from jaxtok.decoding.trigram_table import build_table
    >>> table = build_table([[1, 2, 3, 4, 5, 1, 2, 3, 7], [1, 2, 4]], vocab_size=10)
    >>> drafter = ADED(nodes=8)
    >>> text, length = jnp.array([[8, 1, 2, 0, 0, 0]]), jnp.array([3])
    >>> tokens, parents = drafter.propose(drafter.begin(ADEDState(table), text, length), text, length)
    >>> tokens[0, 1:].tolist(), parents[0].tolist()
    ([3, 4, 4, 7, 5, 1, 0], [-1, 0, 0, 1, 1, 3, 5, -1])
    """

    nodes: int = 65
    """The most nodes of a tree, its root included; the deepest ones are left out first."""
    maker: Literal["mcts", "best_first"] = "mcts"
    """How drafts are found: by the search; or, which is no part of the paper, the most probable sentences directly."""
    reward: Literal["trigram", "published"] = "trigram"
    """What a sentence is worth: 1 and, for each of its tokens c after (a, b), the score of c; or, by a mistake of the
    published code, that of b. Then all sentences are worth about the same, and the search goes by prior and visits."""
    iterations: int = 150
    """Sentences that are tried in a search."""
    length: int = 4
    """The tokens of a sentence, the newest token of the text included."""
    sentences: int = 24
    """The nodes that are taken by their number of visits, the root included; their sentences, each with its most
    probable next token, are the draft."""
    choices: int = 64
    """The most tokens of all sentences, where a token counts once a sentence; the longest are then left out."""
    exploration: float = 32.0
    """c1 of the search's score; 1.814 in the first release of the code."""
    exploration_base: float = 8.0
    """c2 of the search's score."""
    window: int = 16
    """The newest tokens of the text whose trigrams are strengthened before each search."""
    increment: float = 0.04
    """How much is added to a trigram's score; 0: the table does not adapt."""
    cap: float = 3.0
    """The largest score that a trigram can get in this way."""
    shared: bool = False
    """Whether all texts adapt one table."""

    def __post_init__(self):
        low = dict(nodes=2, iterations=1, length=2, sentences=2, choices=1, window=3)
        for field, least in low.items():
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least {least}.")
        for field in ("exploration", "exploration_base", "cap"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be above 0.")
        if not 0 <= self.increment < math.inf:
            raise ValueError(f"increment is {self.increment}; it must be positive, or 0: no adapting.")
        for field, allowed in (("maker", ("mcts", "best_first")), ("reward", ("trigram", "published"))):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be one of {', '.join(allowed)}.")

    chain = False

    def init(self, batch: int, room: int, vocab: int) -> ADEDState:
        """The state with an empty table; with `shared`, it has room for the bigrams of these texts."""
        return ADEDState(TrigramTable.empty(2 * batch * room if self.shared else 1, self.window))

    def begin(
        self, state: ADEDState, text: Int[Array, "batch room"], length: Int[Array, " batch"], logits: Any = None
    ) -> ADEDState:
        """The state for new texts; the newest tokens of each are counted.

        Raises:
          ValueError: the state is no `ADEDState`.
        """
        if not isinstance(state, ADEDState):
            raise ValueError(f"the state of ADED is of {type(state).__name__}; give ADEDState(table).")
        batch, room = text.shape
        index = length[:, None] - self.window + jnp.arange(self.window)
        recent = jnp.where(index >= 0, jnp.take_along_axis(text, jnp.maximum(index, 0), 1), -1)
        own = None
        if not self.shared and self.increment:
            one = TrigramTable.empty(4 * room, state.table.width, state.table.scores.dtype)
            own = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), one)
        return self._strengthened(ADEDState(state.table, own, recent), jnp.ones(batch, bool))

    def observe(self, state: ADEDState, verified: Verified) -> ADEDState:
        """The state after a step; the newest tokens of the rows that go on are counted once more."""
        both = jnp.concatenate([state.recent, verified.chosen], 1)
        index = verified.count[:, None] + jnp.arange(self.window)
        live = verified.count > 0 if verified.live is None else verified.live
        return self._strengthened(state.replace(recent=jnp.take_along_axis(both, index, 1)), live)

    def _strengthened(self, state: ADEDState, live: Bool[Array, " batch"]) -> ADEDState:
        if not self.increment:
            return state
        recent, trigrams = state.recent, self.window - 2
        trigrams = jnp.stack([recent[:, place : place + trigrams] for place in range(3)], -1)
        real = (trigrams >= 0).all(-1) & live[:, None]
        if self.shared:
            table = state.table.strengthen(trigrams.reshape(-1, 3), real.reshape(-1), self.increment, self.cap)
            return state.replace(table=table)

        def strengthen(own, trigrams, real):
            return own.strengthen(trigrams, real, self.increment, self.cap, below=state.table)

        return state.replace(own=jax.vmap(strengthen)(state.own, trigrams, real))

    def propose(
        self, state: ADEDState, text: Int[Array, "batch room"], length: Int[Array, " batch"]
    ) -> tuple[Int[Array, "batch nodes"], Int[Array, "batch nodes"]]:
        """The drafts of each row; a text of less than two tokens has none."""

        def draft(own: TrigramTable | None, text, length):
            def rows(bigrams):
                return state.table.rows(bigrams) if own is None else own.rows(bigrams, below=state.table)

            bigram = jnp.where(length > 1, text[jnp.maximum(length - 2 + jnp.arange(2), 0)], -1)
            if self.maker == "best_first":
                return self.best_first(bigram, rows)
            # A key of the length alone: the draft depends neither on the row's number nor on what is drawn.
            key = jax.random.fold_in(jax.random.key(0), length)
            uniforms = jax.random.uniform(key, (self.iterations, self.length), state.table.scores.dtype)
            search, _ = self.search(bigram, rows, uniforms)
            return self.tree(*self.within_budget(*self.harvest(search, rows)))

        return jax.vmap(draft)(state.own, text, length)

    # --- The search ---

    def search(
        self, bigram: Int[Array, " two"], rows: Rows, uniforms: Float[Array, "iterations length"]
    ) -> tuple[Search, Int[Array, " iterations"]]:
        """Monte-Carlo tree search for continuations of a bigram.

        Each iteration follows, from the root, the child with the largest score; gives the node where that ends all of
        its successors as children, and goes on with the first; draws the rest of the sentence from the table; and adds
        the reward of the sentence to the nodes on the way. A child's score is

            Q + (c1 + ln((N + c2 + 1) / c2)) P sqrt(N) / (1 + n),

        with its mean reward Q, its prior P, its visits n and those of its parent N; that of a child without visits is
        infinite. Of equal scores, the first counts.

        Args:
          uniforms: one for each token that may be drawn; the token is the first whose cumulative share reaches it.

        Returns:
          The nodes, and the node of each iteration from which its reward was added.
        """
        dtype, depth = uniforms.dtype, self.length - 1
        width = rows(bigram)[0].shape[-1]
        size = 1 + self.iterations * width

        def worth(scores, successors, bigram):
            """What each successor of a bigram adds to the reward."""
            if self.reward == "trigram":
                return scores
            return jnp.broadcast_to(jnp.where(successors == bigram[1], scores, 0).sum(), scores.shape)

        def select(search: Search) -> Int[Array, ""]:
            node = jnp.int32(0)
            for _ in range(depth):
                first, visits = search.first[node], search.visits[node].astype(dtype)
                place = first + jnp.arange(width)
                n = search.visits[place].astype(dtype)
                factor = self.exploration + jnp.log((visits + self.exploration_base + 1) / self.exploration_base)
                score = search.total[place] / jnp.maximum(n, 1)
                score += factor * search.prior[place] * jnp.sqrt(visits) / (1 + n)
                score = jnp.where(n > 0, score, jnp.inf)
                score = jnp.where(jnp.arange(width) < search.children[node], score, -jnp.inf)
                node = jnp.where(first > 0, first + jnp.argmax(score), node).astype(jnp.int32)
            return node

        def expand(search: Search, node: Int[Array, ""]) -> tuple[Search, Int[Array, ""]]:
            bigram = jnp.stack([search.previous[node], search.token[node]])
            successors, scores = rows(bigram)
            count = jnp.where(search.depth[node] < depth, (successors >= 0).sum(), 0).astype(jnp.int32)
            one = jnp.ones(width, jnp.int32)
            new = {
                "parent": node * one,
                "previous": bigram[1] * one,
                "token": successors,
                "depth": (search.depth[node] + 1) * one,
                "prior": scores,
                "reward": search.reward[node] + worth(scores, successors, bigram),
            }
            at = search.count
            written = {  # those from `count` on are written over by the next ones
                name: jax.lax.dynamic_update_slice(getattr(search, name), x, (at,)) for name, x in new.items()
            }
            search = search.replace(
                first=search.first.at[node].set(jnp.where(count > 0, at, 0)),
                children=search.children.at[node].set(count),
                count=at + count,
                **written,
            )
            return search, jnp.where(count > 0, at, node)

        def roll_out(search: Search, node: Int[Array, ""], uniforms) -> Float[Array, ""]:
            bigram, reward = jnp.stack([search.previous[node], search.token[node]]), search.reward[node]
            going = search.depth[node] > 0  # a root without successors is the end
            for number in range(depth - 1):
                successors, scores = rows(bigram)
                going &= (search.depth[node] + number < depth) & (successors[0] >= 0)
                share = jnp.cumsum(scores / scores.sum())
                drawn = jnp.minimum((share < uniforms[number]).sum(), (successors >= 0).sum() - 1)
                reward += jnp.where(going, worth(scores, successors, bigram)[drawn], 0)
                bigram = jnp.stack([bigram[1], successors[drawn]])
            return reward

        def iteration(number: Int[Array, ""], carry: tuple[Search, Int[Array, " iterations"]]):
            search, selected = carry
            search, node = expand(search, select(search))
            reward, at = roll_out(search, node, uniforms[number]), node
            visits, total = search.visits, search.total
            for _ in range(self.length):
                place = jnp.where(at >= 0, at, size + width)
                visits, total = visits.at[place].add(1, mode="drop"), total.at[place].add(reward, mode="drop")
                at = jnp.where(at >= 0, search.parent[jnp.maximum(at, 0)], -1)
            return search.replace(visits=visits, total=total), selected.at[number].set(node)

        ints, floats = jnp.zeros(size + width, jnp.int32), jnp.zeros(size + width, dtype)
        start = Search(
            parent=ints - 1,
            previous=ints.at[0].set(bigram[0]),
            token=ints.at[0].set(bigram[1]),
            depth=ints,
            first=ints,
            children=ints,
            visits=ints,
            total=floats,
            prior=floats,
            reward=floats.at[0].set(1),
            count=jnp.int32(1),
        )
        return jax.lax.fori_loop(0, self.iterations, iteration, (start, jnp.zeros(self.iterations, jnp.int32)))

    def harvest(self, search: Search, rows: Rows) -> tuple[Int[Array, "sentences length"], Bool[Array, " sentences"]]:
        """The sentences of the nodes with the most visits, without the root; of equal ones, the older node first.

        A sentence is the tokens on the way to the node and the most probable one after them, if there is any; -2 fills
        it up. Sentences that occur twice are marked as absent, as are those that do not exist.
        """
        size = search.visits.shape[0]
        visits = jnp.where(jnp.arange(size) < search.count, search.visits, -1)
        nodes = jax.lax.top_k(visits, min(self.sentences, size))[1][1:]
        here = jnp.arange(len(nodes))
        depth = search.depth[nodes]
        paths, at = jnp.full((len(nodes), self.length), -2, jnp.int32), nodes
        for _ in range(self.length - 1):
            place = jnp.where(search.depth[at] > 0, search.depth[at] - 1, self.length)
            paths = paths.at[here, place].set(search.token[at], mode="drop")
            at = jnp.maximum(search.parent[at], 0)
        after, _ = rows(jnp.stack([search.previous[nodes], search.token[nodes]], -1))
        paths = paths.at[here, depth].set(jnp.where(after[:, 0] >= 0, after[:, 0], -2))
        exists = visits[nodes] >= 0
        same = (paths[:, None] == paths).all(-1) & exists
        return paths, exists & (jnp.argmax(same, 1) == here)

    def within_budget(
        self, paths: Int[Array, "sentences length"], real: Bool[Array, " sentences"]
    ) -> tuple[Int[Array, "sentences length"], Bool[Array, " sentences"]]:
        """Leaves out the sentences with the most different tokens, until all have at most `choices` together."""
        before = jnp.tril(jnp.ones((self.length, self.length), bool), -1)
        again = ((paths[:, :, None] == paths[:, None]) & before).any(-1)
        different = jnp.where(real, ((paths >= 0) & ~again).sum(-1), 0)
        order = jnp.argsort(-different, stable=True)
        removed = jnp.cumsum(different[order]) - different[order]
        return paths, real & jnp.zeros_like(real).at[order].set(different.sum() - removed <= self.choices)

    def tree(
        self, paths: Int[Array, "sentences length"], real: Bool[Array, " sentences"]
    ) -> tuple[Int[Array, " nodes"], Int[Array, " nodes"]]:
        """The tokens and parents of the tree of some sentences, whose common beginnings are common nodes.

        Nodes are in the order of their depth, and then of the tokens on the way from the root: a token comes before
        another if an earlier sentence has it at this depth.
        """
        sentences, length = paths.shape
        here = real[:, None] & (paths >= 0)
        same = (paths[:, None] == paths) & here[:, None] & here
        place = jnp.where(here, jnp.argmax(same, 1), sentences)  # of a token, among those of its depth
        as_one = jnp.cumprod(same, -1).astype(bool)  # [one, another, depth]: the same up to this depth
        owner = jnp.argmax(as_one, 1)  # the first sentence with this beginning
        mine = here & (owner == jnp.arange(sentences)[:, None])
        depth = jnp.broadcast_to(jnp.arange(length), here.shape)
        on_the_way = jnp.where(jnp.arange(length) <= depth[..., None], place[:, None], 0)
        keys = [on_the_way[..., level].ravel() for level in reversed(range(length))]
        order = jnp.lexsort((*keys, depth.ravel(), ~mine.ravel()))
        number = jnp.zeros(order.shape, jnp.int32).at[order].set(1 + jnp.arange(order.size, dtype=jnp.int32))
        number = number.reshape(here.shape)
        above = jnp.take_along_axis(number, owner, 0)[:, :-1]
        above = jnp.concatenate([jnp.zeros((sentences, 1), jnp.int32), above], 1)
        number = jnp.where(mine, number, self.nodes)
        tokens, parents = jnp.zeros(self.nodes, jnp.int32), jnp.full(self.nodes, -1, jnp.int32)
        return tokens.at[number].set(paths, mode="drop"), parents.at[number].set(above, mode="drop")

    def best_first(self, bigram: Int[Array, " two"], rows: Rows) -> tuple[Int[Array, " nodes"], Int[Array, " nodes"]]:
        """The tree of the nodes with the largest products of shares, each of a successor in its row.

        Each depth has as many nodes as there are `sentences`, at most; it is found with one look at the table.
        """
        levels, bigrams, above = [], bigram[None], jnp.zeros(1, jnp.int32)
        best = jnp.ones(1, rows(bigram)[1].dtype)
        for _ in range(self.length):
            successors, scores = rows(bigrams)
            product = best[:, None] * scores / jnp.maximum(scores.sum(-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
            product = jnp.where(successors >= 0, product, 0)
            best, chosen = jax.lax.top_k(product.ravel(), min(self.sentences, product.size))
            tokens, parent = successors.ravel()[chosen], chosen // successors.shape[-1]
            levels.append((tokens, above[parent], best))
            above = 1 + sum(len(tokens) for tokens, *_ in levels[:-1]) + jnp.arange(len(tokens), dtype=jnp.int32)
            bigrams = jnp.stack([bigrams[parent, 1], tokens], -1)
            bigrams = jnp.where((best > 0)[:, None], bigrams, -1)
        tokens, parents, best = (jnp.concatenate(parts) for parts in zip(*levels))
        # A parent is before its children, and at least as good, so it is kept if they are.
        _, kept = jax.lax.top_k(best, min(self.nodes - 1, len(best)))
        kept = jnp.sort(kept)
        number = jnp.zeros(len(best) + 1, jnp.int32).at[1 + kept].set(1 + jnp.arange(len(kept), dtype=jnp.int32))
        parents = jnp.where(best[kept] > 0, number[parents[kept]], -1)
        rest = self.nodes - 1 - len(kept)
        return (
            jnp.pad(tokens[kept], (1, rest)).astype(jnp.int32),
            jnp.pad(parents, (1, rest), constant_values=-1).astype(jnp.int32),
        )

"""A token vocabulary as a trie over bytes, and which token sequences spell the bytes of a text.

Tables of a trie serve the device (`jaxtok.decoding.byte_exact`). What needs the tokenizer itself is done here, in
Python: which tokens may follow a sequence (`jaxtok.decoding.byte_validity`), and which sequences end exactly at a byte.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxtok.decoding.byte_validity import Rule, Tail, rule_of
from jaxtok.protocols import Special, Tokenizer

Policy = Literal["truncate", "truncate_renormalize", "none", "prompt"]
POLICIES: tuple[Policy, ...] = ("truncate", "truncate_renormalize", "none", "prompt")

SPACE = "▁".encode()  # how SentencePiece spells a space
_REMEMBERED = 2048  # the texts whose covers are kept; each step of a row asks for the one after its last


@dataclasses.dataclass(frozen=True)
class Trie:
    """The byte strings of a vocabulary as a trie, whose nodes are numbered by depth; node 0 is the root.

    The children of a node have consecutive numbers, in the order of their bytes.

    >>> trie = Trie.of([b"a", b"ab", b"", b"b"])
    >>> trie.nodes, trie.first.tolist(), trie.count.tolist(), bytes(trie.symbol[1:].astype("uint8"))
    (4, [1, 3, 4, 4], [2, 1, 0, 0], b'abb')
    >>> trie.ending[3], trie.ending[0]
    ((1,), ())
    """

    first: Int[np.ndarray, " nodes"]
    """The number of a node's first child."""
    count: Int[np.ndarray, " nodes"]
    """How many children it has."""
    symbol: Int[np.ndarray, " nodes"]
    """The last byte of the node's string."""
    ending: list[tuple[int, ...]]
    """The tokens whose bytes are the node's string."""
    order: Int[np.ndarray, " tokens"]
    """The tokens with bytes, in the order of these."""
    low: Int[np.ndarray, " nodes"]
    high: Int[np.ndarray, " nodes"]
    """The tokens whose bytes begin with the node's string are `order[low:high]`."""
    token_of: Int[np.ndarray, " pairs"]
    node_of: Int[np.ndarray, " pairs"]
    """All pairs of a token and a node that its bytes begin with, in the order of the nodes."""

    @property
    def nodes(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> Trie:
        order = np.array(sorted((i for i, s in enumerate(strings) if s), key=lambda i: (strings[i], i)), np.int32)
        ordered = [strings[i] for i in order]
        length = np.array([len(s) for s in ordered], np.int32)
        node = np.zeros(len(ordered), np.int32)  # the node of each string's first `depth` bytes
        parents, symbols, lows, highs = [np.array([-1])], [np.array([-1])], [np.array([0])], [np.array([len(ordered)])]
        tokens, nodes, ending, total = [order], [node.copy()], [()], 1
        for depth in range(length.max(initial=0)):
            here = np.flatnonzero(length > depth)
            byte = np.array([ordered[i][depth] for i in here], np.int32)
            above = node[here]
            new = np.ones(len(here), bool)
            new[1:] = (above[1:] != above[:-1]) | (byte[1:] != byte[:-1])
            starts = np.flatnonzero(new)
            node[here] = total + np.cumsum(new) - 1
            parents.append(above[starts])
            symbols.append(byte[starts])
            lows.append(here[starts])
            highs.append(here[np.append(starts[1:], len(here)) - 1] + 1)
            tokens.append(order[here])
            nodes.append(node[here].copy())
            ending += [()] * len(starts)
            for i in here[length[here] == depth + 1]:
                ending[node[i]] += (int(order[i]),)
            total += len(starts)
        parent = np.concatenate(parents)
        count = np.bincount(parent[1:], minlength=total)
        flat = [np.concatenate(x).astype(np.int32) for x in (symbols, lows, highs, tokens, nodes)]
        symbol, low, high, token_of, node_of = flat
        first = np.concatenate([[1], 1 + np.cumsum(count)[:-1]]).astype(np.int32)
        return cls(first, count.astype(np.int32), symbol, ending, order, low, high, token_of, node_of)

    def child(self, node: int, byte: int) -> int:
        """The child for a byte; -1 if there is none."""
        first, end = self.first[node], self.first[node] + self.count[node]
        found = first + np.searchsorted(self.symbol[first:end], byte)
        return int(found) if found < end and self.symbol[found] == byte else -1


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """A valid token sequence that spells exactly the bytes since the anchor."""

    tokens: tuple[int, ...]
    start: int
    """How many bytes it spells."""
    slot: int
    """Where the model's row after it is kept."""
    tail: Tail
    entry: int
    """Its number among all such sequences of the text, which is that of its last token's slot in the cache."""
    path: tuple[int, ...]
    """The entries of its tokens."""
    follow: Bool[np.ndarray, " vocab"] | None
    """Which tokens may follow it; None: all."""
    ends: bool
    """Whether the text may end after it."""


class New(NamedTuple):
    """An exact sequence that the newest byte has completed; its last token is one that the model has to read."""

    parent: Exact | None
    exact: Exact


@dataclasses.dataclass(frozen=True, eq=False)
class Covers:
    """What covers a text: its open sequences, each with the node of the trie that its further bytes have reached."""

    open: tuple[tuple[Exact, int], ...]
    new: tuple[New, ...]
    entries: int
    """How many exact sequences the text has had so far."""


class Plan(NamedTuple):
    """What a step of the model has to know about the texts of a batch; see `ByteVocabulary.plan`."""

    token: Int[np.ndarray, "batch new"]
    """The tokens to read, -1 where there are no more."""
    parent: Int[np.ndarray, "batch new"]
    """The slots of the sequences that they follow; -1: none, it is the anchor."""
    slot: Int[np.ndarray, "batch new"]
    """The slots for the rows after them."""
    path: Bool[np.ndarray, "batch new entries"]
    """Which of the entries they see."""
    follow: Bool[np.ndarray, "batch new vocab"]
    node: Int[np.ndarray, "batch slots"]
    """The nodes that the open sequences have reached; -1: there is no open sequence in the slot."""
    ends: Bool[np.ndarray, "batch slots"]
    """Whether special tokens may follow."""


@dataclasses.dataclass(frozen=True, eq=False)
class ByteVocabulary:
    """A tokenizer's tokens as symbols: the 256 bytes, then its special tokens.

    Two are equal only if they are the same object, so that functions are compiled once for each.
    """

    tokenizer: Tokenizer
    rule: Rule
    """Which token sequences are valid."""
    strings: list[bytes]
    """The bytes of each token, in this domain."""
    trie: Trie
    specials: tuple[int, ...]
    """The ids of the symbols from 256 on."""
    roles: tuple[str, ...]
    """What these symbols are: unk, bos, eos, or their ids as strings."""
    prefix: bytes
    """What the tokenizer writes before every text (SentencePiece's dummy space), spelled in this domain."""
    lacking: bytes
    """The bytes with which no token begins."""
    spell: Callable[[bytes], bytes]
    """Maps the bytes of a text to those of this domain."""
    unspell: Callable[[bytes], bytes]

    @property
    def symbols(self) -> int:
        return 256 + len(self.specials)

    @functools.cached_property
    def longest(self) -> int:
        """The most bytes of a token."""
        return max(map(len, self.strings))

    # Anchors.

    def anchored(self, text: bytes, inside: bool = False) -> tuple[list[int], bytes]:
        """The tokens of a text up to an anchor, and the bytes after it (in this domain).

        Every cover of the text has a boundary at the anchor, whatever follows, and the same tokens before it.

        Args:
          text: of the tokenizer's own domain.
          inside: whether tokens come before it (a context), so that nothing is written before the text.

        Raises:
          ValueError: the text is not UTF-8, and the tokenizer needs that, or its tokens do not spell it.
        """
        whole = (b"" if inside else self.unspell(self.prefix)) + text
        cut = self.rule.anchor(whole)
        tokens = self.rule.encode(whole[:cut])
        if b"".join(self.strings[i] for i in tokens) != self.spell(whole[:cut]):
            raise ValueError(
                f"the tokens of {text[:40]!r} do not spell it; remove what the vocabulary lacks (such as control "
                "characters)."
            )
        return tokens, self.spell(whole[cut:])

    # Covers.

    @functools.cached_property
    def _known(self) -> OrderedDict[tuple, Covers]:
        return OrderedDict()

    def covers(self, text: bytes, slots: int, policy: Policy = "truncate", prompt: int = 0) -> Covers:
        """The covers of the bytes after an anchor. It is a function of its arguments, which remembers what it found.

        Args:
          slots: the most open sequences.
          policy: which tokens `Exact.follow` allows after them: the valid ones; with "none" all, and with "prompt" all
            from byte `prompt` on (the official code's fast mode).

        Raises:
          ValueError: there are more open sequences than slots.
        """
        key, known = (text, slots, policy, prompt), self._known
        if (found := known.get(key)) is not None:
            known.move_to_end(key)
            return found
        length = len(text)
        while length and (text[:length], slots, policy, prompt) not in known:
            length -= 1
        if length == 0:
            covers = self._after(None, b"", slots, policy, prompt)
            known[b"", slots, policy, prompt] = covers
        else:
            covers = known[text[:length], slots, policy, prompt]
        for end in range(length + 1, len(text) + 1):
            covers = self._after(covers, text[:end], slots, policy, prompt)
            known[text[:end], slots, policy, prompt] = covers
        while len(known) > _REMEMBERED:
            known.popitem(last=False)
        return covers

    def _after(self, before: Covers | None, text: bytes, slots: int, policy: Policy, prompt: int) -> Covers:
        """The covers of a text, from those of the text without its last byte."""
        masked = policy.startswith("truncate") or (policy == "prompt" and len(text) < prompt)

        def exact(parent: Exact | None, token: int | None, slot: int, entry: int) -> Exact:
            tokens = () if parent is None else (*parent.tokens, token)
            tail = () if parent is None else self.rule.tail(parent.tail, token)
            follow, ends = self.rule.follow(tail) if masked else (None, True)
            path = (entry,) if parent is None else (*parent.path, entry)
            return Exact(tokens, len(text), slot, tail, entry, path, follow, ends)

        if before is None:
            root = exact(None, None, 0, 0)
            return Covers(((root, 0),), (New(None, root),), 1)
        still, complete = [], []
        for open_, node in before.open:
            if (child := self.trie.child(node, text[-1])) < 0:
                continue
            if self._reaches(open_, child):
                still.append((open_, child))
            for token in self.trie.ending[child]:
                allowed = self.rule.follow(open_.tail)[0] if open_.follow is None else open_.follow
                if allowed[token]:
                    complete.append((open_, token))
        free = sorted(set(range(slots)) - {open_.slot for open_, _ in before.open})  # the parents' rows are read yet
        if len(free) < len(complete):
            raise ValueError(
                f"more than {slots} token sequences are open after {text[-40:]!r}; give more slots than that."
            )
        new = [
            New(parent, exact(parent, token, slot, before.entries + number))
            for number, ((parent, token), slot) in enumerate(zip(complete, free))
        ]
        opened = [*still, *((made.exact, 0) for made in new)]
        return Covers(tuple(opened), tuple(new), before.entries + len(new))

    def _reaches(self, open_: Exact, node: int) -> bool:
        """Whether some token that may follow is longer than the node's string."""
        ending = len(self.trie.ending[node])
        low, high = self.trie.low[node] + ending, self.trie.high[node]
        if open_.follow is None:
            return low < high
        return bool(open_.follow[self.trie.order[low:high]].any())

    def plan(
        self,
        texts: Sequence[bytes],
        slots: int,
        entries: int,
        vocab: int,
        most: int,
        policy: Policy,
        prompts: Sequence[int],
    ) -> Plan:
        """What a step has to know, after the last byte of each text.

        Args:
          texts: the bytes of each row since its anchor.
          entries: how many entries there is room for.
          vocab: the ids of the model.
          most: the most exact sequences that a byte can complete.
          prompts: see `covers`.

        Raises:
          ValueError: there is no room for the entries, or a byte completes more sequences.
        """
        rows = len(texts)
        token, parent, slot = (np.full((rows, most), -1, np.int32) for _ in range(3))
        path, follow = np.zeros((rows, most, entries), bool), np.zeros((rows, most, vocab), bool)
        node, ends = np.full((rows, slots), -1, np.int32), np.zeros((rows, slots), bool)
        spelled = np.zeros(vocab, bool)
        spelled[self.trie.order] = True
        for row, text in enumerate(texts):
            covers = self.covers(text, slots, policy, prompts[row])
            if len(covers.new) > most:
                raise ValueError(
                    f"{len(covers.new)} token sequences end after {text[-40:]!r}; at most {most} are read."
                )
            if covers.entries > entries:
                raise ValueError(f"the text has {covers.entries} token sequences; there is room for {entries}.")
            for number, (before, new) in enumerate(covers.new):
                token[row, number] = new.tokens[-1] if new.tokens else 0
                parent[row, number] = -1 if before is None else before.slot
                slot[row, number] = new.slot
                path[row, number, list(new.path)] = True
                allowed = follow[row, number]
                if new.follow is None:
                    allowed[:] = spelled
                else:
                    allowed[: len(new.follow)] = new.follow
                allowed[list(self.specials)] = new.ends
            for open_, at in covers.open:
                node[row, open_.slot] = at
                ends[row, open_.slot] = at == 0 and open_.ends
        return Plan(token, parent, slot, path, follow, node, ends)


@functools.lru_cache(8)
def vocabulary_of(
    tokenizer: Tokenizer,
    domain: Literal["text", "piece"] = "text",
    validity: Literal["", "canonical", "prefix"] = "",
) -> ByteVocabulary:
    """A tokenizer's vocabulary over bytes; the same object for the same tokenizer, so that nothing is compiled anew.

    Args:
      tokenizer: one that keeps all of a text; see `jaxtok.protocols.Tokenizer`.
      domain: "text", the bytes of texts; "piece": a space is spelled as SentencePiece's ▁, three bytes, as in the
        official code.
      validity: canonical: a sequence is valid if it is how its own bytes are encoded; prefix: if it begins the
        encoding of some text. They differ where a tokenizer looks ahead (GPT-2's regular expression). "": prefix for
        tokenizers that cut texts before they merge, else canonical.

    Raises:
      ValueError: the domain is unknown, or the tokenizer changes texts.
    """
    if domain not in ("text", "piece"):
        raise ValueError(f"domain is {domain!r}; it must be text or piece.")
    _check_lossless(tokenizer)
    rule = rule_of(tokenizer, validity, SPACE if domain == "piece" else b"")

    def spell(text: bytes) -> bytes:
        return text.replace(b" ", SPACE) if domain == "piece" else text

    def unspell(text: bytes) -> bytes:
        return text.replace(SPACE, b" ") if domain == "piece" else text

    strings = [spell(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    if domain == "piece":  # the piece of the byte 0x20 is not that of a space
        for i in {i for i, text in enumerate(strings) if text == SPACE} - set(rule.encode(b" ")):
            strings[i] = b" "
    trie = Trie.of(strings)
    specials, roles = _specials(strings, tokenizer.special)
    begins = set(trie.symbol[1 : 1 + trie.count[0]].tolist())
    # Bytes that no valid UTF-8 has are not missed.
    lacking = bytes(b for b in range(256) if b not in begins and b not in (0xC0, 0xC1, *range(0xF5, 0x100)))
    return ByteVocabulary(
        tokenizer, rule, strings, trie, specials, roles, spell(_prefix(tokenizer)), lacking, spell, unspell
    )


def _specials(strings: list[bytes], special: Special) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The tokens without bytes in the order of the official code: unk, bos, eos, then by their ids; and their roles."""
    eos = special.eos[0] if special.eos else None
    first = [(i, role) for i, role in ((special.unk, "unk"), (special.bos, "bos"), (eos, "eos")) if i is not None]
    found = {i: role for i, role in reversed(first)}  # GPT-2's one special token is an end first of all
    if eos is not None:
        found[eos] = "eos"
    ordered = [i for i, role in first if found[i] == role]
    rest = [i for i, string in enumerate(strings) if not string and i not in found]
    return (*ordered, *rest), (*(found[i] for i in ordered), *map(str, rest))


def _prefix(tokenizer: Tokenizer) -> bytes:
    """What a tokenizer writes before a text."""
    return b"".join(map(tokenizer.token_bytes, tokenizer.encode(b"a"))).removesuffix(b"a")


def _check_lossless(tokenizer: Tokenizer) -> None:
    """Refuses tokenizers that change a text. One that lacks some of its characters is tried on the others."""
    name = getattr(tokenizer, "name", type(tokenizer).__name__)
    for text in (b"a", b"b a", b"A", b" a", b"a  b", b"a ", b"a\nb", "é".encode(), "e\u0301".encode(), "ﬁ".encode()):
        try:
            found = tokenizer.decode(tokenizer.encode(text))
        except ValueError:  # it lacks a character
            continue
        if found != text:
            raise ValueError(
                f"the tokenizer {name} turns {text.decode()!r} into {found.decode(errors='replace')!r}; exact bytes "
                "need one that keeps all of a text."
            )

"""Which token sequences a tokenizer can produce: those that begin the encoding of some text.

All others have probability 0 in true data (arXiv 2410.09303, section 3). Where a tokenizer merges without cutting the
text first, and for the greedy longest match, a sequence begins an encoding if and only if it is the encoding of its own
bytes (it is canonical). After a regular expression that looks ahead, as GPT-2's, this is not so: "of  x" is
[of][ ][ x], but "of  " is [of][  ].
"""

from __future__ import annotations

import codecs
import functools
import itertools
import math
import string
import unicodedata
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool

from jaxtok.protocols import Tokenizer

LOOKAHEAD = string.ascii_letters + string.digits + string.punctuation + " \n\t"
"""What may come next: one character of look-ahead is enough for the expressions of GPT-2 and Llama 3."""

_AFTER = 3  # a cut before the last three characters stays, whatever follows ("'re" is one part, "'r" is two)
_FULL = 1 << 26  # bytes of remembered masks
_CONTRACTED = frozenset("strevmldSTREVMLD")  # the letters that a cut can depend on, after an apostrophe

Tail = tuple[int, ...]
"""The last tokens of a sequence, as many as decide what may follow."""


class Rule(Protocol):
    """The validity of a tokenizer's sequences."""

    def encode(self, text: bytes) -> list[int]:
        """The tokens of a text, with nothing written before it."""
        ...

    def anchor(self, text: bytes) -> int:
        """The last place at which a token surely begins, whatever follows, with nothing left to choose before it."""
        ...

    def tail(self, tail: Tail, token: int) -> Tail:
        """The tail after another token; that at the anchor is ()."""
        ...

    def follow(self, tail: Tail) -> tuple[Bool[np.ndarray, " vocab"], bool]:
        """Which tokens may follow a valid sequence (never special ones), and whether the text may end after it."""
        ...


class Remembered:
    """A function's masks, of which the last ones are kept."""

    def __init__(self, function: Callable[[Any], Any], vocab: int):
        self._function, self._known = function, OrderedDict()
        self._most = max(64, _FULL // vocab)

    def __call__(self, key: Hashable) -> Any:
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        found = self._known[key] = self._function(key)
        if len(self._known) > self._most:
            self._known.popitem(last=False)
        return found


def incomplete(text: bytes) -> int:
    """How many bytes at the end of a text are a character that is not complete.

    >>> incomplete("é".encode()[:1]), incomplete(b"a")
    (1, 0)

    Raises:
      ValueError: the text does not begin a text in UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    decoder.decode(text)  # UnicodeDecodeError is a ValueError
    return len(decoder.getstate()[0])


def _begins_utf8(text: bytes) -> bool:
    try:
        incomplete(text)
    except ValueError:
        return False
    return True


class Reencode:
    """Any tokenizer, by encoding again: SentencePiece, the greedy longest match, bytes, characters.

    Pieces of single bytes stand for characters that are no pieces: inside a character nothing else may follow, and the
    text may not end.

    Args:
      tokenizer: its `encode_bare`, or else its `encode`, gives the tokens of a text with nothing written before it.
      looks_ahead: whether a sequence is also valid if it begins the encoding of its bytes with one more character.
      without: bytes that no text has: in the domain of pieces, the character that spells a space.
    """

    def __init__(self, tokenizer: Tokenizer, looks_ahead: bool = False, without: bytes = b""):
        self._encode = getattr(tokenizer, "encode_bare", tokenizer.encode)
        self._strings = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self._looks_ahead, self._without = looks_ahead, without
        self._utf8 = max(map(len, self._strings)) > 1
        self._inside = np.zeros((256, 256), bool)  # which pairs of bytes some token has inside
        for text in self._strings:
            raw = np.frombuffer(text, np.uint8)
            self._inside[raw[:-1], raw[1:]] = True
        self.follow = Remembered(self._follow, len(self._strings))

    def encode(self, text: bytes) -> list[int]:
        return self._encode(text) if text else []

    def anchor(self, text: bytes) -> int:
        if self._utf8:
            try:
                incomplete(text)
            except ValueError as error:
                raise ValueError(f"the text is not UTF-8 ({error}); this tokenizer needs that.") from None
        return 0 if self._looks_ahead else self._cut(text)

    def _cut(self, text: bytes) -> int:
        raw = np.frombuffer(text, np.uint8)
        cuts = np.flatnonzero(~self._inside[raw[:-1], raw[1:]] & (raw[1:] & 0xC0 != 0x80)) + 1
        return int(cuts[-1]) if len(cuts) else 0

    def tail(self, tail: Tail, token: int) -> Tail:
        tail = (*tail, token)
        if self._looks_ahead:
            return tail
        cut, done = self._cut(b"".join(self._strings[i] for i in tail)), 0
        for number, i in enumerate(tail):
            if done >= cut:
                return tail[number:]
            done += len(self._strings[i])
        return tail

    def _follow(self, tail: Tail) -> tuple[np.ndarray, bool]:
        text = b"".join(self._strings[i] for i in tail)
        mask = np.zeros(len(self._strings), bool)
        for token, more in enumerate(self._strings):
            whole = text + more
            if not more or (self._utf8 and not _begins_utf8(whole)) or (self._without and self._without in whole):
                continue
            mask[token] = self._begins((*tail, token), whole)
        complete = not self._utf8 or not incomplete(text)
        return mask, complete and self.encode(text) == list(tail)

    def _begins(self, tokens: Tail, text: bytes) -> bool:
        """Whether some encoding begins with the tokens."""
        count = len(tokens)
        if self.encode(text) == list(tokens):
            return True
        return self._looks_ahead and any(
            self.encode(text + more.encode())[:count] == list(tokens) for more in LOOKAHEAD
        )


class Merges:
    """The pairs of tokens that byte pair encoding leaves side by side.

    The pair (a, b) is not left if a merge (u, w) of rank r joins a node u on the right spine of a with a node w on the
    left spine of b before both of them are merged into something else: r < c(u) and r <= c(w), where c is the rank of
    the merge that consumes a node, infinite for a and b themselves (of equal pairs, the leftmost is merged first).
    A sequence is canonical if all its neighbours are such pairs, and each token is the encoding of its own bytes.

    Args:
      strings: the bytes of each token; empty for those that merging never gives.
      merges: the pairs that are merged.
      ranks: which go first; default: in their order.
      characters: whether merging begins with characters, not with bytes.
    """

    def __init__(
        self,
        strings: Sequence[bytes],
        merges: Sequence[tuple[bytes, bytes]],
        ranks: Sequence[int] | None = None,
        characters: bool = False,
    ):
        self._characters = characters
        self.ids = {text: i for i, text in reversed([*enumerate(strings)]) if text}
        rank = {}
        for number, (left, right) in zip(range(len(merges)) if ranks is None else ranks, merges, strict=True):
            ids = (self.ids.get(left), self.ids.get(right), self.ids.get(left + right))
            if None not in ids:
                rank.setdefault(ids[:2], (number, ids[2]))
        self._rank, count = rank, len(strings)
        self.alone = np.zeros(count, bool)
        """Which tokens are the encoding of their own bytes."""
        self._spines: list[list[list[tuple[int, float]]]] = [[[], []] for _ in range(count)]
        holders = [defaultdict(list), defaultdict(list)]
        for token, text in enumerate(strings):
            if not text or self.ids[text] != token or (tree := self._tree(text)) is None:
                continue
            self.alone[token] = True
            for side in (0, 1):  # the left spine, then the right one
                node, consumed = tree, math.inf
                while True:
                    self._spines[token][side].append((node[0], consumed))
                    holders[side][node[0]].append((token, consumed))
                    if node[1] is None:
                        break
                    node, consumed = node[1 + side], node[3]
        self._holders = [
            {node: tuple(np.array(x) for x in zip(*found)) for node, found in side.items()} for side in holders
        ]
        self._partners = [defaultdict(list), defaultdict(list)]  # the merges of a node as the right part, as the left
        for (left, right), (number, _) in rank.items():
            self._partners[1][left].append((right, number))
            self._partners[0][right].append((left, number))
        self.after = Remembered(self._after, count)
        self.before = Remembered(self._before, count)

    def _parts(self, text: bytes) -> list[bytes]:
        return [*map(str.encode, text.decode())] if self._characters else [bytes([byte]) for byte in text]

    def _tree(self, text: bytes) -> tuple | None:
        """The merges by which a token comes about, as nodes (token, left, right, rank); None if others win."""
        parts = [(self.ids.get(part), None, None, None) for part in self._parts(text)]
        if any(part[0] is None for part in parts):
            return None
        while len(parts) > 1:
            ranks = [self._rank.get((a[0], b[0]), (math.inf, -1)) for a, b in itertools.pairwise(parts)]
            at = min(range(len(ranks)), key=lambda i: ranks[i][0])
            number, token = ranks[at]
            if number == math.inf:
                return None
            parts[at : at + 2] = [(token, parts[at], parts[at + 1], number)]
        return parts[0] if parts[0][0] == self.ids[text] else None

    def encode(self, text: bytes) -> list[int]:
        """The tokens of bytes that nothing cuts.

        Raises:
          ValueError: a byte has no token.
        """
        try:
            ids = [self.ids[part] for part in self._parts(text)]
        except KeyError as error:
            raise ValueError(f"the vocabulary has no token for the byte {error.args[0]!r}.") from None
        while len(ids) > 1:
            ranks = [self._rank.get(pair, (math.inf, -1)) for pair in itertools.pairwise(ids)]
            at = min(range(len(ranks)), key=lambda i: ranks[i][0])
            if ranks[at][0] == math.inf:
                break
            ids[at : at + 2] = [ranks[at][1]]
        return ids

    def _after(self, token: int) -> np.ndarray:
        """Which tokens can stand after this one."""
        allowed = self.alone & self.alone[token]
        for node, consumed in self._spines[token][1]:
            for right, number in self._partners[1][node]:
                if number < consumed and right in self._holders[0]:
                    tokens, later = self._holders[0][right]
                    allowed[tokens[later >= number]] = False
        return allowed

    def _before(self, token: int) -> np.ndarray:
        """Which tokens can stand before this one."""
        allowed = self.alone & self.alone[token]
        for node, consumed in self._spines[token][0]:
            for left, number in self._partners[0][node]:
                if number <= consumed and left in self._holders[1]:
                    tokens, later = self._holders[1][left]
                    allowed[tokens[later > number]] = False
        return allowed


class BytePairs:
    """Byte-level byte pair encoding that nothing cuts: all neighbours must be pairs that it leaves (`Merges`)."""

    def __init__(self, tokenizer: Tokenizer):
        self._strings = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.merges = Merges(self._strings, tokenizer.merges())
        self._cut = Reencode(tokenizer)._cut

    def encode(self, text: bytes) -> list[int]:
        return self.merges.encode(text)

    def anchor(self, text: bytes) -> int:
        return self._cut(text)

    def tail(self, tail: Tail, token: int) -> Tail:
        return (token,)

    def follow(self, tail: Tail) -> tuple[np.ndarray, bool]:
        return self.merges.after(tail[-1]) if tail else self.merges.alone, True


class PiecePairs(Reencode):
    """SentencePiece's byte pair encoding of characters, with pieces of single bytes for characters that are no pieces.

    It gives what `Reencode` gives, without encoding again: pieces are neighbours as `Merges` leaves them, and nothing
    merges with bytes. A byte below 128 may come where its character is no piece, another where it can begin one,
    and inside a character only what does not complete one that is a piece.

    Args:
      tokenizer: has `piece_merges` and `token_id`.
    """

    def __init__(self, tokenizer: Any, without: bytes = b""):
        super().__init__(tokenizer, without=without)
        ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)]
        self._byte_ids = {byte: i for byte, i in enumerate(ids) if i is not None}
        self._single = set(self._byte_ids.values())
        strings = [b"" if i in self._single else text for i, text in enumerate(self._strings)]
        self.merges = Merges(strings, *tokenizer.piece_merges, characters=True)
        leads = [*range(0xC2, 0xF5)]
        self._begin = [
            i for byte, i in self._byte_ids.items() if byte in leads or (byte < 128 and self._kept(bytes([byte])))
        ]

    def _kept(self, char: bytes) -> bool:
        """Whether a character is encoded as its bytes."""
        return char != self._without and self.encode(char) == [self._byte_ids.get(byte) for byte in char]

    def tail(self, tail: Tail, token: int) -> Tail:
        if token not in self._single:
            return (token,)
        begun = [i for i in tail if i in self._single]
        open_ = incomplete(b"".join(self._strings[i] for i in [*begun, token]))
        return (*begun, token) if open_ else ()

    def _follow(self, tail: Tail) -> tuple[np.ndarray, bool]:
        if not tail or tail[-1] not in self._single:
            mask = self.merges.after(tail[-1]).copy() if tail else self.merges.alone.copy()
            mask[self._begin] = True
            return mask, True
        mask, begun = np.zeros(len(self._strings), bool), b"".join(self._strings[i] for i in tail)
        for byte in range(0x80, 0xC0):
            text = begun + bytes([byte])
            if byte in self._byte_ids and _begins_utf8(text) and (incomplete(text) or self._kept(text)):
                mask[self._byte_ids[byte]] = True
        return mask, False


class CutBytePairs:
    """Byte-level byte pair encoding after a regular expression that cuts the text into parts.

    A sequence is valid if, with one more character or none, the text has no cut inside a token, and those neighbours
    that no cut divides are pairs that merging leaves. Where a text is cut depends on the kinds of its characters, so it
    is tried once for tokens of the same shape: letters of a category are alike (but for those of contractions after an
    apostrophe), digits are alike, and all else stands for itself.

    Args:
      tokenizer: has `merges`, and `cuts`, which maps a text to the places at which a part begins, after the first.
      looks_ahead: whether what may come next counts; if not, a sequence must be the encoding of its own bytes.
    """

    def __init__(self, tokenizer: Any, looks_ahead: bool = True):
        self._strings = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.merges = Merges(self._strings, tokenizer.merges())
        self._encode = getattr(tokenizer, "encode_bare", tokenizer.encode)
        self._looks_ahead = looks_ahead
        self.cuts = functools.lru_cache(1 << 16)(lambda text: frozenset(tokenizer.cuts(text)))
        self.follow = Remembered(self._follow, len(self._strings))
        self._judged = functools.lru_cache(1 << 12)(self._judge)
        self._inner: list[int] = []  # tokens that begin inside a character
        self._whole = np.zeros(len(self._strings), bool)  # tokens that merging does not give, but only a whole part
        if getattr(tokenizer, "whole_parts", False):
            first = np.array([self.merges.ids.get(text) == i for i, text in enumerate(self._strings)])
            self._whole = first & ~self.merges.alone
        texts: list[tuple[int, str, str]] = []  # a token, its whole characters, and one that it begins
        for token in map(int, np.flatnonzero(self.merges.alone | self._whole)):
            text = self._strings[token]
            if text[0] & 0xC0 == 0x80:
                self._inner.append(token)
            elif _begins_utf8(text):
                head = text[: len(text) - incomplete(text)]
                # The character is completed in all ways that do not merge into the token.
                more = [""] if head == text else self._completions(token, text[len(head) :])
                texts += [(token, head.decode(), char) for char in more]
        self._tables = [_Table(texts, contracted) for contracted in (False, True)]
        alike = defaultdict(list)
        for char in LOOKAHEAD:
            if (first := self.merges.ids.get(char.encode())) is not None:
                kind = unicodedata.category(char)[0]
                alike[{"P": ".", "S": "+"}.get(kind, shape(char, True)) if char not in "'/" else char].append(first)
        self._next = {char: np.any([*map(self.merges.before, firsts)], 0) for char, firsts in alike.items()}

    def encode(self, text: bytes) -> list[int]:
        return self._encode(text) if text else []

    def anchor(self, text: bytes) -> int:
        try:
            whole = text[: len(text) - incomplete(text)].decode()
        except ValueError as error:
            raise ValueError(f"the text is not UTF-8 ({error}); this tokenizer needs that.") from None
        return len(whole[: max((cut for cut in self.cuts(whole) if cut <= len(whole) - _AFTER), default=0)].encode())

    def tail(self, tail: Tail, token: int) -> Tail:
        tail = (*tail, token)
        text = b"".join(self._strings[i] for i in tail)
        if not _begins_utf8(text) or (cut := self.anchor(text)) == 0:
            return tail
        ends = list(itertools.accumulate(len(self._strings[i]) for i in tail))
        return tail[ends.index(cut) + 1 :] if cut in ends else tail

    def _follow(self, tail: Tail) -> tuple[np.ndarray, bool]:
        text = b"".join(self._strings[i] for i in tail)
        mask = np.zeros(len(self._strings), bool)
        if not _begins_utf8(text):
            return mask, False
        if incomplete(text):  # only the rest of the character may follow
            for token in self._inner:
                mask[token] = self.valid((*tail, token))
            return mask, False
        decoded = text.decode()
        whole = all(_begins_utf8(each := self._strings[i]) and not incomplete(each) for i in tail)
        parts, read = [decoded], ""
        if whole:
            parts = []
            for i in tail:
                parts.append(shape(self._strings[i].decode(), contracts(read)))
                read += self._strings[i].decode()
        context = "".join(parts)
        lengths = [len(part) for part in parts] if whole else self._lengths(tail)
        bounds = list(itertools.accumulate(lengths))[:-1]
        # Where merging would not leave the neighbours, a cut must be; none may be where there is no boundary.
        neighbours = zip(bounds, itertools.pairwise(tail))
        must = frozenset(place for place, (a, b) in neighbours if not self.merges.after(a)[b])
        never = frozenset(range(1, len(context))) - set(bounds)
        table = self._tables[contracts(decoded)]
        flags, canonical = self._judged(context, must, never, table)
        pair, tokens, of = self.merges.after(tail[-1]) if tail else None, table.tokens, table.shape_of
        for char, (valid, divided, ended) in flags.items():
            good = valid[of]
            if pair is not None:
                good = good & (divided[of] | pair[tokens])  # `pair` has only tokens that merging gives
            if char:
                good = good & (ended[of] | self._next[char][tokens])
            mask[tokens[good]] = True
        return mask, canonical

    def _lengths(self, tail: Tail) -> list[float]:
        """The characters of each token, where one that ends inside a character has some half."""
        lengths, seen = [], b""
        for token in tail:
            before = _characters(seen)
            seen += self._strings[token]
            lengths.append(_characters(seen) - before)
        return lengths

    def _judge(self, context: str, must: frozenset, never: frozenset, table: _Table) -> tuple[dict[str, tuple], bool]:
        """For each next character ("": none), and each shape of a token: whether a token of this shape may follow the
        context, whether a cut divides them, and whether one comes after the token. Also whether the context is whole.
        """
        here = len(context)
        cuts = self.cuts(context)
        canonical = must <= cuts and not never & cuts
        chars = ["", *(self._next if self._looks_ahead else ())]
        flags = {char: np.zeros((3, len(table.shapes)), bool) for char in chars}
        for number, (text, inner, open_) in enumerate(table.shapes):
            ahead = not open_ and _looks(context[-_AFTER:] + text)
            for char in chars if ahead else [""]:
                cuts = self.cuts(context + text + char)
                if must <= cuts and not never & cuts and not any(here + i in cuts for i in range(1, inner)):
                    flags[char][:, number] = True, here in cuts, here + len(text) in cuts
        return {char: tuple(found) for char, found in flags.items() if found[0].any()}, canonical

    def valid(self, tokens: Tail) -> bool:
        """Whether a sequence that begins at a cut is valid, with its own characters and not their shapes."""
        text = b"".join(self._strings[i] for i in tokens)
        if not all(self.merges.alone[i] or self._whole[i] for i in tokens) or not _begins_utf8(text):
            return False
        ends = set(itertools.accumulate(len(self._strings[i]) for i in tokens))
        neighbours = dict(zip(sorted(ends), itertools.pairwise(tokens)))
        open_ = incomplete(text)
        if open_:
            more = [char.encode()[open_:] for char in _characters_from(text[-open_:])]
        else:
            more = [b"", *(map(str.encode, LOOKAHEAD) if self._looks_ahead else ())]
        for rest in more:
            whole = (text + rest).decode()
            cuts = {len(whole[:cut].encode()) for cut in self.cuts(whole)}
            if any(cut < len(text) and cut not in ends for cut in cuts):
                continue
            if not all(place in cuts or self.merges.after(a)[b] for place, (a, b) in neighbours.items()):
                continue
            if not rest or len(text) in cuts:
                return True
            first = self.merges.ids.get(rest[:1])
            if first is not None and self.merges.after(tokens[-1])[first]:
                return True
        return False

    def _completions(self, token: int, begun: bytes) -> list[str]:
        """A character of each category that begins with these bytes, whose next byte does not merge into the token."""
        found = {}
        for char in _characters_from(begun):
            first = self.merges.ids.get(char.encode()[len(begun) : len(begun) + 1])
            if first is not None and self.merges.after(token)[first]:
                found.setdefault(char if char.isspace() else unicodedata.category(char), char)
        return list(found.values())


class _Table:
    """The shapes of tokens, with the number of whole characters and whether another one is begun; and whose they are.

    Args:
      texts: tokens, their whole characters, and a character that completes them or "".
      contracted: see `shape`.
    """

    def __init__(self, texts: Sequence[tuple[int, str, str]], contracted: bool):
        numbers: dict[tuple[str, int, bool], int] = {}
        found = []
        for token, text, char in texts:
            alike = shape(text, contracted)
            key = (alike + char, len(alike) + len(char), bool(char))
            found.append((token, numbers.setdefault(key, len(numbers))))
        self.shapes = list(numbers)
        self.tokens, self.shape_of = np.array(found, np.int32).reshape(-1, 2).T


def shape(text: str, contracted: bool) -> str:
    """The text of a token in which all characters that an expression treats alike are the same, and runs are short.

    The letters of contractions stay after an apostrophe.

    Args:
      contracted: whether an apostrophe, and then at most such letters, come before the text.

    >>> shape(" don't 2 Übermäßig", False), shape("reset", False), shape("reset", True)
    (" aaa't 1 Aaaa", 'aaa', 'reset')
    """
    out: list[str] = []
    for char in text:
        contracted = contracted and char in _CONTRACTED
        if char.isascii():
            alike = "1" if char.isdigit() else "a" if char.islower() else "A" if char.isupper() else char
            alike = char if contracted else alike
        else:
            alike = char if char.isspace() else _like(unicodedata.category(char))
        contracted = contracted or char == "'"
        if not (alike in "aA" and out[-3:] == [alike] * 3):
            out.append(alike)
    return "".join(out)


def contracts(text: str) -> bool:
    """Whether a text ends in an apostrophe, and then at most letters of contractions.

    >>> contracts("don'"), contracts("we'r"), contracts("r"), contracts("'x")
    (True, True, False, False)
    """
    _, apostrophe, rest = text.rpartition("'")
    return bool(apostrophe) and _CONTRACTED.issuperset(rest)


def _looks(text: str) -> bool:
    """Whether the cuts of a text can depend on what follows it: it ends in white space, or has an apostrophe near."""
    return text[-1:].isspace() or "'" in text[-_AFTER:]


@functools.cache
def _like(category: str) -> str:
    """The character that stands for all of a category, beyond ASCII."""
    if letter := {"Ll": "a", "Lu": "A"}.get(category):
        return letter
    return next(char for char in map(chr, range(0x80, 0x110000)) if unicodedata.category(char) == category)


@functools.cache
def _characters_by_bytes() -> dict[bytes, list[str]]:
    """Characters by the bytes that they begin with, up to three of each category."""
    found: dict[bytes, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for code in itertools.chain(range(0x80, 0xD800), range(0xE000, 0x20000)):
        char = chr(code)
        category = char if char.isspace() else unicodedata.category(char)
        raw = char.encode()
        for end in range(1, len(raw)):
            if len(alike := found[raw[:end]][category]) < 3:
                alike.append(char)
    return {begun: [char for alike in kinds.values() for char in alike] for begun, kinds in found.items()}


def _characters_from(begun: bytes) -> list[str]:
    return _characters_by_bytes().get(begun, [])


def _characters(text: bytes) -> float:
    """How many characters a text has; one that is not complete is half of one."""
    open_ = incomplete(text)
    return len(text[: len(text) - open_].decode()) + (0.5 if open_ else 0)


def rule_of(tokenizer: Any, validity: str = "", without: bytes = b"") -> Rule:
    """The rule of a tokenizer; see `jaxtok.decoding.byte_vocabulary.vocabulary_of` and `Reencode`.

    Raises:
      ValueError: the validity is unknown.
    """
    if validity not in ("", "canonical", "prefix"):
        raise ValueError(f"validity is {validity!r}; it must be canonical, prefix, or empty for the tokenizer's own.")
    cuts = getattr(tokenizer, "cuts", None)
    looks_ahead = validity == "prefix" or (validity == "" and cuts is not None)
    if getattr(tokenizer, "byte_pairs", False):
        return BytePairs(tokenizer) if cuts is None else CutBytePairs(tokenizer, looks_ahead)
    if not looks_ahead and getattr(tokenizer, "piece_merges", None) is not None:
        return PiecePairs(tokenizer, without)
    return Reencode(tokenizer, looks_ahead, without)

"""Words: where hierarchical models cut a text. A rule for whole texts, and one byte by byte for generation.

whitespace  a word and the whitespace behind it, \\S*\\s+ or \\S+ (HAT, arXiv 2501.10322)
unicode     Unicode's word boundaries (UAX #29), cut again behind punctuation and in camelCase, with one space in front
            (the released HAT models, arXiv 2603.15953)

The `hat-splitter` wheel, where it is installed, does the unicode rule faster; only code points that its version of
Unicode does not know may be cut elsewhere.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import regex
from uniseg.wordbreak import words as unicode_words

try:
    from hat_splitter import HATSplitter as _Wheel
except ImportError:
    _Wheel = None

RULES = ("whitespace", "unicode")
NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))
"""The bytes that no valid text has; special tokens are put there."""

_SPACE = r"\p{White_Space}"
_WHITESPACE_WORD = regex.compile(rf"[^{_SPACE}]*[{_SPACE}]+|[^{_SPACE}]+")
_IS_SPACE = regex.compile(rf"[{_SPACE}]+")
_IS_PUNCTUATION = regex.compile(r"\p{P}")
_CUT = regex.compile(r"(?<=\p{P})|(?<=\p{Ll})(?=\p{Lu})")
_ASCII_WORD = regex.compile(  # what the unicode rule comes to in a line of ASCII
    r" {2,}|\r\n|[\t-\r]|"
    r" ?(?:[A-Z0-9]+[a-z]*(?:[0-9][A-Z0-9]*[a-z]*)*|[a-z]+(?:[0-9][A-Z0-9]*[a-z]*)*|[^A-Za-z0-9\t-\r\p{P} ])?\p{P}*"
)
_LINE = regex.compile(r"[^\n]*\n|[^\n]+")


@dataclasses.dataclass(frozen=True)
class WordSplitter:
    """Cuts any bytes into words, which joined are the bytes again.

    Raises:
        ValueError: an unknown rule, or words of no byte.
    """

    rule: Literal["whitespace", "unicode"] = "whitespace"
    max_word_size: int = 100
    """Bytes; a longer word is cut in front of the last character that begins within them."""

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r}: choose one of {', '.join(RULES)}")
        if self.max_word_size < 1:
            raise ValueError(f"max_word_size={self.max_word_size}: choose at least 1")

    def split(self, text: str | bytes) -> list[bytes]:
        """The words of a whole text. Where bytes are not UTF-8, the unicode rule is that of `stream`."""
        if self.rule == "whitespace":
            data = text if isinstance(text, bytes) else _encode(text)
            words: Iterable[str] = _WHITESPACE_WORD.findall(data.decode(errors="surrogateescape"))
        else:
            try:
                words = unicode_rule(text.decode() if isinstance(text, bytes) else text)
                data = text if isinstance(text, bytes) else text.encode()
            except UnicodeError:  # not UTF-8, or a str with half a character
                return self.stream(text if isinstance(text, bytes) else _encode(text))
        return [part for word in words for part in limited(_encode(word), self.max_word_size)]

    def opens(self, word: bytes, byte: int) -> int:
        """With how many of its last bytes the open word and one more begin a new word; 0: they do not.

        The streamed rule of the authors (`check_byte_for_new_word`): a character counts when it is complete, and then
        all its bytes move; a byte that cannot begin a character is a word; bytes that go wrong later run on. On a text,
        its words are those of `split` but in three cases, where a character changes what is in front of it: U+2044
        between digits; a combining mark, emoji modifier or joiner behind punctuation or whitespace; a character that
        lies across max_word_size.
        """
        if not word:
            return 0
        if len(word) >= self.max_word_size:
            return 1
        return _opens(self.rule, word + bytes([byte]))

    def stream(self, data: bytes) -> list[bytes]:
        """The words as generation finds them, byte by byte; defined for any bytes."""
        words, word = [], b""
        for byte in data:
            new, word = self.opens(word, byte), word + bytes([byte])
            if new:
                words.append(word[:-new])
                word = word[-new:]
        return [*words, word] if word else words


def unicode_rule(text: str) -> Iterator[str]:
    """The words of the unicode rule. Lines do not depend on each other; those in ASCII need no tables."""
    for line in _LINE.findall(text):
        yield from _line(line)


@functools.lru_cache(maxsize=65536)
def _line(line: str) -> tuple[str, ...]:
    if line.isascii():
        return tuple(word for word in _ASCII_WORD.findall(line) if word)
    if _Wheel is not None:
        return tuple(_Wheel().split(line))
    return tuple(_by_definition(line))


def _by_definition(text: str) -> Iterator[str]:
    """UAX #29, the further cuts, then groups: [space] word [punctuation ...]."""
    group, kind = "", "none"
    for piece in _pieces(text):
        if piece == " ":
            new = "space"
        elif _IS_SPACE.fullmatch(piece):
            new = "whitespace"
        elif _IS_PUNCTUATION.fullmatch(piece):
            new = "punctuation"
        else:
            new = "word"
        joins = (new == "word" and kind == "space") or (
            new == "punctuation" and kind in ("space", "word", "punctuation")
        )
        if group and not joins:
            yield group
            group = ""
        group, kind = group + piece, new
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    spaces = ""
    for word in unicode_words(text):
        for piece in _CUT.split(word):
            if piece == " ":
                spaces += piece
            elif piece:
                if spaces:
                    yield spaces
                    spaces = ""
                yield piece
    if spaces:
        yield spaces


@functools.lru_cache(maxsize=65536)
def _opens(rule: str, data: bytes) -> int:
    if rule == "whitespace":
        decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
        text = decoder.decode(data)
        if decoder.getstate()[0]:  # an unfinished character
            return 0
        words = _WHITESPACE_WORD.findall(text)
    else:
        try:
            words = list(unicode_rule(data.decode()))
        except UnicodeDecodeError as error:
            return int(error.reason == "invalid start byte")
    return len(_encode(words[1])) if len(words) > 1 else 0


def limited(word: bytes, limit: int) -> Iterator[bytes]:
    """A word in parts of at most `limit` bytes, cut between characters; within one that is longer itself."""
    while len(word) > limit:
        cut = limit
        while cut and word[cut] & 0xC0 == 0x80:
            cut -= 1
        cut = cut or limit
        yield word[:cut]
        word = word[cut:]
    yield word


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def split_specials(splitter: WordSplitter, text: str | bytes, specials: Mapping[str, int]) -> list[bytes]:
    """The words of a text in which the strings of special tokens stand for those (never so in a user's text).

    Strings are tried in the order of `specials`; each becomes a word of its one byte.

    Raises:
        ValueError: a special token's byte can occur in text.
    """
    for name, byte in specials.items():
        if byte not in NEVER_IN_UTF8:
            raise ValueError(
                f"the special token {name!r} is byte {byte}, which text has; choose one of {NEVER_IN_UTF8}"
            )
    if not specials:
        return splitter.split(text)
    words: list[bytes] = []
    bytes_of = {name.encode(): bytes([byte]) for name, byte in specials.items()}
    data = text if isinstance(text, bytes) else _encode(text)
    for part in regex.split(b"(" + b"|".join(map(regex.escape, bytes_of)) + b")", data):
        words += [bytes_of[part]] if part in bytes_of else splitter.split(part)
    return words

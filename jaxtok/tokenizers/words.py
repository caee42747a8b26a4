"""Words: where hierarchical models cut a text, as a whole, or byte by byte for generation. There are two rules:

whitespace  a word and the whitespace after it, \\S*\\s+ or \\S+ (HAT, arXiv 2501.10322)
unicode     Unicode's word boundaries (UAX #29), cut again after punctuation and in camelCase; one space before a word
            belongs to it (the released HAT models, arXiv 2603.15953)

The `hat-splitter` wheel, if it is installed, applies the unicode rule faster; only code points that its version of
Unicode does not know may be cut differently.
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
"""The bytes that do not occur in valid text; special tokens have these."""

_SPACE = r"\p{White_Space}"
_WHITESPACE_WORD = regex.compile(rf"[^{_SPACE}]*[{_SPACE}]+|[^{_SPACE}]+")
_IS_SPACE = regex.compile(rf"[{_SPACE}]+")
_IS_PUNCTUATION = regex.compile(r"\p{P}")
_CUT = regex.compile(r"(?<=\p{P})|(?<=\p{Ll})(?=\p{Lu})")
_ASCII_WORD = regex.compile(  # the unicode rule for a line of ASCII
    r" {2,}|\r\n|[\t-\r]|"
    r" ?(?:[A-Z0-9]+[a-z]*(?:[0-9][A-Z0-9]*[a-z]*)*|[a-z]+(?:[0-9][A-Z0-9]*[a-z]*)*|[^A-Za-z0-9\t-\r\p{P} ])?\p{P}*"
)
_LINE = regex.compile(r"[^\n]*\n|[^\n]+")


@dataclasses.dataclass(frozen=True)
class WordSplitter:
    """Cuts any bytes into words; joined, the words are the bytes again.

    Raises:
        ValueError: the rule is unknown, or `max_word_size` is below 1.
    """

    rule: Literal["whitespace", "unicode"] = "whitespace"
    max_word_size: int = 100
    """The most bytes of a word. A longer one is cut before the last character that begins within them."""

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"rule is {self.rule!r}; it must be one of {', '.join(RULES)}.")
        if self.max_word_size < 1:
            raise ValueError(f"max_word_size is {self.max_word_size}; it must be at least 1.")

    def split(self, text: str | bytes) -> list[bytes]:
        """The words of a whole text. If it is not UTF-8, the words of the unicode rule are those of `stream`."""
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
        """How many of the last bytes of the open `word` followed by `byte` begin a new word; 0: none.

        This is the authors' streamed rule (`check_byte_for_new_word`): a character counts once it is complete, and then
        all its bytes move to the new word; a byte that cannot begin a character is a word; a sequence that turns out
        invalid later continues its word. On a text, its words are those of `split` except in three cases, in which a
        character changes a cut before it: U+2044 between digits; a combining mark, emoji modifier or joiner after
        punctuation or whitespace; a character that lies across max_word_size.
        """
        if not word:
            return 0
        if len(word) >= self.max_word_size:
            return 1
        return _opens(self.rule, word + bytes([byte]))

    def stream(self, data: bytes) -> list[bytes]:
        """The words of any bytes, as generation cuts them byte by byte."""
        words, word = [], b""
        for byte in data:
            new, word = self.opens(word, byte), word + bytes([byte])
            if new:
                words.append(word[:-new])
                word = word[-new:]
        return [*words, word] if word else words


def unicode_rule(text: str) -> Iterator[str]:
    """The words by the unicode rule. Lines do not depend on each other, and lines of ASCII need no Unicode tables."""
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
    """The words by definition: UAX #29, then the further cuts, then groups of [space] word [punctuation ...]."""
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
    """The parts of a word, each of at most `limit` bytes. It is cut between characters, or within a longer one."""
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
    """The words of a text in which the names of special tokens stand for these tokens. (Do not use it on users' text.)

    Names are tried in the order of `specials`; each becomes a word of one byte, that of its token.

    Raises:
        ValueError: a special token's byte can occur in text.
    """
    for name, byte in specials.items():
        if byte not in NEVER_IN_UTF8:
            raise ValueError(f"the special token {name!r} is byte {byte}; it must be one of {NEVER_IN_UTF8}.")
    if not specials:
        return splitter.split(text)
    words: list[bytes] = []
    bytes_of = {name.encode(): bytes([byte]) for name, byte in specials.items()}
    data = text if isinstance(text, bytes) else _encode(text)
    for part in regex.split(b"(" + b"|".join(map(regex.escape, bytes_of)) + b")", data):
        words += [bytes_of[part]] if part in bytes_of else splitter.split(part)
    return words

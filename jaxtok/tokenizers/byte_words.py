"""Words as rows of byte symbols: BERT's rule for words, and arrays of words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex

PAD, CLS, SEP, MASK, UNK = range(256, 261)
"""Symbols after the 256 bytes, each a word of its own: padding, the first and last word of a text, a masked word and an
unknown word."""

_DROPPED = regex.compile(r"[[\p{Cc}\p{Cf}\uFFFD]--[\t\n\r]]", regex.VERSION1)
_IDEOGRAPH = (
    r"\u4E00-\u9FFF\u3400-\u4DBF\U00020000-\U0002A6DF\U0002A700-\U0002B73F\U0002B740-\U0002B81F\U0002B820-\U0002CEAF"
    r"\uF900-\uFAFF\U0002F800-\U0002FA1F"
)
_ALONE = rf"\p{{P}}!-/:-@\[-`{{-~{_IDEOGRAPH}"
_WORD = regex.compile(rf"[{_ALONE}]|[^\s{_ALONE}]+")


def basic_words(text: str | bytes) -> list[bytes]:
    """The words of BERT's basic tokenizer without lower-casing, cut at whitespace, punctuation and CJK characters.

    Punctuation and ideographs are words of their own; control characters are dropped. Bytes that are not UTF-8 are kept
    as parts of words.
    """
    text = text.decode(errors="surrogateescape") if isinstance(text, bytes) else text
    return [word.encode(errors="surrogateescape") for word in _WORD.findall(_DROPPED.sub("", text))]


def word_array(words: Sequence[bytes | int], max_bytes: int) -> tuple[np.ndarray, int]:
    """The symbols of words, int32 [words, max_bytes], padded with PAD; and how many words were cut.

    Args:
      words: each is bytes (empty ones become UNK), or one of the symbols at the top of this module.
      max_bytes: the most bytes of a word; further ones are cut off.

    Raises:
      ValueError: a number is none of the symbols.
    """
    array, cut = np.full((len(words), max_bytes), PAD, np.int32), 0
    for row, word in zip(array, words):
        if isinstance(word, int):
            if not PAD <= word <= UNK:
                raise ValueError(f"a word is the number {word}; numbers must be symbols, {PAD} to {UNK}.")
            row[0] = word
        elif not word:
            row[0] = UNK
        else:
            row[: len(word)] = np.frombuffer(word[:max_bytes], np.uint8)
            cut += len(word) > max_bytes
    return array, cut


def collate(
    texts: Sequence[Sequence[bytes | int]], max_bytes: int, length: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The symbols [texts, length, max_bytes], the masks of real symbols and of words, and how many words were cut.

    A padding word has one real symbol, so that its vector is defined.

    Args:
      texts: the words of each text; give [CLS] and [SEP] as symbols.
      max_bytes: the most bytes of a word.
      length: the number of words in a row; 0: that of the longest text.

    Raises:
      ValueError: a text is longer than `length`.
    """
    longest = max(map(len, texts), default=0)
    length = length or longest
    if longest > length:
        raise ValueError(f"length is {length}; it must be at least {longest}, the words of the longest text.")
    ids, cut = np.full((len(texts), length, max_bytes), PAD, np.int32), 0
    for row, text in zip(ids, texts):
        row[: len(text)], more = word_array(text, max_bytes)
        cut += more
    real = ids[..., 0] != PAD
    return ids, symbol_mask(ids), real, cut


def symbol_mask(ids: np.ndarray) -> np.ndarray:
    """True for the symbols of a word, and for the first symbol of a padding word."""
    return (ids != PAD) | (np.arange(ids.shape[-1]) == 0)

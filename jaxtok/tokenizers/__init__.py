"""Text tokenizers. All of them are lossless on any byte string, but for published vocabularies that lack bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxtok.protocols import Tokenizer
from jaxtok.tokenizers.byt5 import ByT5Tokenizer
from jaxtok.tokenizers.bytes import ByteTokenizer
from jaxtok.tokenizers.characters import ALPHABETS, PREFIX, AlphabetTokenizer, CharacterTokenizer
from jaxtok.tokenizers.hub_files import tokenizer_json
from jaxtok.tokenizers.huggingface import HuggingFaceTokenizer
from jaxtok.tokenizers.sentencepiece import SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "AlphabetTokenizer",
    "ByT5Tokenizer",
    "ByteTokenizer",
    "CharacterTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "load_tokenizer",
    "token_byte_lengths",
    "train_sentencepiece",
]


NAMES = ("bytes", "byt5", *ALPHABETS)
"""The tokenizers that are not files."""


def load_tokenizer(spec: str | Path, eod: int | None = None) -> Tokenizer:
    """The tokenizer that `spec` names.

    bytes                 the 256 bytes
    byt5                  the 256 bytes with ByT5's ids (`ByT5Tokenizer`)
    letters, ascii        a small alphabet only (`AlphabetTokenizer`)
    characters:ALPHABET   these characters, and bytes for all others
    PATH                  a SentencePiece `*.model`, a `tokenizer.json`, or a folder with one of these, with a
                          vocab.json and a merges.txt, or with a vocab.txt

    Args:
        spec: the name or path.
        eod: the id that ends a document, for a tokenizer in a file; by default, its names tell.

    Raises:
        FileNotFoundError: there is no such file or folder, or the folder holds no tokenizer.
        ValueError: the file is no tokenizer, or the folder holds several.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec in ALPHABETS:
        return AlphabetTokenizer(spec)
    if isinstance(spec, str) and spec.startswith(PREFIX):
        return CharacterTokenizer(spec.removeprefix(PREFIX))
    if spec == "byt5":
        return ByT5Tokenizer()
    path = Path(spec)
    if path.is_dir():
        files = [path / "tokenizer.json"] if (path / "tokenizer.json").is_file() else sorted(path.glob("*.model"))
        if not files:
            if tokenizer_json(path) is not None:
                return HuggingFaceTokenizer(path, eod)
            raise FileNotFoundError(f"{path} holds no tokenizer.json and no *.model; give the path of a tokenizer.")
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} *.model files; give the path of one of them.")
        path = files[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no tokenizer {str(spec)!r}; give 'bytes', 'byt5', a *.model, a tokenizer.json or a folder."
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, eod)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, eod)
    raise ValueError(f"{path} is neither a *.model nor a *.json; give a SentencePiece or Hugging Face tokenizer.")


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes each token stands for: int32 [vocab]."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int32)

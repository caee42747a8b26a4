"""SentencePiece models (Kudo & Richardson, 2018), used losslessly where they have all bytes, and their training."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from jaxtok.protocols import Special
from jaxtok.tokenizers.hub_files import added_tokens, kind_of, read_json
from jaxtok.tokenizers.lossless import LosslessTokenizer

EOD = "<|endoftext|>"
_CHUNK = 1000  # characters: at most 4,000 bytes, below SentencePiece's limit of 4,192 for a training sentence
_SENTENCES = 2_000_000  # the lines that training holds in memory, a sample


class SentencePieceTokenizer(LosslessTokenizer):
    """A `*.model` file of any type.

    A model with a dummy prefix tokenises the beginning of a text as published ("Hello" is "▁Hello"). Runs of spaces are
    kept, even by models that were trained to remove them, unless a model has no byte tokens (T5): that encodes as
    published, see `LosslessTokenizer`.

    Tokens that were added after the model's are those of the added_tokens.json and the tokenizer_config.json beside
    it, and T5's sentinels, of which <extra_id_0> has the highest id. A tokenizer_config.json whose add_prefix_space is
    false leaves out the dummy prefix.

    Args:
        path: the file.
        eod: the id that ends a document; by default the model's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a SentencePiece model, or has no end-of-sentence token.
    """

    def __init__(self, path: str | Path, eod: int | None = None):
        self._path = Path(path).absolute()
        self._args = (self._path, eod)
        if not self._path.is_file():
            raise FileNotFoundError(f"there is no SentencePiece model at {path}; give the path of a *.model file.")
        model, kind = ModelProto(), ModelProto.SentencePiece
        try:
            model.ParseFromString(self._path.read_bytes())
            if read_json(self._path.parent / "tokenizer_config.json").get("add_prefix_space") is False:
                model.normalizer_spec.add_dummy_prefix = False
            prefix = b" " if model.normalizer_spec.add_dummy_prefix else b""
            byte_ids = {int(p.piece[3:-1], 16): i for i, p in enumerate(model.pieces) if p.type == kind.BYTE}
            if byte_ids:
                model.normalizer_spec.add_dummy_prefix = False  # `encode` writes it instead, once per text
                model.normalizer_spec.remove_extra_whitespaces = False
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except Exception as error:  # protobuf's DecodeError or SentencePiece's RuntimeError
            raise ValueError(f"{path} is not a SentencePiece model ({error}); give another *.model file.") from error
        names = [piece.piece for piece in model.pieces]
        self.added = _added(self._path.parent, names)
        eod = self._processor.eos_id() if eod is None else eod
        if eod < 0:
            if EOD not in names:
                raise ValueError(f"{path} has no end-of-sentence token; train it with eos_id, or with a piece {EOD}.")
            eod = names.index(EOD)
        pieces = [name.replace("▁", " ").encode() for name in names]
        for byte, i in byte_ids.items():
            pieces[i] = bytes([byte])
        pieces += [b""] * (max([eod, *self.added.values()]) + 1 - len(pieces))
        for i, piece in enumerate(model.pieces):
            if i == eod or piece.type in (kind.CONTROL, kind.UNKNOWN):
                pieces[i] = b""
        self._control = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == kind.CONTROL}
        bos, pad, unk = (
            None if i < 0 else i for i in (self._processor.bos_id(), self._processor.pad_id(), self._processor.unk_id())
        )
        special = Special(bos=bos, eos=(eod,), pad=pad, unk=unk)
        super().__init__(self._path.stem, pieces, byte_ids, eod, prefix, special)
        self.as_published = not byte_ids
        self._ids = {name: i for i, name in enumerate(names)} | self.added

    def token_id(self, name: str) -> int | None:
        """The id of the token of this name, if there is one."""
        return self._ids.get(name)

    def __reduce__(self):
        return type(self), self._args

    @functools.cached_property
    def piece_merges(self) -> tuple[list[tuple[bytes, bytes]], list[int]] | None:
        """All pairs of pieces that byte pair encoding merges, with their ranks; None for models of other types."""
        model = ModelProto()
        model.ParseFromString(self._processor.serialized_model_proto())
        kind = ModelProto.SentencePiece
        if model.trainer_spec.model_type != model.trainer_spec.BPE or self.as_published:
            return None
        if any(piece.type == kind.USER_DEFINED for piece in model.pieces):
            return None
        normal = {piece.piece: piece.score for piece in model.pieces if piece.type == kind.NORMAL}
        scores = sorted(set(normal.values()), reverse=True)
        ranks = {score: rank for rank, score in enumerate(scores)}
        pairs, order = [], []
        for piece, score in normal.items():
            for cut in range(1, len(piece)):
                if piece[:cut] in normal and piece[cut:] in normal:
                    pairs.append(tuple(part.replace("▁", " ").encode() for part in (piece[:cut], piece[cut:])))
                    order.append(ranks[score])
        return pairs, order

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens stand for these, each part between as a text."""
        if not self._control:
            return self.encode(text)
        names = sorted(self._control, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        ids = [[self._control[part]] if number % 2 else self.encode(part) for number, part in enumerate(parts)]
        return [i for some in ids for i in some]

    def _encode_text(self, text: str) -> list[int]:
        return self._processor.encode(text)


def _added(folder: Path, names: list[str]) -> dict[str, int]:
    """The ids by name of the tokens that follow a model's own."""
    added = {name: i for name, i in added_tokens(folder).items() if i >= len(names)}
    sentinel = "<extra_id_0>"
    if kind_of(folder) in ("t5", "mt5") and not {sentinel, f"▁{sentinel}"} & {*names, *added}:
        count = read_json(folder / "tokenizer_config.json").get("extra_ids", 100)
        added |= {f"<extra_id_{i}>": len(names) + count - 1 - i for i in range(count)}
    return added


def train_sentencepiece(
    texts: Iterable[str | bytes], output: Path, *, vocab_size: int, model_type: Literal["unigram", "bpe"] = "unigram"
) -> Path:
    """Trains a lossless SentencePiece model on a stream of documents and writes it to `output`.

    Byte fallback, no normalisation, no dummy prefix, all spaces kept; `<|endoftext|>` ends documents. Lines are the
    training sentences; bytes that are not UTF-8 are replaced.

    Raises:
        ValueError: the type is unknown, the texts are too small for the vocabulary, or it is too small for their
            characters.
    """
    if model_type not in ("unigram", "bpe"):
        raise ValueError(f"model_type is {model_type!r}; it must be unigram or bpe.")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            eos_piece=EOD,
            bos_id=-1,
            pad_id=-1,
            input_sentence_size=_SENTENCES,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_advice(str(error), vocab_size)) from error
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model.getvalue())
    return output


def _sentences(texts: Iterable[str | bytes]) -> Iterator[str]:
    for text in texts:
        for line in (text if isinstance(text, str) else text.decode(errors="replace")).split("\n"):
            for start in range(0, len(line), _CHUNK):
                yield line[start : start + _CHUNK]


def _advice(message: str, vocab_size: int) -> str:
    if most := re.search(r"value <= (\d+)", message):
        return f"vocab_size is {vocab_size}; for these texts it must be at most {most[1]}: lower it, or give more text."
    if least := re.search(r"\d+ vs (\d+)", message):
        return f"vocab_size is {vocab_size}; for the characters of the texts it must be more than {least[1]}."
    if "sentences_.empty()" in message:
        return "the texts are empty; give some text to train a SentencePiece model."
    return f"SentencePiece cannot train with vocab_size = {vocab_size}: {message}"

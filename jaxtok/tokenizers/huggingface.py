"""Tokenizers of Hugging Face's `tokenizers` library (`tokenizer.json`), used losslessly where they have all bytes."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxtok.protocols import Special
from jaxtok.tokenizers.hub_files import named_token, read_json, tokenizer_json
from jaxtok.tokenizers.lossless import LosslessTokenizer

EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]", "<eos>")
TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")
"""Tokens that end a turn of a chat, and so a text, besides the end of a document."""
BEGINNINGS = ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
PADS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(LosslessTokenizer):
    """A `tokenizer.json`: byte-level (GPT-2), byte fallback (Llama), and others.

    A tokenizer that writes a space before a text still does ("Hello" is "▁Hello"), and `decode` drops it. No special
    tokens are added. One with an unknown token, but without all bytes (T5, BERT), encodes as published: see
    `LosslessTokenizer`.

    Args:
        source: the file, the folder that holds it (or a vocab.json with its merges.txt, or a vocab.txt), or its
            content.
        eod: the token that ends a document, or its id; by default the first of `EOD_NAMES` in the vocabulary, or else
            the eos_token of the tokenizer_config.json beside. The roles of other special tokens follow from their
            names.
        name: a name for logs and errors; by default that of the folder or file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no tokenizer, or has no token `eod`.
    """

    def __init__(self, source: str | Path | Mapping[str, Any], eod: str | int | None = None, name: str = ""):
        self._args = (source, eod, name)
        folder = None
        if not isinstance(source, Mapping):
            file = Path(source).absolute()
            folder = file if file.is_dir() else file.parent
            self._args = (file, eod, name)
            name = name or (folder.name if file.is_dir() or file.name == "tokenizer.json" else file.stem)
        path = name if folder is None else source
        config = read_tokenizer_json(source)
        try:
            steps = {key: config.get(key) for key in ("normalizer", "pre_tokenizer")}
            bare = _without_prefix(steps)  # `encode` writes the prefix instead, once per text
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps({**config, **bare}))
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{path} is not a tokenizer.json ({error}); give another file.") from error

        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        eod_id = eod
        if not isinstance(eod, int):
            names = EOD_NAMES if eod is None else (eod,)
            if eod is None and folder is not None:
                beside = named_token(read_json(folder / "tokenizer_config.json").get("eos_token"))
                names += () if beside is None else (beside,)
            eod_id = next((vocab[name] for name in names if name in vocab), None)
            if eod_id is None:
                raise ValueError(
                    f"{path} has none of the tokens {', '.join(names)}, so nothing tells what ends a text; "
                    "name the token as eos_token in a tokenizer_config.json beside it, or give its id as data.ends."
                )
        byte_ids = {int(match[1], 16): i for name, i in vocab.items() if (match := _BYTE.fullmatch(name))}
        self._merges, self._spell = config["model"].get("merges") or [], _speller(config)
        pieces = _pieces(config, vocab, self._spell)
        pieces += [b""] * (eod_id + 1 - len(pieces))
        for byte, i in byte_ids.items():
            pieces[i] = bytes([byte])
        pieces[eod_id] = b""
        special = Special(
            bos=next((vocab[name] for name in BEGINNINGS if name in vocab), None),
            eos=(eod_id, *(vocab[name] for name in TURN_ENDS if name in vocab and vocab[name] != eod_id)),
            pad=next((vocab[name] for name in PADS if name in vocab), None),
            unk=_unknown(config["model"], vocab),
        )
        super().__init__(name, pieces, byte_ids, eod_id, b" " if bare != steps else b"", special)
        self.leave_out_controls()
        self.as_published = special.unk is not None and not self.has_all_bytes
        if self.as_published and bare != steps:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(config))
        self._tokenizer.encode_special_tokens = True  # their strings are encoded as ordinary text
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __reduce__(self):
        return type(self), self._args

    def token_id(self, name: str) -> int | None:
        """The id of the token of this name, if there is one."""
        return self._tokenizer.token_to_id(name)

    def merges(self) -> list[tuple[bytes, bytes]]:
        """The pairs of a BPE in the order in which they are merged; none for other models."""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in self._merges)
        return [(self._spell(first), self._spell(second)) for first, second in pairs]

    @functools.cached_property
    def byte_pairs(self) -> bool:
        """Whether this is byte-level byte pair encoding: parts of a text are merged from their bytes by `merges`."""
        config = read_tokenizer_json(self._args[0])
        steps = [config.get(key) for key in ("normalizer", "pre_tokenizer")]
        model = config["model"]
        odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        return '"ByteLevel"' in json.dumps(steps) and bool(self._merges) and not any(model.get(key) for key in odd)

    @functools.cached_property
    def piece_merges(self) -> tuple[list[tuple[bytes, bytes]], None] | None:
        """The merges of characters where bytes stand for characters that are no tokens (Llama 2); None for others."""
        model = read_tokenizer_json(self._args[0])["model"]
        fallback = model.get("byte_fallback") and not model.get("ignore_merges")
        return (self.merges(), None) if fallback and self._merges and self.cuts is None else None

    @functools.cached_property
    def whole_parts(self) -> bool:
        """Whether a part of a text that is a token stays one, whatever its merges are."""
        return bool(read_tokenizer_json(self._args[0])["model"].get("ignore_merges"))

    @functools.cached_property
    def cuts(self) -> Callable[[str], list[int]] | None:
        """Maps a text to the places at which it is cut before it is merged; None: it is not cut."""
        before = self._tokenizer.pre_tokenizer
        if before is None or _uncut(json.loads(self._tokenizer.to_str())["pre_tokenizer"]):
            return None
        return lambda text: [start for _, (start, _) in before.pre_tokenize_str(text) if start]

    def encode_chat(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens stand for these, as the library gives them."""
        return self._published.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _published(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(json.dumps(read_tokenizer_json(self._args[0])))

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids


def read_tokenizer_json(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the content of a tokenizer.json, or what it would be for the files that a folder has instead.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or a file is damaged.
    """
    if isinstance(source, Mapping):
        return source
    file = Path(source).absolute()
    if file.is_dir() and not (file / "tokenizer.json").is_file() and (config := tokenizer_json(file)) is not None:
        return config
    file = file / "tokenizer.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"there is no tokenizer at {source}; give a tokenizer.json or the folder of one.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a tokenizer.json ({error}); give another file.") from error
    return config


def _without_prefix(step: Any) -> Any:
    """The configuration of the steps, changed so that none of them writes a space before a text."""
    if isinstance(step, list):
        return [_without_prefix(s) for s in step if not (isinstance(s, dict) and s.get("type") == "Prepend")]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return None
    off = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {key: off[key] if key in off else _without_prefix(value) for key, value in step.items()}


def _uncut(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer leaves a text whole."""
    if step["type"] == "Sequence":
        return all(map(_uncut, step["pretokenizers"]))
    if step["type"] == "Metaspace":
        return not step.get("split", True)
    return step["type"] == "ByteLevel" and not step.get("use_regex", True)


def _speller(config: dict[str, Any]) -> Callable[[str], bytes]:
    """The function that maps the name of a token to its bytes, by the steps of the tokenizer."""
    model = config["model"]
    steps = json.dumps([config.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")], ensure_ascii=False)
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    alphabet = _byte_level_alphabet() if '"ByteLevel"' in steps else None

    def spell(name: str) -> bytes:
        name = name.removeprefix(before).removesuffix(after)
        if alphabet and all(char in alphabet for char in name):
            return bytes(alphabet[char] for char in name)
        return (name.replace("▁", " ") if "▁" in steps else name).encode()

    return spell


def _unknown(model: dict[str, Any], vocab: dict[str, int]) -> int | None:
    if (i := model.get("unk_id")) is not None:
        return i
    name = model.get("unk_token")
    return vocab.get(name) if isinstance(name, str) else None


def _pieces(config: dict[str, Any], vocab: dict[str, int], spell: Callable[[str], bytes]) -> list[bytes]:
    """The bytes of each token by id."""
    pieces = [b""] * (max(vocab.values()) + 1)
    for name, i in vocab.items():
        pieces[i] = spell(name)
    for token in config.get("added_tokens", []):
        pieces[token["id"]] = b"" if token["special"] else token["content"].encode()
    if (unknown := _unknown(config["model"], vocab)) is not None:
        pieces[unknown] = b""
    return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which GPT-2 spells bytes: the byte's own character if it prints, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

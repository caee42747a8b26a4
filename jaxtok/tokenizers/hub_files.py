"""Tokenizers in the files that Hugging Face's folders have beside, or instead of, a tokenizer.json.

`tokenizer_json` makes the content of a tokenizer.json of a vocab.json with its merges.txt (GPT-2, RoBERTa, Qwen2) or of
a vocab.txt (BERT, ELECTRA); `added_tokens` finds the tokens that were added to a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KINDS = {  # the kind of a tokenizer by its class or the type of its model
    "gpt2": "gpt2",
    "roberta": "gpt2",
    "qwen2": "qwen2",
    "bert": "bert",
    "electra": "bert",
}
_WELL_KNOWN = (
    *("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>", "<|im_start|>", "<|im_end|>"),
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
)  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a file of options; empty if there is no such file.

    Raises:
      ValueError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; it must be a JSON object.")
    return found


def named_token(value: Any) -> str | None:
    """Returns the token of an entry such as `eos_token`, which is its name, or a dictionary with it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def special_names(folder: Path) -> set[str]:
    """Returns the names of the special tokens that tokenizer_config.json and special_tokens_map.json tell."""
    names = set()
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for key, value in read_json(folder / file).items():
            several = value if key in ("additional_special_tokens", "extra_special_tokens") else []
            several = several.values() if isinstance(several, dict) else several
            names |= {named_token(one) for one in [*several, *([value] if key.endswith("_token") else [])]}
    return {name for name in names if name}


def added_tokens(folder: Path) -> dict[str, int]:
    """Returns the ids by name that added_tokens.json and tokenizer_config.json tell."""
    found = {name: i for name, i in read_json(folder / "added_tokens.json").items() if isinstance(i, int)}
    for i, token in (read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        if (name := named_token(token)) and str(i).isdigit():
            found[name] = int(i)
    return found


def kind_of(folder: Path) -> str:
    """Returns the kind of a folder's tokenizer (`gpt2`, `t5`, ...) in lower case: that of the class that
    tokenizer_config.json names, or else of the model; empty if nothing tells it."""
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class") or ""
    name = name.removesuffix("Fast").removesuffix("Tokenizer").lower()
    if name in ("", "pretrained", "auto", "tokenizersbackend"):  # these read any kind
        name = str(read_json(folder / "config.json").get("model_type") or "")
    return name


def tokenizer_json(folder: Path) -> dict[str, Any] | None:
    """Returns what a tokenizer.json would hold, of a folder with a vocab.json and a merges.txt, or with a vocab.txt.

    None if it has neither, or is not known to be of one of these kinds.

    Raises:
      ValueError: a file is damaged.
    """
    kind, settings = _KINDS.get(kind_of(folder), ""), read_json(folder / "tokenizer_config.json")
    try:
        if kind in ("gpt2", "qwen2") and all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line and not line.startswith("#version")]
            vocab = read_json(folder / "vocab.json")
            prefix = bool(settings.get("add_prefix_space", False))
            return byte_level_bpe(vocab, pairs, _specials(folder, vocab), kind=kind, add_prefix_space=prefix)
        if kind == "bert" and (folder / "vocab.txt").is_file():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
            vocab = {line.rstrip("\r"): i for i, line in enumerate(lines)}
            options = {
                "lowercase": settings.get("do_lower_case", True),
                "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
                "strip_accents": settings.get("strip_accents"),
            }
            return word_pieces(vocab, _specials(folder, vocab), **options)
    except (UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"the vocabulary in {folder} is damaged ({error}); fetch it again.") from error
    except Exception as error:  # the library raises plain Exceptions
        raise ValueError(
            f"the vocabulary and the merges in {folder} do not fit ({error}); fetch them again."
        ) from error
    return None


def _specials(folder: Path, vocab: Mapping[str, int]) -> dict[str, int]:
    ids = {name: vocab[name] for name in (*_WELL_KNOWN, *special_names(folder)) if name in vocab}
    return ids | added_tokens(folder)


def byte_level_bpe(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    special: Mapping[str, int],
    *,
    kind: str = "gpt2",
    add_prefix_space: bool = False,
) -> dict[str, Any]:
    """Returns the content of a tokenizer.json for a byte-level BPE.

    Args:
      vocab: the ids of tokens, which are spelled in GPT-2's alphabet of bytes.
      merges: pairs of tokens in the order in which they are merged.
      special: the ids of special tokens; those that are not in the vocabulary follow it.
      kind: how text is cut into words: as GPT-2 does, or as Qwen2 does.
      add_prefix_space: whether a space is written before a text.

    Raises:
      ValueError: the kind is unknown.
    """
    model = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges), fuse_unk=False))
    if kind == "gpt2":
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    elif kind == "qwen2":
        model.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_WORDS), behavior="isolated")
        model.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)]
        )
    else:
        raise ValueError(f"the kind of a byte-level BPE is {kind!r}; it must be gpt2 or qwen2.")
    model.decoder = decoders.ByteLevel()
    return _with_specials(model, special)


def word_pieces(
    vocab: Mapping[str, int],
    special: Mapping[str, int],
    *,
    lowercase: bool = True,
    handle_chinese_chars: bool = True,
    strip_accents: bool | None = None,
) -> dict[str, Any]:
    """Returns the content of a tokenizer.json for BERT's WordPiece; the options are those of its normalizer."""
    model = tokenizers.Tokenizer(models.WordPiece(vocab=dict(vocab), unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=handle_chinese_chars, strip_accents=strip_accents, lowercase=lowercase
    )
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece(prefix="##")
    return _with_specials(model, special)


def _with_specials(model: tokenizers.Tokenizer, special: Mapping[str, int]) -> dict[str, Any]:
    names = sorted(special, key=lambda name: special[name])
    model.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return json.loads(model.to_str())

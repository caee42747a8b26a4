"""How text becomes ids in a folder of another format: the tokenizer, and what begins and ends a text.

The facts are in several files of a folder, some of which overrule others; only `read_texts` knows which. A folder that
jaxtok wrote also has them in config.json under `jaxtok`, beside the entries that other code reads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxtok.data.text import TextData
from jaxtok.model import Model
from jaxtok.protocols import Tokenizer
from jaxtok.tokenizers import NAMES, load_tokenizer
from jaxtok.tokenizers.hub_files import kind_of, named_token, read_json, tokenizer_json
from jaxtok.tokenizers.huggingface import read_tokenizer_json

RECORD = "text.json"
"""The file in which converted runs kept the facts before their data did."""

_BESIDE = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.jinja"),
)
"""Files that go along with a tokenizer's."""
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")
"""Models of SentencePiece whose ids are the folder's, for tokenizers of the kinds below."""
_SENTENCEPIECE_KINDS = ("llama", "codellama", "mistral", "gemma", "t5", "mt5")
_BEGUN = ("llama", "codellama", "mistral", "gemma", "bert", "electra", "roberta")
"""Kinds of tokenizers without a tokenizer.json that write their first symbol before a text, if add_bos_token does not
say whether they do."""
_UNREAD = ("*.model", "*.model.v*", "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken", "tekken.json")
"""Files of tokenizers, for messages."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """A tokenizer and the ids at the ends of texts."""

    spec: str
    """As `jaxtok.tokenizers.load_tokenizer` takes it."""
    tokenizer: Tokenizer
    begin: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    pad: int | None = None

    def facts(self) -> dict[str, Any]:
        """Returns the fields of a `Model`."""
        return {name: getattr(self, name) for name in ("tokenizer", "begin", "ends", "pad")}


def read_texts(folder: Path, options: Mapping[str, Any], default: str = "", tokenizer: str = "") -> Texts:
    """Returns how a folder's texts become ids.

    Args:
      folder: a folder with a tokenizer, or with the one that config.json names under `jaxtok`.
      options: the content of its config.json.
      default: the tokenizer of a folder without any, if the vocabulary is no larger.
      tokenizer: the tokenizer to take instead of the folder's.

    Raises:
      FileNotFoundError: the folder holds no tokenizer that can be read, and none is given.
      ValueError: nothing tells what ends a text.
    """
    own = options.get("jaxtok") or {}
    spec = tokenizer or _spec_of(folder, options, own, default)
    if spec not in NAMES and Path(spec).exists():
        return _from_files(folder, spec, options, own)
    loaded = load_tokenizer(spec)
    begin = () if spec == default else (loaded.eod_id,)
    return Texts(
        spec,
        loaded,
        begin=tuple(own.get("begin", begin)),
        ends=tuple(own.get("ends", loaded.special.eos)),
        pad=own.get("pad") if own else options.get("pad_token_id"),
    )


def _spec_of(folder: Path, options: Mapping[str, Any], own: Mapping[str, Any], default: str) -> str:
    """Returns the tokenizer of a folder."""
    if (folder / "tokenizer.json").is_file():
        return str((folder / "tokenizer.json").absolute())
    if spec := own.get("tokenizer"):
        file = folder / Path(spec).name
        return str(file.absolute()) if file.is_file() else spec
    kind = kind_of(folder)
    for name in _SENTENCEPIECE:
        lower = read_json(folder / "tokenizer_config.json").get("do_lower_case")
        if (folder / name).is_file() and kind in _SENTENCEPIECE_KINDS and not lower:
            return str((folder / name).absolute())
    if tokenizer_json(folder) is not None:
        return str(folder.absolute())
    there = sorted({file.name for pattern in _UNREAD for file in folder.glob(pattern)})
    size = options.get("vocab_size") or options.get("padded_vocab_size") or 0
    if not there and default and size <= load_tokenizer(default).vocab_size:
        return default
    named = read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    if not there and not named and not default and 257 <= size <= 384:
        warnings.warn(
            f"{folder} holds no tokenizer; as it has {size} ids, its texts are taken to be bytes.", stacklevel=4
        )
        return "bytes"
    what = f"{', '.join(there)}, of a tokenizer of the kind {kind!r}" if there else f"only the name {named}"
    what = what if there or named else "none"
    raise FileNotFoundError(
        f"{folder} holds no tokenizer.json (there is {what}); it needs that, as the fast tokenizer's save_pretrained "
        f"writes it, or a {' or '.join(_SENTENCEPIECE)} of {', '.join(_SENTENCEPIECE_KINDS)}, a vocab.json with a "
        "merges.txt of GPT-2, RoBERTa or Qwen2, or a vocab.txt of BERT or ELECTRA."
    )


def texts_of(data: TextData) -> Texts:
    """Returns how texts become ids by the data alone: the end of a document begins a text if nothing else is told."""
    tokenizer = data.loaded_tokenizer
    return Texts(
        data.tokenizer,
        tokenizer,
        begin=(data.end_id,) if data.begin is None else data.begin,
        ends=data.ends or tokenizer.special.eos,
        pad=data.pad if data.ends else tokenizer.special.pad,
    )


def told(data: TextData, texts: Texts | Model) -> TextData:
    """Returns data that say what begins and ends a text as `texts` does."""
    special, eod = texts.tokenizer.special, (texts.tokenizer.eod_id,)
    named = (texts.begin, texts.ends, texts.pad) == (eod, special.eos, special.pad)
    if named and not Path(data.tokenizer).exists():  # a file's names may not tell them
        return data
    return dataclasses.replace(data, begin=texts.begin, ends=texts.ends, pad=texts.pad)


def _from_files(folder: Path, spec: str, options: Mapping[str, Any], own: Mapping[str, Any]) -> Texts:
    generation, settings = read_json(folder / "generation_config.json"), read_json(folder / "tokenizer_config.json")
    is_sentencepiece = Path(spec).suffix == ".model"
    is_tokenizer_json = Path(spec).suffix == ".json" or (Path(spec) / "tokenizer.json").is_file()
    theirs = None if is_sentencepiece else tokenizers.Tokenizer.from_str(json.dumps(read_tokenizer_json(spec)))
    sentences = load_tokenizer(spec) if is_sentencepiece else None

    def id_of(name: str | None) -> int | None:
        return None if name is None else (theirs.token_to_id(name) if theirs else sentences.token_id(name))

    rows = options.get("vocab_size") or options.get("padded_vocab_size") or math.inf

    def of_role(role: str) -> tuple[int, ...]:
        """Returns a role's ids from the first of generation_config, config and tokenizer_config.json that has any of
        the model's; a config that was copied from a larger model has others."""
        named = id_of(named_token(settings.get(f"{role}_token")))
        for ids in (generation.get(f"{role}_token_id"), options.get(f"{role}_token_id"), named):
            known = ids if isinstance(ids, list) else [ids]
            if known := tuple(i for i in known if isinstance(i, int) and 0 <= i < rows):
                return known
        return ()

    ends = tuple(own["ends"]) if "ends" in own else of_role("eos")
    if not ends and (separator := id_of("[SEP]")) is not None:  # as in encoders
        ends = (separator,)
    if not ends and not is_tokenizer_json:  # the tokenizer's class had them
        ends = load_tokenizer(spec).special.eos[:1]
    if not ends:
        raise ValueError(
            f"{folder} has no eos_token_id, neither in generation_config.json nor in config.json, and no eos_token in "
            "tokenizer_config.json; add one."
        )
    tokenizer = load_tokenizer(spec, ends[0])

    def begin() -> tuple[int, ...]:
        if is_tokenizer_json:
            return _written_first(theirs, ends)  # whatever add_bos_token says, as in transformers
        if not settings.get("add_bos_token", kind_of(folder) in _BEGUN):
            return ()
        named, own_bos = id_of(named_token(settings.get("bos_token"))), tokenizer.special.bos
        return next(((bos,) for bos in (named, own_bos) if bos is not None), of_role("bos")[:1])

    pad = own.get("pad") if own else next(iter(of_role("pad")), None)
    return Texts(spec, tokenizer, tuple(own["begin"]) if "begin" in own else begin(), ends, pad)


def _written_first(theirs: tokenizers.Tokenizer, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the ids that the post-processor writes before a text; it may write others after it."""
    bare, full = (theirs.encode("a", add_special_tokens=special).ids for special in (False, True))
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return tuple(token for token in theirs.encode("", add_special_tokens=True).ids if token not in ends)


def write_texts(folder: Path, model: Model) -> dict[str, Any]:
    """Copies the tokenizer's files into the folder; returns what config.json says of texts."""
    if not isinstance(model.data, TextData):
        return {}
    name = copy_tokenizer(model.data.tokenizer, folder)
    own = {"tokenizer": name, "begin": list(model.begin), "ends": list(model.ends)}
    if model.pad is not None:
        own["pad"] = model.pad
    ids: dict[str, Any] = {}
    if model.begin:
        ids["bos_token_id"] = model.begin[0]
    if model.ends:
        ids["eos_token_id"] = model.ends[0] if len(model.ends) == 1 else list(model.ends)
    if model.pad is not None:
        ids["pad_token_id"] = model.pad
    if (folder / "generation_config.json").is_file():
        generation = read_json(folder / "generation_config.json") | ids
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    return ids | {"jaxtok": own}


def copy_tokenizer(spec: str, folder: Path) -> str:
    """Copies a tokenizer's file, and what is beside it, into a folder; returns its name there.

    A vocabulary with its merges, or a list of words, becomes a tokenizer.json. A tokenizer that is not a file keeps its
    name.
    """
    path = Path(spec)
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        path = path / "tokenizer.json" if (path / "tokenizer.json").is_file() or not models else models[0]
        if not path.is_file() and (content := tokenizer_json(path.parent)) is not None:
            (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            _copy_beside(path.parent, folder)
            return "tokenizer.json"
    if not path.is_file():
        return spec
    name = "tokenizer.json" if path.suffix == ".json" else path.name
    shutil.copyfile(path, folder / name)
    if path.name == "tokenizer.json" or path.suffix == ".model":
        _copy_beside(path.parent, folder)
    if path.suffix == ".model" and (added := load_tokenizer(path).added):
        (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n")
    return name


def _copy_beside(source: Path, folder: Path) -> None:
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def copy_record(source: Path, target: Path) -> None:
    """Copies the record of a run, if it has one, to a run that is made from it."""
    if (source / RECORD).is_file():
        shutil.copyfile(source / RECORD, target / RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the fields of a `Model` that a run's record holds; none if there is no record."""
    facts = read_json(folder / RECORD)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}

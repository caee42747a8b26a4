"""How text becomes ids in a folder of another format: the tokenizer, and what begins and ends a text.

The facts are in several files of a folder, some of which overrule others; only `read_texts` knows which. A folder that
jaxtok wrote also has them in config.json under `jaxtok`, beside the entries that other code reads.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxtok.data.text import TextData
from jaxtok.model import Model
from jaxtok.protocols import Tokenizer
from jaxtok.tokenizers import HuggingFaceTokenizer, load_tokenizer

RECORD = "text.json"
"""The file in which a converted run keeps the facts."""

_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
"""Files that go along with a tokenizer.json."""
_UNREAD = ("*.model", "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken")
"""Files of tokenizers that cannot be read from a folder of another format."""


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
      folder: a folder with a tokenizer.json, or with the tokenizer that config.json names under `jaxtok`.
      options: the content of its config.json.
      default: the tokenizer of a folder without any.
      tokenizer: the tokenizer to take instead of the folder's.

    Raises:
      FileNotFoundError: the folder holds no tokenizer that can be read, and none is given.
      ValueError: nothing tells what ends a text.
    """
    own = options.get("jaxtok") or {}
    if not tokenizer and (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder, options, own)
    spec = tokenizer or own.get("tokenizer") or ""
    if not tokenizer and spec and (folder / Path(spec).name).is_file():
        spec = str((folder / Path(spec).name).absolute())
    if not spec:
        kind = read_json(folder / "tokenizer_config.json").get("tokenizer_class", "")
        there = sorted(file.name for pattern in _UNREAD for file in folder.glob(pattern))
        if there or (kind and not kind.startswith("ByT5")):
            what = f"{', '.join(there)}, which cannot be read" if there else f"{kind} in tokenizer_config.json"
            raise FileNotFoundError(
                f"{folder} holds no tokenizer.json (there is {what}); save the tokenizer there in the fast format."
            )
        size = options.get("vocab_size") or options.get("padded_vocab_size") or 0
        spec = default or ("bytes" if 257 <= size <= 384 else "")
    if not spec:
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; put the model's there, or name its tokenizer.")
    loaded = load_tokenizer(spec)
    begin = () if default else (loaded.eod_id,)
    return Texts(
        spec,
        loaded,
        begin=tuple(own.get("begin", begin)),
        ends=tuple(own.get("ends", loaded.special.eos)),
        pad=own.get("pad") if own else options.get("pad_token_id"),
    )


def named_texts(spec: str) -> Texts:
    """Returns how texts become ids in a run with this tokenizer, whose end of a document also begins a text."""
    tokenizer = load_tokenizer(spec)
    return Texts(spec, tokenizer, begin=(tokenizer.eod_id,), ends=tokenizer.special.eos, pad=tokenizer.special.pad)


def _from_tokenizer_json(folder: Path, options: Mapping[str, Any], own: Mapping[str, Any]) -> Texts:
    file = folder / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(file))
    generation, settings = read_json(folder / "generation_config.json"), read_json(folder / "tokenizer_config.json")

    def of_role(role: str) -> Any:
        """Returns a role's ids from the first of generation_config, config and tokenizer_config.json that has them."""
        for file in (generation, options):
            if (ids := file.get(f"{role}_token_id")) is not None:
                return ids
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        return None if named is None else theirs.token_to_id(named)

    ends = own.get("ends", of_role("eos"))
    if ends is None:  # as in encoders
        ends = theirs.token_to_id("[SEP]")
    if ends is None or ends == []:
        raise ValueError(
            f"{folder} has no eos_token_id, neither in generation_config.json nor in config.json, and no eos_token in "
            "tokenizer_config.json; add one."
        )
    ends = (ends,) if isinstance(ends, int) else tuple(ends)
    begin = own.get("begin", _written_first(theirs, ends))  # whatever add_bos_token says, as in transformers
    pad = own.get("pad") if own else of_role("pad")
    tokenizer = HuggingFaceTokenizer(folder, eod=theirs.id_to_token(ends[0]))
    return Texts(str(file.absolute()), tokenizer, tuple(begin), ends, pad if isinstance(pad, int) else None)


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
    """Copies a tokenizer's file, and what is beside a tokenizer.json, into a folder; returns its name there.

    A tokenizer that is not a file keeps its name.
    """
    path = Path(spec)
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        path = path / "tokenizer.json" if (path / "tokenizer.json").is_file() or not models else models[0]
    if not path.is_file():
        return spec
    name = "tokenizer.json" if path.suffix == ".json" else path.name
    shutil.copyfile(path, folder / name)
    if path.name == "tokenizer.json":
        for beside in _BESIDE:
            if (path.parent / beside).is_file():
                shutil.copyfile(path.parent / beside, folder / beside)
    return name


def write_record(folder: Path, model: Model) -> None:
    """Keeps, in a run's folder, what begins and ends its texts."""
    facts = {"begin": list(model.begin), "ends": list(model.ends), "pad": model.pad}
    (folder / RECORD).write_text(json.dumps(facts, indent=2) + "\n")


def copy_record(source: Path, target: Path) -> None:
    """Copies what `write_record` kept, if it did, to a run that is made from another."""
    if (source / RECORD).is_file():
        shutil.copyfile(source / RECORD, target / RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    """Returns the fields of a `Model` that `write_record` kept; none if it kept none."""
    facts = read_json(folder / RECORD)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


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

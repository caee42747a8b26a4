"""All formats, and the choice of one to read a folder or file, or to write a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxtok.interop.byte2word import BYTE2WORD
from jaxtok.interop.electra import ELECTRA, TENSORFLOW
from jaxtok.interop.elm import ELM
from jaxtok.interop.encoders import ENCODERS
from jaxtok.interop.flextok import FLEXTOK
from jaxtok.interop.folders import read_options
from jaxtok.interop.gguf import GGUF
from jaxtok.interop.hat import HAT
from jaxtok.interop.huggingface import DECODERS
from jaxtok.interop.kl_vae import DIFFUSERS, KL_VAE
from jaxtok.interop.mamba import MAMBA
from jaxtok.interop.peft import PEFT
from jaxtok.interop.seed import SEED
from jaxtok.interop.t5 import T5
from jaxtok.interop.tokenbridge import TOKENBRIDGE
from jaxtok.interop.tokenformer import TOKENFORMER
from jaxtok.interop.tokenunify import TOKENUNIFY
from jaxtok.interop.vqgan import VQGAN
from jaxtok.interop.word_pooled import WORD_POOLED
from jaxtok.protocols import Format
from jaxtok.weights import SUFFIXES

FORMATS: tuple[Format, ...] = (
    DECODERS,
    MAMBA,
    ENCODERS,
    T5,
    ELECTRA,
    TENSORFLOW,
    HAT,
    TOKENFORMER,
    WORD_POOLED,
    BYTE2WORD,
    VQGAN,
    KL_VAE,
    DIFFUSERS,
    ELM,
    FLEXTOK,
    TOKENBRIDGE,
    SEED,
    TOKENUNIFY,
    PEFT,
    GGUF,
)
"""If several can hold a model, the first is the default. A new format is a file of its own and a line here."""


def format_named(name: str) -> Format:
    """Returns the format of this name.

    Raises:
      ValueError: there is none.
    """
    for form in FORMATS:
        if form.name == name:
            return form
    raise ValueError(f"the format is {name!r}; it must be one of {', '.join(form.name for form in FORMATS)}.")


def recognised(path: str | Path) -> list[Format]:
    """Returns the formats that a folder or file may be in: one, several (PyTorch files), or none."""
    return [form for form in FORMATS if form.recognises(Path(path))]


def format_of(path: str | Path, like: Any = None) -> Format:
    """Returns the format of a folder or file.

    Args:
      path: the folder or file.
      like: a task whose model it holds.

    Raises:
      FileNotFoundError: there is nothing at the path.
      ValueError: it is in none of the formats here, or may be in several.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder or file of a model.")
    found = recognised(path)
    if like is not None and GGUF not in found:  # that says of itself what it is
        own = [form for form in FORMATS if form.owns(like)]
        if not own:
            raise ValueError(f"there is no format for a {type(like).__name__}; give another config.")
        return next((form for form in own if form in found), own[0])
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(form.name for form in found)
        raise ValueError(f"{path} may be in the formats {names}; give the config of its model (--config).")
    kinds = "; ".join(f"{form.name}: {form.holds}" for form in FORMATS)
    raise ValueError(f"{path} {_what_it_holds(path)}, which is in none of the formats here ({kinds}).")


def _what_it_holds(path: Path) -> str:
    if path.is_file():
        return f"is a file {path.suffix or 'without a suffix'}"
    if (path / "config.json").is_file():
        kind = read_options(path).get("model_type")
        return f"has the model_type {kind!r} in its config.json" if kind else "has a config.json without model_type"
    names = sorted(file.name for file in path.iterdir())
    return f"holds {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names else "is empty"


def format_for(task: Any, target: str | Path = "") -> Format:
    """Returns the format in which a model of a task is written: the first that owns it and fits the target's name.

    Raises:
      ValueError: there is none.
    """
    if Path(target).suffix == ".gguf":
        raise ValueError(f"{target} is the name of a GGUF file, which can only be read; give that of a folder.")
    own = [form for form in FORMATS if form.owns(task)]
    if not own:
        raise ValueError(
            f"it is a model of {type(task).__name__}, for which there is no format here "
            f"({', '.join(form.name for form in FORMATS)})."
        )
    is_file = Path(target).suffix in SUFFIXES
    return next((form for form in own if form.is_file == is_file), own[0])

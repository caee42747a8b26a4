"""Archives from a package registry, fetched once by the machine's own client of the registry and compared with their
checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Package:
    """An archive as it was published."""

    archive: str
    """The name of its file."""
    sha256: str
    command: tuple[str, ...]
    """The command that writes the archive to the working directory; `python` stands for this interpreter."""
    hint: str
    """How to install the command's program."""


PIP = ("python", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:")
PIP_HINT = "pip comes with Python (python -m ensurepip)"


def download(package: Package, folder: Path, what: str, otherwise: str) -> Path:
    """Fetches an archive into a folder.

    Args:
      what, otherwise: the beginning and the end of an error's sentence.

    Raises:
      FileNotFoundError: no archive came.
    """
    program, *arguments = package.command
    local = shutil.which(program, path=str(Path(sys.executable).parent))  # next to this interpreter
    command = [sys.executable if program == "python" else local or shutil.which(program) or program, *arguments]
    print(f"fetching {package.archive} once, with {program} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=1800)
        problem = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] if done.returncode else []
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = [str(error)]
    if not (folder / package.archive).is_file():
        raise FileNotFoundError(
            f"{what} not on this machine and could not be fetched ({' '.join(problem) or 'no file came'}); run "
            f"`{' '.join(package.command)}` where there is a network ({package.hint}), and {otherwise}."
        )
    return folder / package.archive


def check(archive: Path, package: Package) -> None:
    """Raises a ValueError if the archive is not what was published."""
    with archive.open("rb") as file:
        if (digest := hashlib.file_digest(file, "sha256").hexdigest()) != package.sha256:
            raise ValueError(
                f"{archive} is not {package.archive} as it was published (its SHA-256 is {digest}); fetch it again."
            )

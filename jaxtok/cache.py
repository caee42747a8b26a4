"""The folder in which files that were fetched or made once are kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """Returns a folder of the cache, which may not exist yet: $XDG_CACHE_HOME/jaxtok/..., or ~/.cache/jaxtok/..."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("jaxtok", *parts)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path | None]:
    """Yields a folder to fill, which becomes `folder` at the end; None if that is there already.

    It appears as a whole or not at all, also if several processes make it at the same time.

    Raises:
      OSError: the cache cannot be written.
    """
    if folder.is_dir():
        yield None
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        half_done = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise OSError(
            f"the cache {folder.parent} cannot be written ({error}); set XDG_CACHE_HOME to a folder that can."
        ) from error
    try:
        yield half_done
        try:
            half_done.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(half_done, ignore_errors=True)

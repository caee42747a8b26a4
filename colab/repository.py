"""Writes the repository's address, which pyproject.toml has, into the notebooks: `python colab/repository.py`.

Each notebook has it twice: in its badge, and where it installs jaxtok if it is not installed. There, a checkout that
the notebook is in comes first.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
INSTALL = """\
try:
    import jaxtok
except ImportError:
    from pathlib import Path

    here = Path.cwd()
    checkouts = [folder for folder in (here, *here.parents) if (folder / "jaxtok" / "systems.py").is_file()]
    %pip install -q {checkouts[0] if checkouts else "git+REPOSITORY"}
    import jaxtok
"""
_INSTALL = re.compile(r"try:\n    import jaxtok\nexcept ImportError:\n.*?\n    import jaxtok\n", re.S)
_BADGE = re.compile(r"(https://colab\.research\.google\.com/)github/[^)]*")


def repository() -> str:
    """Returns the address."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def with_repository(path: Path, address: str) -> str:
    """Returns the text of a notebook with this address."""
    notebook = json.loads(path.read_text())
    badge = f"{address.removeprefix('https://github.com/')}/blob/main/colab/{path.name}"
    for cell in notebook["cells"]:
        source = _BADGE.sub(rf"\1github/{badge}", "".join(cell["source"]))
        source = _INSTALL.sub(lambda _: INSTALL.replace("REPOSITORY", address), source)
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for notebook in sorted((ROOT / "colab").glob("*.ipynb")):
        notebook.write_text(with_repository(notebook, repository()))

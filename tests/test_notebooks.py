"""The notebooks in colab/: kept without outputs, and every cell runs at a tiny setting."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import runpy
import sys
import textwrap
from pathlib import Path

import pytest
from gguf_files import TEMPLATE, byte_level, tokenizer_fields, write_gguf

from jaxtok.cache import cache_folder
from jaxtok.interop.gguf import GGUF
from jaxtok.interop.huggingface import DECODERS
from jaxtok.pretrained import WHEELS

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
FIGURES = {
    "a_real_model": 2,
    "an_image_in_1_to_256_tokens": 4,
    "fast_and_exact_decoding": 2,
    "images_as_tokens": 4,
    "segmenting_neurons": 5,
    "sharding_on_eight_devices": 5,
    "train_and_grow": 4,
}
PRINTED = {  # parts of what must be printed
    "a_real_model": [
        "bits per byte of Python before",
        "after 4 steps",
        "adapter_model.safetensors",
        "differ by at most",
    ],
    "an_image_in_1_to_256_tokens": [
        "one image as tokens",
        "squared error from 1 token",
        "nats a token (uniform: 6.24)",
    ],
    "fast_and_exact_decoding": ["all answers are equal: True", "JSON:  {'n':", "equal to no drafts: True"],
    "images_as_tokens": ["of 16 codes used", "nats a position (uniform: 2.77)"],
    "segmenting_neurons": ["parameters are not in the pre-trained model", "pretrained: "],
    "sharding_on_eight_devices": ["8 devices", "all-reduce of f32[8, 16]\n", "all-reduce of f32[8, 16, 32]\n"],
    "train_and_grow": ["bits per byte on validation files", "random keys (the released recipe)", "def "],
}


PRETRAINED = ("a_real_model", "fast_and_exact_decoding")
"""The notebooks that open a pretrained model."""

QUICK = "images_as_tokens"
"""The notebook that runs without --slow."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def kernel(tmp_path, monkeypatch) -> str:
    """The name of a kernel that is this Python, with jaxtok from this checkout and the notebooks' tiny setting."""
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "language": "python"}
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(spec | {"display_name": "this Python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))  # is searched before all other folders of kernels
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAXTOK_NOTEBOOK_TINY", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles faster
    monkeypatch.delenv("MPLBACKEND", raising=False)  # plots go into the notebook
    return "python3"


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} == FIGURES.keys() == PRINTED.keys()


def test_is_stripped(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source


def test_badge_opens_this_notebook_of_the_repository(path):
    """As `python colab/repository.py` writes it."""
    script = runpy.run_path(str(ROOT / "colab" / "repository.py"))
    assert path.read_text() == script["with_repository"](path, script["repository"]())
    first, *rest = (cell.source for cell in nbformat.read(path, as_version=4).cells)
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    name = script["repository"]().removeprefix("https://github.com/")
    target = f"https://colab.research.google.com/github/{name}/blob/main/colab/{path.name}"
    assert f"[![Open In Colab]({image})]({target})" in first
    assert sum(f"git+https://github.com/{name}" in source for source in rest) == 1
    fork = script["with_repository"](path, "https://github.com/someone/tokens")
    assert fork.count("someone/tokens") == 2 and f"/{name}" not in fork


def test_a_checkout_is_installed_where_there_is_one(path, tmp_path, monkeypatch):
    (install,) = (cell.source for cell in nbformat.read(path, as_version=4).cells if "%pip" in cell.source)
    code = re.sub(r"%pip install -q \{(.*)\}", r"print(\1)", install).split("\n    import jaxtok\n")[1]
    lines = textwrap.dedent(code.split("except ImportError:\n", 1)[1])
    for folder, found in ((ROOT / "colab", str(ROOT)), (tmp_path, "git+https://github.com/jaxtok/jaxtok")):
        monkeypatch.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(lines, {})
        assert printed.getvalue() == found + "\n"


def put_smollm2(folder: Path) -> None:
    """Puts a tiny model into the cache where the published one would be, with room for the trees of drafters."""
    file = folder / "tiny.gguf"
    write_gguf(file, "llama", tokenizer_fields("smollm", byte_level("smollm")), template=TEMPLATE)
    model = GGUF.read(file)
    model = dataclasses.replace(model, task=model.task.with_model(max_length=256))
    DECODERS.write(cache_folder("models", Path(WHEELS["smollm2"].member).stem), model)


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * (p.stem != QUICK), id=p.stem) for p in NOTEBOOKS]
)
def test_runs(path, kernel, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if path.stem in PRETRAINED:
        put_smollm2(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(work)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name=kernel, resources=resources).execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == FIGURES[path.stem]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    for part in PRINTED[path.stem]:
        assert part in printed
    assert path.stem == "fast_and_exact_decoding" or list(work.glob("runs/*/*/metrics.jsonl"))

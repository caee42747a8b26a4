"""What `pip install` brings: all modules, and the configs, which are found in an empty folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_has_every_module_and_every_config(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in files:
        if file.startswith(("jaxtok/", "configs/")) or "/" not in file:
            target = tmp_path / "tree" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / file).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, tmp_path / "tree"]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("jaxtok-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {file for file in files if file.startswith("jaxtok/")}
    wanted |= {f"jaxtok/{file}" for file in files if file.startswith("configs/")}
    assert wanted <= packed

    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    code = "import jaxtok; from jaxtok import systems; print(jaxtok.__file__, len(systems.configs()))"
    run = {"cwd": tmp_path, "env": {"PYTHONPATH": str(tmp_path / "installed")}, "capture_output": True, "text": True}
    found = subprocess.run([sys.executable, "-c", code], check=True, **run).stdout.split()
    assert found[0].startswith(str(tmp_path)) and int(found[1]) > 50

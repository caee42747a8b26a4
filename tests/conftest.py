"""Options, and the comparison with the golden fixtures, which are numbers that the authors' code has computed.

@pytest.mark.parity("tokenformer/model_*.npz")   # runs once for each such file below --goldens
def test_model(golden, parity):
    ours = run(golden.config, golden.under("params"))
    parity("logits", ours, golden["out/logits"])  # asserts, and adds a row to the table at the end of the run
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices, for the tests of meshes. Tests mostly compile, so programs are optimised only with --slow.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8"
    if "--slow" in sys.argv
    else "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",  # the other core has tests of its own
)
# With a thread for each of two cores, the eight devices wait for one another for ever in some programs: each collective
# holds a thread until all devices have come to it.
os.environ.setdefault("PJRT_NPROC", "32")

import jaxtyping

jaxtyping.install_import_hook("jaxtok", "shapes.check")

import jax
import numpy as np
import pytest
from causal_lms import noisy_params
from collector import collect

IMPORTS_TORCH = re.compile(r'importorskip\("(torch|transformers|peft)"\)')


def pytest_addoption(parser):
    # Written with "=", as pytest takes a path without one for a folder of tests until it has read this file.
    goldens = Path(__file__).parent / "goldens"
    parser.addoption("--goldens", metavar="DIR", default=goldens, type=Path, help="--goldens=DIR: other fixtures")
    parser.addoption("--slow", action="store_true", help="also run the learning experiments")
    parser.addoption("--budget", type=float, metavar="SECONDS", help="list the systems whose tests take longer")


def pytest_configure(config):
    if not (folder := config.getoption("--goldens")).is_dir():
        raise pytest.UsageError(f"--goldens is {folder}; it must be a folder of fixtures.")


def pytest_collection_finish():
    # Tracing makes many objects and few cycles of them; modules and tests stay until the end.
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="a learning experiment; run with --slow"))
        if isinstance(item, pytest.Function) and imports_torch(item.function):
            item.add_marker("torch")  # so that `make slow` finds it
        elif item.get_closest_marker("torch") and find_spec("torch") is None:
            item.add_marker(pytest.mark.skip(reason="needs PyTorch; `make slow` installs and runs it"))


@functools.cache
def imports_torch(test) -> bool:
    return bool(IMPORTS_TORCH.search(inspect.getsource(test)))


def pytest_generate_tests(metafunc):
    if "golden" in metafunc.fixturenames:
        patterns = metafunc.definition.get_closest_marker("parity").args
        folder = metafunc.config.getoption("--goldens")
        files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
        metafunc.parametrize("golden", files, ids=[file.stem for file in files], indirect=True)
    if "causal_lm" in metafunc.fixturenames and not hasattr(metafunc.module, "causal_lm"):  # a file may have its own
        test, alike = metafunc.function.__name__, getattr(metafunc.module, "LIKE_ANOTHER", ())
        only = getattr(metafunc.module, "ONLY", {})
        slow = {name for name in collect("CAUSAL_LMS") if name in alike or test not in only.get(name, (test,))}
        names = [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in collect("CAUSAL_LMS")]
        metafunc.parametrize("causal_lm", names, indirect=True, scope="session")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One file of fixtures. Its arrays' names are paths: in/..., out/..., grad/..."""

    name: str
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    def under(self, folder: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `folder/`, by the rest of the name."""
        return {key.removeprefix(f"{folder}/"): a for key, a in self.arrays.items() if key.startswith(f"{folder}/")}


@pytest.fixture
def golden(request) -> Golden:
    with np.load(request.param) as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config", "{}")))
    return Golden(f"{request.param.parent.name}/{request.param.stem}", config, arrays)


@pytest.fixture
def parity(request, golden):
    """`parity(what, ours, reference, rtol)`: equal up to rtol times the reference's largest entry.

    `ours` and `reference` are arrays, or dicts of arrays with the same keys. Where the reference is zero everywhere,
    the difference itself has to be within rtol.
    """

    def check(what: str, ours, reference, rtol: float = 1e-4):
        if not isinstance(reference, Mapping):
            ours, reference = {"": ours}, {"": reference}
        assert set(ours) == set(reference), f"{what}: one side only has {sorted(set(ours) ^ set(reference))}"
        errors = {name: relative_error(ours[name], reference[name]) for name in reference}
        worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
        request.node.user_properties.append(("parity", (golden.name, what, float(errors[worst]))))
        assert errors[worst] <= rtol, f"{golden.name}, {what} {worst}: relative error {errors[worst]:.2e} > {rtol:.0e}"

    return check


def relative_error(ours, reference) -> float:
    """The largest difference over the largest entry of the reference (over 1, if that is zero everywhere)."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"shape {ours.shape} instead of {reference.shape}"
    return np.max(np.abs(ours - reference)) / (np.max(np.abs(reference)) or 1.0)


def pytest_terminal_summary(terminalreporter, config):
    if budget := config.getoption("--budget"):
        beyond_budget(terminalreporter, budget)
    worst: dict[tuple[str, str], float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == "parity":
                    name, what, error = value
                    worst[name, what] = float(np.maximum(worst.get((name, what), 0.0), error))  # a NaN stays
    if worst:
        terminalreporter.section("parity with the authors' code")
        terminalreporter.line("| fixture | what | max relative error |\n|---|---|---|")
        for (name, what), error in worst.items():
            terminalreporter.line(f"| {name} | {what} | {error:.1e} |")


def beyond_budget(terminalreporter, budget: float):
    """A line for each system whose test files (test_NAME.py, test_NAME_parity.py, ...) took longer together."""
    files: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                file = report.nodeid.split("::")[0]
                system = re.sub(r"_(parity|learning|study|checkpoint)$", "", Path(file).stem.removeprefix("test_"))
                files[system][file] += report.duration
    terminalreporter.section(f"systems whose tests take more than {budget:g} s")
    for system, seconds in sorted(files.items(), key=lambda item: -sum(item[1].values())):
        if (total := sum(seconds.values())) > budget:
            each = ", ".join(f"{file} {s:.0f}" for file, s in seconds.items())
            terminalreporter.line(f"{system:20} {total:5.0f} s   {each}")


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Drops compiled programs after each file, as they would fill the memory."""
    yield
    jax.clear_caches()
    gc.collect()  # some are in cycles


@pytest.fixture(scope="session")
def causal_lm(request) -> tuple[Any, Any]:
    """A model that a test file defines as one of `CAUSAL_LMS`, and its parameters, none of them zero."""
    model = collect("CAUSAL_LMS")[request.param]()
    return model, noisy_params(model)

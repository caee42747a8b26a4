"""What TokenBridge's paper claims, on photo patches: few levels cost little, and channels depend on each other."""

from __future__ import annotations

import dataclasses

import pytest

from jaxtok.configuration import load_config
from jaxtok.studies.comparison import train_once
from jaxtok.studies.tokenbridge import quantization_curve
from jaxtok.training.mesh import MeshConfig

pytestmark = pytest.mark.slow


def test_errors_of_quantisation():
    """More levels are better, and those of a normal distribution better than even ones up to 32, at a range of 5."""
    rows = quantization_curve((4, 8, 16, 32, 64), (2.0, 5.0))
    narrow, wide = rows[:5], rows[5:]
    of = {kind: [float(row[f"{kind}: images"]) for row in wide] for kind in ("gaussian", "linear")}
    for errors in of.values():
        assert errors == sorted(errors, reverse=True)
    assert all(a < b for a, b in zip(of["gaussian"][:4], of["linear"][:4])) and of["gaussian"][-1] < 1.15
    assert float(narrow[-1]["gaussian: images"]) > 1.5, "too small a range cuts off what is far out"


def test_the_autoregressive_head_is_better_than_the_parallel_one(tmp_path):
    study = load_config("tokenbridge_study")
    study.write_patches(tmp_path / "patches")
    losses = []
    for arm in study.heads.arms:
        data = dataclasses.replace(arm.data, path=str(tmp_path / "patches"))
        experiment = dataclasses.replace(arm, data=data, mesh=MeshConfig(data=1), workdir=str(tmp_path / arm.name))
        result = train_once(experiment)
        losses.append(result.task.evaluate(result.params, data.eval_batches("test"))["loss"])
    assert losses[0] <= 0.75 * losses[1]

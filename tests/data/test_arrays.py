"""Rows of arrays that were computed once."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxtok.data.arrays import ArrayData, write_arrays

SHAPES = (("states", (2, 3)), ("targets", (4,)))


def written(folder) -> ArrayData:
    rng = np.random.default_rng(0)
    for split, counts in (("train", (7, 6)), ("validation", (5, 4))):
        parts = [{name: rng.normal(size=(n, *shape)) for name, shape in SHAPES} for n in counts]
        write_arrays(folder / split, parts)
    return ArrayData(path=str(folder), arrays=SHAPES, batch_size=4, workers=0)


DATASETS = {"arrays": lambda texts, folder: written(folder)}


def test_rows_are_those_of_the_files(tmp_path):
    data = written(tmp_path)
    batches = list(data.eval_batches("validation"))
    assert [batch["mask"].sum() for batch in batches] == [4, 4, 1] and data.count("validation") == 9
    together = np.concatenate([batch["states"][batch["mask"] > 0] for batch in batches])
    assert np.array_equal(together, np.load(tmp_path / "validation" / "states.npy").astype(np.float32))
    seen = np.concatenate([next(data.train_batches())["targets"] for _ in range(1)])
    assert len(np.unique(seen[:, 0])) == 4


def test_what_is_refused(tmp_path):
    data = written(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"test/states\.npy does not exist"):
        data.count("test")
    with pytest.raises(ValueError, match=r"rows of \(4,\); by the config they are \(5,\)"):
        dataclasses.replace(data, arrays=(("targets", (5,)),)).count("train")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_arrays(tmp_path / "train", [])
    write_arrays(tmp_path / "odd", [{"states": np.zeros((3, 2, 3)), "targets": np.zeros((2, 4))}])
    with pytest.raises(ValueError, match="different numbers of rows: states 3, targets 2"):
        data.count("odd")
    with pytest.raises(ValueError, match="arrays is empty"):
        ArrayData()

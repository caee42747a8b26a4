"""Volumes: files of every kind, the generator, crops, and what is refused."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from jaxtok.data.volumes import PERTURBATIONS, VolumeData, VolumeFile, load_labels, load_volume, perturb, toy_volume

IMAGES = np.random.default_rng(0).integers(10, 200, (5, 12, 9)).astype(np.uint8)
LABELS = np.random.default_rng(1).integers(0, 4, IMAGES.shape).astype(np.uint16)


def write(path, array, name="main"):
    if path.suffix == ".h5":
        with pytest.importorskip("h5py").File(path, "a") as file:
            file[name] = array
    elif path.suffix == ".tif":
        pytest.importorskip("tifffile").imwrite(path, array)
    elif path.suffix == ".zarr":
        group = pytest.importorskip("zarr").open_group(str(path), mode="a")
        group.create_array(name, shape=array.shape, dtype=array.dtype)[:] = array
    else:
        nibabel = pytest.importorskip("nibabel")
        nibabel.save(nibabel.Nifti1Image(array.transpose(), np.eye(4)), path)
    return f"volume:{path}"


@pytest.mark.parametrize("ending", [".h5", ".tif", ".zarr", ".nii", ".nii.gz"])
def test_files_there_and_back(ending, tmp_path):
    images, labels = (write(tmp_path / (name + ending), x) for name, x in (("image", IMAGES), ("label", LABELS)))
    volume = load_volume(images, labels)
    assert volume.shape == IMAGES.shape and (volume.low, volume.high) == (IMAGES.min(), IMAGES.max())
    np.testing.assert_array_equal(volume.segments, LABELS)
    expected = (IMAGES[1:4].astype(np.float64) - IMAGES.min()) / (IMAGES.max() - IMAGES.min())
    np.testing.assert_allclose(volume[1:4], expected, atol=1e-6)
    np.testing.assert_allclose(volume.scaled(slice(0, 2), slice(3, 7), slice(1, 5)).max() <= 1, True)


def test_the_layout_of_cremi(tmp_path):
    path = tmp_path / "cremi.h5"
    write(path, IMAGES, "volumes/raw")
    write(path, LABELS.astype(np.uint64) + (LABELS > 0).astype(np.uint64) * 2**40, "volumes/labels/neuron_ids")
    write(path, LABELS, "volumes/labels/clefts")
    volume = load_volume(f"volume:{path}", f"volume:{path}")
    np.testing.assert_array_equal(volume.segments, LABELS)  # large numbers are numbered anew
    assert load_volume(f"volume:{path}::volumes/labels/clefts").shape == IMAGES.shape
    with pytest.raises(ValueError, match="has no data set 'nothing'; it has volumes/labels/clefts, "):
        load_volume(f"volume:{path}::nothing")


def test_a_file_with_several_data_sets_must_be_told_which(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "two.h5", IMAGES, name)
    with pytest.raises(ValueError, match=r"has the data sets a, b; name one: volume:.*::NAME"):
        load_volume(f"volume:{tmp_path}/two.h5")


@pytest.mark.parametrize("ending", [".h5", ".zarr"])
def test_a_file_is_written_part_by_part(ending, tmp_path):
    pytest.importorskip({".h5": "h5py", ".zarr": "zarr"}[ending])
    path = tmp_path / f"new{ending}"
    with VolumeFile(path) as file:
        array = file.create("main", IMAGES.shape, "float32", (2, 100, 100))
        for z in range(5):
            array[z : z + 1] = IMAGES[z : z + 1]
    np.testing.assert_array_equal(np.asarray(load_volume(f"volume:{path}").images[:]), IMAGES)
    with pytest.raises(FileExistsError, match="exists already"):
        VolumeFile(path)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist; give the file of a volume"):
        load_volume(f"volume:{tmp_path}/none.h5")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match="is no volume by its name"):
        load_volume(f"{tmp_path}/text.txt")
    images = write(tmp_path / "image.tif", IMAGES)
    with pytest.raises(ValueError, match=r"has the shape \(4, 12, 9\), but the images \(5, 12, 9\)"):
        load_labels(write(tmp_path / "short.tif", LABELS[:4]), IMAGES.shape)
    with pytest.raises(ValueError, match="holds float32; labels must be whole numbers"):
        load_volume(images, write(tmp_path / "float.tif", LABELS.astype(np.float32)))
    with pytest.raises(ValueError, match="has the label -1; labels must be 0"):
        load_volume(images, write(tmp_path / "negative.tif", LABELS.astype(np.int16) - 1))
    with pytest.raises(ValueError, match=r"has the shape .* a volume must be"):
        load_volume(write(tmp_path / "plane.tif", IMAGES[0]))
    with pytest.raises(ValueError, match=r"crop is .* no side of a crop may be larger"):
        VolumeData(volumes=(images,), crop=(6, 8, 8)).open("train")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"reading image.tif needs tifffile; pip install 'jaxtok\[volumes\]'"):
        load_volume(images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"volumes": ()}, "volumes is empty"),
        ({"volumes": ("a", "b"), "labels": ("c",)}, "labels has 1 files for 2 of volumes"),
        ({"crop": (1, 2)}, "crop is .* three sides"),
        ({"depth_range": (0.5, 0.5)}, "depth_range is"),
        ({"perturbations": ("rain",)}, "perturbations has 'rain'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        VolumeData(**fields)


def test_the_generator():
    one, same, other = (toy_volume(seed, (6, 48, 48), cells=20) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.images, same.images)
    assert not np.array_equal(one.images, other.images)
    ids = np.unique(one.segments)
    assert 10 < len(ids) <= 20 and ids.min() >= 1
    shares = (one.segments[1:] == one.segments[:-1]).mean()
    assert 0.8 < shares < 1  # cells drift, but slowly
    edges = np.zeros(one.shape, bool)
    edges[:, :, 1:] = one.segments[:, :, 1:] != one.segments[:, :, :-1]
    assert one[0:6][edges].mean() < one[0:6][~edges].mean() - 0.1  # membranes are dark


def test_perturbations_stay_in_range():
    crop, rng = toy_volume(0, (4, 16, 16), cells=5)[0:4], np.random.default_rng(0)
    for kind in PERTURBATIONS:
        found = perturb(crop, kind, rng)
        assert found.dtype == np.float32 and found.shape == crop.shape and 0 <= found.min() <= found.max() <= 1
        assert not np.array_equal(found, crop)
    with pytest.raises(ValueError, match="there is no perturbation 'rain'"):
        perturb(crop, "rain", rng)


def test_crops_fit_their_labels(tmp_path):
    """Of a volume whose labels are its intensities; also mirrored and turned, and with a part of its depth."""
    ramp = np.arange(8 * 10 * 10).reshape(8, 10, 10).astype(np.uint16) + 1
    images, labels = write(tmp_path / "image.tif", ramp), write(tmp_path / "label.tif", ramp)
    data = VolumeData(
        volumes=(images,), labels=(labels,), crop=(2, 4, 4), batch_size=16, flip=True, depth_range=(0.5, 1), workers=0
    )
    batch = next(data.train_batches())
    scaled = (batch["segments"] - 1) / 799
    np.testing.assert_allclose(batch["images"][..., 0], scaled, atol=1e-5)
    np.testing.assert_array_equal(batch["images"], batch["clean"])
    assert batch["segments"].min() > 400
    perturbed = dataclasses.replace(data, perturbations=("noise",))
    batch = next(perturbed.train_batches())
    changed = [not np.array_equal(*pair) for pair in zip(batch["images"], batch["clean"])]
    assert 0 < sum(changed) < 16

"""Image metrics against other implementations and exact values; grids."""

import numpy as np
import pytest
from PIL import Image
from scipy import linalg

from jaxtok.data.images import ImageData
from jaxtok.studies.proxy_features import train_proxy
from jaxtok.vision.grids import image_grid
from jaxtok.vision.metrics import FeatureStatistics, feature_statistics, frechet_distance, inception_score, psnr, ssim


def noisy(shape, seed=0):
    """Smooth images, and the same with noise, in [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[1], : shape[2]]
    phase = rng.uniform(0, 6, (shape[0], 1, 1, shape[3]))
    clean = 0.5 + 0.4 * np.sin(y[None, ..., None] / 3 + x[None, ..., None] / 5 + phase)
    return clean.astype(np.float32), np.clip(clean + rng.normal(0, 0.1, shape), 0, 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_psnr_is_that_of_scikit_image():
    reference = pytest.importorskip("skimage.metrics")
    a, b = noisy((3, 20, 24, 3))
    expected = [reference.peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in zip(a, b)]
    np.testing.assert_allclose(psnr(a, b), expected, rtol=1e-5)
    bytes_a, bytes_b = (np.round(x * 255).astype(np.uint8) for x in (a, b))
    np.testing.assert_allclose(psnr(bytes_a, bytes_b), expected, rtol=1e-2)
    half = np.full((1, 4, 4, 3), 0.5, np.float32)
    np.testing.assert_allclose(psnr(half, half + 0.1), 20, rtol=1e-4)
    assert np.isposinf(psnr(half, half)[0])


@pytest.mark.parametrize("shape", [(2, 32, 32, 3), (2, 11, 19, 1)])
def test_ssim_is_that_of_scikit_image(shape):
    reference = pytest.importorskip("skimage.metrics")
    a, b = noisy(shape)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": -1}
    doubles = [(x.astype(np.float64), y.astype(np.float64)) for x, y in zip(a, b)]
    expected = [reference.structural_similarity(x, y, data_range=1.0, **options) for x, y in doubles]
    np.testing.assert_allclose(ssim(a, b), expected, atol=2e-5)
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-6)
    assert 0.1 < expected[0] < 0.95
    flat = np.full(shape, 0.9, np.float32)
    np.testing.assert_allclose(ssim(flat, flat - 0.3), (2 * 0.9 * 0.6 + 1e-4) / (0.9**2 + 0.6**2 + 1e-4), rtol=1e-4)


def test_pairs_must_fit():
    a = np.zeros((2, 10, 10, 3), np.uint8)
    with pytest.raises(ValueError, match="they must be equal"):
        psnr(a, a[:1])
    with pytest.raises(ValueError, match="at least 11 x 11, its window"):
        ssim(a, a)


# ----------------------------------------------------------------------------------------------------------------- sets


def features(count, width=5, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ np.random.default_rng(9).normal(size=(width, width)) + shift


def test_statistics_do_not_depend_on_the_parts():
    x = features(50, shift=1000.0)  # far from zero, where sums of squares would lose digits
    whole, parts, merged = FeatureStatistics().add(x), FeatureStatistics(), FeatureStatistics()
    for part in np.array_split(x, 7):
        parts = parts.add(part)
        merged = FeatureStatistics().add(part).merge(merged)
    for found in (whole, parts.add(x[:0]), merged):
        assert found.count == 50
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-8)


def test_frechet_distance_is_that_of_the_matrix_root():
    a, b = (FeatureStatistics().add(features(200, seed=s, shift=s)) for s in (0, 1))
    root = linalg.sqrtm(a.covariance @ b.covariance)
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9 * np.trace(a.covariance))


def test_frechet_distance_in_closed_form():
    """For diagonal Gaussians, it is the squared difference of means and standard deviations, also with few images."""
    x = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 2, 0], [0, -2, 0], [0, 0, 3], [0, 0, -3]])
    deviations = np.sqrt(2 * np.array([1.0, 4, 9]) / 5)
    a, b = FeatureStatistics().add(x), FeatureStatistics().add(2 * x + [1, 2, 3])
    assert frechet_distance(a, b) == pytest.approx(14 + np.sum(deviations**2), rel=1e-12)
    few = FeatureStatistics().add(features(3, width=40))  # 37 eigenvalues are zero
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    moved = FeatureStatistics().add(features(3, width=40, shift=1.0))
    assert frechet_distance(few, moved) == pytest.approx(40, rel=1e-6)


def test_statistics_of_batches_leave_out_what_does_not_count():
    images = np.arange(6 * 4 * 4 * 3, dtype=np.float32).reshape(6, 4, 4, 3)

    def mean_color(x):
        return np.asarray(x).mean((1, 2))

    batches = [{"images": images[:4], "mask": np.array([1, 1, 0, 1])}, {"images": images[4:], "mask": np.ones(2)}]
    found = feature_statistics(mean_color, batches)
    expected = feature_statistics(mean_color, [images[[0, 1, 3, 4, 5]]])
    assert found.count == 5
    np.testing.assert_allclose(found.covariance, expected.covariance)


def test_sets_must_fit():
    one, other = FeatureStatistics().add(features(1)), FeatureStatistics().add(features(9))
    with pytest.raises(ValueError, match="there are 1 images; for a covariance"):
        frechet_distance(one, other)
    with pytest.raises(ValueError, match="they must be equal"):
        frechet_distance(other, FeatureStatistics().add(features(9, width=4)))
    with pytest.raises(ValueError, match="not finite"):
        other.add(np.full((1, 5), np.nan))


def test_inception_score():
    sure = np.eye(4)[np.arange(40) % 4]
    assert inception_score(sure, splits=2) == pytest.approx((4.0, 0.0))  # of all classes, each image of one
    assert inception_score(np.full((40, 4), 0.25)) == pytest.approx((1.0, 0.0))
    assert inception_score(np.eye(4)[np.zeros(10, int)])[0] == pytest.approx(1.0)
    p = np.random.default_rng(0).dirichlet(np.ones(4), 30)
    parts = [np.exp(np.mean([np.sum(row * np.log(row / part.mean(0))) for row in part])) for part in np.split(p, 3)]
    assert inception_score(p, splits=3) == pytest.approx((np.mean(parts), np.std(parts)))
    for bad, match in ((p * 2, "no probabilities"), (p - 0.5, "no probabilities"), (p[0], "splits is 3")):
        with pytest.raises(ValueError, match=match):
            inception_score(bad, splits=3)


@pytest.mark.slow
def test_the_proxy_tells_digits_from_worse_ones(tmp_path):
    """Its distance grows with the noise, and its score falls; a second call uses the trained network."""
    data = ImageData(images="digits", size=16, batch_size=64, flip=False)
    proxy = train_proxy(data, tmp_path / "proxy")
    assert proxy.accuracy > 0.9
    real = [batch["images"] for batch in data.eval_batches("train")][:-1]
    held_out = list(data.eval_batches("test"))
    rng = np.random.default_rng(0)

    def worse(amount):
        return [np.clip(x / 255 + rng.normal(0, amount, x.shape), 0, 1) for x in real]

    distances = [proxy.frechet_distance(real, others) for others in (held_out, worse(0.1), worse(0.5))]
    assert distances[0] < distances[2] and distances[1] < distances[2]
    scores = [proxy.score(images)[0] for images in (real, worse(0.5))]
    assert 10 >= scores[0] > scores[1] >= 1
    again = train_proxy(data, tmp_path / "proxy")
    assert again.accuracy == proxy.accuracy
    assert proxy.frechet_distance(real, real) == pytest.approx(0, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------- grids


def test_a_grid_holds_every_pixel_enlarged():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    sheet = np.asarray(image_grid(images, columns=3, scale=2))
    assert sheet.shape == (2 * (8 + 6) + 6, 3 * (12 + 6) + 6, 3)
    for number, image in enumerate(images):
        y, x = 6 + number // 3 * 14, 6 + number % 3 * 18
        np.testing.assert_array_equal(sheet[y : y + 8, x : x + 12], image.repeat(2, 0).repeat(2, 1))
    floats = np.asarray(image_grid(images / np.float32(255), columns=3, scale=2))
    np.testing.assert_array_equal(floats, sheet)
    wild = np.asarray(image_grid(np.array([-1.0, 2.0]).reshape(2, 1, 1, 1).repeat(3, -1), scale=1))
    assert wild[6, 6].tolist() == [0] * 3 and wild[6, 13].tolist() == [255] * 3
    assert image_grid(images[:1]).size == (6 * 16 + 12, 4 * 16 + 12)  # 96 pixels wide, by itself


def test_titles_are_written_and_cut_to_their_column(tmp_path):
    images = np.full((2, 8, 8, 3), 255, np.uint8)
    without, titled = image_grid(images), image_grid(images, titles=["cat", "a title that is far too long for it"])
    assert titled.height > without.height
    ink = np.asarray(titled)[6 + 96 : -6].astype(int).min(-1) < 128
    left, right = ink[:, : 96 + 9], ink[:, 96 + 9 :]
    assert left.sum() > 20 and right.sum() > left.sum()
    columns = np.flatnonzero(ink.any(0))
    assert columns.min() >= 6 and columns.max() < titled.width - 6
    titled.save(tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == titled.size


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((0, 4, 4, 3), {}, "it must be .images, height, width, 3"),
        ((2, 4, 4, 1), {}, "it must be .images, height, width, 3"),
        ((2, 4, 4, 3), {"columns": 0}, "columns is 0"),
        ((2, 4, 4, 3), {"titles": ["one"]}, "1 titles for 2 images"),
        ((2, 4, 4, 3), {"scale": -1}, "scale -1"),
    ],
)
def test_bad_grids(shape, options, match):
    with pytest.raises(ValueError, match=match):
        image_grid(np.zeros(shape, np.uint8), **options)
    with pytest.raises(ValueError, match="not finite"):
        image_grid(np.full((1, 2, 2, 3), np.nan))

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from datasets import Dataset, Features, Image, Value

from distill.evaluation import build_reference, evaluate, format_table, metrics
from distill.evaluation.classifier import MNISTClassifier
from distill.evaluation.features import FeatureExtractor, default_features, load_features

GENERATOR = torch.Generator().manual_seed(0)
REAL = torch.randn(300, 6, generator=GENERATOR, dtype=torch.float64)
FAKE = 0.7 * torch.randn(250, 6, generator=GENERATOR, dtype=torch.float64) + 0.3


def statistics(x):
    return metrics.FeatureStatistics().update(x)


def test_streaming_statistics_are_those_of_one_batch():
    stats = metrics.FeatureStatistics()
    for part in REAL.split(37):
        stats.update(part.float())
    torch.testing.assert_close(stats.mean, REAL.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.covariance, REAL.T.cov(), rtol=1e-5, atol=1e-6)


def test_frechet_distance_has_its_closed_form_in_one_dimension():
    a, b = REAL[:, :1], FAKE[:, :1]
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert math.isclose(metrics.frechet_distance(statistics(a), statistics(b)), expected, rel_tol=1e-9)


def test_frechet_distance_equals_the_matrix_square_root():
    a, b = statistics(REAL), statistics(FAKE)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    expected = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert math.isclose(metrics.frechet_distance(a, b), expected, rel_tol=1e-9)
    assert metrics.frechet_distance(a, a) < 1e-9


def test_kernel_distance_equals_brute_force(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 64)
    kernel = lambda x, y: (x @ y.T / 6 + 1) ** 3  # noqa: E731
    xx, yy, xy = kernel(REAL, REAL), kernel(FAKE, FAKE), kernel(REAL, FAKE)
    off = lambda m: (m.sum() - m.trace()) / (len(m) * (len(m) - 1))  # noqa: E731
    expected = off(xx) + off(yy) - 2 * xy.mean()
    assert math.isclose(metrics.kernel_distance(REAL, FAKE), expected, rel_tol=1e-9)


def brute(real, fake, k):
    real, fake = real.numpy(), fake.numpy()
    distance = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=2)  # noqa: E731
    radii = lambda x: np.sort(distance(x, x), axis=1)[:, k]  # noqa: E731
    inside = distance(fake, real) <= radii(real)[None]
    precision, coverage = inside.any(1).mean(), inside.any(0).mean()
    recall = (distance(real, fake) <= radii(fake)[None]).any(1).mean()
    return precision, recall, inside.sum() / (k * len(fake)), coverage


@pytest.mark.parametrize("k", [3, 5])
def test_manifold_metrics_equal_brute_force(monkeypatch, k):
    monkeypatch.setattr(metrics, "CHUNK", 64)
    got = (*metrics.precision_recall(REAL, FAKE, k), *metrics.density_coverage(REAL, FAKE, k))
    assert np.allclose(got, brute(REAL, FAKE, k), atol=1e-12)


def test_neighbourhoods_hold_the_same_metrics_for_several_k(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK", 64)
    found = metrics.neighbourhoods(REAL, FAKE, (3, 5), metrics.neighbour_distances(REAL, 5))
    for k in (3, 5):
        precision, recall, density, coverage = brute(REAL, FAKE, k)
        assert np.allclose([found.inside[k].double().mean(), found.covered[k].double().mean()], [precision, recall])
    assert np.allclose([found.density.double().mean(), found.held.double().mean()], [density, coverage])
    apart = (FAKE[:, None] - FAKE).norm(dim=2).fill_diagonal_(math.inf)
    torch.testing.assert_close(found.nearest, apart.min(1).values)


def test_a_dropped_mode_costs_recall_and_outliers_cost_precision():
    modes = torch.cat([REAL[:150], REAL[150:] + 100])
    precision, recall = metrics.precision_recall(modes, modes[:150] + 0.01)
    assert precision > 0.9 and recall < 0.6
    precision, recall = metrics.precision_recall(REAL, torch.cat([REAL[:200] + 0.01, REAL[:100] + 1000]))
    assert precision < 0.7


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics.precision_recall(REAL[:3], FAKE, 3), "at least 4 samples on each side, got 3"),
        (lambda: metrics.kernel_distance(REAL, FAKE[:1]), "at least 2 samples"),
        (lambda: metrics.kernel_distance(REAL, FAKE[:, :4]), "real features have 6 dimensions"),
        (lambda: statistics(torch.full((4, 2), float("nan"))), "NaN or infinity"),
        (lambda: statistics(REAL[:1]).covariance, "at least 2 samples, got 1"),
        (lambda: statistics(REAL).update(REAL[:, :2]), "earlier ones had 6"),
        (lambda: load_features("inception"), "allowed: MNIST-CNN, pixels"),
    ],
)
def test_bad_input_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_reference_scores_and_floor(digits, monkeypatch):
    monkeypatch.setattr("distill.evaluation.PAIRWISE_SAMPLES", 1000)
    reference = build_reference.__wrapped__(digits, "MNIST-CNN")
    assert len(reference.rows) == 1000 and reference.statistics.count == 1500 and len(reference.held_out) == 500
    assert default_features("mnist") == "MNIST-CNN" and default_features(digits) == "pixels"
    floor = reference.floor(500)
    assert 0 < floor["MNIST-CNN-FD"] and floor["asked class"] > 0.98 and floor["recall (k=3)"] > 0.5
    noise = [(torch.rand(100, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.zeros(100).long())]
    scores = evaluate(noise, reference)
    assert scores["MNIST-CNN-FD"] > 10 * scores["floor"]["MNIST-CNN-FD"]
    assert "real test images (100)" in format_table({"noise": scores})
    with pytest.raises(ValueError, match="at least 50 samples, got 10"):
        evaluate([(noise[0][0][:10], noise[0][1][:10])], reference)


def test_your_own_features():
    own = FeatureExtractor("mean", lambda images: images.flatten(1)[:, :20])
    assert load_features(own) is own
    assert MNISTClassifier().features(torch.zeros(2, 1, 28, 28)).shape == (2, 128)


def write_images(folder, seed):
    features = Features({"image": Image(), "label": Value("int64")})
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 8, 8), dtype=np.uint8)
    for split in ("train", "test"):
        rows = Dataset.from_dict({"image": list(pixels), "label": [0] * 60}, features=features)
        rows.to_parquet(folder / f"{split}.parquet")


def test_features_of_real_images_are_kept_by_data_and_version(tmp_path, monkeypatch):
    calls = []

    def extract(images):
        calls.append(len(images))
        return images.flatten(1)[:, :5]

    monkeypatch.setattr("distill.evaluation.cached_assets_path", lambda *parts: tmp_path)
    build = build_reference.__wrapped__  # without the cache in memory
    write_images(tmp_path, seed=0)
    first = build(str(tmp_path), FeatureExtractor("own", extract, version="1"))
    assert sum(calls) == 120
    again = build(str(tmp_path), FeatureExtractor("own", extract, version="1"))
    assert sum(calls) == 120 and again.floor(60) == first.floor(60)
    build(str(tmp_path), FeatureExtractor("own", extract, version="2"))
    assert sum(calls) == 240
    build(str(tmp_path), FeatureExtractor("own", extract))
    build(str(tmp_path), FeatureExtractor("own", extract))
    assert sum(calls) == 480
    write_images(tmp_path, seed=1)
    assert build(str(tmp_path), FeatureExtractor("own", extract, version="1")).floor(60) != first.floor(60)


def test_a_source_without_a_test_split_holds_half_of_its_images_out(tmp_path):
    write_images(tmp_path, seed=0)
    (tmp_path / "test.parquet").unlink()
    pixels = FeatureExtractor("own", lambda images: images.flatten(1)[:, :5], lambda images: torch.zeros(len(images)))
    for source in (tmp_path, tmp_path / "train.parquet"):
        reference = build_reference.__wrapped__(str(source), pixels, label_column=None)
        assert reference.statistics.count == len(reference.held_out) == 30 and reference.held_out_hits is None
        assert reference.floor(60) == {} and not set(map(tuple, reference.rows)) & set(map(tuple, reference.held_out))

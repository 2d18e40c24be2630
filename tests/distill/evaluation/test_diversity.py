import math

import pytest
import torch

from distill.evaluation import diversity as d


def normal(n, dim=4, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def test_vendi_score_counts_distinct_directions():
    basis = torch.eye(6)
    assert d.vendi_score(basis[:1].repeat(9, 1)) == pytest.approx(1)
    assert d.vendi_score(3 * basis.repeat(5, 1)) == pytest.approx(6)  # whatever their length
    shares = [0.5, 0.25, 0.25]
    mixed = torch.cat([basis[:1].repeat(4, 1), basis[1:2].repeat(2, 1), basis[2:3].repeat(2, 1)])
    assert d.vendi_score(mixed) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_vendi_score_in_its_primal_form():
    x = normal(50)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    values = torch.linalg.eigvalsh(unit @ unit.T / 50).clamp(min=1e-300)
    assert d.vendi_score(x) == pytest.approx(math.exp(-(values * values.log()).sum().item()), rel=1e-9)


def test_mean_pairwise_distance_by_brute_force(monkeypatch):
    x = normal(37)
    pairs = [(x[i] - x[j]).double().norm().item() for i in range(37) for j in range(i)]
    for chunk in (5, 1000):
        monkeypatch.setattr("distill.evaluation.metrics.CHUNK", chunk)
        assert d.mean_pairwise_distance(x) == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)
    # In high dimension two unit normal samples are sqrt(2 D) apart.
    assert d.mean_pairwise_distance(normal(200, 1000)) == pytest.approx(math.sqrt(2000), rel=0.01)


def test_within_classes_is_the_mean_of_each_alone():
    x, classes = torch.tensor([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([3, 3, 7, 7])
    assert d.within_classes(d.mean_pairwise_distance, x, classes) == pytest.approx(3)
    with pytest.raises(ValueError, match="at least 2 samples of each class, class 7 has 1"):
        d.within_classes(d.mean_pairwise_distance, x[:3], classes[:3])


def test_class_entropy():
    assert d.class_entropy(torch.arange(10).repeat(3), 10) == pytest.approx(math.log(10))
    assert d.class_entropy(torch.zeros(5, dtype=torch.long), 10) == 0
    assert d.class_entropy(torch.tensor([0, 0, 0, 1]), 2) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def test_nearest_training_image(monkeypatch):
    monkeypatch.setattr("distill.evaluation.metrics.CHUNK", 7)
    training, samples = normal(60), normal(25, seed=1)
    samples[3] = training[11]
    distances, indices = d.nearest_distances(samples, training)
    expected = torch.stack([(training - s).double().norm(dim=1) for s in samples])
    torch.testing.assert_close(distances, expected.min(1).values, atol=1e-6, rtol=1e-6)
    assert torch.equal(indices, expected.argmin(1)) and indices[3] == 11 and distances[3] < 1e-6


def test_near_duplicates_are_found_and_disjoint(monkeypatch):
    monkeypatch.setattr("distill.evaluation.metrics.CHUNK", 6)
    x = normal(20, 8)
    x[15] = x[2] + 1e-3
    x[9] = x[4] + 1e-2
    x[7] = x[4] - 1e-2
    pairs = d.near_duplicates(x, 3)
    assert [set(pair[1:]) for pair in pairs[:1]] == [{2, 15}] and 4 in pairs[1][1:] and len(pairs) == 3
    used = [i for _, *pair in pairs for i in pair]
    assert len(set(used)) == 6 and all(i < j for _, i, j in pairs)
    assert [p[0] for p in pairs] == sorted(p[0] for p in pairs)


def test_a_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    hits = 0
    for seed in range(100):
        low, high = d.bootstrap_interval(lambda v: v.mean().item(), normal(80, 1, seed), seed=seed)
        hits += low <= 0 <= high
    assert 88 <= hits <= 99


def test_the_interval_of_a_share():
    for end in d.share_interval(0.3, 50):  # of a true share there, 0.3 lies just within its own 95 %
        assert abs(0.3 - end) == pytest.approx(d.NORMAL * math.sqrt(end * (1 - end) / 50))
    low, high = d.share_interval(1.0, 200)
    assert high == 1 and low == pytest.approx(1 / (1 + 1.96**2 / 200), abs=1e-4)
    assert d.share_interval(0.0, 200) == pytest.approx((0.0, 1 - low))
    covered = sum(a <= 0.02 <= b for a, b in (d.share_interval(binomial(0.02, 400, s) / 400, 400) for s in range(200)))
    assert covered > 180


def binomial(share, num, seed):
    return int((torch.rand(num, generator=torch.Generator().manual_seed(seed)) < share).sum())


def test_an_interval_over_seeds():
    mean, half = d.interval_over_seeds([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    scipy = pytest.importorskip("scipy.stats")
    for freedom, quantile in d.STUDENT_T.items():
        assert quantile == pytest.approx(scipy.t.ppf(0.975, freedom), abs=5e-4)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: d.vendi_score(torch.zeros(3, 2)), "not zero"),
        (lambda: d.mean_pairwise_distance(torch.ones(1, 2)), "at least 2 samples"),
        (lambda: d.class_entropy(torch.zeros(0, dtype=torch.long), 3), "at least 1 sample"),
        (lambda: d.interval_over_seeds([1.0]), "at least 2 of them, got 1"),
        (lambda: d.nearest_distances(torch.ones(2, 3), torch.ones(2, 4)), "4 dimensions, generated ones 3"),
    ],
)
def test_what_cannot_be_measured(call, message):
    with pytest.raises(ValueError, match=message):
        call()

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import teachers
from distill.jvp import ForwardModeError, check_jvp, jvp, record_rng, replay_rng
from distill.trigflow import expand


def rearranged(teacher, time):
    """A noisy batch, its time, and the rearranged tangents along a random velocity."""
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 4, *teacher.sample_shape, generator=generator)
    t = torch.full((4,), time)
    scale = t.cos() * t.sin()
    return (x, t), (expand(scale, x) * v, scale)


def times(sigma_data):
    return torch.atan(torch.tensor([0.002, 0.02, 0.3, 2.0, 20.0, 80.0]) / sigma_data).tolist()


VARIANTS = [
    ("SongUNet", {}),
    ("SiT", {}),
    ("SiT", {"qk_norm": True, "double_norm": True}),
]
LABELS = torch.tensor([0, 1, 2, 1])


def relative_error(teacher, autocast):
    """The worst error of the tangent against fp64, over all times."""
    reference, errors = copy.deepcopy(teacher).double(), []
    for time in times(teacher.sigma_data):
        primals, tangents = rearranged(teacher, time)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tangent = jvp(lambda x, t: teacher(x, t, LABELS), primals, tangents)[1]
        wide = [tuple(v.double() for v in pair) for pair in (primals, tangents)]
        expected = jvp(lambda x, t: reference(x, t, LABELS), *wide)[1]
        errors.append(((tangent - expected).norm() / expected.norm()).item())
    return max(errors)


@pytest.mark.parametrize("kind, changes", VARIANTS)
def test_fp32_is_exact_at_every_time(make_teacher, kind, changes):
    assert relative_error(make_teacher(kind, **changes), autocast=False) < 1e-5


@pytest.mark.parametrize("name", ["mnist-edm", "mnist-flow"])
def test_bundled_teachers_in_fp32_and_bf16(name):
    teacher = teachers.load(name)
    assert relative_error(teacher, autocast=False) < 1e-5
    assert relative_error(teacher, autocast=True) < 2e-2


def test_finite_differences_agree(teacher):
    assert check_jvp(teacher) < 1e-4


def test_check_passes_in_training_mode_with_dropout(make_teacher):
    teacher = make_teacher("SongUNet", dropout=0.3).train()
    assert check_jvp(teacher, tolerance=1e-3) < 1e-3


def test_the_loss_forward_sees_the_same_dropout_masks(make_teacher):
    teacher = make_teacher("SongUNet", dropout=0.3).train()
    primals, tangents = rearranged(teacher, 0.7)
    rng = record_rng(torch.device("cpu"))
    primal, _ = jvp(lambda x, t: teacher(x, t, LABELS), primals, tangents)
    with replay_rng(rng):
        torch.testing.assert_close(teacher(*primals, LABELS), primal, rtol=1e-5, atol=1e-6)
    assert (teacher(*primals, LABELS) - primal).abs().max() > 1e-3


class Wrapped(nn.Module):
    """A native network around one questionable layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, time):
        return self.layer(x) * (1 + time.view(-1, 1, 1, 1))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.conv, self.use_reentrant = nn.Conv2d(1, 1, 3, padding=1), use_reentrant

    def forward(self, x):
        return checkpoint(self.conv, x, use_reentrant=self.use_reentrant)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x

    @staticmethod
    def backward(ctx, g):
        return g


class CustomFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return Square.apply(x) * self.weight


class Detached(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.detach()) + x


def wrap(layer):
    return teachers.wrap(Wrapped(layer), teachers.TRIGFLOW, 0.5, (1, 8, 8))


def test_checkpointing_is_passed():
    assert check_jvp(wrap(Checkpointed(use_reentrant=False))) < 1e-4


@pytest.mark.parametrize(
    "layer, message",
    [
        (CustomFunction(), r"cannot pass module 'native.layer' \(CustomFunction\)"),
        (nn.BatchNorm2d(1), r"cannot pass module 'native.layer' \(BatchNorm2d\)"),
        (Detached(1, 1, 3, padding=1), "drops or changes tangents"),
    ],
)
def test_networks_that_cannot_be_differentiated_are_named(layer, message):
    with pytest.raises(ForwardModeError, match=message):
        check_jvp(wrap(layer).train())

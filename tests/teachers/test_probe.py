"""The probe on exact networks of the Gaussian mixture, and on the bundled teachers, under right and wrong conventions."""

import math
import sys

import pytest
import torch

import teachers
from distill.data import load_images
from distill.recipe import DataConfig
from teachers import Parameterization
from teachers.parameterization import PRESETS

siblings, name, Negated = (getattr(sys.modules["teachers.probe"], key) for key in ("siblings", "name", "Negated"))

SD = 0.9  # about that of the mixture
EXACT = [
    teachers.EDM, teachers.EDM_DENOISER, teachers.TRIGFLOW, teachers.VP_EPS, teachers.VP_V, teachers.VP_X0,
    Parameterization("vp", "eps", "t"), Parameterization("vp", "v", "t"), Parameterization("vp", "score", "-2log(alpha)"),
    Parameterization("vp", "score", "log_snr"), teachers.RECTIFIED_FLOW, teachers.SIT,
    Parameterization("flow", "velocity", "1-s"), Parameterization("flow", "-velocity", "s"),
    Parameterization("flow", "velocity", "s", time_scale=1000.0),
]  # fmt: skip


@pytest.fixture
def points(mixture):
    return mixture.sample(256, torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("sigma_data", [SD, 0.5])
@pytest.mark.parametrize("p", EXACT, ids=name)
def test_an_exact_network_passes_and_every_mistake_is_named(mixture, mixture_network, points, p, sigma_data):
    native = mixture_network(mixture, p, sigma_data)
    facts = teachers.probe(teachers.wrap(native, p, sigma_data, (2, 1, 1)), points)
    assert max(facts["denoising_error"].values()) < 1.06 and facts["judged_on"] == "real images"
    assert facts["verdict"].startswith("its parameterization fits: denoising error ")
    for wrong in siblings(p):
        with pytest.raises(ValueError, match="denoises badly under its parameterization") as error:
            teachers.probe(teachers.wrap(native, wrong, sigma_data, (2, 1, 1)), points)
        assert f"; under {name(p)} it is " in str(error.value), (wrong, str(error.value))


@pytest.mark.parametrize("right", ["EDM", "RECTIFIED_FLOW", "SIT", "TRIGFLOW", "VP_EPS", "VP_V", "VP_X0"])
def test_a_mistaken_family_is_named(mixture, mixture_network, points, right):
    native = mixture_network(mixture, PRESETS[right], SD)
    for wrong in PRESETS.values():
        if wrong.family != PRESETS[right].family:
            with pytest.raises(ValueError, match=f"; under {right} it is "):
                teachers.probe(teachers.wrap(native, wrong, SD, (2, 1, 1)), points)


@pytest.mark.parametrize("p", EXACT, ids=name)
def test_without_images_no_wrong_name_is_given(mixture, mixture_network, p):
    native = mixture_network(mixture, p, SD)
    facts = teachers.probe(teachers.wrap(native, p, SD, (2, 1, 1)))
    assert "fits" in facts["verdict"] and facts["judged_on"] == "its own samples"
    refused = 0
    for wrong in siblings(p):
        try:
            teachers.probe(teachers.wrap(native, wrong, SD, (2, 1, 1)))
        except ValueError as error:
            refused += 1
            assert f"; under {name(p)} it is " in str(error), (wrong, str(error))
    # A time near 0 throughout makes some velocities vanish, and a near relative draws samples that it denoises well.
    assert refused >= len(siblings(p)) - 2


def test_errors_in_closed_form(points):
    """A denoiser that knows only mean and standard deviation has error 1 at every time, one that returns 0 is worse."""

    class Linear(torch.nn.Module):
        def forward(self, x, sigma):
            m, s = points.mean(), points.std()
            gain = (s**2 / (s**2 + sigma**2)).view(-1, 1, 1, 1)
            return m + gain * (x - m)

    facts = teachers.probe(teachers.wrap(Linear(), teachers.EDM_DENOISER, SD, (2, 1, 1)), points)
    assert all(abs(error - 1) < 0.05 for error in facts["denoising_error"].values())
    assert facts["verdict"].startswith("warning: it denoises no better than knowing the data's mean and spread")

    class Zero(torch.nn.Module):
        def forward(self, x, sigma):
            return torch.zeros_like(x)

    facts = teachers.probe(teachers.wrap(Zero(), Parameterization("edm", "x0", "sigma"), SD, (2, 1, 1)), points)
    s, rms = points.std().item(), points.square().mean().sqrt().item()
    for t, error in facts["denoising_error"].items():
        sigma = SD * math.tan(t)
        assert abs(error / (rms * math.hypot(s, sigma) / (s * sigma)) - 1) < 0.01
    assert facts["verdict"].startswith("warning: it denoises badly, as it does under the others of its family")


@pytest.fixture(scope="module")
def digits():
    images = load_images(DataConfig("mnist"), 1)
    pairs = [images[i] for i in range(8)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


@pytest.mark.parametrize("source", ["mnist-edm", "mnist-flow"])
def test_bundled_teachers_pass_and_their_mistakes_are_named(source, digits):
    teacher = teachers.load(source)
    for images in ((), digits, digits[:1]):  # own samples, real ones, real ones with the null class
        facts = teachers.probe(teacher, *images)
        assert max(facts["denoising_error"].values()) < 0.8 and "fits" in facts["verdict"]
    for wrong in siblings(teacher.parameterization):
        mistaken = teachers.wrap(
            teacher.native, wrong, teacher.sigma_data, teacher.sample_shape, teacher.num_classes, teacher.label_format
        )
        with pytest.raises(ValueError) as error:
            teachers.probe(mistaken, *digits)
        assert f"; under {name(teacher.parameterization)} it is 0." in str(error.value)
    reversed_time = Parameterization("flow", "velocity", "1-s")
    if source == "mnist-flow":
        mistaken = teachers.wrap(teacher.native, reversed_time, teacher.sigma_data, teacher.sample_shape, 10)
        with pytest.raises(ValueError, match="own samples .* under RECTIFIED_FLOW it is 0."):
            teachers.probe(mistaken)


@pytest.mark.parametrize("source", ["mnist-edm", "mnist-flow"])
def test_an_output_of_the_other_sign_is_named(source, digits):
    teacher = teachers.load(source)
    mistaken = teacher.twin(native=Negated(teacher.native), source=None)
    with pytest.raises(ValueError, match=r"; under .*(with the sign of its output changed|-velocity.*) it is 0\."):
        teachers.probe(mistaken, *digits)


def test_an_output_that_is_not_finite_is_refused(make_teacher):
    teacher = make_teacher("SiT")
    teacher.native.final_layer.linear.bias.data[0] = math.nan
    for images in ((), (torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))):
        with pytest.raises(ValueError, match="this teacher gives NaN or infinite values: its denoising error is inf"):
            teachers.probe(teacher, *images)


def test_guidance_is_left_out_and_nothing_is_changed(digits):
    teacher = teachers.load("mnist-edm").train()
    plain, state = teachers.probe(teacher, *digits), torch.get_rng_state()
    guided = teacher.guided_by(7.0, None, teachers.load("mnist-flow"))
    assert teachers.probe(guided, *digits) == plain and guided.training and teacher.native.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["SongUNet", "SiT"])
def test_a_network_that_was_never_trained_is_told_and_not_refused(make_teacher, kind):
    images = 0.5 * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for given in ((), (images, torch.arange(8) % 3)):
        verdict = teachers.probe(make_teacher(kind), *given)["verdict"]
        assert "probably untrained" in verdict or "it may be little trained" in verdict


def test_a_new_network_of_edm_is_the_denoiser_that_knows_the_spread(make_teacher):
    """Its last layer is zero, so it returns ``c_skip x``: error 1 on data of mean 0, whatever they are."""
    teacher = make_teacher("SongUNet")
    teacher.native.dec["8x8_aux_conv"].requires_grad_(False).weight.zero_()
    teacher.native.dec["8x8_aux_conv"].bias.zero_()
    images = 0.5 * torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for given in ((), (images,)):
        facts = teachers.probe(teacher, *given)
        assert all(abs(error - 1) < 0.1 for error in facts["denoising_error"].values())
        assert "probably untrained" in facts["verdict"]


class Table(torch.nn.Module):
    """Takes its time from a table, as networks of discrete steps do: most other times are errors."""

    def forward(self, x, time):
        return x * torch.ones(3)[time.long()].view(-1, 1, 1, 1)


def test_a_sibling_that_cannot_be_called_is_passed_over(points):
    facts = teachers.probe(teachers.wrap(Table(), teachers.TRIGFLOW, SD, (2, 1, 1)), points)
    assert "denoises badly" in facts["verdict"]

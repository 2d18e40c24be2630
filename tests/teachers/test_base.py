import pytest
import torch

import teachers

X = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
T = torch.tensor([0.3, 1.2])
Y = torch.tensor([0, 2])
NULL = torch.tensor([3, 3])


def test_guidance_extrapolates_from_the_null_class(teacher):
    conditional, null = teacher(X, T, Y), teacher(X, T, NULL)
    teacher.guidance_scale = 2.5
    torch.testing.assert_close(teacher(X, T, Y), null + 2.5 * (conditional - null), rtol=1e-4, atol=1e-5)


def test_guidance_per_sample_is_guidance_at_each_scale(teacher):
    mixed = teacher(X, T, Y, torch.tensor([1.0, 4.0]))
    teacher.guidance_scale = 4.0
    torch.testing.assert_close(mixed[1], teacher(X, T, Y)[1], rtol=1e-4, atol=1e-5)
    teacher.guidance_scale = 1.0
    torch.testing.assert_close(mixed[0], teacher(X, T, Y)[0], rtol=1e-4, atol=1e-5)


def test_guidance_interval_leaves_other_times_alone(teacher):
    plain = teacher(X, T, Y)
    teacher.guidance_scale = 3.0
    for interval, guided, unguided in (((1.0, 1.5), 1, 0), ((0.0, 1.0), 0, 1)):
        teacher.guidance_interval = interval
        out = teacher(X, T, Y)
        torch.testing.assert_close(out[unguided], plain[unguided], rtol=1e-4, atol=1e-5)
        assert (out[guided] - plain[guided]).abs().max() > 1e-3


def test_no_labels_are_the_null_class(teacher):
    torch.testing.assert_close(teacher(X, T), teacher(X, T, NULL))
    assert (teacher(X, T) - teacher(X, T, Y)).abs().max() > 1e-4


def test_guidance_without_labels_is_refused(teacher):
    teacher.guidance_scale = 2.0
    with pytest.raises(ValueError, match="needs labels"):
        teacher(X, T)


def test_labels_out_of_range_name_the_range(teacher):
    with pytest.raises(ValueError, match="label 4 is out of range: this model has classes 0 to 2"):
        teacher.check_labels(torch.tensor([1, 4]))


def test_student_is_an_unguided_copy(teacher):
    teacher.guidance_scale = 2.0
    student = teacher.student()
    before = teacher(X, T, Y)
    for p in student.parameters():
        p.data.add_(1.0)
    torch.testing.assert_close(teacher(X, T, Y), before)
    assert student.guidance_scale == 1.0 and student.metadata() == teacher.metadata()
    student.register_forward_hook(lambda *_: torch.zeros(1))
    assert not teacher._forward_hooks


def test_position_table_is_never_trained(make_teacher):
    student = make_teacher("SiT").student()
    trained = {name for name, p in student.native.named_parameters() if p.requires_grad}
    assert "pos_embed" not in trained and "blocks.0.attn.qkv.weight" in trained


@pytest.mark.parametrize("guidance_embedding", [False, True])
def test_student_of_a_frozen_teacher_trains(make_teacher, guidance_embedding):
    teacher = make_teacher("SiT").requires_grad_(False)
    student = teacher.student(guidance_embedding)
    frozen = {name for name, p in student.native.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed"} and not any(p.requires_grad for p in teacher.parameters())


def test_student_of_a_frozen_foreign_network_trains():
    foreign = torch.nn.Conv2d(1, 1, 1)
    foreign.bias.requires_grad_(False)
    teacher = teachers.wrap(foreign, teachers.TRIGFLOW, 0.5, (1, 8, 8))
    assert [p.requires_grad for p in teacher.student().parameters()] == [True, False]
    assert all(p.requires_grad for p in teacher.requires_grad_(False).student().parameters())
    with pytest.raises(ValueError, match="Conv2d has no guidance input"):
        teacher.student(guidance_embedding=True)


def test_guidance_input_keeps_fp64_weights(make_teacher):
    teacher = make_teacher("SiT").double()
    student, x = teacher.student(guidance_embedding=True), X.double()
    assert torch.equal(student(x, T, Y, torch.ones(2)), teacher(x, T, Y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(teacher, dtype):
    """As an exported pipeline loaded with ``dtype``; the time path stays in fp32."""
    exact = teacher(X, T, Y)
    got = teacher.to(dtype)(X.to(dtype), T, Y)
    assert got.dtype == dtype
    assert ((got.float() - exact).norm() / exact.norm()).item() < 0.03


def test_time_is_not_rounded_to_the_precision_of_samples(teacher):
    # 1.2 and 1.201 are the same bf16 number.
    seen = []
    hook = teacher.native.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    teacher.to(torch.bfloat16)(X.bfloat16(), torch.tensor([1.2, 1.201]), Y)
    hook.remove()
    assert seen[0].dtype == torch.float64 and seen[0][0] != seen[0][1]


def test_foreign_networks_get_the_time_in_fp32():
    seen = []
    foreign = teachers.wrap(Recording(seen), teachers.EDM, 0.5, (1, 8, 8))
    foreign(X.bfloat16(), T)
    foreign(X.double(), T)
    assert [time.dtype for time in seen] == [torch.float32, torch.float64]


class Recording(torch.nn.Module):
    """Returns its input and notes the times it is called with."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x, time):
        self.seen.append(time)
        return x


def test_samples_of_another_shape_are_refused(teacher):
    with pytest.raises(ValueError, match=r"samples have shape \(1, 9, 9\), but this model takes \(1, 8, 8\)"):
        teacher(torch.randn(2, 1, 9, 9), T, Y)


class LearnedSigma(torch.nn.Module):
    def forward(self, x, time):
        return torch.cat([x, x], 1)


class Tuple(torch.nn.Module):
    def forward(self, x, time):
        return (x,)


@pytest.mark.parametrize("native, got", [(LearnedSigma(), r"\(2, 2, 8, 8\)"), (Tuple(), "tuple")])
def test_network_outputs_of_another_shape_are_refused(native, got):
    teacher = teachers.wrap(native, teachers.EDM, 0.5, (1, 8, 8))
    with pytest.raises(ValueError, match=rf"must return a tensor of its input's shape \(2, 1, 8, 8\), got {got}"):
        teacher(X, T)


def test_any_module_in_one_line():
    class Zero(torch.nn.Module):
        def forward(self, x, time):
            return torch.zeros_like(x)

    teacher = teachers.wrap(Zero(), teachers.TRIGFLOW, 0.5, (1, 8, 8))
    assert teacher(X, T).abs().max() == 0
    with pytest.raises(ValueError, match="unconditional and takes no labels"):
        teacher.check_labels(torch.tensor([0]))
    teacher.guidance_scale = 2.0
    with pytest.raises(ValueError, match="unconditional and cannot be guided"):
        teacher(X, T)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="label_format is 'words'"):
        teachers.wrap(torch.nn.Identity(), teachers.EDM, 0.5, (1, 8, 8), 3, "words")
    with pytest.raises(ValueError, match="must be a teachers.Parameterization, such as teachers.VP_V, got 'VP_V'"):
        teachers.wrap(torch.nn.Identity(), "VP_V", 0.5, (1, 8, 8))
    with pytest.raises(ValueError, match=r"sample_shape must be \(C, H, W\), or .* got \(8, 8\)"):
        teachers.wrap(torch.nn.Identity(), teachers.EDM, 0.5, (8, 8))
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        teachers.wrap(torch.nn.Identity(), teachers.EDM, 0.0, (1, 8, 8))


def test_guidance_teacher_in_closed_form(mixture, mixture_network):
    """Two networks of other conventions that know the mixture exactly, the second a broader one, in fp64."""
    sd = 0.9
    broad = type(mixture)()
    broad.variances = 4 * mixture.variances
    teacher = teachers.wrap(mixture_network(mixture, teachers.EDM, sd), teachers.EDM, sd, (2, 1, 1))
    guide = teachers.wrap(mixture_network(broad, teachers.VP_EPS, sd), teachers.VP_EPS, sd, (2, 1, 1))
    x = torch.randn(4, 2, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.3, 0.8, 1.1, 1.4], dtype=torch.float64)
    F, F_g = mixture.F(x, t, sd), broad.F(x, t, sd)
    guided = teacher.guided_by(2.5, None, guide)
    torch.testing.assert_close(guided(x, t), F_g + 2.5 * (F - F_g), rtol=1e-9, atol=1e-9)
    scales = torch.tensor([1.0, 1.5, 2.0, 3.0], dtype=torch.float64)
    expected = F_g + scales.view(-1, 1, 1, 1) * (F - F_g)
    torch.testing.assert_close(guided(x, t, None, scales), expected, rtol=1e-9, atol=1e-9)
    inside = teacher.guided_by(2.5, (0.5, 1.2), guide)(x, t)
    torch.testing.assert_close(inside[1:3], guided(x, t)[1:3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inside[[0, 3]], F[[0, 3]], rtol=1e-9, atol=1e-9)
    # It can be differentiated: along the PF-ODE by forward mode, and in x by backward mode, both against differences.
    direction = torch.ones_like(x), torch.ones_like(t)
    forward = torch.func.jvp(guided, (x, t), direction)[1]
    h = 1e-5
    difference = (guided(x + h * direction[0], t + h) - guided(x - h * direction[0], t - h)) / (2 * h)
    torch.testing.assert_close(forward, difference, rtol=1e-6, atol=1e-6)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(guided(y, t).sum(), y)
    along = torch.func.jvp(lambda x: guided(x, t), (x,), (direction[0],))[1].sum()
    torch.testing.assert_close(gradient.sum(), along, rtol=1e-9, atol=1e-9)


def test_autoguidance_gets_the_labels_and_an_unconditional_network_none(make_teacher):
    teacher, weaker = make_teacher("SongUNet"), make_teacher("SiT", depth=1)
    unconditional = make_teacher("SongUNet", classes=None, label_dim=0)
    for guide, labels in ((weaker, Y), (unconditional, None)):
        F, F_g = teacher(X, T, Y), guide(X, T, labels)
        torch.testing.assert_close(teacher.guided_by(2.0, None, guide)(X, T, Y), F_g + 2.0 * (F - F_g))
    assert (weaker(X, T, Y) - weaker(X, T)).abs().max() > 1e-3
    # A teacher without labels is guided by another one without.
    alone = make_teacher("SiT", num_classes=0, classes=None)
    F, F_g = alone(X, T), unconditional(X, T)
    torch.testing.assert_close(alone.guided_by(2.0, None, unconditional)(X, T), F_g + 2.0 * (F - F_g))


def test_guidance_scale_1_evaluates_one_network(make_teacher):
    teacher, guide = make_teacher("SongUNet"), make_teacher("SiT")
    calls = []
    for network in (teacher, guide):
        network.native.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    plain = teacher(X, T, Y)
    assert torch.equal(teacher.guided_by(1.0, None, guide)(X, T, Y), plain)
    assert calls == ["SongUNet", "SongUNet"]
    teacher.guided_by(2.0, None, guide)(X, T, Y)
    assert calls == ["SongUNet", "SongUNet", "SongUNet", "SiT"]


def test_guidance_teacher_goes_along_but_not_into_the_student(make_teacher):
    guide = make_teacher("SiT").train()
    guided = make_teacher("SongUNet").guided_by(2.0, None, guide)
    assert not guide.training and not guided.train().guidance_teacher.training
    assert guided.double().guidance_teacher.native.x_embedder.proj.weight.dtype == torch.float64
    student = guided.student()
    assert student.guidance_teacher is None and not any("guidance_teacher" in name for name in student.state_dict())
    assert guided.guided_by(2.0).guidance_teacher is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sigma_data=0.7), "the guidance teacher has sigma_data 0.7, the teacher that it guides has 0.5"),
        (dict(num_classes=2, classes=2), "the guidance teacher has 2 classes, the teacher that it guides has 3"),
    ],
)
def test_guidance_teachers_that_do_not_fit_are_refused(make_teacher, changes, message):
    with pytest.raises(ValueError, match=message):
        make_teacher("SongUNet").guided_by(2.0, None, make_teacher("SiT", **changes))


def test_more_guidance_teachers_that_do_not_fit(make_teacher):
    foreign = teachers.wrap(torch.nn.Identity(), teachers.TRIGFLOW, 0.5, (1, 9, 9))
    foreign.source = "other"
    teacher = make_teacher("SongUNet")
    with pytest.raises(ValueError, match=r"guidance teacher 'other' has sample_shape \(1, 9, 9\), .* has \(1, 8, 8\)"):
        teacher.guided_by(2.0, None, foreign)
    alone = make_teacher("SongUNet", classes=None, label_dim=0)
    with pytest.raises(ValueError, match="the guidance teacher has 3 classes, the teacher that it guides has none"):
        alone.guided_by(2.0, None, teacher)
    with pytest.raises(ValueError, match="guidance needs labels, got none"):
        teacher.guided_by(2.0, None, alone)(X, T)
    with pytest.raises(ValueError, match="takes the guidance scale as an input and no guidance teacher"):
        teacher.student(guidance_embedding=True).guided_by(2.0, None, alone)


@pytest.mark.parametrize("p", [teachers.RECTIFIED_FLOW, teachers.VP_V], ids=["flow", "vp"])
def test_a_flow_or_vp_network_serves_data_of_any_standard_deviation(mixture, mixture_network, p):
    """It has no sigma_data of its own: at another one it is the exact velocity of the same data still."""
    teacher = teachers.wrap(mixture_network(mixture, p, 0.5), p, 0.5, (2, 1, 1)).at_sigma_data(0.8)
    t = torch.linspace(0.05, 1.5, 16, dtype=torch.float64)
    x_t = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert teacher.sigma_data == 0.8
    torch.testing.assert_close(teacher(x_t, t), mixture.F(x_t, t, 0.8), rtol=1e-9, atol=1e-9)


def test_a_network_with_a_sigma_data_of_its_own_keeps_it(make_teacher):
    teacher = make_teacher("SongUNet")
    assert teacher.at_sigma_data(0.8) is teacher

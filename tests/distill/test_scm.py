import copy
import math

import pytest
import torch
from support import ExactGaussian
from torch import nn

import teachers
from distill import trigflow
from distill.objectives import scm
from distill.objectives.stable_targets import StableTargets
from distill.recipe import TangentConfig, parse_recipe
from distill.recipe_networks import set_dropout

SD = 0.5
BASE = dict(
    objective="distillation", output_dir="x", sigma_data=SD, max_train_steps=1, train_batch_size=4, sample_shape=[1, 8, 8],
    num_classes=3, teacher="x", data="mnist", adaptive_weighting=False,
)  # fmt: skip
X0 = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * SD
LABELS = torch.tensor([0, 1, 2, 0])


def recipe(**changes):
    return parse_recipe({**BASE, **changes}, "test")


def generator():
    return torch.Generator().manual_seed(1)


def test_tangent_is_cos_t_df_dt_by_finite_differences(make_teacher):
    """``g`` at r = 1 equals ``cos(t) df/dt`` along the teacher's PF-ODE, differentiated numerically in fp64."""
    teacher = make_teacher("SongUNet").double()
    student = make_teacher("SongUNet").double()
    for p in student.parameters():
        p.data += 0.02 * torch.randn_like(p)
    t = torch.tensor([0.2, 0.7, 1.2, 1.5], dtype=torch.float64)
    x_t = trigflow.perturb(X0.double(), SD * torch.randn(4, 1, 8, 8, dtype=torch.float64), t)
    with torch.no_grad():
        dx_dt = SD * teacher(x_t, t, LABELS)
        f = lambda x, t: trigflow.consistency_function(x, student(x, t, LABELS), t, SD)  # noqa: E731
        h = 1e-5
        slope = (f(x_t + h * dx_dt, t + h) - f(x_t - h * dx_dt, t - h)) / (2 * h)
    objective = scm.Consistency(recipe(), teacher)
    _, g = objective.continuous_tangent(student, x_t, t, dx_dt, LABELS, None, 1.0)
    torch.testing.assert_close(g, trigflow.expand(t.cos(), g) * slope, rtol=1e-6, atol=1e-7)
    objective.recipe.tangent.rearrangement = False
    _, plain = objective.continuous_tangent(student, x_t, t, dx_dt, LABELS, None, 1.0)
    torch.testing.assert_close(plain, g, rtol=1e-8, atol=1e-10)


def test_discrete_tangent_approaches_the_continuous_one(make_teacher):
    teacher, student = make_teacher("SiT").double(), make_teacher("SiT", sigma_data=SD).double()
    for p in student.parameters():
        p.data += 0.02 * torch.randn_like(p)
    objective = scm.Consistency(recipe(), teacher)
    t = torch.tensor([0.2, 0.7, 1.2, 1.5], dtype=torch.float64)
    x_t = trigflow.perturb(X0.double(), SD * torch.randn(4, 1, 8, 8, dtype=torch.float64), t)
    dx_dt = SD * teacher(x_t, t, LABELS).detach()
    for r in (0.3, 1.0):
        _, g = objective.continuous_tangent(student, x_t, t, dx_dt, LABELS, None, r)
        errors = []
        for step in (1e-2, 1e-3):
            _, d = objective.discrete_tangent(student, x_t, t, t - step, dx_dt, LABELS, None, r, None)
            errors.append((d - g).norm() / g.norm())
        assert errors[1] < 0.01 and errors[0] / errors[1] > 5


def exact_gaussian():
    """Teacher, exact student, and noisy samples."""
    networks = [teachers.wrap(ExactGaussian(c), teachers.TRIGFLOW, SD, (1, 8, 8)) for c in (False, True)]
    t = torch.tensor([0.1, 0.7, 1.2, 1.55], dtype=torch.float64)
    x_t = SD * torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator())
    return *networks, x_t, t


def test_the_exact_consistency_function_has_no_tangent():
    """For Gaussian data the exact student is a fixed point: g = 0 under the exact teacher."""
    teacher, student, x_t, t = exact_gaussian()
    objective = scm.Consistency(recipe(num_classes=None), teacher)
    _, g = objective.continuous_tangent(student, x_t, t, SD * teacher(x_t, t), None, None, 1.0)
    assert g.abs().max() < 1e-12


def test_the_exact_consistency_function_is_what_segments_ask_for():
    """Up to the solver's error, which is of second order in the number of its steps."""
    teacher, student, x_t, t = exact_gaussian()
    errors = []
    for steps in (2, 8):
        changes = dict(num_classes=None, target_half_life_images=1.0, segments={"solver_steps": steps})
        objective = scm.Consistency(recipe(**changes), teacher)
        length = torch.tensor([0.1, 0.9, 1.5, 2.0], dtype=torch.float64)
        end = objective.segment_end(student, x_t, t, length, None, None)
        errors.append((end - student(x_t, t)).abs().max().item())
    assert errors[0] < 0.05 and errors[1] < errors[0] / 10


def test_short_segments_are_the_tangent(make_teacher):
    """``F_end - F^- = g length / sigma_data`` in the limit."""
    teacher, student = make_teacher("SongUNet").double(), make_teacher("SongUNet").double()
    for p in student.parameters():
        p.data += 0.02 * torch.randn_like(p)
    objective = scm.Consistency(recipe(target_half_life_images=1.0, segments={}), teacher)
    t = torch.tensor([0.2, 0.7, 1.2, 1.5], dtype=torch.float64)
    x_t = trigflow.perturb(X0.double(), SD * torch.randn(4, 1, 8, 8, dtype=torch.float64), t)
    with torch.no_grad():
        F, g = objective.continuous_tangent(student, x_t, t, SD * teacher(x_t, t, LABELS), LABELS, None, 1.0)
    errors = []
    for length in (1e-2, 1e-3):
        end = objective.segment_end(student, x_t, t, torch.full_like(t, length), LABELS, None)
        errors.append(((end - F) * SD / length - g).norm() / g.norm())
    assert errors[1] < 0.01 and errors[0] / errors[1] > 5


def test_segments_give_way_to_the_tangent(make_teacher):
    """First at every t, then only below a time: at 0 nothing is left of them."""
    teacher, student, average = make_teacher("SiT"), make_teacher("SiT"), make_teacher("SiT")
    for p in average.parameters():
        p.data += 0.02 * torch.randn_like(p)

    def loss(step, **segments):
        changes = dict(max_train_steps=4, target_half_life_images=1.0, segments=segments or None)
        objective = scm.Consistency(recipe(**changes), teacher)
        return objective(student, average, X0, LABELS, step, generator()).loss

    early, late = (loss(step, everywhere_share=0.75, below=0.0) for step in (2, 3))
    assert late == loss(3) != early == loss(2, below=1.57)
    assert loss(3, below=1.0) not in (early, late)


def test_segments_of_a_guided_teacher_end_where_its_guided_ode_does(make_teacher):
    """With the guidance scale as an input, one for each sample."""
    teacher = make_teacher("SiT", class_dropout_prob=0.1)
    student = make_teacher("SiT", class_dropout_prob=0.1).student(guidance_embedding=True)
    changes = dict(target_half_life_images=1.0, segments={})
    t, length = torch.full((4,), 0.8), torch.ones(4)
    both = scm.Consistency(recipe(guidance_scale=[1.0, 3.0], **changes), teacher)
    end = both.segment_end(student, X0, t, length, LABELS, torch.tensor([1.0, 1.0, 3.0, 3.0]))
    for scale, rows in ((1.0, slice(0, 2)), (3.0, slice(2, 4))):
        fixed = scm.Consistency(recipe(guidance_scale=scale, **changes), teacher.guided_by(scale, None))
        expected = fixed.segment_end(student, X0, t, length, LABELS, None)
        torch.testing.assert_close(end[rows], expected[rows], rtol=1e-4, atol=1e-5)
    loss = both(student, student, X0, LABELS, 0, generator()).loss
    loss.backward()
    assert torch.isfinite(loss) and student.native.g_embedder.mlp[2].weight.grad.abs().max() > 0


def test_segments_under_bf16_autocast(make_teacher):
    teacher, student = make_teacher("SongUNet"), make_teacher("SongUNet")
    t, length = torch.tensor([0.05, 0.7, 1.2, 1.55]), torch.ones(4)
    x_t = trigflow.perturb(X0, SD * torch.randn(X0.shape, generator=generator()), t)
    ends = []
    for precision in ("no", "bf16"):
        changes = dict(target_half_life_images=1.0, segments={}, mixed_precision=precision)
        ends.append(scm.Consistency(recipe(**changes), teacher).segment_end(student, x_t, t, length, LABELS, None))
    assert ends[1].dtype == torch.float32
    assert 0 < (ends[1] - ends[0]).norm() / ends[0].norm() < 0.02


def test_targets_of_an_average_pull_the_student_towards_it(make_teacher):
    """With the average in place of F^-, the loss is that of F against F_average + g."""
    teacher, student, average = make_teacher("SiT"), make_teacher("SiT"), make_teacher("SiT")
    for p in average.parameters():
        p.data += 0.02 * torch.randn_like(p)
    objective = scm.Consistency(recipe(target_half_life_images=10.0, tangent={"warmup_steps": 0}), teacher)
    loss = objective(student, average, X0, LABELS, 0, generator()).loss
    gen = generator()
    t = trigflow.sample_times(4, -1.0, 1.4, SD, gen).float()
    x_t = trigflow.perturb(X0, SD * torch.randn(X0.shape, generator=gen), t)
    dx_dt = SD * teacher(x_t, t, LABELS).detach()
    F, g = objective.continuous_tangent(average, x_t, t, dx_dt, LABELS, None, 1.0)
    target = F + scm.normalize_tangent(g, objective.recipe.tangent)
    torch.testing.assert_close(loss, (student(x_t, t, LABELS) - target).square().mean())


def test_gradient_is_that_of_the_linearised_loss(make_teacher):
    """The gradient of the squared error equals ``-2/D grad(F . g)`` with g held fixed (section 4.2)."""
    teacher, student = make_teacher("SiT"), make_teacher("SiT")
    for p in student.parameters():
        p.data += 0.02 * torch.randn_like(p)
    objective = scm.Consistency(recipe(), teacher)
    objective(student, student, X0, LABELS, 5000, generator()).loss.backward()
    got = student.native.x_embedder.proj.weight.grad.clone()
    student.zero_grad()
    gen = generator()
    t = trigflow.sample_times(4, -1.0, 1.4, SD, gen).float()
    x_t = trigflow.perturb(X0, SD * torch.randn(X0.shape, generator=gen), t)
    dx_dt = SD * teacher(x_t, t, LABELS).detach()
    _, g = objective.continuous_tangent(student, x_t, t, dx_dt, LABELS, None, 1.0)
    g = scm.normalize_tangent(g, objective.recipe.tangent)
    (-2 * (student(x_t, t, LABELS) * g).flatten(1).mean(1).mean()).backward()
    torch.testing.assert_close(got, student.native.x_embedder.proj.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["SongUNet", "SiT"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_one_forward_pass_for_loss_and_derivative_gives_the_same_gradient(make_teacher, name, precision):
    """With dropout, whose masks both passes share."""
    teacher, student = make_teacher(name), make_teacher(name)
    for p in student.parameters():
        p.data += 0.02 * torch.randn_like(p)
    if name == "SongUNet":  # the SiT has none
        set_dropout(student.native, 0.3)
    student.train()
    found = []
    for shared in (False, True):
        tangent = {"warmup_steps": 0, "shared_primal": shared}
        objective = scm.Consistency(recipe(tangent=tangent, mixed_precision=precision), teacher)
        passes = []
        count = student.register_forward_hook(lambda *_: passes.append(1))  # noqa: B023
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            objective(student, student, X0, LABELS, 0, generator()).loss.backward()
        count.remove()
        assert len(passes) == (1 if shared else 2)
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
        student.zero_grad()
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert error < (1e-5 if precision == "no" else 2e-2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"segments": {}, "target_half_life_images": 1.0}, "needs Algorithm 1 as it is; remove segments"),
        ({"target_half_life_images": 1.0}, "remove target_half_life_images"),
        ({"discrete_steps": 64}, "remove discrete_steps"),
        ({"activation_checkpointing": True}, "does not go with activation_checkpointing"),
        ({"objective": "vsd", "vsd": {}}, "belongs to the consistency objectives"),
    ],
)
def test_one_forward_pass_is_refused_where_two_are_needed(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(tangent={"shared_primal": True}, **changes)


def test_normalisation_conventions():
    g = torch.randn(3, 1, 8, 8)
    rms = g.square().mean((1, 2, 3)).sqrt().view(3, 1, 1, 1)
    normalize = lambda kind: scm.normalize_tangent(g, TangentConfig(normalization=kind, constant=0.1))  # noqa: E731
    torch.testing.assert_close(normalize("rms"), g / (rms + 0.1))
    torch.testing.assert_close(normalize("l2"), g / (rms * 8 + 0.1))
    torch.testing.assert_close(normalize("clip"), g.clamp(-0.1, 0.1))
    assert normalize("none") is g


def test_adaptive_weighting_settles_at_the_inverse_error():
    torch.manual_seed(0)
    weighting = scm.AdaptiveWeighting()
    t, error = torch.linspace(0.1, 1.5, 64), torch.linspace(0.1, 1.5, 64).exp()
    optimizer = torch.optim.Adam(weighting.parameters(), 0.02)
    for _ in range(500):
        optimizer.zero_grad()
        scm.weighted_loss(error, t, weighting).backward()
        optimizer.step()
    torch.testing.assert_close(weighting(t).exp() * error, torch.ones(64), atol=0.05, rtol=0)


def test_warm_up_scales_the_second_term():
    x, dx, F, dF = torch.randn(4, 2, 1, 8, 8)
    t = torch.tensor([0.4, 1.1])
    g = lambda r: scm.consistency_tangent(x, t, dx, F, dF, r, SD)  # noqa: E731
    torch.testing.assert_close(g(0.25), g(0.0) + 0.25 * (g(1.0) - g(0.0)))
    torch.testing.assert_close(g(0.0), -trigflow.expand(t.cos().square(), x) * (SD * F - dx))


def test_consistency_training_uses_the_data_velocity(make_teacher):
    student = make_teacher("SiT")
    objective = scm.build_objective(recipe(objective="training"), make_teacher("SiT"))
    z = SD * torch.randn(X0.shape)
    t = torch.tensor([0.3, 0.6, 0.9, 1.2])
    velocity = objective.pf_ode_velocity(X0, z, None, t, LABELS, None)
    torch.testing.assert_close(velocity, trigflow.velocity(X0, z, t))
    assert torch.isfinite(objective(student, student, X0, LABELS, 0, generator()).loss)


def test_guidance_range_reaches_teacher_and_student(make_teacher):
    teacher = make_teacher("SiT")
    student = teacher.student(guidance_embedding=True)
    objective = scm.Consistency(recipe(guidance_scale=[1.0, 3.0]), teacher)
    scale = scm.sample_guidance(objective.recipe, 1000, generator(), "cpu")
    assert 1 <= scale.min() < 1.1 and 2.9 < scale.max() <= 3
    objective(student, student, X0, LABELS, 100, generator()).loss.backward()
    assert student.native.g_embedder.mlp[2].weight.grad.abs().max() > 0


def test_the_loss_sees_the_dropout_masks_of_the_derivative(make_teacher):
    """At r = 0 the tangent is ``-cos^2(t) (sigma_data F - dx/dt)`` with the F of the derivative: here that of the loss."""
    teacher, network = make_teacher("SongUNet"), make_teacher("SongUNet", dropout=0.5).train()
    student, calls = copy.deepcopy(network), []
    student.register_forward_hook(lambda _, inputs, F: calls.append((*inputs[:2], F.detach())))
    objective = scm.Consistency(recipe(tangent={"normalization": "none"}), teacher)
    loss = objective(student, network, X0, LABELS, 0, generator()).loss
    ((x_t, t, F),) = calls
    dx_dt = SD * teacher(x_t, t, LABELS)
    expected = lambda F: (trigflow.expand(t.cos() ** 2, F) * (SD * F - dx_dt)).square().mean()  # noqa: E731
    torch.testing.assert_close(loss, expected(F), rtol=1e-4, atol=0)
    assert abs(loss / expected(network(x_t, t, LABELS)) - 1) > 1e-2  # other masks


def test_discrete_grid_is_edms():
    grid = scm.discrete_times(64, SD)
    sigma = SD * grid.tan()
    assert len(grid) == 65 and grid[0] == 0
    assert math.isclose(sigma[1], 0.002, rel_tol=1e-6) and math.isclose(sigma[-1], 80, rel_tol=1e-6)
    objective = scm.Consistency(recipe(discrete_steps=64), None)
    t, t_next = objective.sample_times(1000, generator())
    assert (t_next < t).all() and set(t.tolist()) <= set(grid.float().tolist())
    with pytest.raises(ValueError, match="discrete_steps must be at least 2"):
        scm.discrete_times(1, SD)


def test_diffusion_loss_vanishes_for_the_exact_network():
    """Data at one point: the exact F is the conditional velocity over sigma_data."""

    class Exact(nn.Module):
        def forward(self, x, time):
            t, x = time.view(-1, 1, 1, 1), x * SD
            return (t.cos() * x - 0.25) / (t.sin() * SD)

    network = teachers.wrap(Exact(), teachers.TRIGFLOW, SD, (1, 8, 8))
    objective = scm.Diffusion(recipe(num_classes=None))
    loss = objective(network, network, torch.full((64, 1, 8, 8), 0.25), None, 0, generator()).loss
    assert loss < 1e-3


def test_stable_targets_are_the_posterior_mean_of_the_data():
    """Against Bayes' rule written out in fp64; the null class sees every image, the others their own."""
    images, labels = torch.randn(12, 1, 2, 2, dtype=torch.float64), torch.arange(12) % 3
    t, asked = torch.tensor([0.01, 0.9, 1.3, 1.5], dtype=torch.float64), torch.tensor([1, 0, 3, 2])
    x0 = images[[4, 3, 7, 5]]
    x_t = trigflow.perturb(x0, SD * torch.randn(x0.shape, dtype=torch.float64, generator=generator()), t)
    means = StableTargets(images, labels, 3, SD)(x_t, t, asked)
    for i in range(4):
        mine = images if asked[i] == 3 else images[labels == asked[i]]
        square = (x_t[i] - t[i].cos() * mine).square().flatten(1).sum(1)
        weight = (-square / (2 * (SD * t[i].sin()) ** 2)).exp()
        expected = (weight[:, None, None, None] * mine).sum(0) / weight.sum()
        torch.testing.assert_close(means[i], expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(means[0], x0[0])  # little noise: the image itself
    everything = StableTargets(images, None, None, SD)(x_t, t, None)
    torch.testing.assert_close(everything[2], means[2])


def test_stable_targets_read_nothing_from_the_device():
    """A tensor on the meta device has no values to read."""
    targets = StableTargets(torch.randn(12, 1, 2, 2, device="meta"), torch.arange(12) % 3, 3, SD)
    means = targets(torch.empty(4, 1, 2, 2, device="meta"), torch.empty(4, device="meta"), torch.tensor([1, 0, 3, 2]))
    assert means.shape == (4, 1, 2, 2) and means.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        targets(torch.empty(4, 1, 2, 2, device="meta"), torch.empty(4, device="meta"), torch.zeros(4, device="meta").long())


def test_stable_targets_leave_the_diffusion_loss_unbiased():
    """The mean of the squared error falls by exactly what does not depend on the network."""

    class Linear(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope = slope

        def forward(self, x, time):
            return self.slope * x

    data = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 1, 1).contiguous()
    x0 = data.repeat(100_000, 1, 1, 1)
    values = recipe(objective="diffusion", sigma_data=1.0, num_classes=None, p_mean=0.0, p_std=0.5, label_dropout=0.0)
    ordinary, stable = scm.Diffusion(values), scm.Diffusion(values)
    stable.stable_targets = StableTargets(data, None, None, 1.0)
    drops = []
    for slope in (-0.5, 0.0, 1.5):
        network = teachers.wrap(Linear(slope), teachers.TRIGFLOW, 1.0, (1, 1, 1))
        losses = [o(network, network, x0, None, 0, generator()).loss.item() for o in (ordinary, stable)]
        drops.append(losses[0] - losses[1])
    assert drops[0] > 0.1
    assert max(drops) - min(drops) < 0.02


def test_a_velocity_teacher_takes_the_place_of_the_data(make_teacher):
    """The error is the distance between the two networks, whatever the image and the label, dropped ones included."""
    teacher, network = make_teacher("SiT", sigma_data=SD), make_teacher("SongUNet")
    objective = scm.Diffusion(recipe(objective="diffusion", network=None, label_dropout=0.5), teacher)
    seen = []

    def student(*point):
        seen.extend(point)
        return network(*point)

    result = objective(student, network, X0, LABELS, 0, generator())
    x_t, t, labels = seen
    expected = (network(x_t, t, labels) - teacher(x_t, t, labels)).square().mean()
    torch.testing.assert_close(result.loss, expected)
    assert (labels == 3).any() and (labels != 3).any()
    same = scm.Diffusion(recipe(objective="diffusion", network=None), network)
    assert same(network, network, X0, LABELS, 0, generator()).loss == 0

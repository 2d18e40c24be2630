"""Variational score distillation (VSD, Diff-Instruct, DMD), the baseline that consistency models are compared with.

The student is a generator: its samples are to have the score of the teacher's. A second network, the fake score, starts from
the teacher and follows the samples' own distribution ``q`` by the diffusion loss; the difference of the two at a noised
sample is the gradient. In TrigFlow (arXiv 2410.11081, appendix C)

    grad log q_t - grad log p_t = cos(t) / (sigma_data sin(t)) (F_teacher - F_fake),

so a sample moves along ``F_fake - F_teacher``. The two published forms differ in its weight: the paper's adaptive one learns
``w(t)``; DMD (arXiv 2311.18828) takes the difference of the denoisers, ``sigma_data sin(t) (F_teacher - F_fake)``, over the
mean of ``|x - D_teacher|``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill import trigflow
from distill.device import autocast
from distill.noise import draw
from distill.objectives.scm import AdaptiveWeighting, Loss, mean_square, sample_guidance, weighted_loss
from distill.recipe import Recipe
from distill.sampling import consistency_sample
from distill.transfer import to_device
from teachers import Teacher
from teachers.condition import Condition


class VSD:
    """The generator's loss.

    Args:
        recipe: the experiment; its ``vsd`` section is used throughout.
        teacher: frozen, with its guidance.
        fake: the fake score, of the same parameterization, without guidance; over a range of scales it has the scale as an
            input, since the samples differ by it. It is read here, and trained by :class:`FakeScore`.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, fake: Teacher):
        self.recipe, self.teacher, self.fake = recipe, teacher, fake
        self.weighting = AdaptiveWeighting() if recipe.vsd.weighting == "adaptive" else None

    def __call__(self, student: nn.Module, network: Teacher, x0, labels, step: int, generator) -> Loss:
        """One step's loss, with the arguments of :class:`distill.objectives.scm.Consistency`; of the images ``x0`` only
        number and shape are used.
        """
        p = self.recipe.vsd
        guidance = sample_guidance(self.recipe, len(x0), generator, x0.device)
        x = generate_samples(student, network, self.recipe, x0.shape, labels, guidance, generator, x0.device)
        t = trigflow.sample_times(len(x0), p.p_mean, p.p_std, self.recipe.sigma_data, generator)
        t = to_device(t.float(), x0.device)
        difference, denoised = self.score_difference(x.detach(), t, labels, guidance, generator)
        logs = {"score_difference": mean_square(difference).sqrt().mean()}
        # x - x^- is 0, so the gradient of ||x - x^- + direction||^2 / 2 by x is the direction itself.
        moved = x - x.detach()
        if p.weighting == "adaptive":
            return Loss(weighted_loss(mean_square(moved + difference), t, self.weighting), logs)
        scale = (x.detach() - denoised).abs().flatten(1).mean(1).clamp(min=1e-8)
        direction = trigflow.expand(self.recipe.sigma_data * t.sin() / scale, x) * difference
        return Loss(mean_square(moved + direction).mean() / 2, logs)

    @torch.no_grad()
    def score_difference(self, x: Tensor, t: Tensor, labels, guidance, generator) -> tuple[Tensor, Tensor]:
        """``F_teacher - F_fake`` at the samples ``x`` ``(B, C, H, W)`` with noise of times ``t`` ``(B,)``, and what the
        teacher denoises them to.
        """
        sd = self.recipe.sigma_data
        z = sd * to_device(draw(torch.randn, x.shape, generator), x.device)
        x_t = trigflow.perturb(x, z, t)
        with autocast(self.recipe.mixed_precision, x.device):
            F_teacher = self.teacher(x_t, t, labels, guidance).to(x.dtype)
            F_fake = self.fake(x_t, t, labels, guidance).to(x.dtype)
        return F_teacher - F_fake, trigflow.consistency_function(x_t, F_teacher, t, sd)


class FakeScore:
    """The fake score's loss: the diffusion loss (equation 4) on samples of the student as they are now.

    Args:
        recipe: the experiment.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.weighting = AdaptiveWeighting() if recipe.vsd.weighting == "adaptive" else None

    def __call__(self, fake: nn.Module, network: Teacher, x0, labels, generator) -> Tensor:
        """A scalar to minimise.

        Args:
            fake: the prepared network whose forward is differentiated.
            network: the student, unwrapped.
        """
        p, sd = self.recipe.vsd, self.recipe.sigma_data
        guidance = sample_guidance(self.recipe, len(x0), generator, x0.device)
        with torch.no_grad():
            x = generate_samples(network, network, self.recipe, x0.shape, labels, guidance, generator, x0.device)
        t = to_device(trigflow.sample_times(len(x), p.fake_p_mean, p.fake_p_std, sd, generator).float(), x.device)
        z = sd * to_device(draw(torch.randn, x.shape, generator), x.device)
        error = mean_square(fake(trigflow.perturb(x, z, t), t, labels, guidance) - trigflow.velocity(x, z, t) / sd)
        return weighted_loss(error, t, self.weighting)


def generate_samples(
    student: nn.Module, network: Teacher, recipe: Recipe, shape: tuple[int, ...], labels: Condition | None,
    guidance: Tensor | None, generator: torch.Generator, device,
) -> Tensor:  # fmt: skip
    """Samples ``(B, C, H, W)`` as the student would draw them, in up to ``vsd.steps`` steps; only the last one, of
    ``student``, is differentiated.

    Of more than one step a random one is the last (backward simulation, DMD2, arXiv 2405.14867, section 4.4), so that every
    step learns from the inputs that it will have. Numbers of steps have times of their own, so of several a random one is
    taken first.
    """
    sd = recipe.sigma_data
    times = recipe.sampling_times(choose(recipe.vsd.step_counts, generator))
    last = choose(range(len(times)), generator)

    def noise() -> Tensor:
        return sd * to_device(draw(torch.randn, shape, generator), device)

    def earlier_step(x: Tensor, s: Tensor) -> Tensor:
        with autocast(recipe.mixed_precision, device):
            return network(x, s, labels, guidance).to(x.dtype)

    x_t, t = noise(), torch.full((shape[0],), times[last], device=device)
    if last > 0:
        x_t = trigflow.perturb(consistency_sample(earlier_step, noise, times[:last], sd), x_t, t)
    F = student(x_t, t, labels, guidance)
    return trigflow.consistency_function(x_t, F.to(x_t.dtype), t, sd)


def choose(numbers: Sequence[int], generator: torch.Generator) -> int:
    """One of them, each as likely."""
    return numbers[torch.randint(len(numbers), (1,), generator=generator).tolist()[0]]

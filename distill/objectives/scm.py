"""The continuous-time consistency objective sCM (arXiv 2410.11081, Algorithm 1), its discrete counterpart
(appendix E), and the diffusion objective that trains teachers.

Every network here is a :class:`teachers.Teacher`, called as ``F(x_t, t, labels, guidance)``; the paper's
``F_theta(x_t / sigma_data, t)`` is that call.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill import trigflow
from distill.device import autocast
from distill.jvp import jvp, record_rng, replay_rng
from distill.noise import draw
from distill.objectives.stable_targets import StableTargets
from distill.parallel import is_sharded
from distill.recipe import Recipe, TangentConfig
from distill.sampling import denoiser, exponential_adams
from distill.transfer import to_device
from teachers import Teacher
from teachers.condition import Condition
from teachers.networks.flash_attention import flash_attention
from teachers.networks.layers import PositionalEmbedding


class Loss(NamedTuple):
    """A loss to minimise and what to log of it (scalars)."""

    loss: Tensor
    logs: dict[str, Tensor]


class AdaptiveWeighting(nn.Module):
    """``w_phi(t)`` of equation 8: a linear layer on a positional embedding of ``t``; zero at initialisation."""

    def __init__(self, dim: int = 64):
        super().__init__()
        self.embedding = PositionalEmbedding(dim)
        self.linear = nn.Linear(dim, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, t: Tensor) -> Tensor:
        """``(B,)`` for times ``(B,)``."""
        return self.linear(self.embedding(t.float())).squeeze(1)


def weighted_loss(squared_error: Tensor, t: Tensor, weighting: nn.Module | None) -> Tensor:
    """``mean(e^w(t) squared_error - w(t))`` (equation 8); without a weighting, the plain mean.

    ``squared_error`` ``(B,)`` is already divided by the number of dimensions.
    """
    if weighting is None:
        return squared_error.mean()
    w = weighting(t)
    return (w.exp() * squared_error - w).mean()


def mean_square(x: Tensor) -> Tensor:
    """Per-sample mean of squares ``(B,)``, in fp32 or better."""
    return (x if x.dtype == torch.float64 else x.float()).square().flatten(1).mean(1)


def normalize_tangent(g: Tensor, config: TangentConfig) -> Tensor:
    """Step 5 of Algorithm 1: ``g / (||g|| + c)``, or clipping to ``[-c, c]``.

    The paper writes ``||g||`` without saying which norm; ``l2`` sums over the sample, ``rms`` is smaller by sqrt(D), so
    that the same ``c`` means different things.
    """
    if config.normalization == "none":
        return g
    if config.normalization == "clip":
        return g.clamp(-config.constant, config.constant)
    norm = mean_square(g).sqrt()
    if config.normalization == "l2":
        norm = norm * math.sqrt(g[0].numel())
    return g / trigflow.expand(norm + config.constant, g)


def consistency_tangent(
    x_t: Tensor, t: Tensor, dx_dt: Tensor, F: Tensor, cos_sin_dF: Tensor, r: float, sigma_data: float
) -> Tensor:
    """Step 4 of Algorithm 1, ``g = -cos^2(t) (sigma_data F - dx/dt) - r (cos(t) sin(t) x_t + sigma_data cos_sin_dF)``.

    ``cos_sin_dF`` is ``cos(t) sin(t) dF/dt`` along the PF-ODE, as JVP rearrangement delivers it; ``r`` is the tangent
    warm-up. ``g = cos(t) df/dt`` at ``r = 1``.
    """
    t = trigflow.expand(t, x_t)
    cos, sin = t.cos(), t.sin()
    return -cos.square() * (sigma_data * F - dx_dt) - r * (cos * sin * x_t + sigma_data * cos_sin_dF)


class Diffusion:
    """TrigFlow's diffusion loss ``E ||F(x_t, t) - v_t / sigma_data||^2`` (equation 4), which trains teachers.

    For an EDM network it is EDM's own weighted loss; for a flow network it is flow matching weighted by noise level.

    Args:
        recipe: the experiment; see :class:`distill.recipe.Recipe`.
        velocity_teacher: frozen; its ``F`` takes the place of ``v_t / sigma_data``, whose mean it is. This carries a teacher
            over to another network: as far as it is right the minimiser is the same, without the noise of single images.
    """

    def __init__(self, recipe: Recipe, velocity_teacher: Teacher | None = None):
        self.recipe, self.velocity_teacher = recipe, velocity_teacher
        self.weighting = AdaptiveWeighting() if recipe.adaptive_weighting else None
        self.stable_targets: StableTargets | None = None

    def __call__(self, student: nn.Module, network: Teacher, x0, labels, step: int, generator) -> Loss:
        """One step's loss; arguments as those of :class:`Consistency`. With stable targets the labels are the host's."""
        p = self.recipe
        t = to_device(trigflow.sample_times(len(x0), p.p_mean, p.p_std, p.sigma_data, generator), x0.device)
        z = p.sigma_data * to_device(draw(torch.randn, x0.shape, generator), x0.device)
        if labels is not None and p.label_dropout:
            drop = draw(torch.rand, (len(x0),), generator) < p.label_dropout
            labels = network.drop_condition(labels, drop if p.stable_targets else to_device(drop, x0.device))
        t = t.float()
        x_t = trigflow.perturb(x0, z, t)
        target = self.target(x0, z, x_t, t, labels)
        condition = None if labels is None else to_device(labels, x0.device)
        error = mean_square(student(x_t, t, condition) - target)
        return Loss(weighted_loss(error, t, self.weighting), {"squared_error": error.detach().mean()})

    @torch.no_grad()
    def target(self, x0, z, x_t, t, labels) -> Tensor:
        """What ``F`` is to be at ``(x_t, t)``."""
        if self.velocity_teacher is not None:
            with autocast(self.recipe.mixed_precision, x_t.device):
                return self.velocity_teacher(x_t, t, labels).to(x_t.dtype)
        if self.stable_targets is not None:
            x0 = self.stable_targets(x_t, t, labels)
            z = (x_t - trigflow.expand(t.cos(), x_t) * x0) / trigflow.expand(t.sin(), x_t)
        return trigflow.velocity(x0, z, t) / self.recipe.sigma_data


class NoisyBatch(NamedTuple):
    """Images on the diffusion process: ``x_t = cos(t) x0 + sin(t) z``, and the condition they are denoised under."""

    x0: Tensor  # (B, C, H, W)
    z: Tensor
    x_t: Tensor
    t: Tensor  # (B,)
    t_next: Tensor | None  # the next smaller time of the discrete objective
    labels: Condition | None
    guidance: Tensor | None

    def rows(self, index: Tensor) -> "NoisyBatch":
        return NoisyBatch(*(None if values is None else values[index] for values in self))


class Consistency:
    """sCM (Algorithm 1): distillation from a teacher (sCD), or training from data alone (sCT). With the recipe's
    ``segments``, part of the samples learn from a stretch of the teacher's PF-ODE instead of from its tangent.

    Args:
        recipe: the experiment; see :class:`distill.recipe.Recipe`.
        teacher: frozen; gives the PF-ODE velocity. ``None`` for consistency training.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher | None):
        self.recipe, self.teacher = recipe, teacher
        self.weighting = AdaptiveWeighting() if recipe.adaptive_weighting else None
        self.grid = discrete_times(recipe.discrete_steps, recipe.sigma_data) if recipe.discrete_steps else None

    def __call__(self, student: nn.Module, network: Teacher, x0, labels, step: int, generator) -> Loss:
        """One step's loss.

        Args:
            student: the prepared network whose forward is differentiated (DDP, FSDP or plain).
            network: ``F^-`` of Algorithm 1, from which targets are made: the same network unwrapped, or its average.
            x0: images ``(B, C, H, W)``; ``labels`` ``(B,)`` or ``None``.
            step: optimizer steps done, for the tangent warm-up and the end of the segments.
            generator: CPU generator of this step's noise, times and guidance scales.
        """
        p = self.recipe
        times = self.sample_times(len(x0), generator)
        batch = self.noisy_batch(x0, labels, times, generator)
        progress = step / p.max_train_steps
        has_segments = p.segments is not None and not p.segments.are_over(progress)
        # On the host, like the times: which networks to call, and for how many samples, does not wait for the device.
        on_segment = p.segments.covers(times[0], progress) if has_segments else None
        # The loss forward must see the dropout masks that the target saw.
        rng = record_rng(x0.device) if network.training else None
        if p.tangent.shared_primal:
            F, g = self.tangent(student, batch, step, rng)
        else:
            if on_segment is None:
                frozen, g = self.tangent(network, batch, step, rng)
            else:
                frozen, g = self.segment_targets(network, batch, on_segment, step, generator)
            with replay_rng(rng) if rng else nullcontext():
                F = student(batch.x_t, batch.t, labels, batch.guidance)
        if not p.averages_targets(step):
            # F^- of Algorithm 1 is this very F: the derivative's own value differs from it by rounding, and in bf16 or
            # compiled code that difference is as large as g.
            frozen = F.detach()
        if on_segment is not None:
            rows, now = trigflow.expand(to_device(on_segment, F.device), F), F.detach()
            frozen, g = torch.where(rows, now, frozen), torch.where(rows, frozen - now, g)
        error = mean_square(F - (frozen + normalize_tangent(g, p.tangent)))
        logs = {"tangent_norm": mean_square(g).sqrt().mean(), "squared_error": error.detach().mean()}
        return Loss(weighted_loss(error, batch.t, self.weighting), logs)

    def noisy_batch(self, x0, labels, times: tuple[Tensor, Tensor | None], generator) -> NoisyBatch:
        """Step 1 of Algorithm 1, at times that :meth:`sample_times` drew."""
        t, t_next = (None if each is None else to_device(each, x0.device) for each in times)
        z = self.recipe.sigma_data * to_device(draw(torch.randn, x0.shape, generator), x0.device)
        guidance = sample_guidance(self.recipe, len(x0), generator, x0.device)
        return NoisyBatch(x0, z, trigflow.perturb(x0, z, t), t, t_next, labels, guidance)

    def tangent(self, network, batch: NoisyBatch, step: int, rng) -> tuple[Tensor, Tensor]:
        """Steps 2 to 4 of Algorithm 1: ``F^-`` and ``g``. With ``tangent.shared_primal`` the first keeps its graph, as the
        loss' own ``F``.
        """
        x0, z, x_t, t, t_next, *condition = batch
        warmup = self.recipe.tangent.warmup_steps
        r = min(1.0, step / warmup) if warmup else 1.0
        with torch.no_grad():
            dx_dt = self.pf_ode_velocity(x0, z, x_t, t, *condition)
        if self.grid is None:
            return self.continuous_tangent(network, x_t, t, dx_dt, *condition, r)
        return self.discrete_tangent(network, x_t, t, t_next, dx_dt, *condition, r, rng)

    def segment_targets(self, network, batch: NoisyBatch, on_segment, step: int, generator) -> tuple[Tensor, Tensor]:
        """For samples that are not on segments ``F^-`` and ``g``; for those that are, the ``F`` to reach, and zeros.
        ``on_segment`` ``(B,)`` is a mask of the host.
        """
        target, g = torch.zeros_like(batch.x_t), torch.zeros_like(batch.x_t)
        length = to_device(draw(torch.rand, (len(batch.t),), generator).clamp(min=1e-3), batch.t.device)
        off, count = self.evaluated(~on_segment, step, batch.t.device)
        if len(off):
            F, tangent = self.tangent(network, batch.rows(off), step, None)
            target[off[:count]], g[off[:count]] = F[:count], tangent[:count]
        on, count = self.evaluated(on_segment, step, batch.t.device)
        if len(on):
            rows, length = batch.rows(on), self.recipe.segments.max_length * length[on]
            end = self.segment_end(network, rows.x_t, rows.t, length, rows.labels, rows.guidance)
            target[on[:count]] = end[:count]
        return target, g

    def evaluated(self, mask: Tensor, step: int, device) -> tuple[Tensor, int]:
        """The indices of the samples to evaluate networks at where the host's ``mask`` ``(B,)`` asks for it, on the device,
        and how many of them it asks for. Networks in shards are called by every process or by none: where chance decides, by
        one that has no such sample too, in vain.
        """
        p = self.recipe
        rows = [i for i, asked in enumerate(mask.tolist()) if asked]
        by_chance = step / p.max_train_steps >= p.segments.everywhere_share and 0 < p.segments.below < math.pi / 2
        in_vain = [0] if is_sharded(p) and by_chance and not rows else []
        return to_device(torch.tensor(rows + in_vain, dtype=torch.long), device), len(rows)

    @torch.no_grad()
    def segment_end(self, network, x_t, t, length, labels, guidance) -> Tensor:
        """The ``F`` at ``(x_t, t)`` with which ``f(x_t, t) = f^-(x_s, s)``, where the teacher's PF-ODE takes ``x_t`` to
        ``x_s`` and ``log tan s = log tan t - length``.

        ``F - F^-`` is ``g / sigma_data`` integrated over the segment in ``log tan``, so for short segments it is
        ``g length / sigma_data``.
        """
        sd = self.recipe.sigma_data
        ramp = torch.linspace(0, 1, self.recipe.segments.solver_steps + 1, device=x_t.device)
        sigmas = trigflow.expand(sd * t.tan() * torch.exp(-ramp[:, None] * length), x_t[None])
        with autocast(self.recipe.mixed_precision, x_t.device):
            x = exponential_adams(denoiser(self.teacher, labels, guidance), x_t / trigflow.expand(t.cos(), x_t), sigmas)
            s = trigflow.time_from_sigma(sigmas[-1].flatten(), sd)
            x_s = trigflow.expand(s.cos(), x) * x
            F = network(x_s, s, labels, guidance).to(x_t.dtype)
        return trigflow.network_output(x_t, trigflow.consistency_function(x_s, F, s, sd), t, sd)

    def sample_times(self, n: int, generator) -> tuple[Tensor, Tensor | None]:
        """Times ``t`` and, for the discrete objective, their next smaller grid times; fp32, on the host."""
        p = self.recipe
        t = trigflow.sample_times(n, p.p_mean, p.p_std, p.sigma_data, generator)
        if self.grid is None:
            return t.float(), None
        index = torch.searchsorted(self.grid, t).clamp(1, len(self.grid) - 1)
        return self.grid[index].float(), self.grid[index - 1].float()

    def pf_ode_velocity(self, x0, z, x_t, t, labels, guidance) -> Tensor:
        """Step 2: the teacher's ``sigma_data F`` (sCD) or the unbiased ``cos(t) z - sin(t) x0`` (sCT)."""
        if self.teacher is None:
            return trigflow.velocity(x0, z, t)
        with autocast(self.recipe.mixed_precision, x_t.device):
            F = self.teacher(x_t, t, labels, guidance)
        return self.recipe.sigma_data * F.to(x_t.dtype)

    def continuous_tangent(self, network, x_t, t, dx_dt, labels, guidance, r) -> tuple[Tensor, Tensor]:
        """``F^-`` and ``g`` by forward-mode differentiation along the PF-ODE."""
        cos_sin = t.cos() * t.sin()
        scale = cos_sin if self.recipe.tangent.rearrangement else torch.ones_like(t)
        tangents = (trigflow.expand(scale, x_t) * dx_dt, scale)
        with autocast(self.recipe.mixed_precision, x_t.device), flash_attention(self.recipe.tangent.flash_attention):
            call = lambda x, time: network(x, time, labels, guidance)  # noqa: E731
            F, dF = jvp(call, (x_t, t), tangents, self.recipe.tangent.shared_primal, self.recipe.compile)
        F, dF = F.to(x_t.dtype), dF.to(x_t.dtype)
        if not self.recipe.tangent.rearrangement:
            dF = trigflow.expand(cos_sin, x_t) * dF
        return F, consistency_tangent(x_t, t, dx_dt, F.detach(), dF, r, self.recipe.sigma_data)

    @torch.no_grad()
    def discrete_tangent(self, network, x_t, t, t_next, dx_dt, labels, guidance, r, rng) -> tuple[Tensor, Tensor]:
        """``F^-`` and ``g`` from one DDIM step of the teacher, ``g = cos(t) (f(x_t, t) - f(x_t', t')) / sin(t - t')``
        with the warm-up of appendix E.
        """
        sd = self.recipe.sigma_data
        x_next = trigflow.ddim_step(x_t, dx_dt / sd, t, t_next, sd)
        with autocast(self.recipe.mixed_precision, x_t.device):
            F = network(x_t, t, labels, guidance).to(x_t.dtype)
            with replay_rng(rng) if rng else nullcontext():
                F_next = network(x_next, t_next, labels, guidance).to(x_t.dtype)
        t, t_next = trigflow.expand(t, x_t), trigflow.expand(t_next, x_t)
        step = t - t_next
        slope = (step.cos() * F - F_next) / step.sin()
        g = -t_next.cos() * (sd * F - dx_dt) - r * t_next.sin() * (x_t + sd * slope)
        return F, t.cos() * g


def sample_guidance(recipe: Recipe, n: int, generator: torch.Generator, device) -> Tensor | None:
    """Guidance scales ``(n,)``, uniform over the recipe's range; ``None`` when the scale is fixed."""
    if not isinstance(recipe.guidance_scale, list):
        return None
    low, high = recipe.guidance_scale
    return to_device(low + (high - low) * draw(torch.rand, (n,), generator), device)


def discrete_times(n: int, sigma_data: float, sigma_min=0.002, sigma_max=80.0, rho=7.0) -> Tensor:
    """EDM's grid of ``n`` noise levels as TrigFlow times with 0 in front, fp64, increasing (appendix E)."""
    if n < 2:
        raise ValueError(f"discrete_steps must be at least 2, got {n}")
    ramp = torch.linspace(0, 1, n, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    times = trigflow.time_from_sigma((low + ramp * (high - low)) ** rho, sigma_data)
    return torch.cat([torch.zeros(1, dtype=torch.float64), times])


def build_objective(recipe: Recipe, teacher: Teacher | None):
    """The objective a recipe names; ``teacher`` is frozen, ``None`` if the recipe learns from data alone."""
    if recipe.is_diffusion:
        return Diffusion(recipe, teacher)
    return Consistency(recipe, teacher if recipe.objective == "distillation" else None)

"""Small real networks that every test shares, and an analytic Gaussian mixture."""

import math
import os
from pathlib import Path

if "TEST_GPU" not in os.environ:  # the suite compares with what a CPU computes, also on a machine with a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
from processes import Server

import teachers
from teachers.networks import NETWORKS, build

MNIST = Path(__file__).parents[1] / "distill/assets/mnist"

# The networks here are tiny: more threads only wait for each other.
torch.set_num_threads(1)

UNET = dict(
    img_resolution=8, in_channels=1, out_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4], dropout=0.0, label_dropout=0.1,
)  # fmt: skip
ADM = {**UNET, "model_channels": 64, "channel_mult": [1, 1]}  # a head of its attention has 64 channels
EDM2 = dict(
    img_resolution=8, img_channels=1, label_dim=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4], channels_per_head=16, label_dropout=0.1,
)  # fmt: skip
SIT = dict(
    input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3, learn_sigma=False
)
CONFIGS = {"SongUNet": UNET, "DhariwalUNet": ADM, "EDM2UNet": EDM2, "SiT": SIT}


def small_teacher(kind: str, sigma_data: float = 0.5, classes: int = 3, **changes) -> teachers.Teacher:
    """A tiny network with random weights; zero-initialised layers are perturbed so that they matter."""
    torch.manual_seed(0)
    unet = kind != "SiT"
    native = build(kind, {**CONFIGS[kind], **changes})
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    convention = teachers.EDM if unet else teachers.RECTIFIED_FLOW
    return teachers.wrap(native, convention, sigma_data, (1, 8, 8), classes, "one_hot" if unet else "index").eval()


@pytest.fixture(params=["SongUNet", "SiT"])
def teacher(request) -> teachers.Teacher:
    return small_teacher(request.param)


@pytest.fixture
def make_teacher():
    return small_teacher


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> str:
    """A folder with the first images of the bundled MNIST: reading all takes seconds, and their features half a minute."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("digits")
    for split, num in (("train", 1500), ("test", 500)):
        Dataset.from_parquet(str(MNIST / f"{split}.parquet")).select(range(num)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="session")
def fork_server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(fork_server) -> Server:
    """Starts processes, of which none outlives the test."""
    yield fork_server
    if fork_server.running:
        fork_server.close()


@pytest.fixture
def registry():
    """The known network classes, which are afterwards what they were."""
    before = dict(NETWORKS)
    yield NETWORKS
    NETWORKS.clear()
    NETWORKS.update(before)


class GaussianMixture:
    """Three 2-D Gaussians with known posterior means under any ``y = alpha x0 + sigma eps``, fp64."""

    means = torch.tensor([[-1.2, 0.4], [0.7, -0.9], [0.5, 1.1]], dtype=torch.float64)
    variances = torch.tensor([0.09, 0.05, 0.07], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def posterior(self, y, alpha, sigma):
        """``E[x0 | y]`` and ``E[eps | y]`` for ``y`` ``(B, 2, 1, 1)`` and coefficients ``(B,)``."""
        y2 = y.flatten(1)
        alpha, sigma = (torch.as_tensor(v, dtype=y.dtype).expand(len(y)) for v in (alpha, sigma))
        total = alpha[:, None] ** 2 * self.variances + sigma[:, None] ** 2
        d = y2[:, None] - alpha[:, None, None] * self.means
        log_weight = self.weights.log() - d.square().sum(2) / (2 * total) - total.log()
        gain = (alpha[:, None] * self.variances / total)[..., None]
        x0 = (log_weight.softmax(1)[..., None] * (self.means + gain * d)).sum(1)
        eps = (y2 - alpha[:, None] * x0) / sigma[:, None]
        return x0.view_as(y), eps.view_as(y)

    def sample(self, n, generator):
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return (self.means[k] + self.variances[k].sqrt()[:, None] * noise).view(n, 2, 1, 1)

    def F(self, x_t, t, sigma_data):
        """The exact TrigFlow network ``E[cos(t) eps - sin(t) x0 / sigma_data | x_t]``."""
        x0, eps = self.posterior(x_t, t.cos(), sigma_data * t.sin())
        t = t.view(-1, 1, 1, 1)
        return t.cos() * eps - t.sin() * x0 / sigma_data


@pytest.fixture
def mixture() -> GaussianMixture:
    return GaussianMixture()


# Noise-to-signal ratio of a network's step, forwards: what VPPrecond, iDDPMPrecond and DDPM's schedule invert.
def vp_sde_noise(step):
    tau = step / 999
    return torch.expm1(19.9 / 2 * tau**2 + 0.1 * tau).sqrt()


def cosine_noise(step):
    """``1 + noise^2`` is ``1 / alpha_bar``, with alpha_bar of the clean end divided out; as cot^2 to keep its digits."""
    angle = math.pi / 2 / 1.008 * (999 - step) / 1000
    end = torch.tensor(math.pi / 2 / 1.008, dtype=torch.float64)
    return (torch.sin(end - angle) * torch.sin(end + angle)).sqrt() / angle.sin()  # sin^2 end - sin^2 angle, factored


def ddpm_noise(step):
    """At whole steps."""
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step.round().long()]
    return ((1 - kept) / kept).sqrt()


class MixtureNetwork(torch.nn.Module):
    """The network that a teacher of some convention would be if it had learned the mixture perfectly."""

    noise = {"linear_beta": vp_sde_noise, "cosine": cosine_noise, "ddpm_linear": ddpm_noise}

    def __init__(self, mixture, p, own_sigma_data):
        super().__init__()
        self.mixture, self.p, self.own = mixture, p, own_sigma_data

    def forward(self, x, time):
        return getattr(self, self.p.family)(x, time / self.p.time_scale)

    def edm(self, x, time):
        if self.p.prediction == "x0":
            return self.mixture.posterior(x, 1.0, time)[0]
        if self.p.prediction == "-eps":
            return -self.mixture.posterior(x, 1.0, 2 * time.exp())[1]
        sigma = (4 * time).exp()
        s, own = sigma.view(-1, 1, 1, 1), self.own
        norm = (s**2 + own**2).sqrt()
        y = x * norm
        denoised = self.mixture.posterior(y, 1.0, sigma)[0]
        return (denoised - own**2 / norm**2 * y) * norm / (s * own)

    def vp(self, x, time):
        if self.p.time == "log_snr":  # alpha^2 / sigma^2 = e^time
            alpha, sigma = torch.sigmoid(time).sqrt(), torch.sigmoid(-time).sqrt()
        elif self.p.time == "-2log(alpha)":
            alpha, sigma = (-time / 2).exp(), (-torch.expm1(-time)).sqrt()
        elif self.p.time in self.noise:  # (alpha, sigma) = (1, noise) / sqrt(1 + noise^2)
            alpha = torch.rsqrt(1 + self.noise[self.p.time](time) ** 2)
            sigma = self.noise[self.p.time](time) * alpha
        else:
            alpha, sigma = time.cos(), time.sin()
        x0, eps = self.mixture.posterior(x, alpha, sigma)
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        return {"x0": x0, "eps": eps, "v": a * eps - s * x0, "score": -eps / s}[self.p.prediction]

    def flow(self, x, time):
        s = time if self.p.time == "s" else 1 - time
        x0, eps = self.mixture.posterior(x, 1 - s, s)
        return eps - x0 if self.p.prediction == "velocity" else x0 - eps

    def trigflow(self, x, time):
        return self.mixture.F(x * self.own, time, self.own)


@pytest.fixture
def mixture_network() -> type[MixtureNetwork]:
    return MixtureNetwork

"""A plan against the real thing: operations, calls and memory of real steps."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import teachers
from distill import cli, trigflow
from distill.ema import EMA
from distill.jvp import jvp
from distill.objectives.scm import build_objective
from distill.objectives.vsd import VSD, FakeScore
from distill.optimizer import build_optimizer
from distill.plan.memory import Memory, fit_to_device, option, step_memory
from distill.plan.networks import Networks, planned_networks
from distill.plan.passes import LiveMemory, Pass, Passes, blocks
from distill.plan.report import passes_per_image, sampling_costs, segment_share, step_flops, table
from distill.recipe import load_recipe, parse_recipe
from teachers.released import released_config

BATCH = 8
BASE = dict(
    objective="distillation", output_dir="x", sigma_data=0.5, max_train_steps=10, train_batch_size=BATCH,
    sample_shape=[1, 8, 8], num_classes=3, teacher="x", data="mnist",
)  # fmt: skip


def recipe(**changes):
    return parse_recipe({**BASE, **changes}, "test")


SHARED = {"tangent": {"shared_primal": True}}


@pytest.fixture(scope="module", params=["mnist-edm", "mnist-flow"])
def bundled(request):
    """A recipe for a bundled teacher, its passes, and the teacher itself."""
    r = load_recipe("mnist-tangent.yaml", {"teacher": request.param, "train_batch_size": BATCH})
    return r, Passes(r, planned_networks(r), gpu=False), teachers.load(request.param)


def test_flops_are_those_of_real_tensors(bundled):
    _, passes, teacher = bundled
    x, t, labels = torch.randn(2, 1, 28, 28), torch.ones(2), torch.tensor([1, 2])
    derivative = lambda: jvp(lambda x, t: teacher(x, t, labels), (x, t), (x, t))  # noqa: E731
    training = lambda: teacher(x, t, labels).sum().backward()  # noqa: E731
    for call, planned in ((derivative, passes.derivative), (training, passes.training)):
        with FlopCounterMode(display=False) as counter:
            call()
        assert planned.flops == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    assert passes.student_evaluation.flops == pytest.approx(passes.training.flops / 3, rel=0.02)


def memory_of_real_steps(r, teacher) -> int:
    """What torch allocates in two steps of distillation, inside of kernels too, with all weights that are there before."""
    student = teacher.student()
    averages = [EMA(student, e.half_life_images, e.sigma_rel) for e in r.ema]
    optimizer, objective = build_optimizer(r.optimizer, list(student.parameters())), build_objective(r, teacher)
    x0, labels = torch.randn(BATCH, 1, 28, 28), torch.arange(BATCH)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for step in range(2):
            objective(student, student, x0, labels, step, torch.Generator().manual_seed(0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    weights = sum(p.nbytes for module in (teacher, student, *(ema.network for ema in averages)) for p in module.parameters())
    return weights + peak


def test_memory_is_that_of_real_steps(bundled):
    r, passes, teacher = bundled
    assert step_memory(passes).total(BATCH) == pytest.approx(memory_of_real_steps(r, teacher), rel=0.15)


def test_one_pass_for_loss_and_derivative_saves_a_forward_pass_and_takes_little_memory(bundled):
    r, passes, teacher = bundled
    shared = load_recipe("mnist-tangent.yaml", {**SHARED, "teacher": r.teacher, "train_batch_size": BATCH})
    one = Passes(shared, planned_networks(shared), gpu=False)
    flops, fewer = (sum(step_flops(p).values()) for p in (passes, one))
    assert flops - fewer == pytest.approx(passes.student_evaluation.flops, rel=0.05)
    assert step_memory(one).total(BATCH) == pytest.approx(memory_of_real_steps(shared, teacher), rel=0.15)
    assert 1 < step_memory(one).total(BATCH) / step_memory(passes).total(BATCH) < 1.15


def test_memory_is_linear_in_the_batch_and_smaller_with_checkpointing(make_teacher):
    network = make_teacher("SiT", depth=6)
    passes = Passes(recipe(), Networks(network, network), gpu=False)
    memory, checkpointed = step_memory(passes), step_memory(passes, checkpointed=True)
    assert memory.total(2 * BATCH) - memory.total(BATCH) == pytest.approx(BATCH * passes.training.per_image)
    assert checkpointed.activations(BATCH) < memory.activations(BATCH) / 2
    assert passes.checkpointed_training.flops == pytest.approx(4 / 3 * passes.training.flops, rel=0.02)
    largest = memory.largest_batch(1e9)
    assert memory.total(largest) <= 1e9 < memory.total(largest + 1)


def test_live_memory_counts_storages_once_while_they_live():
    a = torch.zeros(100)
    with LiveMemory([a]) as memory:
        b = a + 1
        c = b.view(10, 10)  # the same storage
        a.add_(1)
        assert memory.live == memory.peak == 400
        d = c * 2
        del b, c
        assert memory.live == 400 and memory.peak == 800
        del d
    assert memory.live == 0


class Calls:
    """Images that went through a network, by hook."""

    def __init__(self, network):
        self.images = 0
        network.native.register_forward_pre_hook(lambda module, args: self.add(len(args[0])))

    def add(self, images: int) -> None:
        self.images += images


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"objective": "training"}, {"discrete_steps": 8}, {"guidance_scale": 2.0},
        {"segments": {"everywhere_share": 1.0, "solver_steps": 3}, "target_half_life_images": 100},
        {"objective": "vsd", "vsd": {"fake_updates": 2}}, SHARED,
    ],
)  # fmt: skip
def test_passes_are_those_that_a_step_makes(make_teacher, changes):
    r = recipe(**changes)
    teacher, student = make_teacher("SiT").guided_by(2.0 if r.guidance_scale == 2.0 else 1.0), make_teacher("SiT")
    fake, x0, labels = make_teacher("SiT"), torch.randn(BATCH, 1, 8, 8), torch.arange(BATCH) % 3
    calls, generator = [Calls(network) for network in (teacher, student, fake)], torch.Generator().manual_seed(0)
    if r.objective == "vsd":
        VSD(r, teacher, fake)(student, student, x0, labels, 0, generator)
        for _ in range(r.vsd.fake_updates):
            FakeScore(r)(fake, student, x0, labels, generator)
    else:
        build_objective(r, teacher)(student, student, x0, labels, 0, generator)
    count = passes_per_image(r)
    per_call = 2 if r.guidance_scale == 2.0 else 1  # the null class in the same batch
    assert calls[0].images == BATCH * count["teacher"] * per_call
    others = count["evaluation"] + count["derivative"] + count["training"]
    assert calls[1].images + calls[2].images == BATCH * others


def test_vsd_costs_its_share_of_the_training():
    vsd = {"fake_updates": 5, "steps": [1, 2, 4]}
    none, half, whole = recipe(), recipe(vsd={**vsd, "share": 0.5}), recipe(vsd=vsd)
    for key, count in passes_per_image(half).items():
        assert count == (passes_per_image(none)[key] + passes_per_image(whole)[key]) / 2


def test_the_share_of_segments_is_that_of_the_sampled_times():
    r = recipe(segments={"everywhere_share": 0.25, "below": 1.0, "tangent_share": 0.2}, target_half_life_images=100.0)
    generator = torch.Generator().manual_seed(0)
    t = trigflow.sample_times(100_000, r.p_mean, r.p_std, r.sigma_data, generator)
    progress = [p for p in torch.linspace(0, 0.999, 200) if not r.segments.are_over(p)]
    share = sum(r.segments.covers(t, p).double().mean() for p in progress) / 200
    assert segment_share(r) == pytest.approx(share.item(), abs=0.01)
    r.segments.below = math.pi / 2
    assert segment_share(r) == 0.8


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("edm2-img512-s", 280_212_709), ("edm2-img64-xl-0671088-0.040.pkl", 1_119_276_709),
        ("edm2-img512-xs-uncond-2147483-0.130", 124_201_125), ("models/edm-cifar10-32x32-uncond-vp", 55_733_891),
        ("edm-cifar10-32x32-cond-ve", 56_400_643), ("edm-ffhq-64x64-uncond-vp", 61_805_571),
        ("edm-imagenet-64x64-cond-adm", 295_899_267),
    ],
)  # fmt: skip
def test_released_networks_have_their_published_sizes(name, parameters):
    outline = teachers.pretrained.outline_of(released_config(name), name)
    assert sum(p.numel() for p in outline.parameters()) == parameters
    assert {p.device.type for p in outline.parameters()} == {"meta"}


def test_other_names_are_not_released():
    assert released_config("edm2-img128-s") is released_config("my-edm2-img64-s") is released_config("mnist-edm") is None


SIZES = {
    "imagenet64": {"s": (1e-4, 0.0), "m": (9e-5, 0.0), "l": (8e-5, 0.0), "xl": (7e-5, 0.0)},
    "imagenet512": {"s": (1e-4, 0.0), "m": (9e-5, 0.1), "l": (8e-5, 0.1), "xl": (7e-5, 0.1), "xxl": (6.5e-5, 0.1)},
}


@pytest.mark.parametrize("data", SIZES)
def test_sizes_have_the_papers_values(data):
    """Tables 4 and 5 of arXiv 2410.11081."""
    counts = {"s": 280.2, "m": 497.8, "l": 777.5, "xl": 1119.3, "xxl": 1523.2}
    for size, (rate, dropout) in SIZES[data].items():
        r = load_recipe(f"{data}-{size}.yaml")
        assert (r.optimizer.learning_rate, r.dropout) == (rate, dropout)
        assert r.train_batch_size * r.gradient_accumulation_steps == 2048
        assert (r.optimizer.beta1, r.optimizer.beta2, r.optimizer.epsilon) == (0.9, 0.99, 1e-11)
        assert (r.tangent.constant, r.tangent.warmup_steps, r.ema[0].sigma_rel) == (0.1, 10_000, 0.05)
        small = data == "imagenet64"
        assert (r.p_mean, r.p_std) == ((-1.0, 1.6) if small else (-0.8, 1.6))
        assert r.guidance_scale == (1.0 if small else [1.0, 2.0])
        assert (r.max_train_steps, r.optimizer.lr_reference_steps) == ((400_000, 35_000) if small else (200_000, 70_000))
        networks = planned_networks(r)
        guide = networks.teacher.guidance_teacher
        own = networks.frozen() - (0 if guide is None else sum(p.numel() for p in guide.parameters()))
        assert own / 1e6 == pytest.approx(counts[size], abs=0.06)
        assert len(networks.assumed) == (1 if small else 2) and r.teacher in networks.assumed[0]
        assert networks.student.accepts_guidance == (not small)


def test_a_student_that_is_not_here_is_taken_for_its_teacher():
    networks = planned_networks(load_recipe("mnist-edm2.yaml"))
    assert networks.trained() == networks.frozen() and "runs/mnist-edm2-retrofit is not here" in networks.assumed[0]
    with pytest.raises(FileNotFoundError, match="needs runs/teachers/ddpm .*benchmarks/diffusers_teachers.py"):
        planned_networks(load_recipe("families/ddpm.yaml"))


def test_sharding_divides_the_state_and_processes_keep_a_second_gradient(make_teacher):
    network = make_teacher("SiT")
    assert len(blocks(network.native)) >= 2
    memory = Memory({"weights": 800, "gradients": 800}, [Pass(0.0, 10.0, 5.0)])
    single, double, sharded = (option(Networks(network), memory, n, shares, False) for n, shares in ((1, 1), (8, 1), (8, 8)))
    assert [way.memory.state["gradients"] for way in (single, double, sharded)] == [800, 1600, 100]
    assert set(option(Networks(network), memory, 8, 8, False, offloaded=True).memory.state) == {"gathered blocks"}
    assert sharded.memory.state["weights"] == 100 and sharded.memory.state["gathered blocks"] > 0
    r = recipe(train_batch_size=6, gradient_accumulation_steps=2)
    assert single.advice(r, 1665) == "train_batch_size=6 gradient_accumulation_steps=2"
    assert single.advice(r, 1655) == "train_batch_size=4 gradient_accumulation_steps=3"  # 5 would fit, 12 is no multiple
    r = recipe(train_batch_size=24, gradient_accumulation_steps=2)
    assert double.advice(r, 2415) == "DDP: train_batch_size=8 gradient_accumulation_steps=6"
    assert single.advice(r, 1600) is None


def test_hsdp_shares_the_state_within_a_node(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    r = load_recipe("mnist-flow.yaml")
    weights = {kind: fit_to_device(replace(r, distributed=kind)).state["weights"] for kind in ("ddp", "fsdp", "hsdp")}
    assert weights["fsdp"] == math.ceil(weights["ddp"] / 16) and weights["hsdp"] == math.ceil(weights["ddp"] / 8)


def test_a_network_that_looks_at_values_cannot_be_planned(make_teacher):
    class Looks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, time):
            return x * self.weight if x.sum() > 0 else x

    network = teachers.wrap(Looks(), teachers.EDM, 0.5, (1, 8, 8))
    with pytest.raises(ValueError, match="Looks cannot be run without weights"):
        _ = Passes(recipe(), Networks(network, network), gpu=False).training


def test_the_command(capsys):
    tiny = ["teachers/mnist-flow.yaml", "network.config.depth=1", "network.config.hidden_size=32"]
    assert cli.main(["plan", *tiny, "--gpus", "4", "--json", "--gpu-tflops", "100", "--utilization", "0.5"]) == 0
    values = json.loads(capsys.readouterr().out)
    time, flops = values["time"], values["flops an image"]
    assert time["images a step"] == 128 and time["flops a step"] == pytest.approx(128 * sum(flops.values()))
    assert time["seconds a step"] == pytest.approx(32 * sum(flops.values()) / 50e12)
    assert time["GPU-hours"] == pytest.approx(4 * time["hours"]) == pytest.approx(25_000 * time["seconds a step"] / 900)
    assert [row["option"] for row in values["memory"]] == [
        "DDP", "DDP, activation checkpointing", "FSDP2 over 4", "FSDP2 over 4, activation checkpointing"
    ]  # fmt: skip
    assert 1.9 < flops["backward"] / flops["forward"] <= 2 and flops["derivative"] == 0
    assert cli.main(["plan", *tiny, "--gpu-memory", "0.001"]) == 0
    text = capsys.readouterr().out
    assert "what fits: " in text and "trained network, 18 Heun steps" in text
    for arguments, message in (
        (["--gpus", "0"], "--gpus must be positive"),
        (["--utilization", "2"], "--utilization must"),
        (["--gpus", "3"], "train_batch_size 128 cannot be shared out equally over 3 processes"),
    ):
        assert cli.main(["plan", *tiny, *arguments]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["plan", "sd3.yaml"]) == 1
    assert "needs stable-diffusion-3-medium" in capsys.readouterr().err


def test_a_plan_of_distillation_compares_samples_with_the_teacher():
    changes = {"train_batch_size": BATCH, "guidance_scale": 2.0, "evaluation.num_inference_steps": [2]}
    r = load_recipe("mnist-edm2.yaml", {**changes, "student": None})
    sampling = sampling_costs(r, Passes(r, planned_networks(r), gpu=True))
    assert sampling["teacher, 18 Heun steps"]["evaluations"] == 35
    assert sampling["student, 2 steps"]["share"] == pytest.approx(2 / 35 / 2, rel=1e-3)  # guidance doubles the teacher's
    assert table(["a", "bb"], [["ccc", "1"]]) == ["a    bb", "ccc   1"]

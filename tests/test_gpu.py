"""What a GPU computes, against the CPU of the same machine: TEST_GPU=1 python -m pytest tests/test_gpu.py"""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support import graph
from torch import nn

import distill
import teachers
from distill.jvp import check_jvp, jvp
from distill.run import main
from teachers.networks import layers

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and TEST_GPU=1 in the environment")


class PixelAttention(nn.Module):
    """A network of somebody else, which calls PyTorch's attention itself, over the pixels of one channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.time = nn.Linear(1, 48), nn.Linear(16, 1), nn.Linear(1, 48)

    def forward(self, x, t):
        tokens = x.flatten(2).mT
        q, k, v = (self.qkv(tokens) + self.time(t[:, None])[:, None]).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(y).mT.view_as(x)


@pytest.fixture(autouse=True)
def products_of_fp32(monkeypatch):
    """Without TF32, which rounds more than what is compared here."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["SongUNet", "DhariwalUNet", "EDM2UNet", "SiT", "PixelAttention"])
def network(request, make_teacher):
    if request.param == "PixelAttention":
        return teachers.wrap(PixelAttention(), teachers.EDM, 0.5, (1, 8, 8)).eval()
    return make_teacher(request.param)


def difference(xs, ys) -> float:
    """Of tensors on any devices, relative."""
    a, b = (torch.cat([x.detach().cpu().double().flatten() for x in tensors]) for tensors in (xs, ys))
    return ((a - b).norm() / b.norm()).item()


def derivative_and_gradients(network, device, keep_graph, precision="no"):
    """Value and tangent for a batch of 4, and gradients of a loss of the value, with the derivative's graph or another."""
    network = copy.deepcopy(network).to(device)
    generator = torch.Generator().manual_seed(0)
    x, dx, target = (torch.randn(4, 1, 8, 8, generator=generator).to(device) for _ in range(3))
    t, labels = torch.linspace(0.1, 1.5, 4).to(device), network.example_condition(4, device)
    call = lambda x, t: network(x, t, labels)  # noqa: E731
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        value, tangent = jvp(call, (x, t), (dx, torch.ones_like(t)), keep_graph=keep_graph)
        F.mse_loss((value if keep_graph else call(x, t)).float(), target).backward()
    return [value, tangent], [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("shared_primal", [False, True])
def test_derivative_and_gradients_are_those_of_the_cpu(network, shared_primal):
    results = [derivative_and_gradients(network, device, shared_primal) for device in ("cuda", "cpu")]
    for ours, reference in zip(*results, strict=True):
        assert difference(ours, reference) < 1e-5


def test_in_bf16_they_are_near_those_in_fp32(network):
    exact = derivative_and_gradients(network, "cuda", keep_graph=False)
    for shared_primal in (False, True):
        rounded = derivative_and_gradients(network, "cuda", shared_primal, "bf16")
        for ours, reference in zip(rounded, exact, strict=True):
            assert difference(ours, reference) < 0.03


OFF = pytest.mark.xfail(reason="off by 2.2 % on an H200, and why is not known")


@pytest.mark.parametrize("kind", ["SongUNet", pytest.param("DhariwalUNet", marks=OFF), "EDM2UNet", "SiT"])
def test_the_derivative_in_bf16_passes_its_check(make_teacher, kind):
    with torch.autocast("cuda", torch.bfloat16):
        assert check_jvp(make_teacher(kind).cuda(), tolerance=2e-2) > 0


def test_group_norm_takes_any_memory_format():
    norm, x = layers.GroupNorm(4, 16).cuda(), torch.randn(2, 2, 16, 8, 8, device="cuda")
    arranged = [z.contiguous(memory_format=torch.channels_last) for z in x]
    got = jvp(norm, (arranged[0],), (arranged[1],))
    assert difference(got, jvp(norm, (x[0],), (x[1],))) < 1e-6


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_of_any_strides_runs_on_the_fused_kernel(dtype, tolerance):
    """Its tangent is exact to the last digits of the precision, and TF32 is not left on."""
    made = torch.randn(6, 2, 4, 32, 128, device="cuda", dtype=dtype).mT.unbind()  # tokens beside each other
    primals, tangents = made[:3], made[3:]
    leaves = [x.detach().requires_grad_() for x in primals]
    assert any("ScaledDotProduct" in name for name in graph(layers.attend(*leaves)))
    with torch.no_grad():
        got = torch.func.jvp(layers.attend, primals, tangents)
        wide = [tuple(x.double() for x in xs) for xs in (primals, tangents)]
        assert difference(got, torch.func.jvp(layers.attend, *wide)) < tolerance
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.fixture
def arguments(make_teacher, tmp_path):
    """Of the command that distils a tiny transformer."""
    teachers.save_pretrained(make_teacher("SiT"), tmp_path / "teacher", "teacher")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"objective: distillation\nteacher: {tmp_path}/teacher\noutput_dir: {tmp_path}/run\nsigma_data: 0.5\n"
        "sample_shape: [1, 8, 8]\nnum_classes: 3\ndata: {source: teacher, num_teacher_samples: 64}\nmax_train_steps: 4\n"
        "train_batch_size: 8\ncheckpointing_steps: 2\nlogging_steps: 1\nvalidation_steps: 2\n"
        "tangent: {warmup_steps: 2}\nevaluation: {num_samples: 64, features: pixels, num_inference_steps: [2], also: []}\n"
    )
    return [str(recipe), "mixed_precision=bf16"], tmp_path


def test_a_run_resumes_and_its_student_draws(arguments):
    command, folder = arguments
    assert main([*command, f"output_dir={folder}/whole"]) == 0
    assert main([*command, f"output_dir={folder}/parts", "max_train_steps=2"]) == 0
    assert main([*command, f"output_dir={folder}/parts", "resume_from_checkpoint=latest"]) == 0
    students = [load_file(folder / name / "student/model.safetensors") for name in ("whole", "parts")]
    first, second = ([student[key] for key in sorted(students[0])] for student in students)
    assert difference(first, second) < 1e-6
    student = distill.from_pretrained(folder / "parts")
    assert next(student.network.parameters()).is_cuda and student.sample(4, 2).shape == (4, 1, 8, 8)


def test_a_recipe_that_does_not_fit_the_gpu_says_what_would(arguments, capsys):
    command, _ = arguments
    assert main([*command, f"train_batch_size={2**26}"]) == 1
    assert "can be used; what would fit: train_batch_size=" in capsys.readouterr().err

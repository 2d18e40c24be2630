"""Students as adapters of their teacher: what is trained, shared and saved, through recipes, checkpoints and diffusers."""

import copy
import sys

import pytest
import torch
from safetensors.torch import load_file
from support import DIT

import distill
import teachers
from distill.jvp import check_jvp, jvp
from distill.lora import adapted_layers, adapters, add_adapters, merged, sharing_student
from distill.recipe import LoRAConfig, parse_recipe
from distill.run import check, run
from distill.trainer import Trainer
from teachers.networks import build

LORA = {"rank": 2, "alpha": 6.0}


def dit_teacher():
    torch.manual_seed(0)
    native = build("DiffusersDiT", {"config": DIT})
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return teachers.wrap(native, teachers.DIT, 1.0, (4, 8, 8), 5).eval()


def student_of(teacher, trained=True, **changes):
    student = sharing_student(teacher)
    add_adapters(student.native, LoRAConfig(**{**LORA, **changes}), seed=3)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(student.native).values() if trained else ():
        weight = layer.lora_B["default"].weight
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return student


def batch(teacher, n=3):
    generator = torch.Generator().manual_seed(5)
    x = teacher.sigma_data * torch.randn(n, *teacher.sample_shape, generator=generator)
    return x, torch.linspace(0.3, 1.5, n), torch.arange(n) % teacher.num_classes


def teacher_and_targets(kind, make_teacher):
    return (dit_teacher(), ["to_q", "to_k", "to_v", "to_out.0"]) if kind == "DiT" else (make_teacher("SiT"), ["qkv", "fc1"])


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_an_adapter_adds_a_product_of_two_small_matrices_to_each_target(kind, make_teacher):
    teacher, targets = teacher_and_targets(kind, make_teacher)
    before = copy.deepcopy(teacher)
    inputs = batch(teacher)
    assert torch.equal(student_of(teacher, trained=False, target_modules=targets)(*inputs), before(*inputs))
    student = student_of(teacher, target_modules=targets)
    expected = copy.deepcopy(before)
    layers = adapted_layers(student.native)
    assert len(layers) == 2 * len(targets)  # both networks have two blocks
    for name, layer in layers.items():
        A, B = (factor["default"].weight for factor in (layer.lora_A, layer.lora_B))
        assert A.shape[0] == B.shape[1] == 2
        expected.native.get_submodule(name).weight.data += 6.0 / 2 * B @ A
    assert (student(*inputs) - before(*inputs)).abs().max() > 1e-2
    torch.testing.assert_close(student(*inputs), expected(*inputs), rtol=0, atol=1e-5)
    ordinary = merged(student)
    torch.testing.assert_close(ordinary(*inputs), expected(*inputs), rtol=0, atol=1e-5)
    assert ordinary.native.state_dict().keys() == teacher.native.state_dict().keys()
    assert all(torch.equal(p, q) for p, q in zip(teacher.parameters(), before.parameters(), strict=True))
    student(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters(student.native).parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_all_but_the_adapters_is_the_teachers_own():
    teacher = dit_teacher()
    student = student_of(teacher)
    own = {id(p) for p in adapters(student.native).parameters()}
    assert {id(p) for p in student.parameters()} - own == {id(p) for p in teacher.parameters()}
    assert {id(p) for p in student.parameters() if p.requires_grad} == own
    ordinary = merged(student)
    assert not {p.data_ptr() for p in ordinary.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    assert all(p.requires_grad for p in ordinary.parameters())


class Foreign(torch.nn.Module):
    """A network that is not one of ours."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.outer = torch.nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x, time):
        return self.outer(torch.tanh(self.inner(x) + time.view(-1, 1, 1, 1)))


def test_a_network_in_memory_takes_adapters_too():
    torch.manual_seed(0)
    teacher = teachers.wrap(Foreign(), teachers.RECTIFIED_FLOW, 0.5, (1, 8, 8)).requires_grad_(False)
    student = student_of(teacher, target_modules=["inner"])
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.4, 1.2])
    ordinary = merged(student)
    torch.testing.assert_close(ordinary(x, t), student(x, t), rtol=0, atol=1e-5)
    assert (student(x, t) - teacher(x, t)).abs().max() > 1e-3
    assert ordinary.native.state_dict().keys() == teacher.native.state_dict().keys()
    assert all(p.requires_grad for p in ordinary.parameters())
    assert check_jvp(student) < 1e-3


@pytest.mark.parametrize("kind", ["DiT", "SiT"])
def test_the_derivative_is_exact(kind, make_teacher):
    teacher, targets = teacher_and_targets(kind, make_teacher)
    student = student_of(teacher, target_modules=targets)
    assert check_jvp(student) < 1e-3
    x, t, labels = batch(student)
    other = merged(student)
    direction = (torch.ones_like(x), torch.ones_like(t))
    tangents = [jvp(lambda x, s, net=net: net(x, s, labels), (x, t), direction)[1] for net in (student, other)]
    torch.testing.assert_close(*tangents, rtol=1e-3, atol=1e-3 * tangents[1].abs().max().item())


def recipe(folder, **changes):
    values = dict(
        objective="distillation", teacher=str(folder / "teacher"), output_dir=str(folder / "run"), sigma_data=1.0,
        sample_shape=[4, 8, 8], num_classes=5, max_train_steps=6, train_batch_size=4, checkpointing_steps=2,
        data={"source": "teacher", "num_teacher_samples": 16, "teacher_steps": 2}, logging_steps=1, validation_steps=6,
        tangent={"warmup_steps": 4}, optimizer={"learning_rate": 1e-2}, ema=[{"half_life_images": 8}], lora=LORA,
        evaluation={"validation_samples": 0, "num_samples": 50, "num_inference_steps": [1], "teacher_steps": 0},
    )  # fmt: skip
    return parse_recipe({**values, **changes}, "test")


@pytest.fixture
def folder(tmp_path):
    teachers.save_pretrained(dit_teacher(), tmp_path / "teacher", "teacher")
    return tmp_path


def test_a_run_trains_adapters_and_saves_an_ordinary_student(folder):
    model = run(recipe(folder))
    student, teacher = teachers.load(folder / "run"), teachers.load(folder / "teacher")
    inputs = batch(teacher)
    assert torch.equal(student(*inputs), model.network(*inputs))
    assert (student(*inputs) - teacher(*inputs)).abs().max() > 1e-3
    changed = {k for k, v in student.native.state_dict().items() if not torch.equal(v, teacher.native.state_dict()[k])}
    blocks = [f"model.transformer_blocks.{i}.attn1" for i in (0, 1)]
    assert changed == {f"{b}.{layer}.weight" for b in blocks for layer in ("to_q", "to_k", "to_v", "to_out.0")}
    assert distill.from_pretrained(folder / "run").config["training"]["lora"]["rank"] == 2
    assert not list((folder / "run").glob("**/pytorch_lora_weights*"))  # no pipeline of a DiT reads them
    saved = load_file(folder / "run/checkpoint-6/network.safetensors")
    assert len(saved) == 16 and sum(map(torch.numel, saved.values())) == 8 * 2 * (32 + 32)
    assert load_file(folder / "run/checkpoint-6/ema-0.safetensors").keys() == saved.keys()


def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, make_teacher):
    teachers.save_pretrained(make_teacher("SiT", depth=1), tmp_path / "teacher", "teacher")

    def train(name, **changes):
        lora = {**LORA, "target_modules": ["qkv", "fc1"], "dropout": 0.2}
        trainer = Trainer(recipe(
            tmp_path, sample_shape=[1, 8, 8], sigma_data=0.5, num_classes=3, target_half_life_images=30.0, lora=lora,
            output_dir=str(tmp_path / name), **changes,
        ))  # fmt: skip
        trainer.train()
        return trainer

    whole = train("whole")
    train("run", max_train_steps=4)
    resumed = train("run", resume_from_checkpoint="latest")
    assert whole.step == resumed.step == 6 and set(whole.modules()) == {"network", "ema-0", "target", "weighting"}
    for name, module in whole.modules().items():
        others = resumed.modules()[name].state_dict()
        assert others and all(torch.equal(value, others[key]) for key, value in module.state_dict().items())


def test_every_average_shares_the_frozen_weights(folder):
    trainer = Trainer(recipe(folder, ema=[{"half_life_images": 8}, {"sigma_rel": 0.1}]))
    teacher = {id(p) for p in trainer.teacher.parameters()}
    for network in (trainer.network, *(ema.network for ema in trainer.emas)):
        assert teacher <= {id(p) for p in network.parameters()}
        assert sum(p.numel() for p in network.parameters() if id(p) not in teacher) == 1024


def test_check_counts_what_is_trained(folder):
    text = check(recipe(folder))
    assert ", of which 1,024 are trained" in text and "derivative along the PF-ODE: within" in text
    everything = check(recipe(folder, lora=None))

    def mebibytes(text):
        return int(text.split("MiB (")[1].split()[0])

    assert "are trained" not in everything and mebibytes(text) <= mebibytes(everything)


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"target_modules": ["to_q", "to_z"]}, "lora.target_modules: DiffusersDiT has no module .to_z.; its linear"),
        ({"target_modules": ["attn1"]}, "lora.target_modules: attn1 of DiffusersDiT are not all linear or conv"),
        ({"target_modules": []}, "lora.target_modules must name at least one module"),
        ({"rank": 0}, "lora needs a rank of at least 1"),
        ({"ranks": 4}, "unknown key lora.ranks; did you mean lora.rank?"),
    ],
)
def test_what_cannot_be_adapted_is_one_sentence(folder, lora, message):
    with pytest.raises(ValueError, match=message) as error:
        Trainer(recipe(folder, lora=lora))
    assert "\n" not in str(error.value)


def test_lora_belongs_to_a_consistency_objective_at_one_guidance(folder):
    with pytest.raises(ValueError, match="lora belongs to the consistency objectives, not to diffusion; remove it"):
        recipe(folder, objective="diffusion")
    with pytest.raises(ValueError, match="lora trains no guidance input; give guidance_scale as a number"):
        Trainer(recipe(folder, guidance_scale=[1.0, 2.0]))


def test_without_peft_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"lora needs a package: pip install scm-distill\[lora\]"):
        Trainer(recipe(folder))

"""NVlabs pickles: written here in the published format, read as data, and refused where they ask for more."""

import copyreg
import io
import math
import os
import pickle
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import teachers
from distill import cli
from distill.jvp import check_jvp
from teachers.networks import build

OPTIONS = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], dropout=0.0, augment_dim=9)
DDPMPP = dict(
    model_type="SongUNet", embedding_type="positional", encoder_type="standard", decoder_type="standard",
    channel_mult_noise=1, resample_filter=[1, 1],
)  # fmt: skip
NCSNPP = dict(
    model_type="SongUNet", embedding_type="fourier", encoder_type="residual", decoder_type="standard",
    channel_mult_noise=2, resample_filter=[1, 3, 3, 1],
)  # fmt: skip
ADM = dict(model_type="DhariwalUNet")
EDM2 = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16)


class Persistent:
    """Pickles as ``torch_utils.persistence`` pickles an object."""

    def __init__(self, class_name: str, **state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        meta = dict(type="class", version=6, module_src="raise SystemExit('executed')", class_name=self.class_name,
                    state=self.state)  # fmt: skip
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


@pytest.fixture(autouse=True)
def nvlabs_modules(monkeypatch):
    """Stand-ins for the modules that the files name, needed to write them."""

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("called")

    class EasyDict(dict):
        pass

    for module, name, value in (
        ("torch_utils.persistence", "_reconstruct_persistent_obj", _reconstruct_persistent_obj),
        ("dnnlib.util", "EasyDict", EasyDict),
    ):
        value.__module__, value.__qualname__ = module, name
        monkeypatch.setitem(sys.modules, module.split(".")[0], types.ModuleType(module.split(".")[0]))
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], name, value)
    return EasyDict


def pickled_module(module: nn.Module, **extra):
    """``module`` with every submodule as the repository pickles it."""
    children = OrderedDict((name, pickled_module(child)) for name, child in module._modules.items())
    if isinstance(module, nn.ModuleDict):
        bag = nn.ModuleDict()
        bag.__dict__["_modules"] = children
        return bag
    state = dict(
        training=False, _parameters=OrderedDict(module._parameters), _buffers=OrderedDict(module._buffers),
        _non_persistent_buffers_set=set(), _modules=children, skip_scale=np.sqrt(0.5),
    )  # fmt: skip
    return Persistent(type(module).__name__, **state, **extra)


def snapshot(EasyDict, kind=DDPMPP, class_name="EDMPrecond", _init_args=(), out_channels=3, **changes):
    """A network and its snapshot as ``edm/training/training_loop.py`` writes it."""
    torch.manual_seed(0)
    own = {key: value for key, value in kind.items() if key != "model_type"}
    config = dict(img_resolution=8, in_channels=3, out_channels=out_channels, label_dim=4, **OPTIONS, **own)
    network = build(kind["model_type"], config)
    arguments = EasyDict(img_resolution=8, img_channels=3, label_dim=4, use_fp16=False, **kind, **OPTIONS)
    ema = Persistent(
        class_name, _init_args=_init_args, _init_kwargs=EasyDict({**arguments, **changes}), _parameters=OrderedDict(),
        _buffers=OrderedDict(), _modules=OrderedDict(model=pickled_module(network)), sigma_data=0.5,
    )  # fmt: skip
    return network, dict(ema=ema, loss_fn=None, augment_pipe=Persistent("AugmentPipe", p=0.12), dataset_kwargs=EasyDict())


def write(tmp_path, value, protocol=4):
    path = tmp_path / "network-snapshot.pkl"
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("kind, protocol", [(DDPMPP, 4), (NCSNPP, 4), (ADM, 4), (DDPMPP, 5)])
def test_a_pickle_becomes_a_teacher_bit_for_bit(nvlabs_modules, tmp_path, kind, protocol):
    network, value = snapshot(nvlabs_modules, kind)
    teacher = teachers.load(write(tmp_path, value, protocol))
    assert teacher.parameterization == teachers.EDM and teacher.sigma_data == 0.5
    assert teacher.sample_shape == (3, 8, 8) and teacher.num_classes == 4
    ours, theirs = teacher.native.state_dict(), network.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_edm2_pickle_becomes_a_teacher(nvlabs_modules, tmp_path):
    """In half precision, with the loss weighting of its training, as edm2/training/training_loop.py writes it."""
    torch.manual_seed(0)
    network = build("EDM2UNet", dict(img_resolution=8, img_channels=4, label_dim=5, **EDM2)).half()
    arguments = nvlabs_modules(img_resolution=8, img_channels=4, label_dim=5, use_fp16=True, channel_mult_noise=None, **EDM2)
    logvar = Persistent("MPConv", _parameters=OrderedDict(weight=nn.Parameter(torch.ones(1, 128))), _buffers={}, _modules={})
    ema = Persistent(
        "Precond", _init_args=(), _init_kwargs=arguments, _parameters=OrderedDict(), _buffers=OrderedDict(),
        _modules=OrderedDict(unet=pickled_module(network), logvar_linear=logvar),
    )  # fmt: skip
    value = nvlabs_modules(encoder=Persistent("StabilityVAEEncoder", scale=np.ones(4, np.float32)), ema=ema)
    teacher = teachers.load(write(tmp_path, value))
    assert teacher.sample_shape == (4, 8, 8) and teacher.num_classes == 5 and teacher.parameterization == teachers.EDM
    ours, theirs = teacher.native.state_dict(), network.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key].float()) for key in theirs)
    assert teachers.pretrained.time_embedding_speed(teacher) > 1


def precondition_vp(F, y, sigma, c):
    """Table 1 of EDM (arXiv 2206.00364), one row a function: the denoiser ``D(y, sigma)`` around the network ``F``."""
    beta_d, beta_min, steps = c.get("beta_d", 19.9), c.get("beta_min", 0.1), c.get("M", 1000)
    tau = (math.sqrt(beta_min**2 + 2 * beta_d * math.log(1 + sigma**2)) - beta_min) / beta_d
    return y - sigma * F(y / math.sqrt(sigma**2 + 1), (steps - 1) * tau)


def precondition_ve(F, y, sigma, c):
    return y + sigma * F(y, math.log(sigma / 2))


def precondition_iddpm(F, y, sigma, c):
    """At a step of the schedule, where rounding to the nearest changes nothing."""
    alpha_bar = lambda j: math.sin(math.pi / 2 * j / c.get("M", 1000) / (c.get("C_2", 0.008) + 1)) ** 2  # noqa: E731
    u = [0.0]
    for j in range(c.get("M", 1000), 0, -1):
        u.insert(0, math.sqrt((u[0] ** 2 + 1) / max(alpha_bar(j - 1) / alpha_bar(j), 0.001) - 1))
    distance, j = min((abs(noise - sigma), j) for j, noise in enumerate(u))
    assert distance < 1e-6 * sigma
    return y - sigma * F(y / math.sqrt(sigma**2 + 1), c.get("M", 1000) - 1 - j)


BASELINES = [  # class, network, its constants, the denoiser, a noise level
    ("VPPrecond", DDPMPP, {}, precondition_vp, 0.7),
    ("VPPrecond", DDPMPP, dict(beta_d=12.0, beta_min=0.3, M=100), precondition_vp, 30.0),
    ("VEPrecond", NCSNPP, {}, precondition_ve, 0.7),
    ("iDDPMPrecond", ADM, {}, precondition_iddpm, 0.9905380340424171),
    ("iDDPMPrecond", ADM, dict(M=100, C_2=0.02), precondition_iddpm, 7.165298740994863),
]


@pytest.mark.parametrize("class_name, kind, constants, precondition, sigma", BASELINES)
def test_a_baseline_pickle_is_the_same_denoiser(nvlabs_modules, tmp_path, class_name, kind, constants, precondition, sigma):
    outputs = 6 if class_name == "iDDPMPrecond" else 3
    network, value = snapshot(nvlabs_modules, kind, class_name, out_channels=outputs, **constants)
    for p in network.parameters():  # the pickled tensors are these
        p.data += 0.05 * torch.randn_like(p)
    teacher = teachers.load(write(tmp_path, value))
    assert teacher.sigma_data == 0.5 and teacher.sample_shape == (3, 8, 8) and teacher.num_classes == 4
    network, teacher = network.double().eval(), teacher.double()
    t, labels = torch.full((2,), math.atan(sigma / 0.5), dtype=torch.float64), torch.tensor([0, 3])
    x_t = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    F = lambda x, time: network(x, torch.full((2,), time, dtype=x.dtype), torch.eye(4)[labels])[:, :3]  # noqa: E731
    denoised = precondition(F, x_t / math.cos(t[0]), sigma, constants)
    with torch.no_grad():
        exact = (math.cos(t[0]) * x_t - denoised) / (0.5 * math.sin(t[0]))
        torch.testing.assert_close(teacher(x_t, t, labels), exact, rtol=1e-6, atol=1e-8)


def test_a_baseline_without_variances_to_drop_is_one_sentence(nvlabs_modules, tmp_path):
    path = write(tmp_path, snapshot(nvlabs_modules, ADM, "iDDPMPrecond", out_channels=3)[1])
    with pytest.raises(ValueError, match=r"does not fit DhariwalUNet: tensors 2 wrongly shaped \(out_conv.bias, out_conv.w"):
        teachers.load(path)


@pytest.mark.parametrize("class_name, kind", [("VPPrecond", DDPMPP), ("VEPrecond", NCSNPP), ("iDDPMPrecond", ADM)])
def test_a_baseline_is_differentiable_along_the_ode(nvlabs_modules, tmp_path, class_name, kind):
    outputs = 6 if class_name == "iDDPMPrecond" else 3
    network, value = snapshot(nvlabs_modules, kind, class_name, out_channels=outputs)
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    check_jvp(teachers.load(write(tmp_path, value)))


def test_a_converted_pickle_is_the_same_teacher(nvlabs_modules, tmp_path, capsys):
    path = write(tmp_path, snapshot(nvlabs_modules)[1])
    assert cli.main(["teachers", "convert", str(path), str(tmp_path / "edm")]) == 0
    assert cli.main(["teachers", "inspect", str(tmp_path / "edm")]) == 0
    assert cli.main(["teachers", "inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "kind: model folder" in printed and "kind: NVlabs pickle" in printed
    ours, theirs = teachers.load(tmp_path / "edm"), teachers.load(path)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 1.5]), torch.tensor([0, 3])
    with torch.no_grad():
        assert torch.equal(ours(x, t, labels), theirs(x, t, labels))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "UViT"}, "network is 'UViT'; allowed: SongUNet, DhariwalUNet"),
        ({"decoder_type": "skip"}, "decoder_type is 'skip'; allowed: standard"),
        ({"class_name": "CTPrecond"}, "class CTPrecond; can be read: EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond, Pre"),
        ({"class_name": "VPPrecond", "beta_d": "big"}, "schedule: beta_d must be a positive number, got 'big'"),
        ({"class_name": "VPPrecond", "M": None}, "was made without M"),
        ({"num_blocks": 2}, "does not fit SongUNet: tensors"),
        ({"img_channels": None}, "was made without img_channels"),
        ({"label_dim": "four"}, "num_classes must be a number of classes"),
        ({"_init_args": 3}, "positional arguments of its EDMPrecond"),
        ({"_init_args": (8,) * 9}, "positional arguments of its EDMPrecond"),
        ({"colour": "red"}, "no argument 'colour'"),
    ],
)
def test_other_networks_are_refused(nvlabs_modules, tmp_path, changes, message):
    path = write(tmp_path, snapshot(nvlabs_modules, **changes)[1])
    with pytest.raises(ValueError, match=message):
        teachers.load(path)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def payload(tmp_path):
    return Call(os.system, f"touch {tmp_path / 'executed'}")


def hostile_storage(tmp_path):
    """A tensor whose bytes are another pickle, which runs a command under PyTorch's own ``_load_from_bytes``."""
    stream = io.BytesIO()
    torch.save({"storage": payload(tmp_path)}, stream, _use_new_zipfile_serialization=False)
    storage = Call(torch.storage._load_from_bytes, stream.getvalue())
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, OrderedDict())


def with_weight(value, tensor):
    value["ema"].state["_modules"]["model"].state["_modules"]["map_layer0"].state["_parameters"]["weight"] = tensor
    return value


def nested_tuples():
    """A key whose hash takes 2^100 additions."""
    key = ()
    for _ in range(100):
        key = (key, key)
    return key


def bomb(key) -> bytes:
    """A dictionary with this key, written without hashing it."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, 4)
    pickler.dump(key)
    return stream.getvalue()[:-1].replace(b"\x80\x04", b"\x80\x04}", 1) + b"K\x01s."


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path, value: payload(path), "asks for the global posix.system"),
        (lambda path, value: {**value, "loss_fn": payload(path)}, "asks for the global posix.system"),
        (lambda path, value: Call(getattr, Call(__import__, "os"), "system"), "asks for the global builtins.getattr"),
        (lambda path, value: with_weight(value, hostile_storage(path)), "map_layer0.weight is damaged or not a tensor"),
        (lambda path, value: with_weight(value, 3), "map_layer0.weight is not a tensor"),
        (lambda path, value: {"ema": 3}, "not in the form"),
        (lambda path, value: [1, 2], "holds no network 'ema'"),
        (lambda path, value: Call(copyreg._reconstructor, object, object, None), "copyreg._reconstructor"),
    ],
)
def test_a_hostile_pickle_does_nothing(nvlabs_modules, tmp_path, capsys, make, message):
    path = write(tmp_path, make(tmp_path, snapshot(nvlabs_modules)[1]))
    assert cli.main(["teachers", "convert", str(path), str(tmp_path / "edm")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


def test_modules_without_end_are_refused(nvlabs_modules, tmp_path):
    value = snapshot(nvlabs_modules)[1]
    deep = Persistent("Linear")
    for _ in range(60):
        deep = Persistent("Sequential", _modules={"0": deep})
    value["ema"].state["_modules"]["model"] = deep
    with pytest.raises(ValueError, match="more than 20 modules deep"):
        teachers.load(write(tmp_path, value))


def test_nested_tuples_cost_no_time(tmp_path):
    path = tmp_path / "bomb.pkl"
    path.write_bytes(bomb(nested_tuples()))
    with pytest.raises(ValueError, match="a dictionary key of type tuple"):
        teachers.load(path)


def test_a_tensor_larger_than_its_storage_is_refused(nvlabs_modules, tmp_path):
    stream = io.BytesIO()
    torch.save(torch.zeros(2).storage(), stream, _use_new_zipfile_serialization=False)
    storage = Call(torch.storage._load_from_bytes, stream.getvalue())
    huge = Call(torch._utils._rebuild_tensor_v2, storage, 0, (10**6, 10**6), (0, 0), False, OrderedDict())
    with pytest.raises(ValueError, match="its storage has 2 elements"):
        teachers.load(write(tmp_path, with_weight(snapshot(nvlabs_modules)[1], huge)))


def test_a_truncated_pickle_is_one_sentence(nvlabs_modules, tmp_path):
    path = write(tmp_path, snapshot(nvlabs_modules)[1])
    data = path.read_bytes()
    for end in (2, 3, 40, len(data) // 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="not a readable pickle"):
            teachers.load(path)

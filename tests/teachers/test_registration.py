"""Network classes of a user's own: what is recorded, that they are saved and loaded, and what is refused."""

import copy

import pytest
import torch
from torch import nn

import teachers
from teachers.networks import build, is_registered
from teachers.pretrained import model_config
from teachers.retrofit import retrofit

X = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
T = torch.tensor([0.3, 1.2])
pytestmark = pytest.mark.usefixtures("registry")


class Net(nn.Module):
    """With everything that a rebuilt network could get wrong: a plain tensor, a table in no file, a frozen parameter, and a
    constructor that needs numbers.
    """

    def __init__(self, widths, gain=1.0, *, options=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(1, 1, w, padding="same") for w in widths)
        self.gain, self.options = gain * torch.ones(1), options
        self.slope = torch.linspace(0, 1, 3)[1].item()
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.offset = nn.Parameter(torch.randn(1), requires_grad=False)
        self.times = []

    def forward(self, x, time):
        self.times.append(time.dtype)
        for layer in self.layers:
            x = layer(x) * self.gain + time.view(-1, 1, 1, 1) * self.table[1] * self.slope + self.offset
        return x


@pytest.fixture
def net(monkeypatch):
    """A class that is registered for one test."""
    return teachers.register(type("Net", (Net,), {"__init__": Net.__init__, "__module__": __name__}))


def wrap(native):
    return teachers.wrap(native, teachers.TRIGFLOW, 0.5, (1, 8, 8)).eval()


def test_arguments_are_kept_however_they_are_given(net):
    assert net((3, 1), 2.0).config == {"widths": [3, 1], "gain": 2.0, "options": None}
    assert net(gain=2.0, widths=[3], options={"a": (None, True)}).config == {
        "gain": 2.0, "widths": [3], "options": {"a": [None, True]}
    }  # fmt: skip
    assert build("Net", {"widths": [3]}).config == {"widths": [3]}
    assert is_registered(copy.deepcopy(net([3]))) and net.__name__ == "Net"
    with pytest.raises(TypeError, match="widths"):
        net(gain=1.0)


def test_it_is_saved_and_loaded(net, tmp_path):
    teacher = wrap(net([3, 1], gain=0.5))
    teachers.save_pretrained(teacher, tmp_path, "teacher")
    again = teachers.load(tmp_path)
    assert torch.equal(again(X, T), teacher(X, T)) and type(again.native) is net
    assert not again.native.offset.requires_grad and again.native.layers[0].weight.requires_grad
    facts = teachers.inspect(tmp_path)
    assert facts["time_embedding_speed"] is None and facts["student"].startswith("cannot be told")


def test_a_class_that_is_not_imported_is_named(net, registry, tmp_path):
    teachers.save_pretrained(wrap(net([3])), tmp_path, "teacher")
    del registry["Net"]
    with pytest.raises(ValueError) as error:
        teachers.load(tmp_path)
    assert "network is 'Net'; allowed: SongUNet," in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("once the module that registers it (teachers.register) is imported")


def test_a_frozen_teacher_trains_again_as_it_was_built(net):
    teacher = wrap(net([3])).requires_grad_(False)
    student = teacher.student()
    assert student.native.layers[0].weight.requires_grad and not student.native.offset.requires_grad


def test_its_time_is_fp32_that_of_ours_is_not_rounded(net, make_teacher):
    teacher = wrap(net([3]))
    teacher(X, T)
    teacher.double()(X.double(), T.double())
    assert teacher.native.times == [torch.float32, torch.float64]
    ours, times = make_teacher("SongUNet"), []
    ours.native.map_noise.register_forward_hook(lambda module, inputs, _: times.append(inputs[0].dtype))
    ours(X, T)
    assert times == [torch.float64]


class Guided(nn.Module):
    def __init__(self, guidance_embedding=False, forgets=False):
        super().__init__()
        self.guidance_embedding = guidance_embedding and not forgets
        self.scale = nn.Parameter(torch.ones(()))
        if guidance_embedding:
            self.guidance = nn.Parameter(torch.zeros(()))

    def forward(self, x, time, labels, guidance=None):
        return x * self.scale + (0 if guidance is None else self.guidance * guidance.view(-1, 1, 1, 1))


def test_a_guidance_input_needs_an_argument_for_it(net):
    with pytest.raises(ValueError, match="^Net has no guidance input; distil it at a fixed guidance_scale instead$"):
        wrap(net([3])).student(guidance_embedding=True)
    teachers.register(Guided)
    assert wrap(Guided()).student(guidance_embedding=True).accepts_guidance
    with pytest.raises(ValueError, match="Guided takes guidance_embedding, but does not keep it as an attribute"):
        wrap(Guided(forgets=True)).student(guidance_embedding=True)


def test_a_time_embedding_that_is_not_ours_cannot_be_replaced(net):
    with pytest.raises(ValueError, match="Net is not one of our networks: its time embedding cannot be replaced"):
        retrofit(wrap(net([3])))


def test_what_is_not_registered_cannot_be_saved(net, make_teacher):
    sentence = "is not registered and cannot be saved .*: decorate its class with @teachers.register, then make the network$"
    early = Net([3])
    subclass = type("Wider", (net,), {})
    for native in (early, subclass([3])):
        assert not hasattr(native, "config")
        with pytest.raises(ValueError, match=f"^{type(native).__name__} {sentence}"):
            model_config(wrap(native), "teacher")
    ours = type(make_teacher("SiT").native)(input_size=8, hidden_size=32, num_heads=2, depth=1)
    with pytest.raises(ValueError, match="SiT was not made by teachers.networks.build and cannot be saved"):
        model_config(wrap(ours), "teacher")


def test_a_class_may_be_defined_anew_but_not_take_a_name(net, registry):
    again = teachers.register(type("Net", (Net,), {"__init__": Net.__init__, "__module__": __name__}))
    assert registry["Net"] is again and teachers.register(again) is again
    assert not is_registered(wrap(net([3])).native)
    with pytest.raises(ValueError, match="the name Net is taken by .*test_registration.Net; give elsewhere.Net another one"):
        teachers.register(type("Net", (Net,), {"__init__": Net.__init__, "__module__": "elsewhere"}))
    with pytest.raises(ValueError, match="the name SiT is taken by teachers.networks.sit.SiT"):
        teachers.register(type("SiT", (Net,), {}))
    assert registry["Net"] is again and registry["SiT"].__module__ == "teachers.networks.sit"


@pytest.mark.parametrize("bad", [nn.GELU, torch.float32, float("nan"), {1: 2}, {1}, torch.ones(2), [object()]])
def test_arguments_that_json_does_not_have_are_refused(net, bad):
    with pytest.raises(ValueError, match="^Net: options must be plain to be saved .numbers, strings") as error:
        net([3], options=bad)
    assert "\n" not in str(error.value)


def init(self, dim, /):
    pass


@pytest.mark.parametrize(
    "constructor, message",
    [
        (lambda self, *sizes: None, r"cannot be registered: its constructor takes \*sizes, which no keyword can give"),
        (lambda self, **options: None, r"cannot be registered: its constructor takes \*\*options"),
        (init, "cannot be registered: its constructor takes dim, which no keyword can give"),
        (lambda self, trigflow_time=False: None, "every network has an argument trigflow_time already"),
    ],
)
def test_constructors_that_cannot_be_called_by_name_are_refused(registry, constructor, message):
    with pytest.raises(ValueError, match=message):
        teachers.register(type("Odd", (nn.Module,), {"__init__": constructor}))
    assert "Odd" not in registry


def test_more_that_is_refused():
    for thing in (torch.relu, dict, Net([3])):
        with pytest.raises(ValueError, match="register takes a class of networks"):
            teachers.register(thing)

    @teachers.register
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = "mine"

    with pytest.raises(ValueError, match="Own has an attribute config, where its arguments would be kept; rename it"):
        Own()

"""Users' own networks in exported pipelines: what is carried of their file, and that it is enough."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ONLY_DIFFUSERS, import_file

import distill
import teachers
from distill.carried_code import carried_code
from distill.export import CODE, export
from distill.pipeline import SCMPipeline

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
SCORE = teachers.Parameterization("vp", "score", "-2log(alpha)")
LABELS = [2, 0, 1, 1, 0]
pytestmark = pytest.mark.usefixtures("registry")

# Loads exported folders where neither this package nor any user's file can be found, and saves their images.
STRANGER = ONLY_DIFFUSERS + """
from safetensors.torch import save_file
assert not any(map(find_spec, ("mixer", "script")))
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    options = {} if pipe.network.config.num_classes is None else {"class_labels": [2, 0, 1, 1, 0]}
    images = {str(steps): pipe(5, num_inference_steps=steps, output_type="pt",
                               generator=torch.Generator().manual_seed(3), **options).images for steps in (1, 2)}
    save_file(images, f"{folder}.safetensors")
assert not {"distill", "teachers", "mixer", "script"} & set(sys.modules)
"""

# A file that trains when it is run, with much that its network does not need and some that is easily overlooked.
SCRIPT = '''#!/usr/bin/env python
# Copyright A. Author
"""Nobody needs this."""
import functools
import math
import sys

import torch
from torch import nn

import distill
import teachers
from teachers.networks.layers import PositionalEmbedding as Waves

try:
    import no_such_package
except ImportError as error:
    no_such_package = None

WIDTHS = {"small": 2}  # what the network is made of
WIDTHS["large"] = 8
images, model, x = [], None, distill.from_pretrained  # x and model are also local names of the network
sys.path.append("nothing")


def scaled(gain):
    return lambda cls: cls if no_such_package is None else None


@scaled(2.0)
class Base(nn.Module):
    @property
    @functools.cache
    def period(self):
        return 2 * math.pi


@teachers.register
@scaled(gain=3.0)
class Own(Base):
    """Of no use."""

    def __init__(self, size: str = "small"):
        super().__init__()
        self.waves = Waves(4)
        self.layer = nn.Linear(4, 1)
        self.convolution = nn.Conv2d(WIDTHS["small"] - 1, 1, WIDTHS[size] // 4 * 2 + 1, padding="same")
        self.shift = torch.ones(1)  # in no state dict
        self.register_buffer("table", torch.arange(3.0), persistent=False)

    def forward(self, x, time):
        model = self.layer(self.waves(time).to(x.dtype))[:, :, None, None]
        return self.convolution(x) + model * self.period + self.shift + self.table[1]


def train():
    return teachers.wrap(Own(), teachers.TRIGFLOW, 0.5, (1, 8, 8))


if __name__ == "__main__":
    WIDTHS = train()
'''


def user_file(folder, name, text):
    (folder / f"{name}.py").write_text(text)
    return import_file(folder / f"{name}.py")


def wrap(native):
    torch.manual_seed(1)
    for p in native.parameters():
        p.data += 0.05 * torch.randn_like(p)
    if type(native).__name__ == "MixerScore":
        return teachers.wrap(native, SCORE, 0.5, (1, 8, 8), 3).eval()
    return teachers.wrap(native, teachers.TRIGFLOW, 0.5, (1, 8, 8)).eval()


def sample(network, steps):
    labels = None if network.num_classes is None else LABELS
    return distill.Model(network, {"role": "student"}).sample(5, steps, labels, seed=3)


@pytest.fixture
def mixer():
    return wrap(import_file(EXAMPLES / "mixer.py").MixerScore(size=8, patch=2, dim=16, depth=2, num_classes=3))


@pytest.fixture
def script(tmp_path):
    return wrap(user_file(tmp_path, "script", SCRIPT).Own("large"))


def test_own_networks_load_without_this_package_and_their_files(mixer, script, tmp_path):
    students = {"a": mixer, "b": script}
    folders = [str(export(student, tmp_path / "exported" / name)) for name, student in students.items()]
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, *folders]
    result = subprocess.run(command, cwd=tmp_path / "exported", env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for name, student in students.items():
        images = teachers.pretrained.read_safetensors(tmp_path / "exported" / f"{name}.safetensors")
        for steps in (1, 2):
            torch.testing.assert_close(images[str(steps)] * 2 - 1, sample(student, steps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixer", "script"])
def test_with_the_class_at_hand_nothing_of_the_folder_is_run(request, kind, tmp_path):
    student = request.getfixturevalue(kind)
    folder = export(student, tmp_path / "p")
    for place in (folder, folder / "network"):
        (place / CODE).write_text("raise SystemExit('executed')")
    pipe = SCMPipeline.from_pretrained(folder)
    labels = {} if student.num_classes is None else {"class_labels": LABELS}
    images = pipe(5, generator=torch.Generator().manual_seed(3), output_type="pt", **labels).images
    torch.testing.assert_close(images * 2 - 1, sample(student, 2), rtol=0, atol=1e-5)
    assert torch.equal(distill.from_pretrained(folder).sample(5, 2, labels.get("class_labels"), seed=3), sample(student, 2))


def test_only_what_the_class_needs_is_carried(script):
    code = carried_code(script.native)
    own = code[len(carried_code()) :]
    for text in (
        "# ---- Own, from script.py ----\n", "# Copyright A. Author", "import functools", "Waves = PositionalEmbedding\n",
        'WIDTHS["large"] = 8', "no_such_package = None", "@scaled(gain=3.0)\nclass Own", "what the network is made of",
        "\n\nNETWORKS['Own'] = Own\n",
    ):  # fmt: skip
        assert text in own
    for text in ("Nobody needs this", "import sys", "teachers", "images", "sys.path", "register\n", "def train", "__main__"):
        assert text not in own


def test_the_file_is_carried_as_it_was_imported(script, tmp_path):
    before = carried_code(script.native)
    (tmp_path / "script.py").write_text(SCRIPT.replace("math.pi", "math.e"))
    assert carried_code(script.native) == before


def test_the_card_does_not_give_its_code_a_licence(mixer, script, tmp_path, make_teacher):
    for model, text in (
        (mixer, "the code in this folder is Apache-2.0, except for that of MixerScore, which is its author's."),
        (make_teacher("SiT"), "the code in this folder is Apache-2.0.\n"),
    ):
        assert text in (export(model, tmp_path / "p") / "README.md").read_text()


@pytest.mark.parametrize(
    "text, message",
    [
        ("import helper_of_mine\nneeded = helper_of_mine.x", "line 4: the network needs helper_of_mine, which is of no"),
        ("from helper_of_mine import x as needed", "line 4: the network needs helper_of_mine, which"),
        ("import teachers\nneeded = teachers.EDM", "line 4: there is no teachers where an exported pipeline is"),
        ("def needed():\n    import distill", "line 5: there is no distill where an exported pipeline is loaded"),
        ("from distill.trainer import Trainer as needed", "line 4: Trainer is not in the code that an"),
        ("from math import *\nneeded = pi", "line 5: pi has no definition or import that could be carried along"),
        ("needed = 1\nclass Attention: pass\nneeded = Attention", "line 5: the name Attention is taken in the code"),
        ("import math as Attention\nneeded = Attention", "line 4: the name Attention is taken in the code"),
        ("import statistics as math\nneeded = math.pi if 0 else 1", "line 4: the name math is taken in the code"),
        ("from teachers.networks.sit import Mlp as SiT\nneeded = SiT", "line 4: the name SiT is taken in the code"),
        ("T = {}\nT.update(a=1)\nneeded = T['a']", r"taken out of its file, it does not work .KeyError: 'a'."),
    ],
)
def test_what_cannot_be_carried_is_one_sentence(tmp_path, monkeypatch, text, message):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_mine.py").write_text("x = 1")
    source = f"from torch import nn\nfrom teachers import register\n\n{text}\n\n\n"
    source += "@register\nclass Own(nn.Module):\n    part = needed\n\n    def __init__(self):\n        super().__init__()\n"
    with pytest.raises(ValueError, match=message) as error:
        export(wrap(user_file(tmp_path, "script", source).Own()), tmp_path / "x")
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_classes_without_a_place_of_their_own_in_a_file(tmp_path):
    def local():
        @teachers.register
        class Local(torch.nn.Module):
            def __init__(self):
                super().__init__()

        return Local()

    with pytest.raises(ValueError, match="^Local cannot be exported: it is defined inside test_classes_without_a_place"):
        carried_code(local())
    space = {"__name__": "a notebook"}
    cell = "@teachers.register\nclass Cell(torch.nn.Module):\n    def __init__(self):\n        super().__init__()"
    exec(f"import torch, teachers\n{cell}", space)
    with pytest.raises(ValueError, match="^Cell cannot be exported: no file defines it, so put it into a .py file$"):
        carried_code(space["Cell"]())
    with pytest.raises(ValueError, match="^Linear is not registered and cannot be .* exported: decorate its class with"):
        carried_code(torch.nn.Linear(1, 1))


def test_a_network_that_is_another_one_when_built_again(tmp_path):
    source = "from torch import nn\nimport teachers\n\n\n@teachers.register\nclass Own(nn.Module):\n"
    native = user_file(tmp_path, "script", f"{source}    def __init__(self):\n        super().__init__()\n").Own()
    native.added = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="^Own cannot be exported: built again from its arguments, it has other weights$"):
        carried_code(native)


def test_exporting_a_teacher_is_remarked_on(make_teacher, tmp_path, capsys):
    teacher = make_teacher("SiT")
    distill.from_pretrained(teacher).export(tmp_path / "p")
    warning = "warning: this model is a teacher, not distilled: in a few steps it gives blurred means\n"
    assert capsys.readouterr().err == warning
    distill.Model(teacher, {"role": "student"}).export(tmp_path / "p")
    assert not capsys.readouterr().err

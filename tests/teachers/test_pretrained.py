import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import teachers

X, T, Y = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.2]), torch.tensor([0, 2])


@pytest.fixture
def folder(teacher, tmp_path):
    teachers.save_pretrained(teacher, tmp_path / "model", "teacher")
    return tmp_path / "model"


def test_round_trip_is_bit_exact(teacher, folder):
    loaded = teachers.load(folder)
    assert torch.equal(loaded(X, T, Y), teacher(X, T, Y))
    assert loaded.metadata() == teacher.metadata() and not loaded.training
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_run_folder_means_its_student(teacher, tmp_path):
    teachers.save_pretrained(teacher, tmp_path / "student", "student")
    assert torch.equal(teachers.load(tmp_path)(X, T, Y), teacher(X, T, Y))
    assert teachers.load_config(tmp_path)["role"] == "student"


def test_a_teacher_is_returned_as_it_is(teacher):
    assert teachers.load(teacher) is teacher


def test_inspect_knows_the_facts(teacher, folder):
    facts = teachers.inspect(folder)
    assert facts["parameters"] == sum(p.numel() for p in teacher.native.parameters())
    assert facts["sample_shape"] == [1, 8, 8] and facts["num_classes"] == 3
    assert 0.01 < facts["time_embedding_speed"] < 0.2


def damage(folder, kind):
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "not safetensors":
        weights.write_bytes(b"\x80\x04K\x01." * 50)
    elif kind == "missing tensor":
        save_file({k: v for k, v in tensors.items() if k != first}, weights)
    elif kind == "unexpected tensor":
        save_file({**tensors, "surplus": torch.zeros(1)}, weights)
    elif kind == "wrong shape":
        save_file({**tensors, first: torch.zeros(1, 2, 3)}, weights)
    elif kind == "no weights":
        weights.unlink()
    elif kind == "broken JSON":
        config.write_text(config.read_text()[:-20])
    elif kind == "other format":
        config.write_text(json.dumps({"format": "other"}))
    elif kind == "lacking key":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "sigma_data"}))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "truncated or corrupt"),
        ("not safetensors", "truncated or corrupt"),
        ("missing tensor", "tensors 1 missing"),
        ("unexpected tensor", r"1 unexpected \(surplus\)"),
        ("wrong shape", "1 wrongly shaped"),
        ("no weights", "no model.safetensors"),
        ("broken JSON", "not valid JSON"),
        ("other format", "not a scm-distill version 1"),
        ("lacking key", "lacks the key 'sigma_data'"),
    ],
)
def test_damage_is_one_sentence(folder, kind, message):
    damage(folder, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        teachers.load(folder)
    assert "\n" not in str(error.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean 'mnist-edm'"):
        teachers.load("mnist-emd")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="is not a model"):
        teachers.load(tmp_path)


def test_foreign_modules_cannot_be_saved(tmp_path):
    foreign = teachers.wrap(torch.nn.Identity(), teachers.EDM, 0.5, (1, 8, 8))
    with pytest.raises(ValueError, match="not a registered network"):
        teachers.save_pretrained(foreign, tmp_path / "x", "teacher")

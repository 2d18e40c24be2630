import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

import distill
import teachers
from distill.export import export
from teachers.networks import build
from teachers.pretrained import time_embedding_speed, write_atomically

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


def test_training_may_go_on_after_loading(folder):
    native = teachers.load(folder).native
    trained = {name for name, p in native.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in native.named_parameters()} - {"pos_embed"}


def test_loading_draws_no_random_numbers(folder):
    state = torch.get_rng_state()
    teachers.load(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_saved_in_fp32_and_loaded_apart_from_the_file(teacher, folder):
    teachers.save_pretrained(teacher.bfloat16(), folder, "teacher")
    tensors = load_file(folder / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    save_file({key: value.half() for key, value in tensors.items()}, folder / "model.safetensors")
    loaded = teachers.load(folder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    (folder / "model.safetensors").write_bytes(b"")  # a memory-mapped network would crash now
    assert loaded(X, T, Y).isfinite().all()


def test_extra_facts_are_kept(teacher, tmp_path):
    teachers.save_pretrained(teacher, tmp_path, "student", sampling={"2": [1.56, 1.1]}, guidance_scale=1.5)
    config = teachers.load_config(tmp_path)
    assert config["sampling"] == {"2": [1.56, 1.1]} and config["guidance_scale"] == 1.5
    assert config["network_config"] == teacher.native.config


def test_exported_pipeline_is_read_back(teacher, tmp_path):
    export(teacher, tmp_path / "pipeline")
    loaded = teachers.load(tmp_path / "pipeline")
    assert torch.equal(loaded(X, T, Y), teacher(X, T, Y)) and loaded.metadata() == teacher.metadata()
    assert "sampling" not in teachers.load_config(tmp_path / "pipeline")  # unset, which diffusers writes as null
    assert teachers.inspect(tmp_path / "pipeline")["kind"] == "exported pipeline"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_model_folder_means_the_folder(teacher, folder, name):
    assert torch.equal(teachers.load(folder / name)(X, T, Y), teacher(X, T, Y))


@pytest.mark.parametrize("name", teachers.bundled())
def test_bundled_models_load(name):
    model = teachers.load(name)
    x = torch.randn(2, *model.sample_shape)
    assert model(x, T, Y).isfinite().all()
    assert teachers.inspect(name)["kind"] == "bundled model"


def test_a_full_disk_leaves_the_old_model_whole(teacher, folder):
    old = teachers.load(folder)
    for p in teacher.parameters():
        p.data += 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # every write beyond 20 kB fails
    try:
        with pytest.raises(OSError, match="model.safetensors could not be written"):
            teachers.save_pretrained(teacher, folder, "teacher")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(teachers.load(folder)(X, T, Y), old(X, T, Y))
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
    assert facts["sample_shape"] == [1, 8, 8] and facts["num_classes"] == 3 and facts["sigma_data"] == 0.5
    assert facts["kind"] == "model folder" and facts["role"] == "teacher"
    assert facts["network"] == type(teacher.native).__name__
    assert facts["bytes"] == (folder / "model.safetensors").stat().st_size
    json.dumps(facts)


def test_time_embedding_speed_is_its_closed_form(teacher):
    """Every pair (cos, sin) turns at its own frequency, so the ratio is max |cos t sin t dc/dt| rms(frequencies)."""
    native = teacher.native
    embedding = native.map_noise if hasattr(native, "map_noise") else native.t_embedder.frequencies
    rms = embedding.frequencies("cpu", torch.float64).square().mean().sqrt().item()
    # EDM: 1/4 everywhere. Flow: s (1 - s), at most 1/4, where sigma_data tan t = 1; the grid of times nearly hits it.
    assert time_embedding_speed(teacher) == pytest.approx(0.25 * rms, rel=1e-5)


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
    elif kind == "not a mapping":
        config.write_text("[1]")
    elif kind == "not text":
        config.write_bytes(b"\xff\xfe\x00{")
    elif kind == "lacking key":
        config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "sigma_data"}))
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **kind}))


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
        ("not a mapping", "not a scm-distill version 1"),
        ("not text", "not valid JSON"),
        ("lacking key", "lacks the key 'sigma_data'"),
        ({"version": 2}, "not a scm-distill version 1"),
        ({"role": "pupil"}, "role must be teacher or student, got 'pupil'"),
        ({"sigma_data": "half"}, "sigma_data must be a positive number, got 'half'"),
        ({"sample_shape": [1, 8]}, "sample_shape must be a list of sizes"),
        ({"num_classes": 0}, "num_classes must be"),
        ({"label_format": "words"}, "label_format must be one of index, one_hot, got 'words'"),
        ({"network": "UNet"}, "config.json: network is 'UNet'; allowed: SongUNet, DhariwalUNet, EDM2UNet, SiT"),
        ({"network_config": {"layers": 3}}, "has no argument 'layers'"),
        ({"parameterization": {"family": "edm", "prediction": "raw", "time": "t"}}, "time signal is 't'"),
        ({"parameterization": {"family": "edm", "kind": "raw"}}, "config.json: .* unexpected keyword argument 'kind'"),
    ],
)
def test_damage_is_one_sentence(folder, kind, message):
    damage(folder, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        teachers.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_many_wrong_tensors_are_counted_and_the_first_named(make_teacher, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({f"model.{key}": value for key, value in tensors.items()}, folder / "model.safetensors")
    n, first = len(tensors), ", ".join(sorted(tensors)[:3])
    with pytest.raises(ValueError) as error:
        teachers.load(folder)
    assert f"tensors {n} missing ({first}, ...); {n} unexpected (model." in str(error.value)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(FileNotFoundError, match="did you mean 'mnist-edm'"):
        teachers.load("mnist-emd")
    with pytest.raises(FileNotFoundError, match="did you mean 'mnist-flow'"):
        teachers.load("MNIST-Flow")
    with pytest.raises(FileNotFoundError, match="bundled models: .*mnist-edm"):
        teachers.load("runs/nothing-of-the-kind")


@pytest.mark.parametrize("load", [teachers.load, distill.from_pretrained])
def test_a_module_is_wrapped_first(load):
    with pytest.raises(TypeError, match="a path or a teachers.Teacher, got Linear; teachers.wrap makes"):
        load(torch.nn.Linear(2, 2))


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="is not a model"):
        teachers.load(tmp_path)
    (tmp_path / "weights.pkl").write_bytes(b"\x80\x02K\x01.")
    with pytest.raises(ValueError, match="weights.pkl is not a model"):
        teachers.load(tmp_path / "weights.pkl")


def test_foreign_modules_cannot_be_saved(tmp_path):
    foreign = teachers.wrap(torch.nn.Identity(), teachers.EDM, 0.5, (1, 8, 8))
    with pytest.raises(ValueError, match="Identity is not registered and cannot be saved"):
        teachers.save_pretrained(foreign, tmp_path / "x", "teacher")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "name, config, speed",
    [
        ("SongUNet", dict(img_resolution=8, in_channels=1, out_channels=1, channel_mult=[1], num_blocks=1), 0.06),
        ("SiT", dict(input_size=4, hidden_size=16, num_heads=2, depth=1), 0.06),
    ],
)
def test_released_networks_have_slow_time_embeddings(name, config, speed):
    """EDM's DDPM++ at 128 channels and SiT; both are as slow as the paper's own, 0.12."""
    convention = teachers.EDM if name == "SongUNet" else teachers.SIT
    model = teachers.wrap(build(name, config), convention, 1.0, (4, 4, 4))
    assert time_embedding_speed(model) == pytest.approx(speed, abs=0.005)


def test_a_failed_write_changes_nothing(tmp_path):
    target = tmp_path / "facts.json"
    target.write_text("old")

    def fill_the_disk(path):
        path.write_text("half of the n")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="facts.json could not be written: No space left on device"):
        write_atomically(target, fill_the_disk)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]

"""Models on the Hugging Face hub: from a cache laid out by hand, and from a small server that speaks the hub's protocol."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import constants
from support import DIT, UNET2D

import distill
import teachers
from distill import cli
from distill.export import export
from teachers import hub, pretrained
from teachers.hub import Place

SHA, OLD = "0123456789" * 4, "abcdef0123" * 4


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    pretrained.download.cache_clear()
    return tmp_path / "cache"


def keep(cache: Path, repo: str, files: Path, sha: str = SHA, branch: str = "main") -> None:
    """Put a folder into the cache as ``huggingface_hub`` would after a download, with links to blobs."""
    home = cache / f"models--{repo.replace('/', '--')}"
    for path in files.rglob("*"):
        if path.is_file():
            blob = home / "blobs" / f"{sha}-{str(path.relative_to(files)).replace('/', '-')}"
            link = home / "snapshots" / sha / path.relative_to(files)
            blob.parent.mkdir(parents=True, exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / branch).write_text(sha)


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ddpm")
    unet = diffusers.UNet2DModel(**UNET2D)
    diffusers.DDPMPipeline(unet, diffusers.DDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dit(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dit")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4,
    )  # fmt: skip
    transformer = diffusers.DiTTransformer2DModel(**DIT)
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.save_pretrained(folder, safe_serialization=False)  # .bin, as the released ones
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "id2label": {"1": "tench, Tinca tinca"}}))
    return folder


@pytest.mark.parametrize(
    "source, place",
    [
        ("hf://google/ddpm-cifar10-32", ("google/ddpm-cifar10-32", None, "")),
        ("hf://a/b/", ("a/b", None, "")),
        ("hf:/a/b", ("a/b", None, "")),  # through pathlib.Path
        ("hf://a/b.c@v1.0", ("a/b.c", "v1.0", "")),
        ("hf://a/b@refs/pr/3/x/y.pt", ("a/b", "refs/pr/3", "x/y.pt")),
        ("hf://a/b/runs/edm-afhqv2.pkl", ("a/b", None, "runs/edm-afhqv2.pkl")),
    ],
)
def test_syntax(source, place):
    assert hub.parse(source) == Place(*place)


@pytest.mark.parametrize("source", ["hf://", "hf://name", "hf://a/b@", "hf://a b/c", "hf://a/b/../c", "hf://a/b/*.pt"])
def test_bad_syntax_is_one_sentence(source, cache, capsys):
    with pytest.raises(ValueError, match=r"must look like hf://owner/name\[@revision\]\[/path/in/repo\]"):
        teachers.load(source)
    assert cli.main(["teachers", "inspect", source]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def same(a: teachers.Teacher, b: teachers.Teacher) -> bool:
    ours, theirs = a.native.state_dict(), b.native.state_dict()
    return a.metadata() == b.metadata() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_pipeline_is_read_from_the_cache(ddpm, cache, capsys):
    keep(cache, "tester/ddpm", ddpm)
    teacher = distill.from_pretrained("hf://tester/ddpm").network
    assert same(teacher, teachers.load(ddpm)) and teacher.source == "hf://tester/ddpm"
    assert cli.main(["teachers", "inspect", "hf://tester/ddpm"]) == 0
    assert "source: hf://tester/ddpm\nkind: diffusers pipeline" in capsys.readouterr().out


def flat(pipeline: Path, folder: Path) -> Path:
    """The same pipeline in a single folder, as the first ones on the hub are."""
    shutil.copytree(pipeline / "unet", folder)
    shutil.copy(pipeline / "scheduler" / "scheduler_config.json", folder)
    shutil.copy(pipeline / "model_index.json", folder)
    return folder


def test_an_old_pipeline_has_all_parts_in_one_folder(ddpm, cache, tmp_path):
    keep(cache, "tester/flat", flat(ddpm, tmp_path / "flat"))
    for source in (tmp_path / "flat", "hf://tester/flat"):
        assert same(teachers.load(source), teachers.load(ddpm))


def test_weights_that_are_not_safetensors(dit, cache):
    keep(cache, "tester/dit", dit)
    assert same(teachers.load("hf://tester/dit"), teachers.load(dit))


def test_model_folders_run_folders_and_exports(make_teacher, cache, tmp_path):
    teacher = make_teacher("SiT")
    teachers.save_pretrained(teacher, tmp_path / "model", "teacher")
    teachers.save_pretrained(teacher, tmp_path / "run" / "student", "student")
    export(teacher, tmp_path / "pipeline")
    for name in ("model", "run", "pipeline"):
        keep(cache, f"tester/{name}", tmp_path / name)
        assert same(teachers.load(f"hf://tester/{name}"), teacher)
        assert teachers.load_config(f"hf://tester/{name}") == teachers.load_config(tmp_path / name)
    keep(cache, "tester/all", tmp_path)
    assert same(teachers.load("hf://tester/all/run"), teacher)  # a folder of a repository


def test_a_file_and_the_one_beside_it(cache, tmp_path):
    network = teachers.networks.build("SiT", dict(input_size=8, hidden_size=48, depth=1, num_heads=2, num_classes=3))
    (tmp_path / "files").mkdir()
    torch.save({"ema": network.state_dict()}, tmp_path / "files" / "0400000.pt")
    keep(cache, "tester/sit", tmp_path)
    with pytest.raises(ValueError, match="can be each of sit, dit"):
        teachers.load("hf://tester/sit/files/0400000.pt")
    (tmp_path / "files" / "0400000.pt.json").write_text('{"family": "sit", "network_config": {"num_heads": 2}}')
    keep(cache, "tester/sit", tmp_path, OLD, "v1")
    assert teachers.load("hf://tester/sit@v1/files/0400000.pt").parameterization == teachers.SIT


def test_revisions_are_told_apart(make_teacher, cache, tmp_path):
    for i, sigma_data in enumerate((0.5, 0.7)):
        teachers.save_pretrained(make_teacher("SiT", sigma_data), tmp_path / str(i), "teacher")
        keep(cache, "tester/model", tmp_path / str(i), (SHA, OLD)[i], ("main", "v1")[i])
    found = [teachers.load(f"hf://tester/model{at}").sigma_data for at in ("", "@main", "@v1", f"@{OLD}")]
    assert found == [0.5, 0.5, 0.7, 0.7]


def test_what_is_not_in_the_cache_is_one_sentence(ddpm, cache, tmp_path, capsys):
    keep(cache, "tester/ddpm", ddpm)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "bert"}')
    keep(cache, "tester/text", tmp_path / "text")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.txt").write_text("x")
    keep(cache, "tester/nothing", tmp_path / "nothing")
    for source, message in {
        "hf://tester/other": "no model 'hf://tester/other': HF_HUB_OFFLINE is set, and not all of it is in ",
        "hf://tester/ddpm@v2": "HF_HUB_OFFLINE is set",
        "hf://tester/ddpm/unet": "it is a part of a pipeline: name ",
        "hf://tester/ddpm/edm.pkl": "tester/ddpm has no file or folder 'edm.pkl'",
        "hf://tester/text": "is not a scm-distill version 1 model config",
        "hf://tester/nothing": "is not a model: expected",
    }.items():
        assert cli.main(["teachers", "inspect", source]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


def test_the_vae_and_the_class_names_come_with_the_teacher(dit, cache, tmp_path):
    keep(cache, "tester/dit", dit)
    keep(cache, "tester/vae", dit / "vae")
    student = teachers.load("hf://tester/dit").student()
    sources = ("hf://tester/dit", None), ("mnist-edm", "hf://tester/vae"), ("hf://tester/gone", "hf://tester/dit")
    names = []
    for teacher, vae in sources:
        config = {"role": "student", "teacher": teacher}
        distill.Model(student, config).export(tmp_path / "out", "diffusers", vae)
        pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
        theirs = diffusers.AutoencoderKL.from_pretrained(dit / "vae", use_safetensors=False)
        assert all(torch.equal(a, b) for a, b in zip(pipe.vae.parameters(), theirs.parameters(), strict=True))
        names.append(pipe.labels)
    assert names == [{"Tinca tinca": 1, "tench": 1}, {}, {}]
    with pytest.raises(FileNotFoundError, match="no model 'hf://tester/gone'"):
        distill.Model(student, {"role": "student", "teacher": "hf://tester/gone"}).export(tmp_path / "out", "diffusers")


def test_a_plain_id_is_not_downloaded_but_suggested(cache):
    with pytest.raises(FileNotFoundError, match="on the Hugging Face hub it would be hf://google/ddpm-cifar10-32$"):
        teachers.load("google/ddpm-cifar10-32")
    with pytest.raises(FileNotFoundError, match="mnist-flow-scm$"):
        teachers.load("a/b/c")


class Hub(BaseHTTPRequestHandler):
    """Answers the requests of a download: the commit of a branch, the files of a commit, a file."""

    repositories: dict[str, Path]
    fetched: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/"):
            case [owner, name, "revision", branch]:
                self.answer(f"{owner}/{name}", branch == "main", {"id": f"{owner}/{name}", "sha": SHA})
            case [owner, name, "tree", _]:
                root = self.repositories[f"{owner}/{name}"]
                files = sorted(path for path in root.rglob("*") if path.is_file())
                tree = [
                    {"type": "file", "path": path.relative_to(root).as_posix(), "size": path.stat().st_size, "oid": SHA}
                    for path in files
                ]
                self.answer(f"{owner}/{name}", True, tree)
            case [owner, name, "resolve", _, *parts]:
                if self.command == "GET":
                    self.fetched.append("/".join(parts))
                self.send((self.repositories[f"{owner}/{name}"] / "/".join(parts)).read_bytes(), "/".join(parts))

    def answer(self, repository: str, is_branch: bool, value) -> None:
        if repository in self.repositories and is_branch:
            return self.send(json.dumps(value).encode(), "x")
        self.send_response(401 if repository == "tester/gated" else 404)
        kind = "RevisionNotFound" if repository in self.repositories else "RepoNotFound"
        self.send_header("X-Error-Code", "GatedRepo" if repository == "tester/gated" else kind)
        self.end_headers()

    def send(self, data: bytes, tag: str) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{tag.replace("/", "-")}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


LOAD = """
import sys, teachers
for source in sys.argv[1:]:
    try:
        print("|", source, teachers.load(source).source)
    except (ValueError, OSError) as error:
        print("|", source, error)
"""


def test_a_download_fetches_what_is_read(ddpm, dit, make_teacher, tmp_path):
    shutil.copytree(ddpm, tmp_path / "ddpm")
    (tmp_path / "ddpm" / "unet" / "diffusion_pytorch_model.bin").write_bytes(bytes(10))
    (tmp_path / "ddpm" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(bytes(10))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "text" / "model.safetensors").write_bytes(bytes(10))
    teachers.save_pretrained(make_teacher("SiT"), tmp_path / "model", "teacher")
    repositories = {"t/ddpm": tmp_path / "ddpm", "t/dit": dit, "t/text": tmp_path / "text", "t/model": tmp_path}
    handler = type("OneHub", (Hub,), {"repositories": repositories, "fetched": []})
    sources = ["t/ddpm", "t/dit", "t/text", "t/model/model", "t/ddpm@v2", "tester/none", "tester/gated", "t/dit/a.pkl"]
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        command = [sys.executable, "-c", LOAD, *(f"hf://{source}" for source in sources)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        server.shutdown()
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(lines) == len(sources), result.stderr
    answers = {line.split()[1].removeprefix("hf://"): line.split(maxsplit=2)[2] for line in lines}
    for source in ("t/ddpm", "t/dit", "t/model/model"):
        assert answers[source] == f"hf://{source}"
    assert "is not a scm-distill version 1 model config" in answers["t/text"]
    assert answers["t/ddpm@v2"].endswith("t/ddpm has no branch, tag or commit 'v2'")
    assert "the hub has no tester/none" in answers["tester/none"]
    assert "hf://tester/gated is gated: accept its terms at http" in answers["tester/gated"]
    assert "has no file or folder 'a.pkl'" in answers["t/dit/a.pkl"]
    assert sorted(handler.fetched) == sorted([
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.bin", "config.json", "model/config.json", "model/model.safetensors",
    ])  # fmt: skip

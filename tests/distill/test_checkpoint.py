"""Checkpoints by themselves: what their manifest notices, what is passed over, and what killed runs leave."""

import json
import shutil

import pytest
import torch

from distill.checkpoint import checkpoints, find_checkpoint, load_checkpoint, remove_leftovers, save_checkpoint


@pytest.fixture
def parts():
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {"network": network}, {"optimizer": optimizer}


def states(parts):
    return [{name: part.state_dict() for name, part in kind.items()} for kind in parts]


@pytest.fixture
def run(parts, tmp_path):
    """A run with checkpoints 2, 4 and 6."""
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, *states(parts), {"step": step}, limit=3)
    return tmp_path


def find(run, resume="latest"):
    warnings = []
    return find_checkpoint(run, resume, warnings.append), warnings


def rewrite(path, change):
    manifest = json.loads(path.read_text())
    change(manifest["files"])
    path.write_text(json.dumps(manifest))


FILES = ("network.safetensors", "optimizer.pt", "state.json")
DAMAGES = {
    **{f"{name} is cut off": lambda c, name=name: (c / name).write_bytes((c / name).read_bytes()[:-1]) for name in FILES},
    **{f"{name} is gone": lambda c, name=name: (c / name).unlink() for name in FILES},
    "a changed bit": lambda c: (c / FILES[0]).write_bytes((c / FILES[0]).read_bytes()[:-1] + b"\x7f"),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "half a manifest": lambda c: (c / "manifest.json").write_text('{"files": {"state.'),
    "a deep manifest": lambda c: (c / "manifest.json").write_text("[" * 100_000),
    "a list for a manifest": lambda c: (c / "manifest.json").write_text("[]"),
    "an empty manifest": lambda c: (c / "manifest.json").write_text('{"files": {}}'),
    "no hashes": lambda c: rewrite(c / "manifest.json", lambda files: files.update({"state.json": None})),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_or_if_it_was_named_an_error(run, parts, damage):
    newest = run / "checkpoint-6"
    damage(newest)
    found, warnings = find(run)
    assert found == run / "checkpoint-4" and load_checkpoint(found, *parts) == {"step": 4}
    assert len(warnings) == 1 and str(newest) in warnings[0] and warnings[0].endswith("; it is passed over")
    with pytest.raises(ValueError, match="checkpoint-6"):
        find(run, str(newest))
    for path in checkpoints(run):
        (path / "manifest.json").unlink(missing_ok=True)
    found, warnings = find(run)
    assert found is None and len(warnings) == 3


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "sub/file", "..", ".", "", "a\0b"])
def test_a_manifest_lists_files_of_its_folder_only(run, name):
    (run / "secret").write_text("mine")
    rewrite(run / "checkpoint-6/manifest.json", lambda files: files.update({name: files["state.json"]}))
    with pytest.raises(ValueError, match="lists .*, which is not the name of a file in it"):
        find(run, str(run / "checkpoint-6"))


def test_what_is_no_checkpoint_is_said_to_be_none(run, tmp_path):
    assert find(tmp_path / "new") == (None, [])
    with pytest.raises(FileNotFoundError, match="is not a checkpoint; in this run: .*checkpoint-2.*checkpoint-6"):
        find(run, str(run))


def test_a_whole_checkpoint_of_the_same_step_is_kept_and_a_damaged_one_replaced(run, parts):
    save_checkpoint(run, 6, *states(parts), {"step": "again"}, limit=3)
    assert load_checkpoint(run / "checkpoint-6", *parts) == {"step": 6}
    (run / "checkpoint-6/optimizer.pt").write_bytes(b"")
    save_checkpoint(run, 6, *states(parts), {"step": "again"}, limit=2)
    assert load_checkpoint(find(run)[0], *parts) == {"step": "again"}
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-4", "checkpoint-6"]


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(run):
    (run / "student").mkdir()
    kept = [run / ".gitignore", run / ".notes.1.tmp", run / ".checkpoints.tmp", run / ".tmpabcdef", run / "student/.keep"]
    for path in (*kept, run / ".curves.png.12.tmp", run / "student/.model.safetensors.12.tmp", run / "student/.tmpAbC12d"):
        path.touch()
    shutil.copytree(run / "checkpoint-6", run / ".checkpoint-8.12.tmp")
    shutil.copytree(run / "checkpoint-6", run / ".checkpoint-2.12.old")
    remove_leftovers(run)
    assert sorted(run.rglob(".*")) == sorted(kept)

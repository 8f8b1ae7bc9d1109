"""Checkpoints that were damaged, cut short or could not be written: nothing of them is loaded silently."""

import logging
import os
import random
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dtrain.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    Damaged,
    SaveFailed,
    choose_checkpoint,
    damage,
    find_checkpoint,
    read_progress,
    step_folders,
)
from dtrain.checkpoint.storage import TENSORS, Reader
from dtrain.checkpoint.verify import verify
from tests.checkpoints import all_tensors
from tests.dtrain.test_checkpoint import progress, training_state
from tests.faults.harm import HARM, cut, flip

pytestmark = pytest.mark.usefixtures("single_process_group")

ALTERATIONS = 1000


def checkpointer(folder: Path, **config: int) -> Checkpointer:
    group = dist.new_group(backend="gloo")
    return Checkpointer(folder, CheckpointConfig(**config), group, is_main=True, run_config="seed = 0\n")


@pytest.fixture
def saved(tmp_path: Path, single_process_group: None) -> Path:
    """Checkpoints of steps 1, 2 and 3."""
    state, saver = training_state(0), checkpointer(tmp_path)
    for step in (1, 2, 3):
        saver.save(state, progress(step))
    saver.close()
    return tmp_path


def test_no_alteration_goes_unseen(saved: Path) -> None:
    """A thousand random ones, of any file: what differs from what was written is named."""
    draw = random.Random(0)
    whole = saved / "step-00000003"
    assert list(damage(whole)) == []
    names = sorted(path.name for path in whole.iterdir())
    assert {TENSORS, "manifest.json", "SHA256SUMS"} < set(names)
    for number in range(ALTERATIONS):
        name, harm = draw.choice(names), draw.choice(HARM)
        kept = (whole / name).read_bytes()
        harm(whole / name, draw)
        faults = " ".join(damage(whole))
        assert faults, (number, name, harm)
        assert name in faults or name == "SHA256SUMS", (number, name, harm)
        (whole / name).write_bytes(kept)
    assert list(damage(whole)) == []


def test_the_newest_intact_one_is_used_and_the_others_are_named(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip(saved / "step-00000003" / "__0_0.distcp", random.Random(0))
    (saved / "step-00000002" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, "dtrain"):
        assert choose_checkpoint(CheckpointConfig(), saved) == saved / "step-00000001"
    said = [r.getMessage() for r in caplog.records if r.name.startswith("dtrain.checkpoint")]
    assert [line.split(" is damaged")[0] for line in said] == [
        "checkpoint: step-00000003",
        "checkpoint: step-00000002",
    ]
    assert "__0_0.distcp: SHA-256" in said[0]
    assert "manifest.json: cannot be read: No such file" in said[1]
    assert find_checkpoint(saved) == saved / "step-00000001"
    with pytest.raises(Damaged, match="step-00000002"):
        find_checkpoint(saved, 2)
    # The one that is asked for by name is not replaced by another.
    with pytest.raises(Damaged, match=r"__0_0.distcp: SHA-256"):
        choose_checkpoint(CheckpointConfig(resume=str(saved / "step-00000003")), saved)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(saved: Path) -> None:
    for folder in step_folders(saved):
        cut(folder / TENSORS, random.Random(0))
    with pytest.raises(Damaged, match="no intact checkpoint is in") as error:
        choose_checkpoint(CheckpointConfig(), saved)
    assert str(error.value).count(TENSORS) == 3


def test_verify(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(saved / "step-00000002" / "__0_0.distcp", random.Random(0))
    (saved / "partial-00000004").mkdir()
    rows, intact = verify(saved)
    assert not intact
    verdicts = {name: said.split(",")[0] for name, said in rows if name}
    assert verdicts == {
        "step-00000001": "intact",
        "step-00000002": "DAMAGED",
        "step-00000003": "intact",
        "partial-00000004": "never finished; not used",
    }
    assert verify(saved / "step-00000003")[1]
    with pytest.raises(FileNotFoundError, match="no checkpoint is here"):
        verify(saved / "elsewhere")


def test_coreutils_read_the_hashes(saved: Path) -> None:
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=saved / "step-00000001").returncode == 0


def test_no_name_leaves_the_folder(saved: Path) -> None:
    """Whoever can write hashes can write paths."""
    folder = saved / "step-00000003"
    text = (folder / TENSORS).read_text()
    for name in ("../step-00000001/__0_0.distcp", "/etc/passwd", "__0_0.distcp/../../x", ".metadata"):
        (folder / TENSORS).write_text(text.replace("__0_0.distcp", name))
        with pytest.raises(ValueError, match="is no file of a checkpoint"):
            Reader(folder).tensors()
    sums = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(sums.replace("__0_0.distcp", "../x"))
    assert list(damage(folder)) == [f"{folder / 'SHA256SUMS'}: line 1 is no hash and name"]


def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    torch.testing.assert_close(
        all_tensors(saved / "step-00000003"), all_tensors(saved / "step-00000001"), rtol=0, atol=0
    )
    other = training_state(1)
    other.load(saved / "step-00000003")


@contextmanager
def full_disk(nbytes: int) -> Iterator[None]:
    """No file may grow beyond this: the system refuses the write, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_a_save_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, saver = training_state(0), checkpointer(tmp_path, every=100, keep=1)
    saver.save(state, progress(100))
    saver.wait()
    assert not saver.due(150)
    with full_disk(1000), caplog.at_level(logging.WARNING, "dtrain"):
        for step in (200, 210):
            assert saver.due(step)
            saver.save(state, progress(step))
            assert not saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]  # the last good one, nothing else
    said = [r.getMessage() for r in caplog.records if r.name.startswith("dtrain.checkpoint")]
    assert len(said) == 2
    assert "step 200 could not be saved (1 in a row): rank 0: OSError(27, 'File too large')" in said[0]
    assert "tries again within 10 steps" in said[1]
    saver.save(state, progress(220))
    saver.close()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000220"]
    assert not saver.due(230)


def test_a_run_does_not_end_without_its_last_checkpoint(tmp_path: Path) -> None:
    saver = checkpointer(tmp_path)
    with full_disk(1000):
        saver.save(training_state(0), progress(1))
        with pytest.raises(SaveFailed, match="the last checkpoint could not be written"):
            saver.close()


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, then their folder, then the name, then the folder that holds the name."""
    order: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        sync(handle)

    def renamed(path: Path, target: Path) -> Path:
        order.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    saver = checkpointer(tmp_path)
    saver.save(training_state(0), progress(1))
    saver.close()
    files = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert set(order[:-3]) == files
    assert order[-3:] == ["partial-00000001", "rename partial-00000001", tmp_path.name]


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    state, saver = training_state(0), checkpointer(tmp_path)
    for step in (1, 2):
        saver.save(state, progress(step))
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter += 1
    saver.close()
    first, second = (all_tensors(tmp_path / f"step-0000000{step}") for step in (1, 2))
    names = [name for name in first if name.startswith("model.")]
    assert all(torch.equal(first[name] + 1, second[name]) for name in names)
    assert [read_progress(folder).step for folder in step_folders(tmp_path)] == [1, 2]

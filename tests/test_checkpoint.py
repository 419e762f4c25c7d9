"""Checkpoints: only a committed, whole one counts; the newest of these is found, whatever happened to the others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raymuse.storage.checkpoint import commit, folder_of, newest, prune, write_share


def write(root: Path, step: int, ranks: int = 2) -> Path:
    folder = folder_of(root, step)
    records = [
        write_share(
            folder, rank, {f"weight/{rank}": torch.full((100,), float(step)), f"exp_avg/{rank}": torch.rand(3, 2)}
        )
        for rank in range(ranks)
    ]
    commit(folder, step, records, {"updates": step, "nested": {"a": [1, 2]}})
    return folder


def test_what_was_written_comes_back_whole_and_merged(tmp_path: Path) -> None:
    odd = {"t": torch.arange(12.0).view(3, 4).T, "scalar": torch.tensor(5), "bf16": torch.ones(2, dtype=torch.bfloat16)}
    folder = folder_of(tmp_path, 7)
    commit(folder, 7, [write_share(folder, 0, odd), write_share(folder, 1, {"more": torch.zeros(1)})], {"x": 1})
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, found.state, found.folder.name) == (7, {"x": 1}, "step-00000007")
    tensors = found.tensors()
    assert set(tensors) == {"t", "scalar", "bf16", "more"}
    assert all(torch.equal(tensors[name], value) for name, value in odd.items())
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


def test_a_folder_that_was_never_committed_does_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 10)
    write_share(folder_of(tmp_path, 20), 0, {"a": torch.zeros(5)})
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert capsys.readouterr().err == ""


def flip_a_byte(folder: Path) -> None:
    path = folder / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def rewrite(folder: Path, text: str) -> None:
    (folder / "checkpoint.json").write_text(text)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped byte": flip_a_byte,
    "a truncated share": truncate,
    "a missing share": lambda folder: (folder / "rank-00001.safetensors").unlink(),
    "broken JSON": lambda folder: rewrite(folder, '{"step": 20, "fi'),
    "empty JSON": lambda folder: rewrite(folder, ""),
    "JSON of another kind": lambda folder: rewrite(folder, "[1]"),
    "JSON without a step": lambda folder: rewrite(folder, json.dumps({"files": [], "state": {}})),
    "binary JSON": lambda folder: (folder / "checkpoint.json").write_bytes(b"\xff\xfe\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_falls_back_with_a_warning_that_names_both(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 10)
    DAMAGE[damage](write(tmp_path, 20))
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 10
    assert float(found.tensors()["weight/1"][0]) == 10
    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert "step-00000020 is damaged" in warning
    assert "going on from step-00000010" in warning


def test_nothing_but_damage_starts_again_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncate(write(tmp_path, 10))
    assert newest(tmp_path) is None
    assert "step-00000010 is damaged" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_whole_again_when_written_again(tmp_path: Path) -> None:
    write(tmp_path, 10)
    flip_a_byte(write(tmp_path, 20, ranks=3))
    write(tmp_path, 20, ranks=1)  # by a smaller world: the old ranks' shares lie there still
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 20
    assert set(found.tensors()) == {"weight/0", "exp_avg/0"}


def steps(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def test_prune_keeps_the_newest_and_clears_leftovers_before_them(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        write(tmp_path, step)
    write_share(folder_of(tmp_path, 15), 0, {"a": torch.zeros(1)})
    write_share(folder_of(tmp_path, 35), 0, {"a": torch.zeros(1)})
    prune(tmp_path, 5, 40)
    assert steps(tmp_path) == [10, 15, 20, 30, 35, 40]
    prune(tmp_path, 2, 40)
    assert steps(tmp_path) == [30, 35, 40]
    prune(tmp_path, 1, 40)
    assert steps(tmp_path) == [40]


def test_prune_keeps_the_best_too_where_asked(tmp_path: Path) -> None:
    for step, loss in {10: 0.5, 20: 0.3, 30: 0.4, 40: None, 50: 0.6}.items():
        folder = write(tmp_path, step)
        commit(folder, step, [write_share(folder, 0, {"a": torch.zeros(1)})], {"loss": loss})
    rewrite(folder_of(tmp_path, 10), "{")  # damaged: it is not the best, whatever it was
    prune(tmp_path, 1, 50, best_by="loss")
    assert steps(tmp_path) == [20, 50]
    for step, loss in {60: 0.2, 70: 0.4}.items():
        folder = write(tmp_path, step)
        commit(folder, step, [write_share(folder, 0, {"a": torch.zeros(1)})], {"loss": 0.1, "eval_loss": loss})
    prune(tmp_path, 1, 70, best_by="eval_loss")  # what has none is not the best
    assert steps(tmp_path) == [60, 70]
    prune(tmp_path, 1, 70)
    assert steps(tmp_path) == [70]


def test_prune_never_gives_up_a_whole_checkpoint_for_a_damaged_later_one(tmp_path: Path) -> None:
    """Two newest are damaged, the run goes on from 10 and commits 20 again, keeping one."""
    write(tmp_path, 10)
    for step in (20, 30):
        truncate(write(tmp_path, step))
    write(tmp_path, 20)
    prune(tmp_path, 1, 20)
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 20


def test_a_prune_stopped_half_way_leaves_no_checkpoint_that_seems_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20):
        write(tmp_path, step)

    def stop(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 1, 20)
    assert not (folder_of(tmp_path, 10) / "checkpoint.json").exists()

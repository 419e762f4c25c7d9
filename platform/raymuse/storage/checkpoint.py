"""Checkpoints free of world size, ZeRO stage and pickle.

    step-00001000/
      rank-00000.safetensors   this rank's share: `weight/NAME`, `ema/NAME`, `STATE/NAME` (optimizer moments)
      checkpoint.json          last: step, files with sha256, and the plain state (position, schedule)

Only a folder with a valid checkpoint.json counts; a damaged newest one falls back to the one before.
"""

import contextlib
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from raymuse.storage.folder import Folder
from raymuse.storage.manifest import FileRecord


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder, step and plain state."""

    folder: Path
    step: int
    state: dict[str, Any]
    files: tuple[FileRecord, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All shares together, on the CPU."""
        merged: dict[str, torch.Tensor] = {}
        for file in self.files:
            merged.update(load_file(self.folder / file.name))
        return merged


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def write_share(folder: Path, rank: int, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write one rank's tensors, whole or not at all."""
    name = f"rank-{rank:05d}.safetensors"
    share = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    path = Folder(str(folder)).write_local(name, lambda partial: _save(share, partial))
    return FileRecord(name, path.stat().st_size, _sha256(path))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Raises OSError, of which safetensors makes an error of its own with the number in its text."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), str(error)) if number else error) from error


def commit(folder: Path, step: int, files: Sequence[FileRecord], state: Mapping[str, Any]) -> None:
    """Make the checkpoint count. Called once, after every rank has written its share."""
    record = {"step": step, "files": [asdict(file) for file in files], "state": dict(state)}
    Folder(str(folder)).write("checkpoint.json", json.dumps(record, indent=1).encode())


def _warn(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def newest(root: Path, warn: Callable[[str], None] = _warn) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning that names both."""
    damaged: str | None = None
    for folder in sorted(root.glob("step-*"), reverse=True):
        if not (folder / "checkpoint.json").exists():
            continue
        checkpoint, problem = read(folder)
        if checkpoint is None:
            damaged = damaged or f"{folder.name} is damaged ({problem})"
            continue
        if damaged:
            warn(f"warning: {root}: {damaged}; going on from {folder.name}.")
        return checkpoint
    if damaged:
        warn(f"warning: {root}: {damaged}; no older checkpoint, starting again.")
    return None


def prune(root: Path, keep: int, newest_step: int, *, best_by: str | None = None) -> None:
    """Delete all but the newest `keep` checkpoints up to the one just committed, and leftovers before them.

    Later ones are damaged, or the run would have gone on from them: they must not push a whole one out.

    Args:
        best_by: keep the one whose state has the lowest number of this name as well, though it be older.
    """
    last = folder_of(root, newest_step)
    committed = sorted(path.parent for path in root.glob("step-*/checkpoint.json") if path.parent <= last)
    if len(committed) <= keep:
        return
    oldest_kept = committed[-keep]
    best = _best(committed, best_by) if best_by is not None else None
    for folder in sorted(root.glob("step-*")):
        if folder < oldest_kept and folder != best:
            (folder / "checkpoint.json").unlink(missing_ok=True)
            shutil.rmtree(folder)


def _best(committed: Sequence[Path], name: str) -> Path | None:
    """The one of the lowest number of that name; of equal ones the newest. What has none is not it."""
    losses: list[tuple[float, int, Path]] = []
    for number, folder in enumerate(committed):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            loss = json.loads((folder / "checkpoint.json").read_text())["state"][name]
            losses.append((float(loss), -number, folder))
    return min(losses)[2] if losses else None


def read(folder: Path) -> tuple[Checkpoint | None, str]:
    """The checkpoint in a folder, its files checked; None, and what is wrong, where it is not whole."""
    try:
        record = json.loads((folder / "checkpoint.json").read_text())
        step, state = int(record["step"]), dict(record["state"])
        files = tuple(FileRecord(**file) for file in record["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"checkpoint.json: {error}"
    for file in files:
        path = folder / file.name
        if not path.exists() or path.stat().st_size != file.size or _sha256(path) != file.sha256:
            return None, f"{file.name} is missing or changed"
    return Checkpoint(folder, step, state, files), ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

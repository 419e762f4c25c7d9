"""What `raymuse demo` says to input it cannot work with: one sentence, exit code 2, and nothing written."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from raymuse.cli.app import main
from raymuse.datasets import emoji


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence that a command ends with."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Error: ")
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    return err


def test_a_missing_folder_of_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "demo", f"data.source={tmp_path / 'nowhere'}", f"workdir={tmp_path / 'work'}")
    assert str(tmp_path / "nowhere") in said
    assert not (tmp_path / "work").exists()


def test_a_folder_without_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.md").write_text("no pictures here")
    said = refused(capsys, "demo", f"data.source={tmp_path}", f"workdir={tmp_path / 'work'}")
    assert str(tmp_path) in said
    assert not (tmp_path / "work").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refused(capsys, "demo", f"workdir={tmp_path / 'file' / 'work'}")
    assert str(tmp_path / "file") in said
    assert "Choose an output" in said


def test_too_little_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 10**6))
    said = refused(capsys, "demo", f"workdir={tmp_path / 'work'}")
    assert "GiB free" in said
    assert not (tmp_path / "work").exists()


def test_a_missing_emoji_font_says_how_to_install_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emoji.find_font, "__defaults__", (tmp_path / "no.ttf",))
    said = refused(capsys, "demo", "--recipe", "emoji", f"workdir={tmp_path / 'work'}")
    assert "apt-get install fonts-noto-color-emoji" in said
    assert not (tmp_path / "work").exists()

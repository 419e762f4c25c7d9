"""The scripts in jobs/ under a real `ray job submit`, on a head of our own that asks for a token."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from heads import Head, running_head


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as started:
        yield started


def test_a_stage_runs_as_a_job(head: Head, tmp_path: Path) -> None:
    output = tmp_path / "data"
    words = ["demo:data", "train=16", "test=4", "pictures_per_shard=8", "resolution=32", f"output={output}"]
    done = head.submit("right", "python", "jobs/make_data.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert head.exit_code("right") == 0
    assert str(output) in done.stdout  # the address that the stage prints
    assert (output / "_SUCCESS").exists()
    assert len(list((output / "train").glob("*.tar"))) == 2


def test_a_wrong_key_fails_the_job_with_code_2_and_says_so(head: Head, tmp_path: Path) -> None:
    done = head.submit("wrong", "python", "jobs/make_data.py", "demo:data", "trian=16", f"output={tmp_path / 'no'}")
    assert done.returncode != 0
    assert head.exit_code("wrong") == 2
    assert "trian: no such key; did you mean train?" in done.stdout
    assert not (tmp_path / "no").exists()


def test_without_the_token_nothing_is_submitted(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=20)

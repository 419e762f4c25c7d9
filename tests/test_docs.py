"""What the documents tell people to type: every command is taken as the program takes it, up to where work would begin.

Recipes, fields, options and files are the real ones, so that a renamed field or a lost option fails here. What cannot
be tried so stands in `EXEMPT`, with the reason.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import typer

from raymuse.cli.commands import app
from raymuse.config.load import load
from told import ROOT, Told, blocks, inline

EXEMPT = {
    "apt-get": "Debian's own",
    "aws": "a cloud account",
    "chmod": "the shell's own",
    "cp": "the shell's own",
    "curl": "the HTTP API's calls are tested in test_serving.py",
    "docker": "a container engine; the image's steps are tested in chaos/test_image.py",
    "export": "the shell's own",
    "gcloud": "a cloud account",
    "kubectl": "a Kubernetes cluster; what it would apply is checked in test_cluster_files.py",
    "mkdir": "the shell's own",
    "mv": "the shell's own",
    "pip": "the network",
    "tar": "the shell's own",
    "test": "the shell's own",
    "xdg-open": "a desktop",
    "ray": "a cluster; what `ray job submit` runs is tried here, `ray up` in chaos/test_onprem.py",
    "raymuse score --compare images-a images-b clip=CLIP output=compared": "asks what lies in the folders",
    "raymuse verify-weights": "published weights; the same code on made ones in test_golden.py",
}

# Where each command begins to work: everything before has checked what was typed.
WORK = (
    "raymuse.cli.launch.run_stage",
    "raymuse.cli.launch.show_tracking",
    "raymuse.flow.demo",
    "raymuse.serving.deploy.serve",
    "raymuse.stages.edit.edit",
    "raymuse.stages.edit.repeat",
    "raymuse.stages.inspect_tokens.inspect_tokens",
    "raymuse.storage.token_check.check_tokens",
    "raymuse.storage.batch_check.batch_state",
    "raymuse.storage.batch_check.check_batch",
    "raymuse.clusters.jobserver.connect",
    "raymuse.clusters.check.check",
    "raymuse.clusters.plan.plan_text",
    "raymuse.submit.jobs.plan",
    "raymuse.cli.training_plan.train_plan",
    "raymuse.cli.plans.flow_plan",
    "raymuse.encoding.plan.plan_text",
    "raymuse.doctor.examine",
    "raymuse.cli.runs._server",
)

# Recipes of one's own, as `raymuse config copy` writes them.
OWN = {"train": "demo:base", "generate": "demo:generate", "pretokenize": "demo:pretokenize", "score": "demo:score"}


class WorkBeginsError(Exception):
    """All that was typed was understood."""


@pytest.fixture
def halted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would begin to work raises WorkBeginsError instead."""

    def begin(*_given: Any, **_named: Any) -> None:
        raise WorkBeginsError

    for place in WORK:
        monkeypatch.setattr(place, begin)
    monkeypatch.setattr("raymuse.tracking.registry.with_model", lambda config, _uri: config)
    monkeypatch.setattr("raymuse.cli.launch.local_ray", nullcontext)
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("told", [one for one in blocks() if one.program not in EXEMPT or "jobs/" in str(one)], ids=str)
@pytest.mark.usefixtures("halted")
def test_a_command_of_the_documents_is_understood(told: Told, tmp_path: Path) -> None:
    TAKEN[told.program](list(told.words[1:]), tmp_path)


@pytest.mark.parametrize("told", inline(), ids=str)
def test_a_command_of_the_running_text_exists(told: Told) -> None:
    command: Any = typer.main.get_command(app)
    for word in told.words[1:]:
        if not (commands := getattr(command, "commands", None)):
            break
        assert word in commands, f"{told.page}: {told}"
        command = commands[word]
    options = {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts}
    unknown = {word.partition("=")[0] for word in told.words if word.startswith("--")} - options - {"--help"}
    assert not unknown, f"{told.page}: {told}"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """`make docs`: every page is in the menu, and every docstring of the reference says what it should."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "site" / "reference.html").read_text()
    assert all(word in reference for word in ("best_of", "Raises"))


def _raymuse(words: list[str], folder: Path) -> None:
    if {" ".join(["raymuse", *words[:1]]), " ".join(["raymuse", *words])} & EXEMPT.keys():
        return
    words = [typed for word in words for typed in _typed(word, words, folder)]
    try:
        app(args=words, prog_name="raymuse")
    except WorkBeginsError:
        return
    except SystemExit as left:
        if left.code:
            raise


def _typed(word: str, words: list[str], folder: Path) -> list[str]:
    """A word with what it stands for: a recipe of one's own is written first, and patterns of files are expanded."""
    if word in ("my.yaml", "my-flow.yaml"):
        path = folder / word
        if words[:2] != ["config", "copy"]:
            with pytest.raises(SystemExit):
                app(args=["config", "copy", next((OWN[name] for name in words if name in OWN), "demo"), str(path)])
        return [str(path)]
    if "*" in word and "/" in word:
        found = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(word.rstrip("/")))
        assert found, f"nothing is called {word}"
        return found
    return [word]


def _job(words: list[str], folder: Path) -> None:
    """`ray job submit ... -- python jobs/STAGE.py WORDS`."""
    place = next(place for place, word in enumerate(words) if word.startswith("jobs/") and word.endswith(".py"))
    command = re.search(r'main\(\["([\w-]+)"', (ROOT / words[place]).read_text())
    assert command, words[place]
    _raymuse([command[1], *words[place + 1 :]], folder)


def _make(words: list[str], _folder: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if re.fullmatch(r"[\w-]+", word)} <= targets


def _python(words: list[str], folder: Path) -> None:
    if words[:1] == ["-m"]:
        assert words[1] == "raymuse.training", words
        load(words[2], words[3:])
    elif words[0].startswith("jobs/"):
        _job(words, folder)
    elif words[0] != "-c":
        assert (ROOT / words[0]).is_file(), words[0]


def _torchrun(words: list[str], folder: Path) -> None:
    _python(words[words.index("-m") :], folder)


def _pytest(words: list[str], _folder: Path) -> None:
    assert all((ROOT / word.partition("::")[0]).exists() for word in words if word.startswith("tests"))


TAKEN: dict[str, Callable[[list[str], Path], None]] = {
    "raymuse": _raymuse,
    "make": _make,
    "python": _python,
    "pytest": _pytest,
    "ray": _job,
    "torchrun": _torchrun,
}

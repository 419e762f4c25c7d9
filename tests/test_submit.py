"""What `raymuse submit` checks and gathers before it speaks to a cluster; the jobs themselves: test_jobs.py."""

import contextlib
import json
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.job_submission import JobDetails, JobStatus

from raymuse.cli.app import main
from raymuse.cli.submit import job_config
from raymuse.clusters.jobserver import connect
from raymuse.clusters.token import find_token
from raymuse.config.errors import UserError
from raymuse.config.load import load
from raymuse.submit import package as packaging
from raymuse.submit.following import verdict
from raymuse.submit.jobs import job_variables, resumable, run_key, stop
from raymuse.submit.order import Order, check, entry_resources, keep, kept, pinned, require_reachable, runtime_env
from raymuse.submit.package import gather
from raymuse.submit.pipeline import check_stages, section_changes
from raymuse.tracking.run import Run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: a recipe, an ignored one, and a large file."""
    root = tmp_path / "mine"
    (root / "inner").mkdir(parents=True)
    files = {".gitignore": "*.log\nruns/\n", "my.yaml": "extends: demo:data\n", "inner/a.txt": "a", "inner/b.log": "b"}
    for name, text in files.items():
        (root / name).write_text(text)
    (root / "runs").mkdir()
    (root / "runs" / "big").write_bytes(bytes(1000))
    (root / "outside").symlink_to("/etc/hostname")
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("tracked", [True, False], ids=["git", "no git"])
def test_what_goes_along(folder: Path, tracked: bool) -> None:
    if tracked:
        subprocess.run(["git", "init", "--quiet", folder], check=True)
    package = gather(folder, ["*.txt"] if tracked else [])
    own = [name for name in package.files if name.startswith("platform/raymuse/")]
    rest = set(package.files) - set(own)
    assert rest == {".gitignore", "my.yaml"} | (set() if tracked else {"inner/a.txt"})
    assert "platform/raymuse/cli/__main__.py" in own
    assert "platform/raymuse/recipes/demo.yaml" in own
    assert not any("__pycache__" in name for name in own)
    assert package.holds("./my.yaml")
    assert package.holds("inner") is not tracked
    assert not package.holds("runs/big")
    assert f"{len(package.files):,} files, " in package.summary


def test_equal_folders_make_equal_archives(folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    gather(folder, []).write(first, None)
    (folder / "my.yaml").touch()
    gather(folder, []).write(second, None)
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None
        assert archive.read("inner/a.txt") == b"a"


def test_the_token_never_goes_along(folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("token: c0ffee")
    with pytest.raises(UserError, match=r"notes.txt holds the cluster's token"):
        gather(folder, []).write(tmp_path / "it.zip", "c0ffee")


def test_too_much_is_refused_with_what_is_largest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 1000)
    with pytest.raises(UserError, match=r"(?s)more than the 0.0 MiB.*the largest:.*--exclude PATTERN"):
        gather(folder, [])


def order(command: str, *words: str, **more: object) -> tuple[Order, object]:
    config = job_config(command, list(words))
    return Order(command, words[0], tuple(words[1:]), **more), config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "words", "more", "said"),
    [
        ("train", ("demo:base",), {}, "output=runs/demo/base is relative"),
        ("pipeline", ("smoke",), {}, "workdir=runs/smoke is relative"),
        ("data", ("my.yaml", "output=/shared/x", "source=runs/big"), {}, "source=runs/big lies on this machine"),
        ("data", ("../mine/my.yaml", "output=/x"), {}, "my.yaml does not go along"),
        ("data", ("my.yaml", "output=/x"), {"image": "a/b:1"}, "put it into the image"),
        ("data", ("demo:data", "output=/x"), {"mlflow": "http://me:secret@h:5000"}, "holds a password"),
    ],
)
def test_what_no_cluster_could_run(
    folder: Path, command: str, words: tuple[str, ...], more: dict[str, str], said: str
) -> None:
    asked, config = order(command, *words, **more)
    with pytest.raises(UserError, match=said) as caught:
        check(asked, config, gather(folder, []))  # type: ignore[arg-type]
    assert "secret" not in str(caught.value)


def test_a_job_is_named_after_its_storage(folder: Path) -> None:
    (first, here), (second, again) = (order("data", "my.yaml", f"output=/x/{name}") for name in "ab")
    assert first.label(here) != second.label(again)  # type: ignore[arg-type]
    assert first.label(here) == order("data", "my.yaml", "train=9", "output=/x/a")[0].label(here)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--name a/b: letters"):
        Order("data", None, name="a/b").label(here)  # type: ignore[arg-type]


def test_what_the_driver_asks_for(folder: Path) -> None:
    def asked(command: str, *words: str, **more: float) -> dict[str, float]:
        made, config = order(command, *words)
        return entry_resources(Order(made.command, made.recipe, **more), config)  # type: ignore[arg-type]

    assert asked("pretokenize", "demo:pretokenize") == {}
    assert asked("train", "demo:base") == {}
    assert asked("train", "demo:vqgan", "workers=0")["entrypoint_num_cpus"] >= 1
    assert asked("export", "demo:export") == {"entrypoint_num_cpus": 1.0}
    assert asked("export", "demo:export", cpus=2.0, gpus=1.0, memory_gib=1.5) == {
        "entrypoint_num_cpus": 2.0,
        "entrypoint_num_gpus": 1.0,
        "entrypoint_memory": 3 * 2**29,
    }


def test_the_environment_is_ours_or_the_images() -> None:
    plain = runtime_env(Order("data", None), "it.zip", {"A": "b"})
    assert plain == {"working_dir": "it.zip", "env_vars": {"PYTHONPATH": "platform", "A": "b"}}
    assert runtime_env(Order("data", None, image="a/b:1"), "it.zip", {}) == {"image_uri": "a/b:1", "env_vars": {}}
    installed = runtime_env(Order("data", None, install=True), "it.zip", {})["pip"]["packages"]
    assert installed == pinned()


def test_the_pinned_dependencies_are_those_of_the_constraints() -> None:
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    constraints = {line.lower().replace("_", "-").partition("+")[0] for line in lines if "==" in line}
    found = {pin.lower().replace("_", "-") for pin in pinned()}
    names = {pin.partition("==")[0] for pin in found}
    assert {"torch", "mlflow", "deepspeed", "sqlalchemy"} <= names  # what raymuse needs, and what that needs
    assert not names & {"ray", "raymuse", "pytest", "ruff", "openai"}
    assert found <= constraints


def test_a_job_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    asked = Order("train", "demo:base", ("steps=3",), name="mine", stages=("a",), cpus=2.0)
    keep(asked, "mine", tmp_path, "http://h:8265")
    assert kept("mine") == (asked, tmp_path)
    (file,) = tmp_path.rglob("*.json")
    assert file.stat().st_mode & 0o777 == 0o600


def job(submission: str, **about: str) -> JobDetails:
    metadata = {f"raymuse.{key}": value for key, value in about.items()}
    return JobDetails(
        type="SUBMISSION", entrypoint="x", status="RUNNING", submission_id=submission, metadata=metadata or None
    )


@dataclass
class Known:
    """A cluster that knows some jobs, and whose jobs stop when they are told to."""

    known: list[JobDetails]
    address: str = "http://h:8265"

    @property
    def client(self) -> "Known":
        return self

    def jobs(self) -> list[JobDetails]:
        return self.known

    def details(self, submission: str) -> JobDetails:
        return next(one for one in self.known if one.submission_id == submission)

    def answering(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stop_job(self, submission: str) -> None:
        self.details(submission).status = JobStatus.STOPPED


def test_a_job_is_resumed_by_its_name_and_by_an_attempts_id() -> None:
    jobs = [job("mine", name="mine"), job("mine-2", name="mine"), job("theirs")]
    server: Any = Known([*jobs, job("row.vqgan", name="row.vqgan", pipeline="row")])
    assert [resumable(server, name) for name in ("mine", "mine-2", "theirs", "gone")] == ["mine"] * 2 + [
        "theirs",
        "gone",
    ]
    with pytest.raises(UserError, match="a stage of the pipeline row: `raymuse jobs resume row` goes on"):
        resumable(server, "row.vqgan")
    assert stop(server, "mine-2") == "mine-2 is STOPPED; what it finished is kept: raymuse jobs resume mine"
    assert stop(server, "row.vqgan").endswith("what it finished is kept: raymuse jobs resume row")
    assert stop(server, "theirs") == "theirs is STOPPED; what it finished is kept"


def test_all_attempts_have_one_run_wherever_mlflow_is(folder: Path) -> None:
    asked, config = order("data", "my.yaml", "output=/x/a")
    key = run_key(asked.label(config), config)  # type: ignore[arg-type]
    first, second = (job_variables(asked, config, name, Run.off()) for name in ("a", "a-2"))  # type: ignore[arg-type]
    assert first == {"RAYMUSE_JOB": "a", "MLFLOW_RUN_ID": key}  # of the server that the cluster's machines name
    assert second == {"RAYMUSE_JOB": "a-2", "MLFLOW_RUN_ID": key}
    named = replace(asked, mlflow="http://m:5000")
    assert job_variables(named, config, "a", Run.off()) == {  # type: ignore[arg-type]
        **first,
        "MLFLOW_TRACKING_URI": "http://m:5000",
        "MLFLOW_EXPERIMENT_NAME": "raymuse",
    }


@pytest.mark.parametrize(
    ("mlflow", "cluster", "right"),
    [
        ("http://127.0.0.1:5000", "http://10.0.0.10:8265", False),
        ("http://localhost:5000", "https://ray.example.org", False),
        ("http://[::1]:5000", "http://10.0.0.10:8265", False),
        ("http://127.0.0.1:5000", "http://localhost:8265", True),
        ("http://10.0.0.10:5000", "http://10.0.0.10:8265", True),
        (None, "http://10.0.0.10:8265", True),
    ],
)
def test_an_mlflow_of_this_machine_is_not_sent_to_another(mlflow: str | None, cluster: str, right: bool) -> None:
    asked = Order("data", None, mlflow=mlflow)
    if right:
        require_reachable(asked, cluster)
        return
    with pytest.raises(UserError, match=r"is on this machine alone, and the job runs at http"):
        require_reachable(asked, cluster)


def test_a_pipelines_changes_go_to_their_stages() -> None:
    changes = ["base.steps=3", "workdir=/w", "base.optimizer.lr=1e-4", "clip.steps=5", "name=x"]
    assert section_changes(changes, "base", "/w") == ("workdir=/w", "steps=3", "optimizer.lr=1e-4")
    assert load("smoke:base", section_changes(changes, "base", "/w")) == load("smoke", changes).base.within("/w")  # type: ignore[attr-defined]
    assert check_stages(["score", "base"]) == ["base", "score"]
    assert len(check_stages([])) == 9
    with pytest.raises(UserError, match="there is no bsae"):
        check_stages(["bsae"])
    with pytest.raises(UserError, match="name each key"):
        section_changes(["base={steps: 3}"], "base", "/w")


@pytest.mark.parametrize(
    ("status", "driver", "code", "told"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 3, 3, "job it: FAILED. exit code 3"),
        ("FAILED", -9, 137, "job it: FAILED. exit code 3"),
        ("FAILED", None, 1, "job it: FAILED. exit code 3, last available logs:\nmore"),
        ("STOPPED", None, 143, "job it: STOPPED. exit code 3, last available logs:\nmore"),
    ],
)
def test_a_jobs_end_becomes_an_exit_code(status: str, driver: int | None, code: int, told: str) -> None:
    message = "exit code 3, last available logs:\nmore"
    details = JobDetails(
        type="SUBMISSION", entrypoint="x", status=status, submission_id="it", driver_exit_code=driver, message=message
    )
    said: list[str] = []
    assert verdict(details, said.append) == code
    assert "".join(said) == told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit"], "needs a stage and a recipe"),
        (["submit", "tarin", "demo:base"], "there is no stage 'tarin'"),
        (["submit", "train", "demo:base", "setps=3"], "did you mean steps?"),
        (["submit", "train", "demo:base", "--stages", "base"], "--stages belongs to --pipeline"),
        (["submit", "--pipeline", "demo:base"], "run it with `raymuse train demo:base`"),
        (["pipeline", "smoke"], "runs inside a job"),
    ],
)
def test_bad_usage(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_a_dry_run_says_what_would_go(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "data", "my.yaml", "output=/shared/data", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "python -m raymuse.cli data my.yaml output=/shared/data" in text
    assert "before compression" in text
    assert "driver: on the head" in text


# --- tokens, and servers that are not what they should be


@pytest.fixture
def tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token file, and no other setting."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back, also where the test's subject sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_text("c0ffee\n")
    return path


def test_tokens_are_found_as_ray_finds_them(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no token for the cluster"):
        find_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tokens))
    found = find_token()
    assert found is not None
    assert (found.text, found.place) == ("c0ffee", str(tokens))
    assert "c0ffee" not in f"{found} {found!r}"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "other")
    other = find_token()
    assert other is not None
    assert other.text == "other"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "off")
    with pytest.raises(UserError, match="it is token or disabled"):
        find_token()


def test_a_token_that_others_can_read_is_refused(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tokens))
    for mode in (0o640, 0o604):
        tokens.chmod(mode)
        with pytest.raises(UserError, match=r"may be read by others \(mode 06\d\d\): chmod 600") as caught:
            find_token()
        assert "c0ffee" not in str(caught.value)
    tokens.chmod(0o600)
    tokens.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        find_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tokens.with_name("none")))
    with pytest.raises(UserError, match="cannot read the token file"):
        find_token()


class OtherRay(BaseHTTPRequestHandler):
    """A job server of another version, which cannot be installed beside ours; it keeps what it is asked."""

    asked: list[str] = []  # noqa: RUF012 - one server a test

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Authorization", ""))
        body = json.dumps({"version": "4", "ray_version": "2.9.3", "ray_commit": "x"}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_words: object) -> None:
        pass


@pytest.fixture
def other_ray() -> Iterator[str]:
    OtherRay.asked = []
    with HTTPServer(("127.0.0.1", 0), OtherRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_another_version_of_ray_is_named(tokens: Path, other_ray: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tokens))
    with pytest.raises(UserError, match=rf"runs Ray 2\.9\.3 and this machine {ray.__version__}"):
        connect(other_ray)
    assert OtherRay.asked == ["Bearer c0ffee"]
    with pytest.raises(UserError, match=r"there is no host nowhere\.invalid"):
        connect("http://nowhere.invalid:8265")

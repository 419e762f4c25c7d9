"""The rules of the repository that no linter holds."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "raymuse"
JOBS = sorted((ROOT / "jobs").glob("*.py"))
FREE_OF_RAY = ("pipeline", "drawing", "training", "encoding", "models", "masking")

IMPORT_WITHOUT = """
import importlib, sys

for name in ("ray", "mlflow"):
    sys.modules[name] = None  # as if it were not installed: `import` fails and find_spec finds nothing
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_the_source_root_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()  # it would take the place of the module `platform`
    assert {path.name for path in (ROOT / "platform").iterdir() if path.suffix != ".egg-info"} == {"raymuse"}


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.name)
def test_jobs_are_short_and_shadow_nothing(job: Path) -> None:
    installed = set(importlib.metadata.packages_distributions())
    assert job.stem not in sys.stdlib_module_names | installed
    text = job.read_text()
    assert len(text.splitlines()) < 30
    assert f"python jobs/{job.name}" in (ast.get_docstring(ast.parse(text)) or "")


def test_jobs_import_the_package_alone() -> None:
    for job in JOBS:
        nodes = ast.walk(ast.parse(job.read_text()))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert modules == {"raymuse.cli.app"}


def test_every_package_has_an_empty_init() -> None:
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder
        assert not (folder / "__init__.py").read_text().strip(), folder


def test_no_junk_drawers() -> None:
    assert not {path.stem for path in PACKAGE.rglob("*.py")} & {"utils", "util", "common", "helpers", "misc"}


def test_the_science_imports_without_ray_and_mlflow() -> None:
    """A GPU machine without them can run everything that costs GPU time."""
    modules = []
    for name in FREE_OF_RAY:
        modules += [f"raymuse.{name}"] if (PACKAGE / f"{name}.py").exists() else []
        modules += [f"raymuse.{name}.{path.stem}" for path in sorted((PACKAGE / name).glob("[!_]*.py"))]
    done = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT, *modules], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_architecture_names_every_module_as_it_names_itself() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in sorted(PACKAGE.rglob("*.py")):
        if told := ast.get_docstring(ast.parse(path.read_text())):
            first = told.splitlines()[0].replace("|", "\\|")
            assert f"| `{path.name}` | {first} |" in page, f"docs/architecture.md: {path.relative_to(PACKAGE)}: {first}"


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda path: path.name
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors, f"{page.name}: {link} (it has {', '.join(sorted(anchors))})"

"""Images and versions in cluster files: pinned, and equal to what the project is pinned to."""

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

_MOVING = {"latest", "nightly", "stable", "main", "master", "edge"}
_RAY_IMAGE = re.compile(r"(?:.*/)?rayproject/ray(?:-[a-z]+)?:([0-9][^-]*)(?:-(py[0-9]+))?(?:-.*)?")
_PYTHONS = ("py311", "py312")


def pinned(package: str, near: Path) -> tuple[str, str]:
    """The version of a package that holds for a file, and who says so.

    That is the first constraints.txt in the file's folder or above it; away from a checkout, what is installed here.
    """
    for folder in near.resolve().parents:
        constraints = folder / "constraints.txt"
        if constraints.is_file():
            for line in constraints.read_text("utf-8").splitlines():
                name, _, version = line.partition("==")
                if name.strip().lower() == package.lower() and version:
                    return version.strip(), "constraints.txt"
    return metadata.version(package), "what is installed here"


def image_problems(where: str, image: object, near: Path) -> Iterator[str]:
    """What is wrong with an image's name: no tag, a tag that moves, or another Ray or Python than the project's."""
    if not isinstance(image, str):
        return  # the schema's business
    if "@sha256:" in image:
        return
    tag = image.rpartition("/")[2].partition(":")[2]
    if not tag or tag.partition("-")[0] in _MOVING:
        was = f"the tag {tag} moves" if tag else "has no tag, which means latest"
        yield f"{where}: {image}: {was}; pin a version, so that machines that start later are equal"
        return
    match = _RAY_IMAGE.fullmatch(image)
    if match is None:
        return
    version, source = pinned("ray", near)
    if match[1] != version:
        yield f"{where}: {image} has Ray {match[1]}, and {source} pins {version}: client and cluster must be equal"
    if match[2] not in _PYTHONS:
        yield f"{where}: {image}: say the Python too, such as {version}-py311"


def version_problems(where: str, package: str, said: object, near: Path) -> Iterator[str]:
    """Whether a version that a file states is the pinned one."""
    version, source = pinned(package, near)
    if str(said) != version:
        yield f"{where}: is {said}, and {source} pins {package} {version}: make them equal"


_INSTALL = re.compile(r"(?<![\w.-])(?:uv )?pip3? install(?P<words>[^;&|]*)")


def install_problems(where: str, command: str) -> Iterator[str]:
    """Whether what a command installs is held to constraints.txt."""
    for match in _INSTALL.finditer(command):
        if not re.search(r"(?:-c|--constraint)[ =]\S*constraints\.txt", match["words"]):
            words = match["words"].strip()
            yield f"{where}: `pip install {words}` is not held to constraints.txt: add `-c .../constraints.txt`"

"""What a job takes along: the files of the folder it is submitted from, and this very raymuse.

Git says which files those are (tracked, or neither tracked nor ignored); without git, Ray's own reading of .gitignore
does. Where the folder holds no raymuse of its own, the installed package goes along, so that the cluster runs the code
that checked the recipe.
"""

import hashlib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel
from ray._private.thirdparty.pathspec import PathSpec

from raymuse.config.errors import UserError
from raymuse.tracking.provenance import git

SOURCE = "platform"  # what PYTHONPATH names on the cluster
PACKAGE = Path(__file__).parents[1]
ALWAYS_OUT = ("__pycache__/", ".git/", ".venv/")
SHOWN = 5
_DATE = (1980, 1, 1, 0, 0, 0)  # equal files make an equal archive, which Ray uploads once


@dataclass(frozen=True)
class Package:
    """The files of an archive.

    Attributes:
        files: name in the archive -> file on this machine.
        size: bytes of all of them.
    """

    root: Path
    files: dict[str, Path]
    size: int

    @property
    def summary(self) -> str:
        """How much it is, and what is largest, for people."""
        largest = sorted(self.files, key=lambda name: -self.files[name].stat().st_size)[:SHOWN]
        shown = "".join(f"\n  {mib(self.files[name].stat().st_size):>10}  {name}" for name in largest)
        return f"{self.root}: {len(self.files):,} files, {mib(self.size)} before compression; the largest:{shown}"

    def holds(self, name: str) -> bool:
        """Whether a relative path, of a file or a folder, is among them."""
        plain = Path(name).as_posix()
        return plain in self.files or any(file.startswith(f"{plain}/") for file in self.files)

    def write(self, archive: Path, secret: str | None) -> None:
        """Write the archive.

        Args:
            secret: what must be in none of the files.

        Raises:
            UserError: a file holds it, or cannot be read.
        """
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for name, path in self.files.items():
                try:
                    data = path.read_bytes()
                except OSError as error:
                    raise UserError(f"cannot read {path}: {error.strerror}.") from None
                if secret is not None and secret.encode() in data:
                    raise UserError(f"{path} holds the cluster's token: move it away, or leave it out with --exclude.")
                entry = zipfile.ZipInfo(name, _DATE)
                entry.external_attr = (path.stat().st_mode & 0o777) << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                out.writestr(entry, data)


def gather(root: Path, excludes: Sequence[str]) -> Package:
    """What of a folder goes along.

    Args:
        root: where relative recipes and inputs lie.
        excludes: further patterns, as in .gitignore.

    Raises:
        UserError: it is more than a cluster takes.
    """
    root = root.resolve()
    out = PathSpec.from_lines("gitwildmatch", [*ALWAYS_OUT, *excludes])
    names = [name for name in _listed(root) if not out.match_file(name)]
    files = {name: root / name for name in sorted(names) if _is_inside(root / name, root)}
    if not (root / SOURCE / "raymuse").is_dir():
        own = (path for path in sorted(PACKAGE.rglob("*")) if path.is_file() and path.suffix != ".pyc")
        files |= {f"{SOURCE}/raymuse/{path.relative_to(PACKAGE).as_posix()}": path for path in own}
    package = Package(root, files, sum(path.stat().st_size for path in files.values()))
    if package.size > GCS_STORAGE_MAX_SIZE:
        raise UserError(
            f"this folder is more than the {mib(GCS_STORAGE_MAX_SIZE)} that a cluster takes along with a job. "
            f"{package.summary}\nName what is not needed in .gitignore, or with --exclude PATTERN."
        )
    return package


def slug(text: str, length: int = 40) -> str:
    """Text as part of a name: letters, digits, `-`, and `_`."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in text).strip("-")[:length]


def digest(text: str) -> str:
    """A short sum of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def mib(size: float) -> str:
    """A size in MiB."""
    return f"{size / 2**20:.1f} MiB"


def _listed(root: Path) -> list[str]:
    listed = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listed is not None:
        return [name for name in listed.split("\0") if name]
    found: list[str] = []
    out = PathSpec.from_lines("gitwildmatch", ALWAYS_OUT)

    def skip(path: Path) -> bool:
        name = path.absolute().relative_to(root).as_posix()
        return (path.is_symlink() and path.is_dir()) or bool(out.match_file(f"{name}/"))

    def note(path: Path) -> None:
        if path.is_file():
            found.append(path.absolute().relative_to(root).as_posix())

    _dir_travel(root, [skip], note, include_gitignore=True)
    return found


def _is_inside(path: Path, root: Path) -> bool:
    """Whether a file is there (git lists deleted ones, and links), and no link leads out of the folder."""
    return path.is_file() and path.resolve().is_relative_to(root)

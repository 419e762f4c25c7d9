"""The commands that the documents tell, found in their code blocks and between their backticks."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "cluster" / "README.md")
PROGRAMS = {
    "apt-get",
    "aws",
    "chmod",
    "cp",
    "curl",
    "docker",
    "export",
    "gcloud",
    "kubectl",
    "make",
    "mkdir",
    "mv",
    "pip",
    "pytest",
    "python",
    "ray",
    "raymuse",
    "tar",
    "test",
    "torchrun",
    "xdg-open",
}


@dataclass(frozen=True)
class Told:
    """One command of a page, in words as the shell would hand them over."""

    page: str
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        return self.words[0]

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks() -> list[Told]:
    """Every command that stands on a line of its own in a code block, once a page."""
    return list(dict.fromkeys(told for page in PAGES for line in _code(page) for told in _commands(page.name, line)))


def inline() -> list[Told]:
    """Every `raymuse ...` of the running text, once."""
    found = {}
    for page in PAGES:
        for text in re.findall(r"`(raymuse [a-z][^`]*)`", page.read_text()):
            words = tuple(text.replace("|", " ").split())
            found.setdefault(words, Told(page.name, words))
    return list(found.values())


def _code(page: Path) -> Iterator[str]:
    """The lines of a page's code blocks, indented or fenced, with what a backslash continues."""
    fenced, held = False, ""
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not (fenced or line.startswith("    ")):
            continue
        held += line.strip().removeprefix("$ ")
        if held.endswith("\\"):
            held = held[:-1]
            continue
        yield held
        held = ""


def _commands(page: str, line: str) -> Iterator[Told]:
    """The commands of a line, where it is one: what stands between `;`, `&&`, `|` and `&`."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = [word for word in lexer if word not in ("...", "\\")]
    except ValueError:
        return
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set(";&|"):
            if command and (program := Path(command[0]).name) in PROGRAMS:
                yield Told(page, (program, *command[1:]))
            command = []
        else:
            command.append(word.strip("[]") if word.startswith("[--") else word)

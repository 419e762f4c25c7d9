"""The token that a cluster asks for: found as Ray finds it, and never shown.

`RAY_AUTH_TOKEN`, else the file `RAY_AUTH_TOKEN_PATH`, else `~/.ray/auth_token`. It goes to Ray in a header, and nowhere
else: into no message, no job's environment, no archive and no run.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from raymuse.config.errors import UserError

MODES = ("token", "disabled")
DEFAULT_FILE = "~/.ray/auth_token"


@dataclass(frozen=True)
class Token:
    """A token and where it was found; its text is in no `repr`."""

    text: str = field(repr=False)
    place: str

    @property
    def headers(self) -> dict[str, str]:
        """What carries it in HTTP."""
        return {"Authorization": f"Bearer {self.text}"}


def find_token() -> Token | None:
    """The token to send; None where RAY_AUTH_MODE=disabled says that the cluster asks for none.

    Without RAY_AUTH_MODE a token is sent, and `token` is written into the environment: Ray's own default depends on
    what it finds.

    Raises:
        UserError: there is none, its file may be read by others, or RAY_AUTH_MODE is neither of the two.
    """
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode not in MODES:
        raise UserError(f"RAY_AUTH_MODE={mode}: it is {' or '.join(MODES)}.")
    if mode == "disabled":
        return None
    if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(text, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH") or None
    path = Path(named or DEFAULT_FILE).expanduser()
    if named is None and not path.exists():
        raise UserError(
            f"no token for the cluster: put the one it was started with into {DEFAULT_FILE} (chmod 600), or name its "
            "file in RAY_AUTH_TOKEN_PATH. For a cluster that asks for none: RAY_AUTH_MODE=disabled."
        )
    return _read(path)


def _read(path: Path) -> Token:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"cannot read the token file {path}: {reason}.") from None
    if mode & 0o077:
        raise UserError(f"the token file {path} may be read by others (mode {mode:04o}): chmod 600 {path}")
    if not text:
        raise UserError(f"the token file {path} is empty.")
    return Token(text, str(path))

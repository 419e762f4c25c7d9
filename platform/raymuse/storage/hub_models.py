"""Model folders to the Hugging Face Hub: one commit, with what is in the folder and nothing else."""

import os
from pathlib import Path
from typing import Any

from raymuse.config.errors import UserError

_OWN = ("_manifest/", "_SUCCESS")  # what our stages keep in a folder for themselves


def require_login(repository: str) -> None:
    """Raise UserError where nothing could be sent to `owner/name`, before any work is done."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            f"push_to={repository}: there is no token for the Hugging Face Hub. Make one that may write at "
            "huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN."
        )


def push(folder: Path, repository: str, private: bool, message: str) -> str:
    """Send a model folder, into a repository that is made where there is none; the commit's address.

    HF_ENDPOINT names another Hub.

    Raises:
        UserError: the Hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api: Any = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    wanted = [name for name in names if not name.startswith(_OWN)]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, str(folder / name)) for name in wanted]
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except Exception as error:  # of a dozen kinds: no network, no right to write, a name that is not one
        said = " ".join(str(error).split())
        raise UserError(
            f"push_to={repository}: the Hugging Face Hub did not take {folder}: {said[:300]} The folder is whole; run "
            "the same command again to send it."
        ) from error

"""Where weights come from: local folders and Hugging Face ids alike, safetensors only, with a fingerprint."""

import hashlib
from pathlib import Path

from raymuse.config.errors import UserError

HUB = "hf://"


def require_safetensors(folder_or_id: str, part: str) -> tuple[str, str | None]:
    """The (root, subfolder) to load from. A local folder may be the part itself or a model folder that holds it.

    A Hugging Face id stands as `hf://owner/name` (inside a flow's recipe, whose bare names are folders), or bare.

    Raises:
        UserError: for a local folder that is missing, or that has only pickled weights.
    """
    root = Path(folder_or_id)
    if folder_or_id.startswith(HUB):
        return folder_or_id.removeprefix(HUB), part
    if not root.exists():
        if folder_or_id.startswith(("/", ".")) or folder_or_id.count("/") != 1:
            raise UserError(f"{folder_or_id} does not exist. Give a folder with {part}/, or a Hugging Face id.")
        return folder_or_id, part
    subfolder = part if (root / part / "config.json").exists() else None
    folder = root / subfolder if subfolder else root
    if not (folder / "config.json").exists():
        raise UserError(f"{folder_or_id} holds neither config.json nor {part}/config.json: it is no {part} folder.")
    if not list(folder.glob("*.safetensors")):
        pickled = [path.name for path in folder.glob("*") if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}]
        raise UserError(
            f"{folder} holds no .safetensors file"
            + (f" ({pickled[0]} is a pickle, which can run code and is not read)" if pickled else "")
            + ". Convert it: load it where you trust it and call save_pretrained(..., safe_serialization=True)."
        )
    return str(root), subfolder


def weights_sha256(folder_or_id: str, part: str) -> str:
    """sha256 (hex) over the part's safetensors files, in the order of their names; an id stands for itself."""
    root, subfolder = require_safetensors(folder_or_id, part)
    if not Path(root).exists():
        return f"id:{root}"
    digest = hashlib.sha256()
    for path in sorted((Path(root) / (subfolder or "")).glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def without_bars() -> None:
    """No progress bar of transformers for a load from disk in this process; downloads keep theirs."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()

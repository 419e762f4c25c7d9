"""Where weights come from: local folders and Hugging Face ids alike, safetensors only, with a fingerprint."""

import hashlib
import re
from pathlib import Path

from raymuse.config.errors import UserError

HUB = "hf://"
TWINS = ("*.fp16[.-]*", "*.bf16[.-]*")  # names of half-precision twins, which are loaded only as a variant
# NAME.fp16.safetensors; of shards NAME.fp16-00001-of-00002, and formerly NAME-00001-of-00002.fp16.
_VARIANT = re.compile(r"^[^.]+?(?:\.([a-z]\w*))?(?:-\d+-of-\d+)?\.safetensors$")
_READ = ("*.json", "*.safetensors", "*.txt", "*.model")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_TOKENIZER = (
    *("tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "added_tokens.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)


def require_safetensors(folder_or_id: str, part: str, variant: str | None = None) -> tuple[str, str | None]:
    """The (root, subfolder) on this disk to load from: the part itself, or a model folder that holds it.

    Of several sets of weights the variant's (e.g. "fp16") are meant, or those without a variant. A Hugging Face id
    stands as `hf://owner/name` (inside a flow's recipe, whose bare names are folders), or bare; what the part needs of
    it is downloaded once, to the Hub's own cache.

    Raises:
        UserError: for a folder or id that is missing, or that has only pickled weights.
    """
    name = hub_id(folder_or_id, part)
    root = Path(folder_or_id) if name is None else _download(name, part, variant)
    subfolder = part if (root / part / "config.json").exists() else None
    folder = root / subfolder if subfolder else root
    if not (folder / "config.json").exists():
        raise UserError(f"{folder_or_id} holds neither config.json nor {part}/config.json: it is no {part} folder.")
    if not weight_files(folder, variant):
        if others := sorted({str(_variant(path)) for path in folder.glob("*.safetensors")}):
            raise UserError(
                f"{folder} has no weights {f'of the variant {variant!r}' if variant else 'without a variant'}; "
                f"it has the variants {', '.join(others)}."
            )
        pickled = [path.name for path in folder.glob("*") if path.suffix in _PICKLES]
        raise UserError(
            f"{folder_or_id if name else folder} holds no .safetensors file"
            + (f" ({pickled[0]} is a pickle, which can run code and is not read)" if pickled else "")
            + (" (pickles can run code and are not read)" if name else "")
            + ". Convert it: load it where you trust it and call save_pretrained(..., safe_serialization=True)."
        )
    return str(root), subfolder


def hub_id(folder_or_id: str, part: str) -> str | None:
    """The Hugging Face id that is meant; None for a folder. Raises UserError for a folder that does not exist."""
    if folder_or_id.startswith(HUB):
        return folder_or_id.removeprefix(HUB)
    if Path(folder_or_id).exists():
        return None
    if folder_or_id.startswith(("/", ".")) or folder_or_id.count("/") != 1:
        raise UserError(f"{folder_or_id} does not exist. Give a folder with {part}/, or a Hugging Face id.")
    return folder_or_id


def weights_sha256(folder_or_id: str, part: str) -> str:
    """sha256 (hex) over the part's safetensors files, in the order of their names, wherever they came from."""
    root, subfolder = require_safetensors(folder_or_id, part)
    digest = hashlib.sha256()
    for path in weight_files(Path(root, subfolder or "")):
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def tokenizer_sha256(folder_or_id: str) -> str:
    """sha256 (hex) over the names and the bytes of the files of a text encoder's tokenizer, wherever they came from.

    Raises:
        UserError: as `require_safetensors`, or where there is no file of a tokenizer.
    """
    folder = tokenizer_folder(Path(require_safetensors(folder_or_id, "text_encoder")[0]))
    sums = []
    for path in sorted(folder / name for name in _TOKENIZER if (folder / name).is_file()):
        with path.open("rb") as stream:
            sums.append(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n")
    if not sums:
        raise UserError(f"{folder} holds no tokenizer: none of {', '.join(_TOKENIZER)}. Put the text encoder's there.")
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def tokenizer_folder(root: Path) -> Path:
    """Where the tokenizer of a text encoder lies that is loaded from `root`: in `tokenizer/`, or beside the weights."""
    return root / "tokenizer" if (root / "tokenizer").is_dir() else root


def without_bars() -> None:
    """No progress bar of transformers for a folder on a disk in this process; downloads keep theirs."""
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a part: those of the variant, or those of none."""
    return sorted(path for path in folder.glob("*.safetensors") if _variant(path) == variant)


def variant_name(name: str, variant: str) -> str:
    """The name of a safetensors file's twin: NAME.fp16.safetensors, NAME.fp16-00001-of-00002.safetensors."""
    stem, dash, shard = name.removesuffix(".safetensors").partition("-")
    return f"{stem}.{variant}{dash}{shard}.safetensors"


def _variant(path: Path) -> str | None:
    match = _VARIANT.match(path.name)
    return match[1] if match else None


def _download(name: str, part: str, variant: str | None) -> Path:
    """The snapshot of a repository with the part and its tokenizer: from folders of their own, or all from its root."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json", "*/config.json"]))
        twins = [*TWINS] if variant is None else []
        if (folder / part / "config.json").exists():
            wanted, left = [f"{place}/{kind}" for place in (part, "tokenizer") for kind in _READ], twins
        else:
            wanted, left = list(_READ), [*twins, "*/*"]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=left))
    except Exception as error:  # of a dozen kinds: no network, no such id, a gated one, an incomplete cache
        said = " ".join(str(error).split())
        raise UserError(
            f"{name} is no folder, and as a Hugging Face id it cannot be fetched: {said[:300]} "
            "Name a folder that there is, or check the id and the network."
        ) from error

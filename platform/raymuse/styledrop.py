"""The style of one picture in two rounds: what `raymuse styledrop` runs (Sohn et al., arXiv 2306.00983).

output/style/            the picture and its caption
output/first/            its tokens, and the LoRA that learned it
output/candidates/       pictures that this LoRA draws; candidates.png has them with their numbers
output/second/           the kept ones, their tokens, and the LoRA that learned these
output/images/           what the second LoRA draws of the same prompts

Every stage knows what it has finished, so that the same command goes on where it stopped.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from raymuse.config.errors import UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.styledrop import SUBJECTS, StyledropConfig
from raymuse.encoding.pictures import decode
from raymuse.models.clip import Clip
from raymuse.recording import recorded, run_of
from raymuse.stages.generate import generate
from raymuse.stages.pretokenize import pretokenize
from raymuse.stages.train import train
from raymuse.storage.contact_sheet import Entry, sheet_png
from raymuse.storage.folder import Folder
from raymuse.storage.generated import Generated, read_part
from raymuse.storage.manifest import Manifest, read_finished
from raymuse.storage.pictures import png_bytes
from raymuse.storage.rejects import Unreadable
from raymuse.tracking.run import Run, finishing

SHEET = "candidates.png"


def styledrop(config: StyledropConfig, run: Run, uri: str | None) -> str:
    """Run what is not finished; the folder of the last pictures, or of the candidates where a person must choose.

    Args:
        run: the parent of the stages' runs.
        uri: of the MLflow server that has it, where there is one.

    Raises:
        UserError: the output is of another picture or caption; for whatever a stage finds wrong, before that stage
            writes anything.
    """
    root = Path(config.output).resolve()
    Folder(str(root)).require_local("the pictures of both rounds are put together there")
    picture = _read(config.picture)
    style = {"picture": hashlib.sha256(picture).hexdigest(), "caption": config.told}
    manifest = Manifest.open(str(root), {"stage": "styledrop", **style})
    try:
        _write_pictures(root / "style", [(picture, config.told)], Path(config.picture).suffix)
        return _both_rounds(config, root, _Flow(config, root, run, uri))
    finally:
        manifest.release()


def _both_rounds(config: StyledropConfig, root: Path, flow: "_Flow") -> str:
    lora = flow.learn("first", root / "style")
    candidates = read_candidates(flow.draw("candidates", lora))
    sheet = _sheet(candidates, config.told)
    sheet.save(root / SHEET)
    flow.run.picture("candidates", sheet, 0)
    chosen = choose(config, candidates)
    if not chosen:
        print(f"look at {root / SHEET} and go on with the numbers that you keep: kept=[1,5,7]", flush=True)
        return str(root / "candidates")
    print(f"the second round learns from {', '.join(str(number) for number in chosen)} of {root / SHEET}", flush=True)
    kept = [candidates[number - 1] for number in chosen]
    _write_pictures(root / "second" / "pictures", [(png_bytes(one.pixels, {}), one.row.prompt) for one in kept])
    return flow.draw("images", flow.learn("second", root / "second" / "pictures"))


class _Flow:
    """The stages that both rounds share."""

    def __init__(self, config: StyledropConfig, root: Path, run: Run, uri: str | None) -> None:
        self.config, self.root, self.run, self.uri = config, root, run, uri

    def learn(self, name: str, pictures: Path) -> str:
        """Tokens of a folder of pictures, and the LoRA that learned them."""
        place = self.root / name
        tokens = self.config.pretokenize.model_copy(
            update={"input": str(pictures), "output": str(place / "tokens"), "min_encoders": None, "encoders": 1}
        )
        assert isinstance(tokens, PretokenizeConfig)
        self._run(f"{name} tokens", pretokenize, tokens)
        training = {"input": tokens.output, "output": str(place / "lora")}
        self._run(f"{name} lora", train, self.config.train.model_copy(update=training))
        return f"{place}/lora/model"

    def draw(self, name: str, lora: str) -> str:
        """Pictures of the prompts with a LoRA, once each (`generate.samples` times)."""
        drawing = {"prompts": self._prompts(), "output": str(self.root / name), "lora": lora}
        return self._run(name, generate, self.config.generate.model_copy(update=drawing))

    def _run(self, name: str, stage: Any, config: Any) -> str:
        print(f"[{name}] -> {config.output}", flush=True)
        identity = self.run.identity  # children stand in their parent's experiment, where MLflow shows them below it
        child = run_of(config, self.uri, identity.experiment, name, self.run) if identity is not None else Run.off()
        with finishing(child), recorded(config, child):
            return str(stage(config, child))

    def _prompts(self) -> str:
        if self.config.prompts is not None:
            return self.config.prompts
        path = self.root / "prompts.txt"
        if not path.exists():
            Folder(str(self.root)).write(
                path.name, "".join(f"{one} {self.config.style}\n" for one in SUBJECTS).encode()
            )
        return str(path)


def choose(config: StyledropConfig, candidates: Sequence[Generated]) -> list[int]:
    """Numbers (from 1) of the candidates to learn from: those said by hand, or the best by CLIP score; none: ask.

    Raises:
        UserError: for numbers that no candidate has.
    """
    if config.kept:
        wrong = [number for number in config.kept if not 1 <= number <= len(candidates)]
        if wrong:
            raise UserError(f"kept: there is no candidate {wrong[0]}; {SHEET} has 1 to {len(candidates)}.")
        return sorted(set(config.kept))
    if config.clip is None:
        return []
    clip = Clip.load(config.clip)
    scores = [float(clip.score(one.pixels[None], [one.row.prompt])[0]) for one in candidates]
    best = sorted(range(len(scores)), key=lambda number: (-scores[number], number))[: config.keep]
    return sorted(number + 1 for number in best)


def read_candidates(address: str) -> list[Generated]:
    """All pictures of a finished batch, in the order of its prompts."""
    parts = read_finished(address, "generate")
    pictures = [one for part in sorted(parts) for one in read_part(Folder(address), part)]
    return sorted(pictures, key=lambda one: (one.row.index, one.row.sample))


def _sheet(candidates: Sequence[Generated], title: str) -> Image.Image:
    entries = [Entry(f"{number}: {one.row.prompt}", (one.pixels,)) for number, one in enumerate(candidates, 1)]
    return sheet_png(entries, ("kept=[...] takes these numbers",), title)


def _read(address: str) -> bytes:
    """The bytes of a picture that can be decoded. Raises UserError."""
    folder, name = Folder.holding(address)
    try:
        data = folder.read(name)
        decode(data)
    except (OSError, Unreadable) as error:
        raise UserError(f"{address}: cannot be read as a picture: {error}.") from error
    return data


def _write_pictures(place: Path, pictures: Sequence[tuple[bytes, str]], ending: str = ".png") -> None:
    """A folder of pictures with a .txt each; what is there already stays."""
    folder = Folder(str(place))
    folder.create()
    for number, (data, caption) in enumerate(pictures):
        for name, content in ((f"{number:03d}{ending}", data), (f"{number:03d}.txt", caption.encode())):
            if not folder.exists(name) or folder.read(name) != content:
                folder.write(name, content)

"""Pictures drawn at once, without Ray: `raymuse edit`, and a drawn picture once more (`generate --from-png`)."""

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from raymuse.config.edit import EditConfig, RepeatConfig
from raymuse.config.errors import UserError
from raymuse.config.sampling import Options
from raymuse.drawing.model_folder import model_sha256
from raymuse.pipeline import Pipeline, image_seed
from raymuse.storage.pictures import png_bytes, png_facts

# What a PNG must say to be drawn again.
NEEDED = {
    *("prompt", "negative", "seed", "width", "height"),
    *("steps", "guidance", "temperature", "batch_size", "model"),
}


def edit(config: EditConfig) -> list[str]:
    """Draw the variations and return their files. Each PNG carries how it was made.

    Raises:
        UserError: before any work, for what cannot be read or does not fit together.
    """
    places = _places(Path(config.output), config.samples)
    pipeline = Pipeline.load(config.model, batch_size=1, lora=config.adapters, precision=config.precision)
    facts = config.model_dump(
        mode="json", exclude={"stage", "model", "lora", "lora_scales", "output", "samples", "seed"}
    )
    facts |= {"model": model_sha256(config.model, config.adapters)[:16], "batch_size": 1}
    for sample, place in enumerate(places):
        seed = config.seed if config.samples == 1 else image_seed(config.seed, 0, sample)
        (picture,) = pipeline.edit(
            config.task,
            [config.prompt],
            [config.picture],
            seeds=[seed],
            negative=config.negative,
            masks=None if config.mask is None else [config.mask],
            strength=config.strength,
            sides=config.sides,
            rounds=config.rounds,
            share=config.share,
            size=config.size,
            paste=config.paste,
            superres=cast(Options, config.superres_sampling),
            **config.sampling,
        ).pictures
        place.write_bytes(png_bytes(picture.pixels, {**facts, "seed": seed}))
    return [str(place) for place in places]


def repeat(config: RepeatConfig) -> str:
    """Draw a picture of `raymuse generate` once more, from what its file says, and return the new file.

    Raises:
        UserError: for a file that does not say how it was drawn, or another model.
    """
    png = Path(config.picture)
    (output,) = _places(Path(config.output), 1)
    if not png.is_file():
        raise UserError(f"the picture {png} does not exist.")
    facts = png_facts(png.read_bytes())
    if missing := sorted(NEEDED - facts.keys()):
        raise UserError(
            f"{png} does not say how it was drawn ({', '.join(missing)} missing from its text): give a PNG that "
            "`raymuse generate` wrote, not saved anew by another program."
        )
    if facts["model"] != (given := model_sha256(config.model, config.adapters)[:16]):
        raise UserError(f"{png} was drawn by another model: {facts['model']}, and {config.model} is {given}.")
    if facts.get("task"):
        raise UserError(f"{png} was drawn from another picture ({facts['task']}), which it does not hold.")
    output.write_bytes(png_bytes(_drawn(config, facts), facts))
    return str(output)


def _drawn(config: RepeatConfig, facts: dict[str, Any]) -> NDArray[np.uint8]:
    """The picture of the size that the file says, or the base's own.

    Files from before one could choose say nothing of the precision, and of no other sampling.
    """
    precision = facts.get("precision", "fp32")
    pipeline = Pipeline.load(config.model, batch_size=facts["batch_size"], lora=config.adapters, precision=precision)
    scale, own = pipeline.settings.size // pipeline.settings.base_size, pipeline.settings.base_size
    # Files from before there were other sizes do not name a task, and tell a base by its size.
    base = facts.get("base", "task" not in facts and scale > 1 and facts["width"] == own)
    scale = scale if base else 1
    (picture,) = pipeline(
        [facts["prompt"]],
        seeds=[facts["seed"]],
        negative=facts["negative"],
        steps=facts["steps"],
        guidance=facts["guidance"],
        temperature=facts["temperature"],
        size=(facts["width"] * scale, facts["height"] * scale),
        superres=json.loads(facts.get("superres_sampling") or "{}"),
        **json.loads(facts.get("sampling") or "{}"),
    ).pictures
    return picture.base_pixels if base else picture.pixels


def _places(output: Path, samples: int) -> list[Path]:
    """Where the pictures go. Raises UserError for another kind of file, or a folder that is not there."""
    if output.suffix.lower() != ".png":
        raise UserError(f"output={output}: pictures are written as .png, which carries how they were made.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.absolute().parent}; make it first.")
    return [output] if samples == 1 else [output.with_stem(f"{output.stem}-{sample}") for sample in range(samples)]

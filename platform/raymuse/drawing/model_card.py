"""README.md of a model folder: what it is, how to draw with it, what it was made from and what that took."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymuse.config.export import ExportConfig
from raymuse.drawing.model_folder import Settings
from raymuse.storage.folder import Folder

TRAINED = ("base", "superres", "critic", "vqgan", "superres_vqgan", "text_encoder")
"""Fields of the export's config that say where the parts came from."""


def model_card(config: ExportConfig, settings: Settings, sums: Mapping[str, str], diffusers: bool) -> str:
    """The card; `sums` are sha256 of the parts' weights, and `diffusers` opens the base as well."""
    sections = [_head(config, settings, diffusers), _weights(config, sums), _training(config), _scores(config)]
    return "\n".join(section for section in sections if section)


def _head(config: ExportConfig, settings: Settings, diffusers: bool) -> str:
    cascade = f"\nA super-resolution transformer draws the final {settings.size} px.\n" if settings.superres else ""
    library = "diffusers" if diffusers else "raymuse"
    licence = f"license: {config.licence}\n" if config.licence else ""
    also = (
        ", or open the base in\ndiffusers: `AmusedPipeline.from_pretrained(FOLDER)`."
        if diffusers
        else ". diffusers\nhas no such pipeline."
    )
    return f"""---
library_name: {library}
pipeline_tag: text-to-image
{licence}tags: [muse, amused, masked-image-modeling, raymuse]
---
# {config.name}

A masked-image text-to-image model, {settings.base_size} px, trained with raymuse.
{cascade}
Draw with raymuse: `raymuse generate demo:generate model=FOLDER prompts=prompts.txt output=images`{also}

Defaults: {settings.base.steps} steps, guidance {settings.base.guidance}, temperature {settings.base.temperature}.
"""


def _weights(config: ExportConfig, sums: Mapping[str, str]) -> str:
    rows = "".join(f"| {name} | `{value[:16]}` |\n" for name, value in sums.items())
    twins = f"; also as {', '.join(config.variants)} (`variant=`)" if config.variants else ""
    styles = ""
    if config.adapters and config.lora_apart:
        styles = "\nLoRAs, not in the weights: " + ", ".join(f"`{place}`" for place in apart(config)) + "\n"
    elif config.adapters:
        styles = f"\nLoRAs in the weights: {len(config.adapters)}\n"
    return f"Weights: {config.weights}, fp32{twins}.\n\n| part | sha256 of its weights |\n|---|---|\n{rows}{styles}"


def apart(config: ExportConfig) -> dict[str, str]:
    """Where each LoRA lies in the folder, and where it came from."""
    return {f"lora/{number}": address for number, address in enumerate(config.adapters)}


def _training(config: ExportConfig) -> str:
    """What the trainings say of themselves; nothing of parts that came without."""
    rows = []
    sources = {field: getattr(config, field) for field in TRAINED}
    sources |= {f"lora {number}": str(Path(address).parent) for number, address in enumerate(config.adapters)}
    for part, address in sources.items():
        record = _record(address)
        if record is not None:
            code, data = record["code"], str(record["data"])[:16]
            rows.append(
                f"| {part} | {record['steps']:,} of {record['batch_size']:,} | {record['precision']} | "
                f"{record['worker_hours']:,.2f} {record['device']} hours | `{data}` | "
                f"{record['parent'] or 'nothing'} | {code} |\n"
            )
    if not rows:
        return ""
    head = "| part | steps | precision | cost | data | started from | raymuse |\n|---|---|---|---|---|---|---|\n"
    return f"## Training\n\n{head}{''.join(rows)}"


def _record(address: str | None) -> dict[str, Any] | None:
    """`training.json` of a training's output, or of the output whose `model` it is; None where there is none."""
    places = [Path(address), Path(address).parent] if address else []
    found = [place / "training.json" for place in places if (place / "training.json").is_file()]
    return dict(json.loads(found[0].read_text())) if found else None


def _scores(config: ExportConfig) -> str:
    if config.scores is None:
        return ""
    found = _flat(json.loads(Folder(config.scores).read("scores.json")))
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in found.items())
    return f"## Scores\n\n| score | |\n|---|---|\n{rows}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers by their dotted names."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{name}"] = value
    return flat

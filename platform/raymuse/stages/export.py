"""Trained parts to one model folder in diffusers' layout.

model_index.json  transformer/  vqvae/  text_encoder/  tokenizer/  scheduler/     diffusers' AmusedPipeline opens it
superres/  critic/  generation_config.json  README.md                           ours, beside it

diffusers has neither Muse's base nor an aMUSEd that reads T5: a folder with one of these is laid out alike and opened
by this project alone. Its model_index.json names a pipeline that diffusers does not know, and it has no scheduler/.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from raymuse.config.errors import UserError
from raymuse.config.export import ExportConfig
from raymuse.drawing.model_card import apart, model_card
from raymuse.drawing.model_folder import Settings, local_folder, trained_part
from raymuse.models.base import record_of
from raymuse.models.lora import adapter_sha256
from raymuse.models.network_files import save_network
from raymuse.models.variants import write_variant
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import HUB, require_safetensors, tokenizer_folder, weights_sha256, without_bars
from raymuse.pipeline import Pipeline
from raymuse.recording import Made
from raymuse.storage.folder import Folder
from raymuse.storage.hub_models import push, require_login
from raymuse.storage.manifest import Manifest
from raymuse.tracking.run import Run, register

COMPONENTS = {
    "scheduler": ("diffusers", "AmusedScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "transformer": ("diffusers", "UVit2DModel"),
    "vqvae": ("diffusers", "VQModel"),
}
OURS = "RaymusePipeline"
SAMPLES = "samples.png"  # in a training's output: what it drew last


def export(config: ExportConfig, run: Run) -> str:
    """Assemble the model folder, open it once to see that it works, and return it.

    Raises:
        UserError: for parts that are missing or not trained to the end.
    """
    Folder(config.output).require_local("diffusers and transformers read models from a disk")
    if config.push_to is not None:
        require_login(config.push_to)
    if config.scores is not None and not Folder(config.scores).exists("scores.json"):
        raise UserError(f"scores={config.scores}: there is no scores.json. `raymuse score` writes it.")
    parts = _parts(config)
    sums = {name: weights_sha256(str(folder), name) for name, folder in parts.items() if name != "tokenizer"}
    sums |= {f"lora {number}": adapter_sha256(address) for number, address in enumerate(config.adapters)}
    manifest = Manifest.open(config.output, {**config.identity(), "weights": sums})
    folder = Path(config.output)
    if not manifest.finished:
        run.params({**config.model_dump(mode="json"), **sums})
        for name, source in parts.items():
            shutil.copytree(source, folder / name, dirs_exist_ok=True, ignore=_not_of(name))
        settings = _settings(config, folder)
        settings.save(folder)
        write_index(folder)
        if config.lora_apart:
            for place, address in apart(config).items():
                shutil.copytree(address, folder / place, dirs_exist_ok=True)
        elif config.adapters:
            _merge(folder, config.adapters)
        for variant in config.variants:
            for name in parts.keys() - {"tokenizer"}:
                write_variant(folder / name, variant)
        pipeline = Pipeline.load(config.output, lora=dict.fromkeys(_apart(config, folder), 1.0))
        run.metrics(_sizes(pipeline), 0)
    _write_card(config, folder, parts.keys() - {"tokenizer"})  # also of a folder that is finished: scores come later
    if not manifest.finished:
        manifest.finish(**sums)
    manifest.release()
    _show(config, run)
    if config.alias is not None:
        _register(config, run, sums)
    if config.push_to is not None:
        run.tags({"hub": push(folder, config.push_to, config.push_private, f"{config.name}, by raymuse export")})
    return config.output


def _show(config: ExportConfig, run: Run) -> None:
    """The model card, and what the parts drew at the end of their trainings."""
    if run.id is None:
        return
    run.file(Path(config.output, "README.md"))
    for part in ("base", "superres"):
        sheet = Path(getattr(config, part) or "", SAMPLES)
        if sheet.is_file():
            run.picture(f"{part} at its end", sheet, 0)


def _register(config: ExportConfig, run: Run, sums: dict[str, str]) -> None:
    """A version of the registered model: the same weights are one version, however often they are exported.

    Raises:
        UserError: there is no server, or no such alias can be.
    """
    if run.id is None:
        raise UserError(
            f"alias={config.alias}: no MLflow is named (--mlflow URI, MLFLOW_TRACKING_URI) to register with"
        )
    made = {name: Made.read(address) for name in ("vqgan", "base", "superres") if (address := getattr(config, name))}
    parents = {"export": run.id, **{name: one.run for name, one in made.items() if one is not None}}
    card = Path(config.output, "README.md").read_text().split("---", 2)[-1].strip()
    sheet = Path(config.superres or config.base, SAMPLES)
    version = register(
        run,
        config.name,
        config.output,
        card,
        alias=config.alias,
        picture=sheet if sheet.is_file() else None,
        parents=parents,
        key=hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest(),
    )
    told = f"version {version}" if version is not None else "a version, once MLflow is back"
    print(f"models:/{config.name}@{config.alias} is {told}", flush=True)


def _write_card(config: ExportConfig, folder: Path, parts: Set[str]) -> None:
    own = {name: weights_sha256(str(folder / name), name) for name in sorted(parts)}
    (folder / "README.md").write_text(model_card(config, _settings(config, folder), own, opens_in_diffusers(folder)))


def _apart(config: ExportConfig, folder: Path) -> list[str]:
    return [str(folder / place) for place in apart(config)] if config.lora_apart else []


def _parts(config: ExportConfig) -> dict[str, Path]:
    """Where each part comes from; a training's output stands for its `model/` (or `model_raw/`)."""
    chosen = "model" if config.weights == "ema" else "model_raw"
    root, subfolder = require_safetensors(config.text_encoder, "text_encoder")
    parts = {
        "transformer": trained_part(config.base, "transformer", chosen),
        "vqvae": _within(config.vqgan, "vqvae"),
        "text_encoder": Path(root, subfolder or ""),
        "tokenizer": tokenizer_folder(Path(root)),
    }
    if config.superres is not None:
        parts["superres"] = trained_part(config.superres, "superres", chosen)
    if config.superres_vqgan is not None:
        if config.superres is None:
            raise UserError(
                "superres_vqgan: there is no superres whose ids it would decode. Leave it out, or name one."
            )
        parts["superres_vqvae"] = _within(config.superres_vqgan, "vqvae")
    if config.critic is not None:
        parts["critic"] = trained_part(config.critic, "critic", chosen)
    missing = [str(path) for path in parts.values() if not path.exists()]
    if missing:
        raise UserError(f"cannot export: {', '.join(missing)} missing. Train these parts to the end first.")
    return parts


def _within(address: str, part: str) -> Path:
    """A part of a model folder (or of a Hugging Face id), or the folder of that part itself."""
    folder = local_folder(address) if address.startswith(HUB) else Path(address)
    return folder / part if (folder / part).exists() else folder


def _not_of(part: str) -> Callable[[Any, list[str]], list[str]]:
    """What is not copied: a T5's repository has weights, pickles and tokenizer in one folder."""
    kept = {".json", ".txt", ".model"} if part == "tokenizer" else {".json", ".safetensors"}
    return lambda _, names: [name for name in names if Path(name).suffix not in kept]


def _merge(folder: Path, adapters: dict[str, float]) -> None:
    """Write the weights of a model folder anew, with LoRAs in them."""
    pipeline = Pipeline.load(str(folder), lora=adapters)
    networks: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "transformer": (pipeline.base, record_of(pipeline.base.config))
    }
    if pipeline.superres is not None:
        networks["superres"] = (pipeline.superres, record_of(pipeline.superres.config))
    for part, (network, record) in networks.items():
        shutil.rmtree(folder / part)
        save_network(network, record, folder / part, network.state_dict())
    shutil.rmtree(folder / "text_encoder")
    without_bars()
    pipeline.text.network.save_pretrained(folder / "text_encoder", safe_serialization=True)


def _settings(config: ExportConfig, folder: Path) -> Settings:
    """Sizes follow from the grids that the transformers were trained on."""
    factor = Vqgan.load(str(folder)).factor
    base_size = _read(folder / "transformer")["sample_size"] * factor
    own = folder / "superres_vqvae"
    high_factor = Vqgan.load(str(own)).factor if own.exists() else factor
    high = _read(folder / "superres")["high_grid"] * high_factor if (folder / "superres").exists() else None
    micro = config.micro_conditioning or (base_size, base_size, 0, 0, 6)
    return Settings(
        base_size=base_size,
        size=high or base_size,
        micro_conditioning=micro,
        base=config.base_sampling,
        superres=config.superres_sampling if high else None,
    )


def write_index(folder: Path) -> None:
    """model_index.json, and the scheduler where they make the folder an AmusedPipeline of diffusers."""
    if not opens_in_diffusers(folder):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": OURS}, indent=2) + "\n")
        return
    written_for = {"_diffusers_version": version("diffusers")}
    mask_id = _read(folder / "transformer")["vocab_size"] - 1
    scheduler = {
        "_class_name": "AmusedScheduler",
        **written_for,
        "mask_token_id": mask_id,
        "masking_schedule": "cosine",
    }
    index = {"_class_name": "AmusedPipeline", **written_for, **{name: list(kind) for name, kind in COMPONENTS.items()}}
    (folder / "scheduler").mkdir(exist_ok=True)
    for place, record in (("scheduler/scheduler_config.json", scheduler), ("model_index.json", index)):
        (folder / place).write_text(json.dumps(record, indent=2) + "\n")


def opens_in_diffusers(folder: Path) -> bool:
    """Whether diffusers has these parts: aMUSEd's U-ViT, told by a CLIP."""
    tower = str(_read(folder / "text_encoder").get("model_type"))
    return _read(folder / "transformer").get("_class_name") == "UVit2DModel" and tower.startswith("clip")


def _sizes(pipeline: Pipeline) -> dict[str, float]:
    networks = {
        "base": pipeline.base,
        "superres": pipeline.superres,
        "vqgan": pipeline.vqgan.network,
    }
    return {
        f"{name}_parameters": float(sum(p.numel() for p in network.parameters()))
        for name, network in networks.items()
        if network is not None
    }


def _read(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))

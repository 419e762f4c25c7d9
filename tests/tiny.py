"""Tiny data and models for tests, made without Ray in seconds: shards, encoders, token shards, a model folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.config.sampling import SamplingConfig
from raymuse.config.training import BaseConfig, ClipConfig, SuperresConfig, VqganConfig
from raymuse.datasets import shapes
from raymuse.drawing.model_folder import Settings, load_base
from raymuse.encoding.chunks import decode_chunks
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.models import lora, lpips
from raymuse.models.base import Base, BaseShape, new_base, record_of
from raymuse.models.maskgit import MaskGitConfig
from raymuse.models.network_files import save_network
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.models.uvit import UVitConfig
from raymuse.models.weights import weights_sha256
from raymuse.serving.checker import Classifier
from raymuse.stages.export import write_index
from raymuse.storage.images import list_shards
from raymuse.storage.manifest import Manifest
from raymuse.storage.tokens import EMPTY, parquet_bytes
from raymuse.storage.webdataset_writer import write_shard
from raymuse.training.clip import ClipTask
from raymuse.training.vqgan import VqganTask

SIDE, LOW_SIDE, CODES, TEXT_LENGTH = 32, 16, 32, 24
VQGAN = {
    "block_out_channels": [8, 8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "num_vq_embeddings": CODES,
    "norm_num_groups": 4,
}
CLIP = {"width": 16, "layers": 2, "heads": 2, "projection": 8, "patch_size": 8}
UVIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "in_channels": 16,
    "block_out_channels": 16,
    "num_res_blocks": 1,
    "block_num_heads": 2,
    "micro_cond_encode_dim": 4,
    "micro_cond_embed_dim": 20,
}
MASKGIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SUPERRES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "low_res_layers": 1,
}


def write_shards(folder: Path, count: int = 48, per_shard: int = 16, side: int = SIDE) -> str:
    """Shards of shapes with captions, at `side` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count // per_shard):
        drawn = shapes.samples(per_shard, 0, side, held_out=False, start=number * per_shard)
        write_shard(folder / f"{number:05d}.tar", ((one.key, one.image, one.caption, {}) for one in drawn))
    return str(folder)


def vqgan_config(root: Path, shards: str, **changes: Any) -> VqganConfig:
    values = {"resolutions": (LOW_SIDE, SIDE), "crop": LOW_SIDE, "warm_steps": 2, "model": VQGAN}
    return VqganConfig(**{**_training(root, "vqgan", shards), **values, **changes})


def clip_config(root: Path, shards: str, **changes: Any) -> ClipConfig:
    values = {"resolution": SIDE, "vocabulary": 640, "text_length": TEXT_LENGTH, "model": CLIP}
    return ClipConfig(**{**_training(root, "clip", shards), **values, **changes})


def base_config(root: Path, tokens: str, **changes: Any) -> BaseConfig:
    values = {"ids": "low_ids", "model": UVIT}
    return BaseConfig(**{**_training(root, "base", tokens), **values, **changes})


def superres_config(root: Path, tokens: str, **changes: Any) -> SuperresConfig:
    return SuperresConfig(**{**_training(root, "superres", tokens), "model": SUPERRES, **changes})


def _training(root: Path, name: str, source: str) -> dict[str, Any]:
    optimizer = {"lr": 2e-3, "warmup_steps": 3}
    return {
        "input": source,
        "output": str(root / name),
        "steps": 12,
        "batch_size": 8,
        "workers": 0,
        "seed": 3,
        "optimizer": optimizer,
    }


def write_encoders(folder: Path, shards: str, codes: int = CODES) -> str:
    """A folder with `vqvae/`, `clip/`, `text_encoder/` and `tokenizer/`, of random weights."""
    task = VqganTask(vqgan_config(folder, shards, model={**VQGAN, "num_vq_embeddings": codes}))
    task.module(task.batch(np.arange(32), np.ones(32, np.float32)))
    task.codebook.start(torch.cat(task.module.latents), 0)  # so that the ids say something of the pictures
    network = task.network
    save_network(network, network.config.to_diffusers(), folder / "vqvae", network.state_dict())
    clip = ClipTask(clip_config(folder, shards))
    clip.save({f"network.{name}": value for name, value in clip.network.state_dict().items()}, folder)
    return str(folder)


def write_tokens(folder: Path, shards: str, encoders: str, **changes: Any) -> str:
    """Token shards as the pretokenize stage writes them, one part a shard."""
    values: dict[str, Any] = {"resolution": SIDE, "low_resolution": LOW_SIDE, "chunk_size": 16}
    values |= {"vqgan": encoders, "text_encoder": encoders, **changes}
    config = PretokenizeConfig(input=shards, output=str(folder), **values)
    encoder = ChunkEncoder(config)
    facts = {
        "vqgan_sha256": weights_sha256(encoders, "vqvae"),
        "text_encoder_sha256": weights_sha256(config.text_encoder, "text_encoder"),
        "codebook_size": encoder.crops.vqgan.codes,
        "low_codebook_size": encoder.crops.low_vqgan.codes,
        "text_length": encoder.captions.text.length,
    }
    manifest = Manifest.open(config.output, {**config.identity(), **facts})
    empty = parquet_bytes(encoder.captions([""]), facts)
    manifest.write_part(EMPTY, {f"captions/{EMPTY}.parquet": empty}, rows=0, rejects=0, source="")
    for number, shard in enumerate(list_shards(shards)):
        (chunk,) = decode_chunks(shard, config)
        encoded = encoder(chunk)
        part = f"part-{number:06d}"
        files = {
            f"tokens/{part}.parquet": parquet_bytes(encoded.tokens, facts),
            f"captions/{part}.parquet": parquet_bytes(encoded.captions, facts),
        }
        manifest.write_part(part, files, rows=len(encoded.tokens), rejects=0, source=shard.name)
    manifest.finish()
    return str(folder)


def write_model(folder: Path, encoders: str, *, cascade: bool = False, muse: bool = False, **changes: Any) -> str:
    """A model folder of random weights, as the export stage lays it out; `cascade` adds `superres/`.

    muse: Muse's own base.
    changes: of the base's shape.
    """
    source = Path(encoders)
    for part in ("vqvae", "text_encoder", "tokenizer"):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        _copy(source / part, folder / part)
    grid = LOW_SIDE // 4 if cascade else SIDE // 4
    shared = {"encoder_hidden_size": CLIP["width"], "vocab_size": CODES + 64, "codebook_size": CODES}
    told = {**shared, "sample_size": grid}
    base: BaseShape
    if muse:
        base = MaskGitConfig(**{**MASKGIT, **told, **changes})
    else:
        base = UVitConfig(**{**UVIT, **told, "cond_embed_dim": CLIP["projection"], **changes})
    save_network(new_base(base), record_of(base), folder / "transformer", _random_weights(new_base(base)))
    high = None
    if cascade:
        config = SuperResConfig(**{**SUPERRES, **shared, "low_vocab_size": CODES, "low_grid": 4, "high_grid": 8})
        save_network(SuperRes(config), config.to_dict(), folder / "superres", _random_weights(SuperRes(config)))
        high = SamplingConfig(steps=3, guidance=2.0)
    size = grid * 4
    Settings(size, SIDE, (size, size, 0, 0, 6), SamplingConfig(steps=5, guidance=3.0), high).save(folder)
    write_index(folder)
    return str(folder)


def write_adapter(folder: Path, model: str, seed: int = 0) -> str:
    """A LoRA of a model's base that changes its pictures, as a training leaves it."""
    network = load_base(Path(model) / "transformer")
    lora.insert(network, 2, 4.0, ["to_q", "to_v"], seed)
    draw = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    weights = {name: torch.randn(value.shape, generator=draw) for name, value in trained.items()}
    lora.save({"transformer": weights}, 4.0, folder)
    return str(folder)


def write_checker(folder: Path, pictures: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
    """An image classifier as transformers saves it, of random weights, and settings that refuse about half of some."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    network = ViTForImageClassification(
        ViTConfig(image_size=32, patch_size=8, id2label={0: "safe", 1: "unsafe"}, **sizes)  # type: ignore[arg-type]
    )
    with torch.no_grad():
        network.classifier.weight.normal_(0, 3)
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    scores = sorted(Classifier(str(folder), ("unsafe",), 0.5, "cpu").scores(picture)["unsafe"] for picture in pictures)
    middle = len(scores) // 2
    threshold = (scores[middle - 1] + scores[middle]) / 2
    assert scores[0] < threshold < scores[-1], "pictures that are all the same to it"
    return {"checker": str(folder), "checker_refuses": ("unsafe",), "checker_threshold": threshold}


def _random_weights(network: Base | SuperRes) -> dict[str, torch.Tensor]:
    """Large enough that every input, also behind zero-started layers, reaches the logits."""
    draw = np.random.default_rng(0)
    return {
        name: torch.from_numpy(draw.normal(0, 0.3, value.shape).astype(np.float32))
        for name, value in network.state_dict().items()
    }


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def json_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def vgg_state() -> dict[str, torch.Tensor]:
    """A state dict of the names and shapes of torchvision's vgg16 but for its classifier, of random weights."""
    draw, state, number, before = torch.Generator().manual_seed(0), {}, 0, 3
    for widths in lpips.WIDTHS:
        for width in widths:
            state[f"features.{number}.weight"] = (
                torch.randn(width, before, 3, 3, generator=draw) / (before * 4.5) ** 0.5
            )
            state[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=draw)
            number, before = number + 2, width
        number += 1
    return state


def linear_state() -> dict[str, torch.Tensor]:
    """A state dict of the names and shapes of LPIPS' linear layers for VGG16, of random weights."""
    draw = torch.Generator().manual_seed(1)
    widths = [widths[-1] for widths in lpips.WIDTHS]
    return {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1, generator=draw) for n, width in enumerate(widths)}

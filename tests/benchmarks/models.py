"""Model folders of random weights in the shapes that the benchmarks run: speed does not depend on the weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import VQModel

from raymuse.config.sampling import SamplingConfig
from raymuse.config.training import ClipConfig
from raymuse.datasets import shapes
from raymuse.drawing.model_folder import Settings
from raymuse.models.network_files import save_network
from raymuse.models.uvit import UVit, UVitConfig
from raymuse.stages.export import write_index
from raymuse.storage.webdataset_writer import write_shard
from raymuse.training.clip import ClipTask

STEPS, GUIDANCE = 12, 3.0
PROMPT = "a large red circle on a white background"
SIZES: dict[str, dict[str, Any]] = {
    # The demo's: 8 x 8 ids of 256 codes.
    "demo": {
        "uvit": {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 256}
        | {"in_channels": 96, "block_out_channels": 96, "block_num_heads": 4, "num_res_blocks": 4},
        "codes": 256,
        "grid": 8,
        "vqgan": [32, 64, 64],
        "text": {"width": 96, "layers": 1, "heads": 4, "projection": 64, "patch_size": 8},
    },
    # 36 million parameters: 16 x 16 ids of 8192 codes.
    "36M": {
        "uvit": {"hidden_size": 384, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 1024}
        | {"in_channels": 256, "block_out_channels": 256, "block_num_heads": 4, "num_res_blocks": 3},
        "codes": 8192,
        "grid": 16,
        "vqgan": [32, 32, 64, 64, 96],
        "text": {"width": 256, "layers": 4, "heads": 4, "projection": 256, "patch_size": 8},
    },
}


def write_model(folder: Path, *, uvit: Any, codes: int, grid: int, vqgan: list[int], text: Any, latent: int = 8) -> str:
    """A model folder of random weights.

    Args:
        uvit: fields of UVitConfig; `micro` in place of the two widths of the micro-conditions.
        vqgan: channels of its levels.
        latent: width of a code.
    """
    side = grid * 2 ** (len(vqgan) - 1)
    VQModel(
        block_out_channels=vqgan,
        down_block_types=["DownEncoderBlock2D"] * len(vqgan),
        up_block_types=["UpDecoderBlock2D"] * len(vqgan),
        layers_per_block=2,
        latent_channels=latent,
        num_vq_embeddings=codes,
        norm_num_groups=16,
        act_fn="silu",
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    ).save_pretrained(folder / "vqvae", safe_serialization=True)
    write_text(folder, text)
    micro = uvit.get("micro", (32, 160))
    config = UVitConfig(
        **{name: value for name, value in uvit.items() if name != "micro"},
        encoder_hidden_size=text["width"],
        cond_embed_dim=text["projection"],
        micro_cond_encode_dim=micro[0],
        micro_cond_embed_dim=micro[1],
        vocab_size=codes + 64,
        codebook_size=codes,
        sample_size=grid,
    )
    network = UVit(config)
    network.initialise(0)
    draw = torch.Generator().manual_seed(0)
    for weight in network.parameters():  # a fresh network is almost equally sure of many ids, and rounding decides
        weight.data += 0.02 * torch.randn(weight.shape, generator=draw)
    print(f"{folder.name}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters, {side} px")
    save_network(UVit(config), config.to_diffusers(), folder / "transformer", network.state_dict())
    Settings(side, side, (side, side, 0, 0, 6), SamplingConfig(steps=STEPS, guidance=GUIDANCE)).save(folder)
    write_index(folder)
    return str(folder)


def write_text(folder: Path, shape: dict[str, int]) -> None:
    """A CLIP of random weights, with a tokenizer of the shapes' captions."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    drawn = shapes.samples(64, 0, 64, held_out=False)
    write_shard(shards / "00000.tar", ((one.key, one.image, one.caption, {}) for one in drawn))
    config = ClipConfig(
        input=str(shards),
        output=str(folder / "clip-run"),
        workers=0,
        steps=1,
        resolution=64,
        vocabulary=640,
        text_length=77,
        model=shape,
    )
    task = ClipTask(config)
    task.save({f"network.{name}": value for name, value in task.network.state_dict().items()}, folder)

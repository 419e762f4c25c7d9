"""`make bench-generate`: our pipeline beside diffusers' AmusedPipeline, on the same weights and the same work.

Prompt to picture: text encoder, all steps, VQGAN. Both draw greedily once before, and must give the same ids.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AmusedPipeline, VQModel
from report import Row, compare, write

from raymuse.config.sampling import SamplingConfig
from raymuse.config.training import ClipConfig
from raymuse.datasets import shapes
from raymuse.drawing.model_folder import Settings
from raymuse.models.network_files import save_network
from raymuse.models.uvit import UVit, UVitConfig
from raymuse.pipeline import Pipeline
from raymuse.stages.export import write_index
from raymuse.storage.webdataset_writer import write_shard
from raymuse.training.clip import ClipTask

STEPS, GUIDANCE = 12, 3.0
PACKAGES = ("torch", "diffusers", "transformers")
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


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        folders = {name: write_model(root / name, **size) for name, size in SIZES.items()}
        rows = [
            row(folders["demo"], "demo's size, batch 1", 1, goal=2.0),
            row(folders["36M"], "36M, batch 1", 1, goal=1.3),
            row(folders["36M"], "36M, batch 8", 8, goal=1.3),
            row(folders["36M"], "36M, batch 1, guidance on half of the steps", 1, goal=1.7, span=(0.0, 0.5)),
            row(folders["demo"], "demo's size, batch 1, ours compiled", 1, goal=2.0, compiled=True),
            row(folders["36M"], "36M, batch 1, ours compiled", 1, goal=1.3, compiled=True),
            row(folders["36M"], "36M, batch 8, ours compiled", 8, goal=1.3, compiled=True),
        ]
        write("generate", rows)
    finally:
        shutil.rmtree(root)


def row(
    folder: str,
    name: str,
    batch: int,
    *,
    goal: float,
    span: tuple[float, float] = (0.0, 1.0),
    compiled: bool = False,
) -> Row:
    ours, theirs = Pipeline.load(folder, batch_size=batch), AmusedPipeline.from_pretrained(folder)
    if compiled:
        ours = ours.compiled()
    theirs.set_progress_bar_config(disable=True)
    same_ids(Pipeline.load(folder, batch_size=1), theirs)
    prompts, generator = [PROMPT] * batch, torch.Generator().manual_seed(0)
    return compare(
        name,
        "diffusers-amused",
        lambda: rate(lambda: ours(prompts, seeds=range(batch), guidance_span=span), batch),
        lambda: rate(
            lambda: theirs(
                prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator, output_type="np"
            ),
            batch,
        ),
        goal=goal,
        unit="pictures/s",
        packages=PACKAGES,
    )


def rate(draw: Callable[[], object], batch: int) -> float:
    """Pictures a second over as many draws as fit into four seconds, after one that does not count."""
    draw()
    began, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < 4:
        draw()
        count += batch
    return count / seconds


def same_ids(ours: Pipeline, theirs: AmusedPipeline) -> None:
    """Without chance, both draw the same picture: the work is the same.

    In 11 steps: in 12, diffusers' fp32 cosine masks one id less after the eighth.
    """
    sample = torch.multinomial
    torch.multinomial = lambda probabilities, *_, **__: probabilities.argmax(-1, keepdim=True)
    try:
        wanted = theirs(
            [PROMPT], num_inference_steps=11, guidance_scale=GUIDANCE, temperature=(0, 0), output_type="latent"
        ).images
    finally:
        torch.multinomial = sample
    drawn = ours([PROMPT], seeds=[0], steps=11, temperature=0.0, top_k=1).ids
    assert np.array_equal(drawn, wanted.numpy().reshape(drawn.shape)), "the two do not draw the same ids"


def write_model(folder: Path, *, uvit: Any, codes: int, grid: int, vqgan: list[int], text: Any) -> str:
    """A model folder of random weights."""
    side = grid * 2 ** (len(vqgan) - 1)
    VQModel(
        block_out_channels=vqgan,
        down_block_types=["DownEncoderBlock2D"] * len(vqgan),
        up_block_types=["UpDecoderBlock2D"] * len(vqgan),
        layers_per_block=2,
        latent_channels=8,
        num_vq_embeddings=codes,
        norm_num_groups=16,
        act_fn="silu",
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    ).save_pretrained(folder / "vqvae", safe_serialization=True)
    write_text(folder, text)
    config = UVitConfig(
        **uvit,
        encoder_hidden_size=text["width"],
        cond_embed_dim=text["projection"],
        micro_cond_encode_dim=32,
        micro_cond_embed_dim=160,
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


if __name__ == "__main__":
    diffusers.utils.logging.set_verbosity_error()
    main()

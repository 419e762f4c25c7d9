"""The peer of `raymuse pretokenize`: webdataset + DataLoader + VQModel + CLIP in one loop, writing the same Parquet.

python plain_pretokenize.py SHARDS ENCODERS OUT WORKERS THREADS
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from diffusers import VQModel
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPTextModelWithProjection

SIDE, BATCH = 64, 64


def prepare(sample: dict) -> tuple[str, np.ndarray, str, int, int]:
    """Resize the short side and crop the centre, as aMUSEd does."""
    image: Image.Image = sample["pil"]
    scale = SIDE / min(image.size)
    resized = image.resize((max(SIDE, int(image.width * scale)), max(SIDE, int(image.height * scale))), Image.BILINEAR)
    left, top = round((resized.width - SIDE) / 2), round((resized.height - SIDE) / 2)
    crop = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)))
    return sample["__key__"], crop, sample["txt"], image.width, image.height


def collate(rows: list) -> tuple:
    keys, crops, captions, widths, heights = zip(*rows, strict=True)
    return keys, torch.from_numpy(np.stack(crops)), captions, widths, heights


@torch.no_grad()
def main(shards: str, encoders: str, out: str, workers: int, threads: int) -> None:
    torch.set_num_threads(threads)
    vqgan = VQModel.from_pretrained(encoders, subfolder="vqvae").eval()
    text = CLIPTextModelWithProjection.from_pretrained(encoders, subfolder="text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(encoders, subfolder="tokenizer")
    length = min(tokenizer.model_max_length, text.config.max_position_embeddings)
    Path(out, "tokens").mkdir(parents=True)
    tars = sorted(map(str, Path(shards).glob("*.tar")))
    data = (
        webdataset.WebDataset(tars, shardshuffle=False)
        .decode("pilrgb")
        .rename(pil="jpg;png", txt="txt")
        .map(prepare)
        .batched(BATCH, collation_fn=collate)
    )
    rows: list[pa.Table] = []
    held = part = 0
    per_part = 500
    for keys, crops, captions, widths, heights in DataLoader(data, batch_size=None, num_workers=workers):
        pixels = crops.permute(0, 3, 1, 2).float() / 255
        ids = vqgan.quantize(vqgan.encode(pixels).latents)[2][2].reshape(len(keys), -1).to(torch.int32)
        tokens = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        said = text(tokens, output_hidden_states=True)
        rows.append(
            pa.table(
                {
                    "key": list(keys),
                    "image_ids": _column(ids.numpy().astype(np.uint16)),
                    "caption": list(captions),
                    "text_ids": _column(tokens.numpy().astype(np.int32)),
                    "text_states": _column(said.hidden_states[-2].numpy().astype(np.float16)),
                    "pooled": _column(said.text_embeds.numpy().astype(np.float16)),
                    "original_width": list(widths),
                    "original_height": list(heights),
                }
            )
        )
        held += len(keys)
        if held >= per_part:
            part, held, rows = _write(out, part, rows), 0, []
    if rows:
        _write(out, part, rows)


def _column(values: np.ndarray) -> pa.Array:
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])


def _write(out: str, part: int, rows: list[pa.Table]) -> int:
    pq.write_table(pa.concat_tables(rows), f"{out}/tokens/part-{part:06d}.parquet", compression="zstd")
    return part + 1


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))

"""A model folder's weights once more in half precision, beside those in fp32, under diffusers' names.

transformer/diffusion_pytorch_model.fp16.safetensors     `from_pretrained(..., variant="fp16")`, and ours alike
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymuse.config.errors import UserError
from raymuse.models.weights import variant_name, weight_files

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def write_variant(part: Path, variant: str) -> list[Path]:
    """Write the part's weights in the variant's number type, and the index of a part that is cut into files.

    Raises:
        UserError: a weight is larger than fp16 holds.
    """
    written = []
    for path in weight_files(part):
        weights = {name: _cast(path, name, value, variant) for name, value in load_file(path).items()}
        written.append(path.with_name(variant_name(path.name, variant)))
        save_file(weights, written[-1], metadata={"format": "pt"})
    for index in part.glob("*.safetensors.index.json"):
        record = json.loads(index.read_text())
        record["weight_map"] = {name: variant_name(file, variant) for name, file in record["weight_map"].items()}
        other = index.with_name(index.name.removesuffix(".json") + f".{variant}.json")
        other.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        written.append(other)
    return written


def _cast(path: Path, name: str, value: Tensor, variant: str) -> Tensor:
    if not value.is_floating_point():
        return value
    cast = value.to(DTYPES[variant])
    if not bool(cast.isfinite().all()) and bool(value.isfinite().all()):
        raise UserError(
            f"{path}: {name} holds {float(value.abs().max()):.3g}, and fp16 ends at 65504: take variants=[bf16]."
        )
    return cast

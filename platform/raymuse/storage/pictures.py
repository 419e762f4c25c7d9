"""Drawn pictures as PNG bytes that carry how they were made."""

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

TEXT_CHUNK = "raymuse"


def png_bytes(pixels: NDArray[np.uint8], facts: Mapping[str, Any]) -> bytes:
    """A picture uint8 (H, W, 3) as PNG, with `facts` as JSON in its text chunk `raymuse`."""
    text = PngInfo()
    text.add_itxt(TEXT_CHUNK, json.dumps(dict(facts), sort_keys=True))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def png_facts(data: bytes) -> dict[str, Any]:
    """What `png_bytes` stored; empty where it stored nothing."""
    text = getattr(Image.open(io.BytesIO(data)), "text", {}).get(TEXT_CHUNK)
    return dict(json.loads(text)) if text else {}

"""Chunks to tables: every shape its own grid, the same codes whatever else rides along, and nothing infinite stored."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import VQModel
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from raymuse.config.errors import UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.datasets import shapes
from raymuse.encoding.chunks import Chunk, CropFacts
from raymuse.encoding.encoder import ChunkEncoder, CropEncoder, Encoded, code_agreement
from raymuse.encoding.pictures import downscale
from raymuse.models.precision import float32_products
from raymuse.models.text import TextEncoder
from raymuse.models.vqgan import Vqgan, to_unit
from raymuse.storage.rejects import REJECTS_SCHEMA, Reason, Reject
from raymuse.storage.tokens import caption_id, captions_schema, tokens_schema

BUCKETS = ("32x32", "48x24", "24x48")
SIZE = 6


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("encoders")
    return tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))


def config_of(encoders: str, **changes: Any) -> PretokenizeConfig:
    values: dict[str, Any] = {
        "input": "in",
        "output": "out",
        "vqgan": encoders,
        "text_encoder": encoders,
        "resolution": 32,
        "chunk_size": SIZE,
    }
    return PretokenizeConfig.model_validate({**values, **changes})


def facts(key: str, *captions: str, **changes: Any) -> CropFacts:
    known = {"original_width": 640, "original_height": 480, "crop_top": 1, "crop_left": 2, "aesthetic": 5.5}
    return CropFacts(
        **{**known, "key": key, "captions": captions, "flip": False, "crop": 0, "source": "a.tar", **changes}
    )


def crops(shape: tuple[int, int], count: int) -> list[NDArray[np.uint8]]:
    """Drawn shapes cut to (H, W)."""
    drawn = shapes.samples(count, 0, max(shape), held_out=False)
    return [np.array(one.image)[: shape[0], : shape[1]].copy() for one in drawn]


def chunk(shape: tuple[int, int] = (32, 32), count: int = 4, **changes: Any) -> Chunk:
    said = [facts(f"k{row}", f"caption {row}", "of them all") for row in range(count)]
    return Chunk(**{"number": 0, "shape": shape, "pixels": crops(shape, count), "facts": said, **changes})


def ids_of(table: pa.Table, column: str, shape: tuple[int, int]) -> NDArray[np.uint16]:
    return np.asarray(table[column].combine_chunks().flatten()).reshape(-1, *shape)


# --- shapes


@pytest.mark.parametrize("shape", [(32, 32), (48, 24), (24, 48)])
def test_every_shape_has_its_own_grid_and_columns(shape: tuple[int, int], encoders: str) -> None:
    config = config_of(encoders, buckets=BUCKETS, low_resolution=16)
    encoder, vqgan = ChunkEncoder(config), Vqgan.load(encoders)
    given = chunk(shape)
    encoded = encoder(given)
    high, low = (shape[0] // 4, shape[1] // 4), (shape[0] // 8, shape[1] // 8)
    assert encoded.tokens.schema.equals(tokens_schema(high, low))
    np.testing.assert_array_equal(ids_of(encoded.tokens, "image_ids", high), vqgan.encode(np.stack(given.pixels)))
    twins = np.stack([downscale(pixels, (shape[0] // 2, shape[1] // 2)) for pixels in given.pixels])
    np.testing.assert_array_equal(ids_of(encoded.tokens, "low_ids", low), vqgan.encode(twins))
    assert set(encoded.tokens["height"].to_pylist()) == {high[0]}
    assert set(encoded.tokens["low_width"].to_pylist()) == {low[1]}
    assert encoded.tokens["caption_ids"].to_pylist()[2] == [caption_id("caption 2"), caption_id("of them all")]
    assert encoded.captions["caption"].to_pylist() == [
        "caption 0",
        "of them all",
        "caption 1",
        "caption 2",
        "caption 3",
    ]
    assert len(np.unique(ids_of(encoded.tokens, "image_ids", high))) > 3, "a VQGAN that says one thing proves nothing"


@pytest.mark.parametrize("low", [None, 16])
def test_an_empty_chunk_gives_empty_tables_of_its_shapes_columns(low: int | None, encoders: str) -> None:
    encoder = ChunkEncoder(config_of(encoders, buckets=BUCKETS, low_resolution=low))
    reject = Reject("a.tar", "bad", Reason.TRUNCATED, "it ends")
    encoded = encoder(Chunk(3, (48, 24), rejects=[reject], counts={"animations": 2}, last=True))
    assert encoded.tokens.schema.equals(tokens_schema((12, 6), (6, 3) if low else None))
    assert encoded.captions.schema.equals(captions_schema(tiny.TEXT_LENGTH, 16, 8))
    assert (len(encoded.tokens), len(encoded.captions)) == (0, 0)
    assert [row["key"] for row in encoded.rejects.to_pylist()] == ["bad"]
    assert encoded.counts == {"animations": 2}


def test_a_row_is_the_same_alone_and_in_a_full_chunk(encoders: str) -> None:
    encoder = ChunkEncoder(config_of(encoders, low_resolution=16))
    whole = chunk(count=SIZE)
    together = encoder(whole)
    for row in range(SIZE):
        alone = encoder(replace(whole, pixels=whole.pixels[row : row + 1], facts=whole.facts[row : row + 1]))
        assert alone.tokens.equals(together.tokens.slice(row, 1))
        for caption in alone.captions.to_pylist():
            assert caption in together.captions.to_pylist()


def test_two_vqgans_say_each_their_own(encoders: str, tmp_path: Path) -> None:
    other = tiny.write_encoders(tmp_path / "other", tiny.write_shards(tmp_path / "shards", side=40))
    encoder = ChunkEncoder(config_of(encoders, low_resolution=16, low_vqgan=other))
    given = chunk()
    twins = np.stack([downscale(pixels, 16) for pixels in given.pixels])
    found = ids_of(encoder(given).tokens, "low_ids", (4, 4))
    np.testing.assert_array_equal(found, Vqgan.load(other).encode(twins))
    assert not np.array_equal(found, Vqgan.load(encoders).encode(twins))


# --- text


def test_states_are_the_encoders_and_captions_that_do_not_fit_are_counted_once(encoders: str) -> None:
    long = "a very small yellow triangle " * 9
    said = [facts("a", "short", long), facts("b", long), facts("c", "short", long + " more")]
    given = chunk(count=3, facts=said, counts={"animations": 1, "pictures": 3})
    encoded = ChunkEncoder(config_of(encoders))(given)
    assert encoded.counts == {"animations": 1, "pictures": 3}
    assert len(encoded.truncated) == 2
    captions = encoded.captions["caption"].to_pylist()
    assert captions == ["short", long, long + " more"]
    states, pooled = TextEncoder.load(encoders)(captions)
    stored = np.asarray(encoded.captions["text_states"].combine_chunks().flatten()).reshape(states.shape)
    np.testing.assert_allclose(stored, states.numpy(), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.stack(encoded.captions["pooled"].to_numpy()), pooled.numpy(), rtol=1e-3, atol=1e-5)


def test_text_ids_alone_and_a_length_of_ones_own(encoders: str) -> None:
    encoded = ChunkEncoder(config_of(encoders, text="ids", text_length=5))(chunk())
    assert encoded.captions.schema.equals(captions_schema(5, None, None))
    text, captions = TextEncoder.load(encoders, length=5), encoded.captions["caption"].to_pylist()
    np.testing.assert_array_equal(np.stack(encoded.captions["text_ids"].to_numpy()), text.tokenize(captions)[0].numpy())
    assert encoded.truncated == {caption_id(caption) for caption in text.truncated(captions)}
    assert len(encoded.truncated) > 0


# --- precision


def test_fp32_agrees_with_itself_and_tf32_is_fp32_on_a_cpu(encoders: str) -> None:
    for precision in ("fp32", "tf32"):
        assert code_agreement(config_of(encoders, precision=precision, low_resolution=16), chunk()) == 1.0
    with pytest.raises(ValueError, match="without crops"):
        code_agreement(config_of(encoders), Chunk(0, (32, 32)))


def test_the_agreement_of_bf16_is_measured_over_all_ids(encoders: str) -> None:
    config = config_of(encoders, precision="bf16", low_resolution=16)
    given = chunk(count=SIZE)
    near, exact = (CropEncoder.load(config, "cpu", kind)(given.shape, given.pixels) for kind in ("bf16", "fp32"))
    assert near.low_ids is not None
    assert exact.low_ids is not None
    same = int((near.image_ids == exact.image_ids).sum() + (near.low_ids == exact.low_ids).sum())
    share = code_agreement(config, given)
    assert share == pytest.approx(same / (exact.image_ids.size + exact.low_ids.size))
    assert 0.9 < share < 1, "bf16 that never differs was not bf16"
    table = ChunkEncoder(config)(given).tokens
    np.testing.assert_array_equal(ids_of(table, "image_ids", (8, 8)), near.image_ids)


def test_fp32_is_what_diffusers_says(encoders: str) -> None:
    vqgan, pixels = Vqgan.load(encoders), np.stack(crops((32, 32), 4))
    theirs = VQModel.from_pretrained(encoders, subfolder="vqvae", low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        ids = theirs.quantize(theirs.encode(to_unit(pixels)).latents)[2][2].reshape(4, 8, 8)
    np.testing.assert_array_equal(vqgan.encode(pixels), ids.numpy())


def test_bf16_is_the_blocks_of_the_encoder_alone(encoders: str) -> None:
    vqgan, exact = Vqgan.load(encoders, precision="bf16"), Vqgan.load(encoders)
    kinds = {name: value.dtype for name, value in vqgan.network.named_parameters()}
    low = {".".join(name.split(".")[:2]) for name, kind in kinds.items() if kind == torch.bfloat16}
    assert low == {"encoder.down_blocks", "encoder.mid_block"}
    assert not any(kind == torch.float32 for name, kind in kinds.items() if name.startswith(tuple(low)))
    ids = exact.encode(np.stack(crops((32, 32), 2)))
    np.testing.assert_array_equal(vqgan.decode(ids), exact.decode(ids))


def test_the_switches_of_cuda_are_set_inside_and_put_back() -> None:
    def now() -> tuple[str, str]:
        return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    before = now()
    with float32_products("tf32"):
        assert now() == ("tf32", "tf32")
        with float32_products("ieee"):
            assert now() == ("ieee", "ieee")
        assert now() == ("tf32", "tf32")
    assert now() == before
    with pytest.raises(ZeroDivisionError), float32_products("tf32"):
        raise ZeroDivisionError
    assert now() == before


# --- what is not finite


@contextmanager
def spoiled(encoder: ChunkEncoder) -> Iterator[None]:
    """A stand-in for a network that fails on some pictures: latents of those whose first pixel is pure red are NaN."""

    def spoil(_network: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        red = (args[0][:, :, 0, 0] == torch.tensor([1.0, 0.0, 0.0])).all(dim=1)
        out[red, :, 0, 0] = torch.nan
        return out

    hook = encoder.crops.vqgan.network.encoder.register_forward_hook(spoil)
    yield
    hook.remove()


def test_a_picture_whose_latents_are_not_finite_is_rejected_with_all_its_crops(encoders: str) -> None:
    encoder = ChunkEncoder(config_of(encoders))
    said = [facts("a", "one"), facts("b", "two", crop=0), facts("b", "two", crop=1), facts("c", "one", "three")]
    given = chunk(count=4, facts=said, counts={"pictures": 3})
    given.pixels[2][0, 0] = (255, 0, 0)
    clean = encoder(given)
    with spoiled(encoder):
        encoded = encoder(given)
    assert encoded.tokens.equals(clean.tokens.take([0, 3]))
    assert encoded.captions["caption"].to_pylist() == ["one", "three"]
    (reject,) = encoded.rejects.to_pylist()
    assert (reject["source"], reject["key"], reject["reason"]) == ("a.tar", "b", "not_finite")
    assert "crop 1" in reject["detail"]
    assert encoded.counts == {"pictures": 2}  # with one reject: three pictures, as before
    assert not Reason.NOT_FINITE.is_filter


def test_a_chunk_of_nothing_finite_gives_rejects_alone(encoders: str) -> None:
    encoder = ChunkEncoder(config_of(encoders))
    given = chunk(count=2)
    for pixels in given.pixels:
        pixels[0, 0] = (255, 0, 0)
    with spoiled(encoder):
        encoded = encoder(given)
    assert encoded.tokens.schema.equals(tokens_schema((8, 8), None))
    assert (len(encoded.tokens), len(encoded.captions), len(encoded.rejects)) == (0, 0, 2)
    assert encoded.rejects.schema.equals(REJECTS_SCHEMA)


def louder(encoders: str, folder: Path, times: float) -> str:
    """The encoders with a text projection that is `times` as large."""
    for part in ("vqvae", "text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
        for path in Path(encoders, part).iterdir():
            (folder / part / path.name).write_bytes(path.read_bytes())
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    weights["text_projection.weight"] *= times
    save_file(weights, file, metadata={"format": "pt"})
    return str(folder)


def test_states_beyond_float16_are_rejected_and_never_stored_as_infinity(encoders: str, tmp_path: Path) -> None:
    captions = [f"caption {row}" for row in range(4)]
    loudness = TextEncoder.load(encoders)(captions)[1].abs().amax(dim=1)
    loudest = int(loudness.argmax())
    second = loudness.sort().values[-2]
    loud = louder(
        encoders, tmp_path / "loud", 65504 * 2 / float(loudness[loudest] + second)
    )  # only the loudest is over
    given = chunk(facts=[facts(f"k{row}", caption) for row, caption in enumerate(captions)])
    encoded = ChunkEncoder(config_of(loud))(given)
    assert [row["key"] for row in encoded.rejects.to_pylist()] == [f"k{loudest}"]
    assert "float16" in encoded.rejects["detail"][0].as_py()
    kept = [caption for row, caption in enumerate(captions) if row != loudest]
    assert encoded.captions["caption"].to_pylist() == kept
    assert len(encoded.tokens) == 3
    assert np.isfinite(np.stack(encoded.captions["pooled"].to_numpy())).all()
    assert len(ChunkEncoder(config_of(loud, text="ids"))(given).tokens) == 4  # stores no states

    deafening = louder(encoders, tmp_path / "deafening", 1e9)
    with pytest.raises(UserError, match=r"the states of the caption '' are not finite, .*Set text: ids"):
        ChunkEncoder(config_of(deafening)).captions([""])


def test_counts_of_chunks_can_be_summed(encoders: str) -> None:
    """Also where an encoder takes more pictures off than its own chunk counted."""
    encoder = ChunkEncoder(config_of(encoders))
    given = chunk(count=1, counts={})
    given.pixels[0][0, 0] = (255, 0, 0)
    with spoiled(encoder):
        encoded: Encoded = encoder(given)
    total = Counter({"pictures": 3})
    total.update(encoded.counts)
    assert total["pictures"] + len(encoded.rejects) == 3

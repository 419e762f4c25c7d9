"""Text encoders: CLIP as aMUSEd uses it, T5 with its mask, from folders and from the Hugging Face Hub's cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPTextModelWithProjection,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import tiny
from raymuse.config.errors import UserError
from raymuse.config.pretokenize import PretokenizeConfig
from raymuse.encoding.encoder import ChunkEncoder
from raymuse.models.text import ClipText, T5Text, TextEncoder
from raymuse.models.weights import require_safetensors, tokenizer_sha256, weights_sha256
from raymuse.storage.tokens import captions_schema
from tiny_t5 import CAPTIONS, T5, WIDTH, encoder_only, t5_tokenizer, write_t5


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_t5(tmp_path_factory.mktemp("t5"), encoder_only())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("clip")
    return tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))


# --- CLIP


def test_clip_says_to_the_bit_what_transformers_says_without_a_mask(clip: str) -> None:
    network = CLIPTextModelWithProjection.from_pretrained(f"{clip}/text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(f"{clip}/tokenizer")
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=tiny.TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        said = network(ids.input_ids, output_hidden_states=True)
    text = TextEncoder.load(clip)
    states, pooled = text(CAPTIONS)
    assert isinstance(text, ClipText)
    assert torch.equal(states, said.hidden_states[-2])
    assert torch.equal(pooled, said.text_embeds)
    assert (text.length, text.width, text.pooled_width) == (tiny.TEXT_LENGTH, 16, 8)
    assert (states.shape, pooled.shape) == ((4, text.length, text.width), (4, text.pooled_width))
    assert torch.equal(text.tokenize(CAPTIONS)[1], ids.attention_mask.bool())


def test_a_clip_reads_fewer_tokens_where_asked_and_never_more_than_its_positions(clip: str) -> None:
    short = TextEncoder.load(clip, length=7)
    ids, mask = short.tokenize(CAPTIONS)
    assert ids.shape == mask.shape == (4, 7)
    assert ids[0, -1] == short.tokenizer.eos_token_id  # cut before its end mark, which pooling looks for
    assert torch.isfinite(short(CAPTIONS)[1]).all()
    with pytest.raises(UserError, match=r"text_length=25 is more than .* can read: it has 24 positions"):
        TextEncoder.load(clip, length=25)
    with pytest.raises(UserError, match=r"text_length=2 leaves no room .* adds 2 tokens"):
        TextEncoder.load(clip, length=2)


def test_captions_that_do_not_fit_are_counted(clip: str) -> None:
    text = TextEncoder.load(clip)
    one = len(text.tokenizer("star", truncation=False).input_ids) - 2  # without start and end
    fits = " ".join(["star"] * ((text.length - 2) // one))
    assert text.truncated([fits, fits + " star star", "", fits + " circle" * 50]) == [
        fits + " star star",
        fits + " circle" * 50,
    ]
    assert text.truncated([]) == text.truncated(CAPTIONS) == []
    assert len(TextEncoder.load(clip, length=4).truncated(CAPTIONS)) == 3


# --- T5


def test_t5_says_what_transformers_says_of_each_caption_alone(t5: str) -> None:
    text = TextEncoder.load(t5)
    states, pooled = text(CAPTIONS)
    assert isinstance(text, T5Text)
    assert (text.length, text.width, text.pooled_width) == (256, WIDTH, WIDTH)
    assert (states.shape, pooled.shape) == ((4, 256, WIDTH), (4, WIDTH))
    network = T5EncoderModel.from_pretrained(f"{t5}/text_encoder").eval()
    for row, caption in enumerate(CAPTIONS):
        ids = text.tokenizer(caption, return_tensors="pt").input_ids
        with torch.no_grad():
            alone = network(ids).last_hidden_state[0]
        torch.testing.assert_close(states[row, : len(alone)], alone, rtol=1e-4, atol=1e-5)
        assert not states[row, len(alone) :].any(), "padding says something"
        torch.testing.assert_close(pooled[row], alone.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert states.abs().amax() > 0.1


def test_t5_knows_padding_by_the_ids_alone(t5: str) -> None:
    """So that stored text ids need no mask to be encoded later; a caption may spell out the padding's own name."""
    text = TextEncoder.load(t5, length=12)
    captions = [*CAPTIONS, "a <pad> cat", "<pad>"]
    ids, mask = text.tokenize(captions)
    assert isinstance(text, T5Text)
    assert torch.equal(text._real(ids), mask)
    assert text.tokenizer.pad_token_id in ids[4][mask[4]].tolist()
    nothing = text.encode(torch.zeros(2, 12, dtype=torch.int64))  # the rows that fill up a batch
    assert not nothing[0].any()
    assert not nothing[1].any()


def test_padding_a_batch_changes_no_other_row(t5: str) -> None:
    text = TextEncoder.load(t5, length=20)
    ids = text.tokenize(CAPTIONS)[0]
    padded = text.encode(torch.cat([ids, torch.zeros(4, 20, dtype=torch.int64)]))
    torch.testing.assert_close(padded[0][:4], text.encode(ids)[0], rtol=1e-5, atol=1e-6)


def test_the_length_of_a_t5_is_256_less_or_as_asked(t5: str, tmp_path: Path) -> None:
    assert TextEncoder.load(t5, length=300).tokenize(["a cat"])[0].shape == (1, 300)
    text = TextEncoder.load(t5, length=5)
    ids, mask = text.tokenize(CAPTIONS[:1])
    assert ids[0, -1] == text.tokenizer.eos_token_id
    assert mask.all()
    assert text.truncated(CAPTIONS) == list(CAPTIONS[:3])
    folder = shutil.copytree(t5, tmp_path / "short")
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 40}))
    assert TextEncoder.load(str(folder)).length == 40


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (T5Config, T5ForConditionalGeneration),
        (MT5Config, MT5ForConditionalGeneration),
        (UMT5Config, UMT5ForConditionalGeneration),
    ],
)
def test_of_a_full_t5_at_the_root_the_encoder_is_read_without_a_word(
    config: Any, kind: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    network = kind(config(vocab_size=len(t5_tokenizer()), **T5))
    folder = write_t5(tmp_path, network, at_root=True)
    capfd.readouterr()
    text = TextEncoder.load(folder)
    assert capfd.readouterr() == ("", "")
    ids, mask = text.tokenize(CAPTIONS)
    with torch.no_grad():
        said = network.get_encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(text.encode(ids)[0], said * mask[..., None])
    assert len(weights_sha256(folder, "text_encoder")) == 64


def test_bf16_is_near_fp32(t5: str) -> None:
    exact, near = TextEncoder.load(t5), TextEncoder.load(t5, dtype=torch.bfloat16)
    states, pooled = near(CAPTIONS)
    assert (states.dtype, pooled.dtype) == (torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(states.float(), exact(CAPTIONS)[0], rtol=0.1, atol=0.1)
    assert not torch.equal(states.float(), exact(CAPTIONS)[0])


def test_chunks_are_encoded_with_a_t5_as_with_a_clip(t5: str, clip: str) -> None:
    config = PretokenizeConfig(input="in", output="out", vqgan=clip, text_encoder=t5, text_length=20, resolution=32)
    encoder = ChunkEncoder(config)
    table = encoder.captions([*CAPTIONS, "a cat " * 30])
    assert table.schema.equals(captions_schema(20, WIDTH, WIDTH))
    stored = np.asarray(table["text_states"].combine_chunks().flatten()).reshape(5, 20, WIDTH)
    mask = np.stack(table["text_mask"].to_numpy())
    assert not stored[~mask].any()
    states, pooled = encoder.captions.text(table["caption"].to_pylist())
    np.testing.assert_allclose(stored, states.numpy(), rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(np.stack(table["pooled"].to_numpy()), pooled.numpy(), rtol=1e-2, atol=1e-3)
    ids = torch.from_numpy(np.stack(table["text_ids"].to_numpy()).astype(np.int64))  # as training reads them
    torch.testing.assert_close(encoder.captions.text.encode(ids)[0], states)


# --- what is refused


def test_folders_that_hold_no_text_encoder_are_refused(t5: str, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        return shutil.copytree(t5, tmp_path / name)

    other = damaged("other") / "text_encoder" / "config.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "model_type": "bert"}))
    with pytest.raises(UserError, match=r"holds a 'bert': a text encoder is CLIP or T5 \(clip, .*umt5\)"):
        TextEncoder.load(str(tmp_path / "other"))

    deeper = damaged("deeper") / "text_encoder" / "config.json"
    deeper.write_text(json.dumps({**json.loads(deeper.read_text()), "num_layers": 3}))
    with pytest.raises(UserError, match=r"\d+ weights are missing, such as encoder\.block\.2\."):
        TextEncoder.load(str(tmp_path / "deeper"))

    (weights,) = (damaged("cut") / "text_encoder").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="the weights cannot be read"):
        TextEncoder.load(str(tmp_path / "cut"))

    (pickled,) = (damaged("pickled") / "text_encoder").glob("*.safetensors")
    pickled.rename(pickled.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle.*not read\).*safe_serialization=True"):
        TextEncoder.load(str(tmp_path / "pickled"))

    shutil.rmtree(damaged("mute") / "tokenizer")
    with pytest.raises(UserError, match=r"mute: the tokenizer cannot be read"):
        TextEncoder.load(str(tmp_path / "mute"))


# --- the Hub: its cache is real, its network is not there


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which `owner/NAME` is cached as NAME; nothing beyond it can be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def cached(hub: Path, name: str) -> str:
    """Put the folder hub/NAME into the cache, as a download would, and return its id."""
    snapshot = hub.parent / "cache" / f"models--owner--{name}" / "snapshots" / ("0" * 40)
    shutil.copytree(hub / name, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    return f"owner/{name}"


@pytest.mark.parametrize("at_root", [False, True])
def test_an_id_is_what_its_repository_holds(at_root: bool, hub: Path, t5: str) -> None:
    folder = write_t5(hub / "t5", encoder_only(), at_root=at_root)
    name = cached(hub, "t5")
    for given in (name, f"hf://{name}"):
        assert torch.equal(TextEncoder.load(given)(CAPTIONS)[0], TextEncoder.load(folder)(CAPTIONS)[0])
        assert weights_sha256(given, "text_encoder") == weights_sha256(folder, "text_encoder")


@pytest.mark.parametrize("at_root", [False, True])
def test_a_tokenizer_has_a_sum_of_its_names_and_bytes(at_root: bool, hub: Path) -> None:
    folder = Path(write_t5(hub / "t5", encoder_only(), at_root=at_root))
    first = tokenizer_sha256(str(folder))
    assert first == tokenizer_sha256(cached(hub, "t5"))
    (folder / "README.md").write_text("no file of a tokenizer")
    if not at_root:
        (folder / "tokenizer_config.json").write_text("not read where there is tokenizer/")
    assert tokenizer_sha256(str(folder)) == first
    place = folder if at_root else folder / "tokenizer"
    sums = {first}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        data = (place / name).read_bytes()
        (place / name).write_bytes(data + b"\n")
        sums.add(tokenizer_sha256(str(folder)))
        (place / name).write_bytes(data)
    for name in ("vocab.json", "merges.txt", "spiece.model", "special_tokens_map.json"):
        assert not (place / name).exists()
        (place / name).write_bytes(b"the same bytes")
        sums.add(tokenizer_sha256(str(folder)))
        (place / name).unlink()
    assert len(sums) == 7
    assert tokenizer_sha256(str(folder)) == first


def test_a_missing_tokenizer_has_no_sum(tmp_path: Path) -> None:
    folder = Path(write_t5(tmp_path / "mute", encoder_only()))
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=r"mute holds no tokenizer: none of tokenizer\.json, .*Put the text encoder's"):
        tokenizer_sha256(str(folder))
    with pytest.raises(UserError, match="does not exist"):
        tokenizer_sha256("./nowhere")


def test_an_id_with_pickles_alone_and_one_that_cannot_be_had_are_refused(hub: Path) -> None:
    folder = Path(write_t5(hub / "old", encoder_only(), at_root=True))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"owner/old holds no \.safetensors file.*pickle.*safe_serialization=True"):
        TextEncoder.load(cached(hub, "old"))
    with pytest.raises(
        UserError, match=r"owner/none is no folder, and as a Hugging Face id it cannot be fetched: .*the network"
    ):
        TextEncoder.load("owner/none")


def test_half_precision_twins_are_no_weights(t5: str, tmp_path: Path) -> None:
    folder = shutil.copytree(t5, tmp_path / "twins")
    (weights,) = (folder / "text_encoder").glob("*.safetensors")
    shutil.copy(weights, weights.with_name("model.fp16.safetensors"))
    assert weights_sha256(str(folder), "text_encoder") == weights_sha256(t5, "text_encoder")
    assert require_safetensors(str(folder), "text_encoder") == (str(folder), "text_encoder")
    weights.unlink()
    with pytest.raises(UserError, match=r"has no weights without a variant; it has the variants fp16"):
        require_safetensors(str(folder), "text_encoder")

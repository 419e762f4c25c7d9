"""What export adds to a model folder: half precision under diffusers' names, styles beside it, a card, the Hub."""

import base64
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AmusedPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

import tiny
from raymuse.config.errors import UserError
from raymuse.config.export import ExportConfig
from raymuse.models.variants import write_variant
from raymuse.models.weights import weight_files
from raymuse.pipeline import Pipeline
from raymuse.stages.export import export
from raymuse.tracking.run import Run
from raymuse.training.alone import opened, train_alone

TOKEN = "hf_nothing"


@dataclass(frozen=True)
class Made:
    """Folders: encoders, a trained base, and the model that was exported with all that export can add."""

    encoders: str
    base: str
    adapter: str
    model: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("export")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    tokens = tiny.write_tokens(root / "tokens", shards, encoders)
    base = tiny.base_config(root, tokens, ids="image_ids", steps=2, ema_decay=0.9)
    train_alone(base, Run.off(), opened(base))
    plain = tiny.write_model(root / "plain", encoders)
    adapter = tiny.write_adapter(root / "adapter", plain)
    given = config(root, encoders, base.output, variants=("fp16", "bf16"), lora=adapter, lora_apart=True)
    return Made(encoders, base.output, adapter, export(given, Run.off()))


def config(root: Path, encoders: str, base: str, **changes: Any) -> ExportConfig:
    return ExportConfig(output=str(root / "model"), base=base, vqgan=encoders, text_encoder=encoders, **changes)


# --- variants


def test_the_fp16_twin_opens_in_diffusers_and_here(made: Made) -> None:
    theirs = AmusedPipeline.from_pretrained(made.model, variant="fp16", torch_dtype=torch.float16)
    whole = load_file(f"{made.model}/transformer/diffusion_pytorch_model.safetensors")
    for name, value in theirs.transformer.state_dict().items():
        assert torch.equal(value, whole[name].half()), name
    assert theirs.text_encoder.dtype == theirs.vqvae.dtype == torch.float16
    ours = Pipeline.load(made.model, batch_size=2, variant="fp16")
    for name, weight in ours.base.state_dict().items():
        assert torch.equal(weight, whole[name].half().float()), name
    assert ours(["a red circle"], seeds=[1]).ids.shape == (1, 8, 8)


def test_every_part_has_every_variant(made: Made) -> None:
    for part in ("transformer", "vqvae", "text_encoder"):
        for variant, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16, None: torch.float32}.items():
            (file,) = weight_files(Path(made.model, part), variant)
            assert {value.dtype for value in load_file(file).values() if value.is_floating_point()} == {dtype}
    bf16 = CLIPTextModelWithProjection.from_pretrained(f"{made.model}/text_encoder", variant="bf16")
    assert bf16 is not None


def test_a_part_in_several_files_keeps_its_index(tmp_path: Path) -> None:
    names = {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    for name, file in names.items():
        save_file({name: torch.ones(2)}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    write_variant(tmp_path, "fp16")
    index = json.loads((tmp_path / "model.safetensors.index.fp16.json").read_text())
    assert index["weight_map"]["w2"] == "model.fp16-00002-of-00002.safetensors"
    assert [file.name for file in weight_files(tmp_path, "fp16")] == sorted(index["weight_map"].values())
    assert [file.name for file in weight_files(tmp_path)] == sorted(names.values())


def test_what_fp16_cannot_hold_is_refused(tmp_path: Path) -> None:
    save_file({"large": torch.tensor([1e6])}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"large holds 1e\+06, and fp16 ends at 65504"):
        write_variant(tmp_path, "fp16")
    write_variant(tmp_path, "bf16")


# --- LoRAs apart, and the card


def test_a_lora_apart_leaves_the_weights_as_they_are(made: Made) -> None:
    raw = load_file(f"{made.base}/model/diffusion_pytorch_model.safetensors")
    plain = Pipeline.load(made.model, batch_size=2)
    assert all(torch.equal(value, raw[name]) for name, value in plain.base.state_dict().items())
    styled = Pipeline.load(made.model, batch_size=2, lora={f"{made.model}/lora/0": 1.0})
    wanted = plain.styled({made.adapter: 1.0}).base.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in styled.base.state_dict().items())


def test_the_card_says_what_the_model_is_made_of_and_what_it_cost(made: Made, tmp_path: Path) -> None:
    card = Path(made.model, "README.md").read_text()
    record = json.loads(Path(made.base, "training.json").read_text())
    assert "Weights: ema, fp32; also as fp16, bf16 (`variant=`)." in card
    assert f"| base | 2 of 8 | fp32 | 0.00 CPU hours | `{record['data'][:16]}` | nothing | {record['code']} |" in card
    assert "LoRAs, not in the weights: `lora/0`" in card
    assert "## Scores" not in card
    scored = tmp_path / "scores"
    scored.mkdir()
    (scored / "scores.json").write_text(json.dumps({"accuracy": {"base": {"whole": 0.51}}, "note": "x"}))
    given = config(Path(made.model).parent, made.encoders, made.base, variants=("fp16", "bf16"), lora=made.adapter,
                   lora_apart=True, licence="apache-2.0", scores=str(scored))  # fmt: skip
    export(given, Run.off())
    card = Path(made.model, "README.md").read_text()
    assert "license: apache-2.0\n" in card
    assert "| accuracy.base.whole | 0.51 |" in card
    with pytest.raises(UserError, match=r"there is no scores.json"):
        export(given.model_copy(update={"scores": str(tmp_path)}), Run.off())


def test_raw_weights_are_those_without_the_average(made: Made, tmp_path: Path) -> None:
    raw = Pipeline.load(export(config(tmp_path, made.encoders, made.base, weights="raw"), Run.off()), batch_size=2)
    wanted = load_file(f"{made.base}/model_raw/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in raw.base.state_dict().items())


# --- the Hub


@dataclass
class Hub:
    """A Hugging Face Hub of one process, as far as a push goes, and what it was sent."""

    address: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            hub.tokens.add(self.headers["Authorization"])
            if self.path == "/api/repos/create":
                hub.made.append(json.loads(body))
                answer: dict[str, Any] = {"url": f"{hub.address}/me/tiny", "name": "me/tiny", "id": "1"}
            elif "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                kept = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": name, **kept} for name in names]}
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.address}/me/tiny/commit/1"}
            else:
                answer = {"errors": [], "warnings": []}  # validate-yaml
            said = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *words: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


def test_a_model_is_sent_to_the_hub_whole_and_alone(made: Made, hub: Hub, tmp_path: Path) -> None:
    folder = Path(export(config(tmp_path, made.encoders, made.base, push_to="me/tiny"), Run.off()))
    own = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert hub.files.keys() == {name for name in own if not name.startswith(("_manifest", "_SUCCESS"))}
    assert all((folder / name).read_bytes() == data for name, data in hub.files.items())
    assert {"model_index.json", "README.md", "transformer/diffusion_pytorch_model.safetensors"} <= hub.files.keys()
    asked = hub.made[0]
    assert (asked["name"], asked["organization"], asked.get("visibility")) == ("tiny", "me", "private")
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_without_a_token_nothing_is_begun(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match=r"push_to=me/tiny: there is no token .* run `hf auth login` or set HF_TOKEN"):
        export(config(tmp_path, made.encoders, made.base, push_to="me/tiny"), Run.off())
    assert not (tmp_path / "model").exists()


def test_a_hub_that_is_not_there_says_so(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"push_to=me/tiny: the Hugging Face Hub did not take .* run the same command"):
        export(config(tmp_path, made.encoders, made.base, push_to="me/tiny"), Run.off())


def test_a_super_resolution_may_have_a_vqgan_of_its_own(made: Made, tmp_path: Path) -> None:
    cascade = tiny.write_model(tmp_path / "cascade", made.encoders, cascade=True)
    given = config(tmp_path, made.encoders, cascade, superres=cascade, superres_vqgan=made.encoders)
    pipeline = Pipeline.load(export(given, Run.off()), batch_size=2)
    assert pipeline.superres_vqgan is not pipeline.vqgan
    assert pipeline(["a red circle"], seeds=[1]).pixels.shape == (1, tiny.SIDE, tiny.SIDE, 3)
    with pytest.raises(UserError, match="there is no superres whose ids it would decode"):
        export(config(tmp_path / "no", made.encoders, made.base, superres_vqgan=made.encoders), Run.off())

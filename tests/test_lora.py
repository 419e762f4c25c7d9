"""LoRA adapters: read as peft and diffusers write them, merged to scale, refused where they do not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

import tiny
from raymuse.config.edit import EditConfig
from raymuse.config.errors import UserError
from raymuse.config.export import ExportConfig
from raymuse.config.generate import GenerateConfig
from raymuse.drawing.model_folder import model_sha256
from raymuse.models.lora import Adapter
from raymuse.pipeline import Pipeline
from raymuse.stages.edit import edit
from raymuse.stages.export import export
from raymuse.tracking.run import Run

LAYERS = ("transformer_layers.0.attn1.to_q", "transformer_layers.0.ff.net.2", "mlm_layer.conv2")
RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("lora")
    encoders = tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))
    return tiny.write_model(root / "model", encoders)


@pytest.fixture(scope="module")
def pipeline(folder: str) -> Pipeline:
    return Pipeline.load(folder, batch_size=2)


def halves(pipeline: Pipeline, layer: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank)."""
    weight = pipeline.base.get_parameter(f"{layer}.weight").flatten(1)
    draw = torch.Generator().manual_seed(seed + len(layer))
    down, up = torch.randn(RANK, weight.shape[1], generator=draw), torch.randn(weight.shape[0], RANK, generator=draw)
    return down, up


def write_peft(folder: Path, pipeline: Pipeline, seed: int = 0, **facts: Any) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, **facts}))
    tensors = {}
    for layer in LAYERS:
        down, up = halves(pipeline, layer, seed)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def weights(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipeline.base.state_dict().items()}


def expected(pipeline: Pipeline, scale: float, seed: int = 0) -> dict[str, torch.Tensor]:
    changed = weights(pipeline)
    for layer in LAYERS:
        down, up = halves(pipeline, layer, seed)
        name = f"{layer}.weight"
        changed[name] = changed[name] + (scale * (up @ down)).view(changed[name].shape)
    return changed


def assert_weights(pipeline: Pipeline, wanted: dict[str, torch.Tensor]) -> None:
    for name, value in pipeline.base.state_dict().items():
        torch.testing.assert_close(value, wanted[name], msg=name)


def test_a_peft_adapter_is_merged_to_scale_and_leaves_the_model_alone(pipeline: Pipeline, tmp_path: Path) -> None:
    before = weights(pipeline)
    address = write_peft(tmp_path / "a", pipeline)
    styled = pipeline.styled({address: 0.5})
    assert_weights(styled, expected(pipeline, 0.5 * ALPHA / RANK))
    assert_weights(pipeline, before)
    one, other = (each(["a red circle"], seeds=[1]).ids for each in (pipeline, styled))
    assert not np.array_equal(one, other)
    assert np.array_equal(one, pipeline.styled({address: 0.0})(["a red circle"], seeds=[1]).ids)


def test_several_adapters_add_up(pipeline: Pipeline, tmp_path: Path) -> None:
    first, second = (write_peft(tmp_path / str(seed), pipeline, seed) for seed in (1, 2))
    both = pipeline.styled({first: 1.0, second: -0.5})
    assert_weights(both, weights(pipeline.styled({first: 1.0}).styled({second: -0.5})))


def test_scales_of_peft(pipeline: Pipeline, tmp_path: Path) -> None:
    rooted = write_peft(tmp_path / "rooted", pipeline, use_rslora=True)
    assert_weights(pipeline.styled({rooted: 1.0}), expected(pipeline, ALPHA / RANK**0.5))
    patterned = write_peft(tmp_path / "patterned", pipeline, alpha_pattern={"to_q": 9, "net.2": 9, "conv2": 9})
    assert_weights(pipeline.styled({patterned: 1.0}), expected(pipeline, 9 / RANK))


@pytest.mark.parametrize(("down", "up"), [("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_diffusers_files_are_read(down: str, up: str, pipeline: Pipeline, tmp_path: Path) -> None:
    tensors = {}
    for layer in LAYERS:
        tensors[f"transformer.{layer}.{down}.weight"], tensors[f"transformer.{layer}.{up}.weight"] = halves(
            pipeline, layer
        )
        tensors[f"transformer.{layer}.alpha"] = torch.tensor(ALPHA)
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    tensors[f"text_encoder.{text}.{down}.weight"] = torch.ones(RANK, 16)
    tensors[f"text_encoder.{text}.{up}.weight"] = torch.ones(16, RANK)
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    styled = pipeline.styled({str(tmp_path): 1.0})
    assert_weights(styled, expected(pipeline, ALPHA / RANK))
    query = styled.text.network.get_parameter(f"{text}.weight")
    torch.testing.assert_close(query, pipeline.text.network.get_parameter(f"{text}.weight") + RANK)


def test_what_does_not_fit_is_said(pipeline: Pipeline, tmp_path: Path) -> None:
    def of(name: str, tensors: dict[str, torch.Tensor]) -> str:
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
        return str(tmp_path / f"{name}.safetensors")

    down, up = halves(pipeline, LAYERS[0])
    cases = {
        of("nowhere", {"other.to_q.lora_A.weight": down, "other.to_q.lora_B.weight": up}): "no layer other.to_q",
        of("narrow", {f"{LAYERS[0]}.lora_A.weight": down[:, 1:], f"{LAYERS[0]}.lora_B.weight": up}): "is .16, 16. here",
        of("half", {f"{LAYERS[0]}.lora_A.weight": down}): "one half is missing",
        of("ranks", {f"{LAYERS[0]}.lora_A.weight": down[1:], f"{LAYERS[0]}.lora_B.weight": up}): "ranks 2 and 3",
        of("dora", {f"{LAYERS[0]}.lora_magnitude_vector": up}): "is no weight of a LoRA",
        of("cascade", {"superres.x.lora_A.weight": down, "superres.x.lora_B.weight": up}): "no super-resolution",
        str(tmp_path / "nothing"): "holds no LoRA",
    }
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
    cases[str(tmp_path / "pickled")] = "a .bin is a pickle"
    for address, said in cases.items():
        with pytest.raises(UserError, match=said):
            pipeline.styled({address: 1.0})


def test_an_adapter_names_its_parts(pipeline: Pipeline, tmp_path: Path) -> None:
    adapter = Adapter.load(write_peft(tmp_path / "a", pipeline))
    assert set(adapter.changes) == {"transformer"}
    assert set(adapter.changes["transformer"]) == set(LAYERS)


def test_raymuse_edit_draws_with_adapters_to_scale(pipeline: Pipeline, folder: str, tmp_path: Path) -> None:
    first, second = (tiny.write_adapter(tmp_path / str(seed), folder, seed) for seed in (1, 2))
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "grey.png")
    words = {"task": "image-to-image", "picture": tmp_path / "grey.png", "prompt": "a red circle", "strength": 1.0}
    words |= {"lora": [first, second], "lora_scales": [0.5, 2.0], "model": folder, "output": tmp_path / "out.png"}
    edit(EditConfig.model_validate({**words, "picture": str(words["picture"]), "output": str(words["output"])}))
    styled = Pipeline.load(folder, batch_size=1, lora={first: 0.5, second: 2.0})
    wanted = styled.edit("image-to-image", ["a red circle"], [words["picture"]], seeds=[0], strength=1.0)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), wanted.pixels[0])
    assert not np.array_equal(
        wanted.pixels,
        pipeline.edit("image-to-image", ["a red circle"], [words["picture"]], seeds=[0], strength=1.0).pixels,
    )
    sums = {model_sha256(folder, loras) for loras in ({}, {first: 1.0}, {first: 0.5}, {second: 1.0})}
    assert len(sums) == 4
    assert model_sha256(folder, {}) == model_sha256(folder)


def test_one_scale_for_each_adapter() -> None:
    with pytest.raises(ValidationError, match="1 in lora and 2 in lora_scales"):
        GenerateConfig(output="o", model="m", prompts="p", lora="a", lora_scales=(1.0, 2.0))
    assert GenerateConfig(output="o", model="m", prompts="p", lora="a").adapters == {"a": 1.0}
    with pytest.raises(ValidationError, match="lora names one of a, a twice"):
        GenerateConfig(output="o", model="m", prompts="p", lora=("a", "a"))
    assert GenerateConfig(output="o", model="m", prompts="p", lora=("a", "b"), lora_scales=2.0).adapters["b"] == 2.0
    within = GenerateConfig(output="o", model="m", prompts="p", lora=("a", "/b")).within("runs")
    assert within.adapters == {"runs/a": 1.0, "/b": 1.0}


def test_an_exported_model_has_its_adapters_in_its_weights(folder: str, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "adapter", folder)
    config = ExportConfig(
        output=str(tmp_path / "merged"), base=folder, vqgan=f"{folder}/vqvae", text_encoder=folder, lora=adapter
    )
    merged = Pipeline.load(export(config, Run.off()), batch_size=2)
    styled = Pipeline.load(folder, batch_size=2, lora={adapter: 1.0})
    assert_weights(merged, weights(styled))
    from diffusers import AmusedPipeline

    theirs = AmusedPipeline.from_pretrained(config.output).transformer.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in weights(styled).items())


def test_an_adapter_alone_is_no_base_to_export(folder: str, tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "trained" / "model", folder)
    (tmp_path / "trained" / "_SUCCESS").touch()
    config = ExportConfig(
        output=str(tmp_path / "no"), base=str(tmp_path / "trained"), vqgan=f"{folder}/vqvae", text_encoder=folder
    )
    with pytest.raises(UserError, match=r"holds a LoRA: give the model that it changes here, and lora=.*trained/model"):
        export(config, Run.off())

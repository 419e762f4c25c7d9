"""Costs counted from the networks themselves, and the plan's arithmetic."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private.label_utils import validate_node_label_syntax

from raymuse.cli.app import main
from raymuse.clusters import costs
from raymuse.clusters.check import load as load_file
from raymuse.clusters.kustomize import build
from raymuse.clusters.machines import groups_of
from raymuse.clusters.plan import Amounts, plan_text
from raymuse.clusters.pods import cluster_of
from raymuse.clusters.prices import read_prices, shipped
from raymuse.clusters.watching import PRICE_LABEL
from raymuse.config.errors import UserError
from raymuse.config.flow import FlowConfig
from raymuse.config.load import load
from raymuse.config.training import BaseConfig
from raymuse.models.maskgit import MaskGitConfig
from raymuse.training.measure import Sizes, flops
from raymuse.training.plan import plan_of

ROOT = Path(__file__).parents[1]
AWS, GCP, ONPREM = (ROOT / "cluster" / f"{name}.yaml" for name in ("aws", "gcp", "onprem"))
KUBERAY = ROOT / "cluster" / "kuberay"


def test_costs_are_those_of_the_published_models() -> None:
    """GFLOP an image as they were measured on the published networks, to a tenth."""
    found = [
        *(flops(costs.amused(256, 16), Sizes(1, (16, 16), 77), None, False, back) / 1e9 for back in (False, True)),
        flops(costs.amused(512, 32), Sizes(1, (32, 32), 77), None, False, False) / 1e9,
        costs.vqgan_gflop(None, 256, decode=False),
        costs.vqgan_gflop(None, 256, decode=True),
        costs.vqgan_gflop(None, 512, decode=False),
    ]
    assert found == pytest.approx([213.5, 656.8, 227.4, 216.3, 477.4, 865.3], abs=0.06)
    assert costs.CLIP_L.gflop == pytest.approx(13.3, abs=0.01)


def test_a_plan_counts_the_network_that_the_recipe_trains() -> None:
    """Muse's base by what `raymuse train --dry-run` counts, T5's tokens with T5's width; a LoRA's frozen weights."""
    for recipe, tokens in (("muse-632m", 77), ("muse-3b", 256)):
        config = load(recipe, ["text_encoder=null", "gradient_checkpointing=false", "input=/nowhere"])
        assert isinstance(config, BaseConfig)
        shape = plan_of(config).shape
        assert isinstance(shape, MaskGitConfig)
        piece = costs.training(config, 256)
        assert piece.gflop == pytest.approx(flops(shape, Sizes(1, (16, 16), tokens), None, False) / 1e9, rel=1e-9)
    tuned, lora = (load(name, ["gradient_checkpointing=false"]) for name in ("finetune-256", "lora-256"))
    assert isinstance(tuned, BaseConfig)
    assert isinstance(lora, BaseConfig)
    whole, some = costs.training(tuned, 256).gflop, costs.training(lora, 256).gflop
    assert whole is not None
    assert some is not None
    assert some < 0.7 * whole


def test_a_flow_is_counted_with_its_own_small_text_encoder() -> None:
    config = load("demo")
    assert isinstance(config, FlowConfig)
    text = costs.text_of(config.clip)
    assert (text.width, text.layers, text.tokens, text.pooled) == (96, 1, 20, 64)
    assert text.gflop == pytest.approx((24 * 20 * 96**2 + 4 * 20**2 * 96) / 1e9)
    said = plan_text("demo", config, AWS, read_prices(None), Amounts())
    assert "+ text 0.00458" in said
    assert "text 13.3" not in said
    assert "these stages: " in said
    assert "not counted: the flow's other stages (data, train-clip, export, score)" in said


def test_a_plan_does_its_sum_as_it_says() -> None:
    """The H200's limits: with all of it reached, the rates of a machine are the measured ones."""
    prices = table(reached={"pretokenize": 1.0, "train": 1.0, "generate": 1.0})
    pictures = 3_441 * 3600
    config = load("tokens-256", ["gpus_per_encoder=1", "decoders=16"])
    text = plan_text("tokens-256", config, h200(), prices, Amounts(pictures=pictures))
    assert "1 H200 x 790 TFLOP/s x 1 / 229.6 GFLOP = 3,440" in text
    assert f"16 cores x 180 = 2,880.0 a second\n    1 x USD 0/h on demand x {pictures / 2880 / 3600:.2f} h" in text
    config = load(
        "finetune-256", ["gradient_checkpointing=false", "text_encoder=null", "steps=1000", "batch_size=1203"]
    )
    text = plan_text("finetune-256", config, h200(), prices, Amounts())
    assert "790 TFLOP/s x 1 / 656.8 GFLOP = 1,202.8 a second" in text
    assert "1,203,000 / 1,202.8 a second = 0.28 h" in text


def h200() -> Path:
    return ONPREM


def table(**changes: Any) -> Any:
    prices = read_prices(None)
    local = prices.machines["local"].model_copy(update={"gpu": "H200"})
    reached = prices.reached.model_copy(update=changes.get("reached", {}))
    return prices.model_copy(update={"machines": {**prices.machines, "local": local}, "reached": reached})


def test_stages_go_where_placement_says_and_the_slowest_decides() -> None:
    config = load("tokens-256", ["encoders=8", "gpus_per_encoder=1", "decoders=20"])
    text = plan_text("tokens-256", config, AWS, read_prices(None), Amounts(pictures=1_000_000))
    assert "decode: 2 x c6i.4xlarge (decoders), 20 cores x 180 = 3,600.0 a second" in text
    assert "encode: 2 x g6e.12xlarge (trainers), 8 L40S x 290 TFLOP/s x 0.5 / 229.6 GFLOP = 5,051" in text
    assert "1,000,000 / 3,600.0 a second = 278 s  <- this decides" in text
    hours = 1_000_000 / 3600 / 3600
    total = hours * (2 * 0.27 + 2 * 4.2 + 0.192)
    assert f"in all: 278 s one after the other, USD {total:,.2f}" in text


def test_every_shipped_cluster_and_a_whole_flow_can_be_planned() -> None:
    prices = read_prices(None)
    for path in (AWS, GCP, ONPREM, KUBERAY / "overlays" / "eks", KUBERAY / "overlays" / "gke"):
        head, groups = groups_of(path, prices)
        assert head.name == "head"
        assert any(group.machine.gpus for group in groups)
        assert all(group.hour > 0 for group in groups) or path == ONPREM
    text = plan_text("demo", load("demo"), AWS, prices, Amounts())
    assert [line.partition(":")[0] for line in text.splitlines()[1:] if line[0] not in " ("][:5] == [
        "train-vqgan",
        "pretokenize",
        "train-base",
        "train-superres",
        "generate",
    ]
    assert "(generators)" not in text  # the demo asks for no GPU: all of it runs on the decoders
    assert "c6i.4xlarge (decoders)" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tokens-256", "--on", str(AWS)], "how many pictures are there? Say --images N"),
        (["demo:generate", "--on", str(AWS)], "how many prompts are there? Say --prompts N"),
        (["demo:score", "--on", str(AWS)], "a plan is made for pretokenize"),
        (
            ["finetune-256", "--on", str(AWS), "workers=9", "batch_size=9", "micro_batch_size=1"],
            "asks for 9 workers of 1 GPU to train, and the file has room for 8 (trainers 2 x 4)",
        ),
        (["finetune-256", "--on", str(KUBERAY / "base")], "which GPU it gets is not said"),
        (["finetune-256", "--on", str(KUBERAY / "base" / "network.yaml")], "describes 0 Ray clusters"),
        (["finetune-256", "--on", str(AWS), "--prices", "none.yaml"], "cannot read none.yaml"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_table_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load(shipped().read_text())
    values["machines"]["g6e.12xlarge"]["spot"] = 100.0
    mine = tmp_path / "prices.yaml"
    mine.write_text(yaml.safe_dump(values))
    assert main(["cluster", "plan", "finetune-256", "--on", str(AWS), "--prices", str(mine)]) == 0
    assert "1 x USD 100/h spot" in capsys.readouterr().out
    values["machines"]["g6e.12xlarge"]["gpu"] = "L40"
    del values["core"]
    mine.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="core: Field required"):
        read_prices(mine)
    values["core"] = {"tflops": 0.04, "pictures_per_second": 180}
    mine.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"machines.g6e.12xlarge.gpu: there is no L40 under gpus"):
        read_prices(mine)


def test_pods_are_priced_by_what_they_ask_for() -> None:
    prices = read_prices(None)
    _, (decoders, trainers, _generators) = groups_of(KUBERAY / "overlays" / "gke", prices)
    assert decoders.spot
    assert decoders.hour == pytest.approx(14 * prices.pods.cpu + 28 * prices.pods.memory_gib)
    asked = 44 * prices.pods.cpu + 160 * prices.pods.memory_gib
    assert trainers.hour == pytest.approx(asked + 4 * prices.gpus["L4"].hour)
    _, (_, trainers, _) = groups_of(KUBERAY / "overlays" / "eks", prices)
    assert (trainers.kind, trainers.hour) == ("g6e.12xlarge", prices.machines["g6e.12xlarge"].spot)


PRICED = [AWS, GCP, *sorted(path.parent for path in (KUBERAY / "overlays").rglob("kustomization.yaml"))]


@pytest.mark.parametrize("path", PRICED, ids=lambda path: str(path.relative_to(ROOT)))
def test_machines_say_in_a_label_what_the_price_table_says(path: Path) -> None:
    """Without the label Prometheus would count a machine as free."""
    head, workers = groups_of(path, read_prices(None))
    found = dict(_labels(path))
    assert {group.name: f"{round(group.hour, 3):g}" for group in (head, *workers)} == found
    for price in found.values():
        validate_node_label_syntax({PRICE_LABEL: price})
    if path.suffix:
        starts = " ".join(yaml.safe_load(path.read_text())["head_start_ray_commands"])
        assert f"--labels=raymuse/role=head,{PRICE_LABEL}={head.hour:g} " in starts


def _labels(path: Path) -> Iterator[tuple[str, str]]:
    for document in load_file(path):
        for name, node in document.get("available_node_types", {}).items():
            yield name, node["labels"][PRICE_LABEL]
        cluster = cluster_of(document)
        if cluster:
            yield "head", cluster["headGroupSpec"]["labels"][PRICE_LABEL]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["labels"][PRICE_LABEL]


def test_a_folder_is_read_as_it_would_be_applied() -> None:
    folder = KUBERAY / "overlays" / "eks"
    assert load_file(folder) == build(folder) == load_file(folder / "kustomization.yaml")

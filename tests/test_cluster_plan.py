"""Costs counted from the networks themselves, and the plan's arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from raymuse.cli.app import main
from raymuse.clusters import costs
from raymuse.clusters.check import load as load_file
from raymuse.clusters.kustomize import build
from raymuse.clusters.machines import groups_of
from raymuse.clusters.plan import Amounts, plan_text
from raymuse.clusters.prices import read_prices, shipped
from raymuse.config.errors import UserError
from raymuse.config.load import load

ROOT = Path(__file__).parents[1]
AWS, GCP, ONPREM = (ROOT / "cluster" / f"{name}.yaml" for name in ("aws", "gcp", "onprem"))
KUBERAY = ROOT / "cluster" / "kuberay"


def test_costs_are_those_of_the_published_models() -> None:
    """GFLOP an image as they were measured on the published networks, to a tenth."""
    found = [
        costs.base_gflop(costs.shape_at(256), 16, backward=False),
        costs.base_gflop(costs.shape_at(256), 16, backward=True),
        costs.base_gflop(costs.shape_at(512), 32, backward=False),
        costs.vqgan_gflop(None, 256, decode=False),
        costs.vqgan_gflop(None, 256, decode=True),
        costs.vqgan_gflop(None, 512, decode=False),
    ]
    assert found == pytest.approx([213.5, 656.8, 227.4, 216.3, 477.4, 865.3], abs=0.06)


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


def test_a_folder_is_read_as_it_would_be_applied() -> None:
    folder = KUBERAY / "overlays" / "eks"
    assert load_file(folder) == build(folder) == load_file(folder / "kustomization.yaml")

"""Scores of pictures whose scores are known: the truth itself, the truth under other captions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from numpy.typing import NDArray
from PIL import Image

from raymuse.config.errors import UserError
from raymuse.config.load import from_values
from raymuse.config.score import ScoreConfig
from raymuse.datasets.scenes import parse
from raymuse.datasets.shapes import draw
from raymuse.encoding.pictures import decode, downscale
from raymuse.models.clip import Clip
from raymuse.recording import recorded
from raymuse.scoring import parts
from raymuse.scoring.measures import render_error
from raymuse.scoring.summary import flat, markdown, summarise
from raymuse.stages.compare import compare, read_comparison
from raymuse.stages.score import read_scores, score
from raymuse.stages.sweep import read_sweep, sweep
from raymuse.storage.generated import PictureRow, rows_table
from raymuse.storage.images import Picture, list_shards, read_shard
from raymuse.storage.manifest import Manifest
from raymuse.storage.pictures import png_bytes
from raymuse.storage.tokens import parquet_bytes
from raymuse.storage.webdataset_writer import write_tar
from raymuse.tracking.run import Run, finishing, open_run
from raymuse.tracking.server import Server

pytestmark = pytest.mark.usefixtures("ray_cluster")
PER_PART = 3


def write_generated(
    folder: Path,
    truth: Sequence[Picture],
    captions: Sequence[str],
    bases: Sequence[NDArray[np.uint8]] | None = None,
) -> str:
    """What generate would leave, had the model drawn the true pictures for these captions."""
    manifest = Manifest.open(str(folder), {"stage": "generate"})
    tables = []
    for number, start in enumerate(range(0, len(truth), PER_PART)):
        name = f"part-{number:06d}"
        members: list[tuple[str, bytes]] = []
        rows = []
        for index in range(start, min(start + PER_PART, len(truth))):
            pixels = np.asarray(decode(truth[index].data))
            key = f"{index:09d}-0"
            row = PictureRow(
                index, 0, key, truth[index].key, captions[index], "", 0, 64, 64, 1, 1.0, 1.0, 16, "truth", name
            )
            facts = dict(vars(row))
            members.append((f"{key}.png", png_bytes(pixels, facts)))
            if bases is not None:
                members.append((f"{key}.base.png", png_bytes(bases[index], facts)))
            members.append((f"{key}.json", json.dumps(facts).encode()))
            rows.append(row)
        (folder / "parts").mkdir(exist_ok=True)
        write_tar(folder / "parts" / f"{name}.tar", members)
        tables.append(rows_table(rows))
        manifest.write_part(name, {f"rows/{name}.parquet": b""}, rows=len(rows), rejects=0, source="")
    manifest.folder.write("manifest.parquet", parquet_bytes(pa.concat_tables(tables), {}))
    manifest.finish()
    return str(folder)


@pytest.fixture(scope="module")
def truth(shards: str) -> list[Picture]:
    rows = [row for shard in list_shards(f"{shards}/test") for row in read_shard(shard)]
    return [row for row in rows if isinstance(row, Picture)]


@pytest.fixture
def config(model: str, clip: str, tmp_path: Path) -> ScoreConfig:
    return ScoreConfig(images=str(tmp_path / "images"), output=str(tmp_path / "scores"), model=model, clip=clip)


def changed(config: ScoreConfig, **changes: object) -> ScoreConfig:
    return ScoreConfig.model_validate({**config.model_dump(), **changes})


def test_the_truth_drawn_by_a_cascade_is_all_right_and_beside_its_ceilings(
    config: ScoreConfig, truth: list[Picture], shards: str
) -> None:
    bases = [downscale(np.asarray(decode(one.data)), 32) for one in truth]
    write_generated(Path(config.images), truth, [one.captions[0] for one in truth], bases)
    scores = read_scores(score(changed(config, truth=f"{shards}/test"), Run.off()))
    assert scores["pictures"] == dict.fromkeys(("truth", "vqgan", "vqgan_low", "base", "cascade"), len(truth))
    for kind in ("truth", "cascade"):
        accuracy = scores["accuracy"][kind]
        assert accuracy["whole"] == 1.0
        assert set(accuracy["attributes"].values()) == {1.0}
    assert scores["accuracy"]["vqgan"]["whole"] < 0.5  # a VQGAN of three batches shows next to nothing
    assert scores["clip_score"]["truth"] == pytest.approx(scores["clip_score"]["cascade"], abs=1e-6)
    distances = scores["clip_fid"]
    assert set(distances) == {"vqgan", "vqgan_low", "base", "cascade"}
    assert distances["cascade"] == pytest.approx(0, abs=1e-5)
    assert distances["vqgan"] > 10 * max(distances["cascade"], 1e-3)
    assert scores["vqgan_fd"]["cascade"] == pytest.approx(0, abs=1e-5)
    assert scores["vqgan_fd"]["base"] > 1e-3
    assert scores["codes_used"]["truth"] == scores["codes_used"]["cascade"] > 0
    assert_rows_match(config, truth)


def assert_rows_match(config: ScoreConfig, truth: list[Picture]) -> None:
    """rows.parquet has one row a picture and kind, each with the CLIP score of that very pair."""
    rows = pq.read_table(f"{config.output}/rows.parquet").to_pylist()
    assert [(row["key"], row["kind"]) for row in rows] == [
        (f"{index:09d}-0", kind)
        for index in range(len(truth))
        for kind in ("truth", "vqgan", "vqgan_low", "base", "cascade")
    ]
    pixels = np.stack([np.asarray(decode(one.data)) for one in truth])
    fits = Clip.load(config.clip).score(pixels, [one.captions[0] for one in truth])
    found = [row["clip_score"] for row in rows if row["kind"] == "truth"]
    np.testing.assert_allclose(found, fits, atol=1e-5)


def test_other_captions_are_wrong_and_a_base_alone_has_one_kind(config: ScoreConfig, truth: list[Picture]) -> None:
    captions = [one.captions[0] for one in truth]
    write_generated(Path(config.images), truth, [*captions[1:], captions[0]])
    scores = read_scores(score(config, Run.off()))
    assert scores["pictures"] == {"base": len(truth)}
    assert scores["accuracy"]["base"]["whole"] == 0.0
    assert 0 < np.mean(list(scores["accuracy"]["base"]["attributes"].values())) < 0.8  # some are right by chance
    again = score(config, Run.off())  # done: nothing starts
    assert read_scores(again) == scores


def test_without_a_judge_only_clip_scores(config: ScoreConfig, truth: list[Picture]) -> None:
    write_generated(Path(config.images), truth, [one.captions[0] for one in truth])
    scores = read_scores(score(changed(config, judge="none"), Run.off()))
    assert "accuracy" not in scores
    assert set(scores["clip_score"]) == {"base"}
    assert "| clip_score | " in markdown(scores)


def test_as_a_set_they_are_held_against_real_pictures_whose_statistics_are_kept(
    config: ScoreConfig, truth: list[Picture], shards: str, tmp_path: Path
) -> None:
    write_generated(Path(config.images), truth, [one.captions[0] for one in truth])
    statistics = tmp_path / "cache/test.safetensors"
    held = changed(config, reference=f"{shards}/test", statistics=str(statistics))
    scores = read_scores(score(held, Run.off()))
    assert scores["clip_fid"]["base"] == pytest.approx(0, abs=1e-5)  # they are those pictures
    assert scores["vqgan_fd"]["base"] == pytest.approx(0, abs=1e-5)
    written = statistics.stat().st_mtime_ns
    known = changed(held, output=str(tmp_path / "again"), judge="none")
    assert read_scores(score(known, Run.off()))["clip_fid"] == scores["clip_fid"]
    assert statistics.stat().st_mtime_ns == written
    other = {"output": str(tmp_path / "other")}
    with pytest.raises(UserError, match=r"was made with something else: pictures was '\w+' and is now"):
        score(changed(held, reference=f"{shards}/train", **other), Run.off())
    with pytest.raises(UserError, match="side was 64 and is now 32"):
        score(changed(held, reference_side=32, **other), Run.off())
    with pytest.raises(UserError, match=r"holds 8 pictures and the protocol asks for 30000: draw so many"):
        score(changed(held, pictures=30000, **other), Run.off())
    assert not (tmp_path / "other").exists()


# --- sweeps and comparisons, whose details are in test_sweep.py


def test_a_sweep_and_a_comparison_are_drawn_by_actors_and_stand_in_mlflow(
    base_model: str, clip: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_here", lambda *_: pytest.fail("drawn without Ray"))
    told = {"prompts": f"{shards}/prompts.jsonl", "clip": clip, "pictures_per_part": 4, "workers": 2}
    with Server.start(tmp_path / "mlflow", wait=False) as server:
        server.wait(300)
        client = MlflowClient(tracking_uri=server.uri)

        def done(kind: str, stage: Any, **values: Any) -> tuple[str, Any]:
            config: Any = from_values(kind, {**told, "output": str(tmp_path / kind), **values})
            run = open_run(server.uri, "scores", kind, spool=tmp_path / "spool", patience=120)
            with finishing(run), recorded(config, run):
                stage(config, run)
            found = client.get_run(run.id)
            assert found.info.status == "FINISHED"
            assert {one.tags[0].value for one in found.inputs.dataset_inputs} == {"eval", "output"}
            assert_tracked(client, found, Path(config.output), kind)
            return config.output, found

        output, run = done("sweep", sweep, model=base_model, guidance=[1.0, 2.0], steps=[1, 2])
        found = read_sweep(output)
        assert run.data.metrics["best.accuracy"] == found["best"]["figures"]["accuracy"]
        assert float(run.data.params["best.guidance"]) == found["best"]["options"]["guidance"]
        for name in ("clip_score", "pictures_per_second"):
            told_values = [one.value for one in client.get_metric_history(run.info.run_id, name)]
            assert told_values == [row[name] for row in table_of(client, run, "sweep.json")]
            assert len(told_values) == 4
        model = {"model": base_model}
        output, run = done("compare", compare, a=model, b={**model, "steps": 1}, resamples=200)
        assert f"- a.model: `{base_model}`" in run.data.tags["mlflow.note.content"]
        by = read_comparison(output)["by"]["clip_score"]
        assert run.data.metrics["clip_score.difference.low"] == by["difference"]["low"]
        assert [row["side"] for row in table_of(client, run, "compare.json")] == ["the model's defaults", "steps=1"]


def table_of(client: MlflowClient, run: Any, name: str) -> list[dict[str, Any]]:
    """The rows of a table that MLflow's pages show."""
    assert {"path": name, "type": "table"} in json.loads(run.data.tags["mlflow.loggedArtifacts"])
    held = json.loads(Path(client.download_artifacts(run.info.run_id, name)).read_text())
    return [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]


def assert_tracked(client: MlflowClient, run: Any, output: Path, kind: str) -> None:
    """The plot or sheet and the table that lie in the folder stand on the run's page."""
    picture = {"sweep": "sweep.png", "compare": "contact_sheet.png"}[kind]
    latest = client.download_artifacts(run.info.run_id, f"latest/{picture}")
    np.testing.assert_array_equal(*(np.asarray(Image.open(path)) for path in (latest, output / picture)))
    table = (output / f"{kind}.md").read_text()
    assert Path(client.download_artifacts(run.info.run_id, f"{kind}.md")).read_text() == table
    note = run.data.tags["mlflow.note.content"]
    assert table.strip() in note
    assert f"latest%2F{picture}" in note


# --- what cannot be scored


def test_what_cannot_be_scored_is_refused_before_anything_starts(
    config: ScoreConfig, truth: list[Picture], shards: str
) -> None:
    with pytest.raises(UserError, match=r"does not exist\. Run `raymuse generate` to the end first"):
        score(config, Run.off())
    write_generated(Path(config.images), truth, [one.captions[0] for one in truth])
    with pytest.raises(UserError, match=r"has no picture with the key '\w+' \(8 of the prompts have none\)"):
        score(changed(config, truth=f"{shards}/train/00011.tar"), Run.off())
    assert not Path(config.output).exists()


def test_pictures_that_were_all_rejected_are_no_pictures(config: ScoreConfig) -> None:
    manifest = Manifest.open(config.images, {})
    manifest.folder.write("manifest.parquet", parquet_bytes(rows_table([]), {}))
    manifest.finish()
    with pytest.raises(UserError, match="holds no pictures"):
        score(config, Run.off())


# --- arithmetic


def row(kind: str, fit: float, **attributes: bool) -> dict[str, Any]:
    return {
        "kind": kind,
        "clip_score": fit,
        "attributes": attributes or None,
        "correct": all(attributes.values()) if attributes else None,
        "key": "0",
        "render_error": None,
    }


def test_the_summary_is_the_mean_of_its_rows() -> None:
    rows = [
        row("base", 0.1, colour=True, shape=True),
        row("base", 0.2, colour=True, shape=False),
        row("base", 0.6, colour=False, shape=True, relation=True),
        row("truth", 0.9, colour=True, shape=True),
    ]
    summary = summarise(rows)
    assert summary["pictures"] == {"truth": 1, "base": 3}
    assert summary["clip_score"] == {"truth": 0.9, "base": pytest.approx(0.3)}
    base = summary["accuracy"]["base"]
    assert base["whole"] == pytest.approx(1 / 3)
    assert (base["one_object"], base["two_objects"]) == (0.5, 0.0)
    assert base["attributes"] == {"colour": pytest.approx(2 / 3), "shape": pytest.approx(2 / 3), "relation": 1.0}
    assert summary["accuracy"]["truth"]["two_objects"] is None  # there were none: not a zero
    assert "accuracy.truth.two_objects" not in flat(summary)
    assert flat(summary)["accuracy.base.attributes.colour"] == pytest.approx(2 / 3)
    assert "| one_object | 1.000 | 0.500 |" in markdown(summary)


def test_base_and_cascade_are_compared_in_pairs() -> None:
    errors = {"base": {"a": 30.0, "b": 40.0, "c": 50.0, "d": None}, "cascade": {"c": 44.0, "b": 36.0, "a": 28.0}}
    rows = [
        {
            **row(kind, 0.5, **({"colour": True} if key == "a" else {"relation": True})),
            "key": key,
            "render_error": error,
        }
        for kind, by_key in errors.items()
        for key, error in by_key.items()
    ]
    compared = summarise(rows)["render_error"]
    assert (compared["base"], compared["cascade"], compared["difference"]) == (40.0, 36.0, -4.0)
    half = 1.96 * 2.0 / 3**0.5
    assert compared["difference_low"] == pytest.approx(-4 - half)
    assert compared["difference_high"] == pytest.approx(-4 + half)
    assert (compared["two_objects"]["base"], compared["two_objects"]["difference"]) == (45.0, -5.0)
    assert "one_object" not in compared  # of one pair there is no interval


def test_the_render_error_of_a_clean_picture_is_small_and_of_a_blurred_one_larger() -> None:
    scene = parse("a large red circle on a white background")
    clean = draw(scene, 64, np.random.default_rng(0))
    caption = "a large red circle on a white background"
    sharp = render_error(np.asarray(clean), caption, 64)
    blurred = render_error(np.asarray(clean.resize((32, 32), Image.Resampling.BILINEAR)), caption, 64)
    other = render_error(np.asarray(clean), "a large blue circle on a white background", 64)
    assert sharp < 3 < blurred < other

"""Bases that read their own features of the step before, and bases that judge what they drew, against loops by hand."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tiny
from ranks import run_ranks
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.export import ExportConfig
from raymuse.config.sampling import SamplingConfig
from raymuse.config.training import TrainConfig
from raymuse.drawing.model_folder import load_base
from raymuse.drawing.sampler import Course, Draws, Rows, sample_ids
from raymuse.masking import CHOICE, CONFIDENCE, CRITIC, guide, mean_masking_ratio, pick, reveal, uniforms
from raymuse.models.base import Base, new_base, read_shape
from raymuse.models.uvit import UVit, UVitConfig
from raymuse.pipeline import Pipeline
from raymuse.stages.export import export
from raymuse.tracking.run import Run
from raymuse.training.build import build_task
from raymuse.training.masked import MaskedTask
from raymuse.training.measure import Sizes, flops
from trainings import Trained, fit, fit_all

BOTH = {"self_conditioning": True, "self_critic": True}
PROMPTS = ["a red circle", "a small blue star", "a green square", ""]


@dataclass(frozen=True)
class Data:
    """Folders: encoders, token shards, and a model whose base does both."""

    encoders: str
    tokens: str
    model: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("self")
    shards = tiny.write_shards(root / "shards")
    encoders = tiny.write_encoders(root / "encoders", shards)
    tokens = tiny.write_tokens(root / "tokens", shards, encoders)
    return Data(encoders, tokens, tiny.write_model(root / "model", encoders, **BOTH))


def config(root: Path, data: Data, **changes: Any) -> TrainConfig:
    values = {"ids": "image_ids", "log_every": 1, "model": {**tiny.UVIT, **BOTH}, "checkpoint": {"every": 6}}
    return tiny.base_config(root, data.tokens, **{**values, **changes})


def task_of(config: TrainConfig) -> MaskedTask:
    task = build_task(config)
    assert isinstance(task, MaskedTask)
    return task


def sample_of(condition: Any, row: int) -> Any:
    """One sample of a condition that is not precomputed."""
    return type(condition)(*(tensor[row : row + 1] for tensor in condition[:2]))


def shaken(task: MaskedTask) -> MaskedTask:
    """With weights that are not zero anywhere."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return task


# --- training


@pytest.mark.parametrize("architecture", ["uvit", "maskgit"])
def test_the_loss_is_that_of_three_passes(architecture: str, data: Data, tmp_path: Path) -> None:
    """One without gradients feeds nine in ten samples; one learns the ids; one learns which of its draws are true."""
    shape = {**(tiny.UVIT if architecture == "uvit" else tiny.MASKGIT), **BOTH}
    task = shaken(task_of(config(tmp_path, data, architecture=architecture, model=shape, critic_weight=0.5)))
    positions, weights = np.arange(64), np.ones(64, np.float32)
    weights[60:] = 0
    batch = task.batch(positions, weights)
    network: Any = task.network
    told = network.condition(batch["states"], batch["pooled"], batch["micro"])
    with torch.no_grad():
        loss, metrics = task.module(batch)
        before = network.features(batch["ids"], told)
        chosen = uniforms(3, 13, positions, 1)[:, 0] < 0.9
        before[torch.from_numpy(~chosen)] = 0
        logits = network.head(network.features(batch["ids"], told, None, before))
        mask = batch["mask"]
        wanted = F.cross_entropy(logits[mask], batch["targets"][mask], reduction="sum")
        draws = torch.from_numpy(uniforms(3, CRITIC, positions, 64)).view(64, 8, 8)
        filled = torch.where(mask, pick(logits.softmax(dim=-1), draws), batch["ids"])
        verdict = network.judge(network.features(filled, told))[:60, ..., 0]
        critic = F.binary_cross_entropy_with_logits(verdict, (filled == batch["targets"])[:60].float(), reduction="sum")
    assert float(loss) == pytest.approx(float(wanted + 0.5 * mean_masking_ratio("cosine") * critic), rel=1e-5)
    assert float(metrics["critic_loss"] / metrics["critic_loss:of"]) == pytest.approx(float(critic) / 60 / 64, rel=1e-5)
    assert 0.8 < chosen.mean() < 1


def test_a_fresh_one_says_what_one_without_it_says(data: Data, tmp_path: Path) -> None:
    """What is fed back starts at zero, so that a trained model may be given it."""
    task = task_of(config(tmp_path, data, model=tiny.UVIT, start_from=None))
    grown = task_of(config(tmp_path, data, start_from=data.model, model={}))
    assert grown.network.config.self_conditioning
    plain = UVit(replace(task.network.config, self_conditioning=True))  # type: ignore[arg-type]
    plain.initialise(0)
    ids = torch.randint(0, tiny.CODES, (2, 8, 8))
    told = plain.condition(torch.randn(2, 5, 16), torch.randn(2, 8), torch.zeros(2, 5))
    with torch.no_grad():
        first = plain.features(ids, told)
        assert torch.equal(plain.features(ids, told, None, first), first)
        seen = grown.network.features(ids, told, None, first)
        assert not torch.allclose(seen, grown.network.features(ids, told))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_pass_without_gradients_takes_none_from_the_other(precision: str, data: Data, tmp_path: Path) -> None:
    task = shaken(task_of(config(tmp_path, data, precision=precision)))
    loss, _ = task.module(task.batch(np.arange(8), np.ones(8, np.float32)))
    loss.backward()
    for name, parameter in task.network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name


def test_a_restart_and_the_world_change_nothing(data: Data, tmp_path: Path) -> None:
    """Also of a super-resolution, and at ZeRO 3, whose passes gather what they need twice."""
    wide = {**tiny.UVIT, **BOTH, "intermediate_size": 4096}
    superres = {"model": {**tiny.SUPERRES, "self_conditioning": True}, "log_every": 1, "checkpoint": {"every": 6}}
    kinds = {
        "base": lambda root, **more: config(root, data, model=wide, **more),
        "superres": lambda root, **more: tiny.superres_config(root, data.tokens, **superres, **more),
    }
    alone = {name: fit(make(tmp_path / "one")) for name, make in kinds.items()}
    ranks = [kinds[name](tmp_path / f"{name}{stage}", workers=2, zero={"stage": stage}) for name, stage in RANKS]
    trained: list[Trained] = run_ranks(fit_all, 2, tmp_path / "first", ranks)[0]
    for one in ranks:
        (Path(one.output) / "step-00000012" / "checkpoint.json").unlink()
    again: list[Trained] = run_ranks(fit_all, 2, tmp_path / "second", ranks)[0]
    for (name, _), (losses, tensors), (rest, resumed) in zip(RANKS, trained, again, strict=True):
        assert losses == pytest.approx(alone[name][0], abs=1e-5), name
        assert rest == losses[6:]
        assert float(tensors["weight/network.self_conditioning.ff.net.2.weight"].abs().max()) > 0
        assert all(torch.equal(value, resumed[key]) for key, value in tensors.items())


RANKS = [("base", 2), ("base", 3), ("superres", 3)]


def test_their_work_is_planned() -> None:
    small = {**tiny.UVIT, "hidden_size": 64, "intermediate_size": 256, "vocab_size": 96, "codebook_size": 32}
    shape, sizes = UVitConfig(**small), Sizes(1, (16, 16), 8)
    plain = flops(shape, sizes, None, False)
    forward = flops(shape, sizes, None, False, backward=False)
    fed = flops(replace(shape, self_conditioning=True), sizes, None, False)
    assert fed == pytest.approx(plain + forward, rel=0.1)
    assert flops(replace(shape, self_critic=True), sizes, None, False) == pytest.approx(2 * plain, rel=0.1)


# --- sampling


def by_hand(network: Base, told: Any, free: Any, seed: int, sampling: SamplingConfig) -> Tensor:
    """One picture (1, h, w): every pass is fed with the features of the pass before under the same text."""
    course, length = Course.of(sampling, 64), 64
    ids, before, before_free = torch.full((1, 64), network.config.mask_id), None, None
    choice, confidence = (uniforms(seed, stream, range(sampling.steps), length) for stream in (CHOICE, CONFIDENCE))
    for step in range(sampling.steps):
        before = network.features(ids.view(1, 8, 8), told, None, before)
        logits = network.head(before)
        if course.guidance[step] != 1:
            before_free = network.features(ids.view(1, 8, 8), free, None, before_free)
            logits = guide(logits, network.head(before_free), course.guidance[step])
        critic = None
        if sampling.order == "critic":

            def critic(drawn: Tensor) -> Tensor:
                return network.judge(network.features(drawn.view(1, 8, 8), told)).flatten(1)

        ids = reveal(
            logits.flatten(1, 2),
            ids,
            torch.from_numpy(choice[step : step + 1]),
            torch.from_numpy(confidence[step : step + 1]),
            torch.tensor([course.remaining[step]]),
            torch.tensor([course.temperature[step]], dtype=torch.float64),
            mask_id=network.config.mask_id,
            critic=critic,
        )
    return ids.view(1, 8, 8)


@pytest.fixture(scope="module")
def network(data: Data) -> Base:
    return load_base(Path(data.model) / "transformer")


@torch.no_grad()
def test_sampling_feeds_each_pass_with_the_one_before(network: Base) -> None:
    """Rows with and without guidance side by side, as each alone by hand."""
    draw = torch.Generator().manual_seed(2)
    told, free = (
        network.condition(torch.randn(3, 5, 16, generator=draw), torch.randn(3, 8, generator=draw), torch.zeros(3, 5))
        for _ in range(2)
    )
    kinds = [
        SamplingConfig(steps=6, guidance=g, guidance_span=span) for g, span in ((3, (0, 1)), (1, (0, 1)), (4, (0, 0.5)))
    ]
    ids = sample_ids(
        network,  # type: ignore[arg-type]
        told,
        free,
        ids=torch.full((3, 8, 8), network.config.mask_id),
        seeds=[5, 6, 7],
        courses=[Course.of(kind, 64) for kind in kinds],
    )
    for row, kind in enumerate(kinds):
        one, other = (sample_of(condition, row) for condition in (told, free))
        assert torch.equal(by_hand(network, one, other, 5 + row, kind)[0], ids[row]), row
    plain = new_base(replace(network.config, self_conditioning=False, self_critic=False))
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if k in plain.state_dict()})
    assert not torch.equal(by_hand(plain, sample_of(told, 0), sample_of(free, 0), 5, kinds[0])[0], ids[0])


@torch.no_grad()
def test_a_row_that_is_taken_anew_knows_nothing_of_the_picture_before(network: Base) -> None:
    told = network.condition(torch.ones(1, 5, 16), torch.ones(1, 8), torch.zeros(1, 5))
    course, seen = Course.of(SamplingConfig(steps=4, guidance=1), 64), []
    rows = Rows(network, (1, 8, 8), Draws())  # type: ignore[arg-type]
    for _ in range(2):
        ids = torch.full((1, 8, 8), network.config.mask_id)
        rows.admit([0], told, None, ids=ids, seeds=[9], courses=[course])
        for _ in range(4):
            rows.step()
        seen.append(rows.ids.clone())
    assert torch.equal(*seen)


def test_graphs_are_refused_when_the_model_is_loaded(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymuse.drawing.networks.require_graphs", lambda device: None)
    with pytest.raises(UserError, match=r"cuda_graphs: not with .*, which is self-conditioned"):
        Pipeline.load(data.model, cuda_graphs=True)


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 4])
def test_kept_guidance_feeds_back_what_the_row_itself_asked_anew(network: Base, at_once: int) -> None:
    """A neighbour that joins a step later asks its network anew where this row keeps what it has."""
    draw = torch.Generator().manual_seed(3)
    told, free = (
        network.condition(torch.randn(4, 5, 16, generator=draw), torch.randn(4, 8, generator=draw), torch.zeros(4, 5))
        for _ in range(2)
    )
    course = Course.of(SamplingConfig(steps=6, guidance=3, guidance_every=2), 64)
    ids = torch.full((1, 8, 8), network.config.mask_id)

    def drawn(neighbour: Course | None) -> tuple[Tensor, Tensor | None]:
        rows = Rows(network, (4, 8, 8), at_once=at_once)  # type: ignore[arg-type]
        for row, own, steps in ((2, course, 1), (3, neighbour, 5)):
            if own is not None:
                one, other = (sample_of(condition, row) for condition in (told, free))
                rows.admit([row], one, other, ids=ids, seeds=[row], courses=[own])
            for _ in range(steps):
                rows.step()
        return rows.ids[2], rows._fed.before(2 + 2 // at_once * at_once + at_once, 1)

    (alone, fed), (beside, fed_beside) = drawn(None), drawn(course)
    assert torch.equal(alone, beside)
    assert fed is not None
    assert fed_beside is not None
    assert fed.any()
    torch.testing.assert_close(fed_beside, fed)


def test_a_picture_ordered_by_its_own_base_does_not_depend_on_its_batch(data: Data, network: Base) -> None:
    pipeline = Pipeline.load(data.model, batch_size=4)
    seeds = range(40, 44)
    together = pipeline(PROMPTS, seeds=seeds, order="critic")
    alone = pipeline(PROMPTS[1:2], seeds=[41], order="critic")
    assert np.array_equal(alone.ids[0], together.ids[1])
    assert not np.array_equal(together.ids, pipeline(PROMPTS, seeds=seeds).ids)
    states, pooled = pipeline.text(PROMPTS[1:2])
    free = pipeline.text([""])
    micro = torch.tensor([[32.0, 32, 0, 0, 6]])
    sampling = pipeline.settings.base.model_copy(update={"order": "critic"})
    with torch.no_grad():
        ids = by_hand(network, network.condition(states, pooled, micro), network.condition(*free, micro), 41, sampling)
    assert np.array_equal(ids[0].numpy(), alone.ids[0])


def test_a_style_reaches_the_judge_as_well(data: Data, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "lora", data.model)
    styled = Pipeline.load(data.model, batch_size=4).styled({adapter: 1.0})
    assert styled.critic is not None
    assert styled.critic.base is styled.base  # type: ignore[union-attr]


# --- folders


def test_an_exported_one_opens_here_and_says_that_it_is_not_diffusers(data: Data, tmp_path: Path) -> None:
    trained = config(tmp_path, data, steps=2)
    fit(trained)
    Path(trained.output, "_SUCCESS").touch()
    parts = {"base": trained.output, "vqgan": data.encoders, "text_encoder": data.encoders}
    wanted = ExportConfig(output=str(tmp_path / "model"), **parts, base_sampling={"order": "critic", "steps": 3})
    pipeline = Pipeline.load(export(wanted, Run.off()), batch_size=4)
    assert pipeline(["a red circle"], seeds=[1]).ids.shape == (1, 8, 8)
    record = json.loads((tmp_path / "model" / "transformer" / "config.json").read_text())
    assert record["_class_name"] == "UVit"
    assert read_shape(record) == pipeline.base.config
    assert json.loads((tmp_path / "model" / "model_index.json").read_text()) == {"_class_name": "RaymusePipeline"}


def test_a_started_model_is_given_what_it_lacks_and_keeps_what_it_has(data: Data, tmp_path: Path) -> None:
    plain = tiny.write_model(tmp_path / "plain", data.encoders)
    grown = task_of(config(tmp_path, data, start_from=plain, model=BOTH))
    own = load_base(Path(plain) / "transformer").state_dict()
    now = grown.network.state_dict()
    assert all(torch.equal(now[name], value) for name, value in own.items())
    assert {name.split(".")[0] for name in now.keys() - own.keys()} == {"self_conditioning", "critic_head"}
    with pytest.raises(ConfigError, match=r"model.self_critic: .* does, and that cannot be taken out"):
        build_task(config(tmp_path, data, start_from=data.model, model={"self_critic": False}))
    with pytest.raises(ConfigError, match="a LoRA adds no layers"):
        build_task(config(tmp_path, data, start_from=plain, model=BOTH, lora={"rank": 2}))

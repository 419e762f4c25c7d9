"""How a model draws beside what it draws: precisions, memory that runs out, CUDA graphs, steps that compute less."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.generate import CheckingConfig, GenerateConfig, ServeConfig
from raymuse.drawing import remote_model, sampler
from raymuse.drawing.graphs import WARM_UPS, StepGraphs
from raymuse.drawing.model_folder import local_folder, model_sha256
from raymuse.drawing.sampler import Course, Draws, Rows
from raymuse.drawing.scheduler import MOST_LANES, Scheduler, Ticket
from raymuse.masking import fresh_steps, guide, reveal
from raymuse.models.vqgan import to_bytes
from raymuse.pipeline import Pipeline
from raymuse.serving.generator import draws_as, identity
from raymuse.serving.limit import measure

PROMPTS = [f"a picture of {word}" for word in ("one", "two", "three", "four", "five", "six", "seven")]
SEEDS = list(range(100, 107))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("drawing")
    encoders = tiny.write_encoders(root / "encoders", tiny.write_shards(root / "shards"))
    return tiny.write_model(root / "model", encoders, cascade=True)


@pytest.fixture(scope="module")
def pipeline(folder: str) -> Pipeline:
    return Pipeline.load(folder, batch_size=8)


def scaled(folder: str, part: str, name: str, times: float) -> None:
    """Multiply one weight of a model folder's part."""
    path = Path(folder) / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[name] = weights[name] * times
    save_file(weights, path, metadata={"format": "pt"})


def copied(folder: str, to: Path) -> str:
    for path in Path(folder).rglob("*.*"):
        if path.is_file():
            place = to / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    return str(to)


# --- precision


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_draws_nearly_the_same_and_the_vqgan_stays_exact(
    precision: Any, folder: str, pipeline: Pipeline
) -> None:
    low = Pipeline.load(folder, batch_size=8, precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert low.superres is not None
    assert {weight.dtype for network in (low.base, low.superres) for weight in network.parameters()} == {dtype}
    for exact in (low.vqgan.network, low.text.network):
        assert {weight.dtype for weight in exact.parameters()} == {torch.float32}
    greedy: Any = {"top_k": 1, "temperature": 0.0, "steps": 1}
    drawn, wanted = (one(PROMPTS, seeds=SEEDS, **greedy) for one in (low, pipeline))
    rate = float(np.mean(drawn.base_ids == wanted.base_ids))
    assert rate > (0.8 if precision == "bf16" else 0.95), rate
    assert np.array_equal(low(PROMPTS[3:4], seeds=SEEDS[3:4]).ids[0], low(PROMPTS, seeds=SEEDS).ids[3])
    with pytest.raises(UserError, match=r"precision='fp32'"):
        low.packed()


def test_numbers_that_overflow_fp16_are_drawn_by_the_vqgan_and_refused_by_the_transformer(
    folder: str, tmp_path: Path
) -> None:
    """aMUSEd's VQGAN gives NaN in fp16. Here one of its convolutions does, wherever it counts in fp16."""
    place = copied(folder, tmp_path / "model")
    scaled(place, "vqvae", "decoder.conv_in.weight", 1e7)
    scaled(place, "vqvae", "encoder.conv_in.weight", 1e7)
    low = Pipeline.load(place, batch_size=2, precision="fp16")
    drawn = low(PROMPTS[:2], seeds=SEEDS[:2])
    half = copy.deepcopy(low.vqgan.network).half()
    codes = half.quantize.embedding(torch.from_numpy(drawn.base_ids)).permute(0, 3, 1, 2)
    assert not half.draw(codes).isfinite().all()
    exact = Pipeline.load(place, batch_size=2).vqgan
    assert np.array_equal(drawn.base_pixels, exact.decode(drawn.base_ids))
    assert len(np.unique(drawn.pixels)) > 8
    picture = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    assert not half.latents(torch.from_numpy(picture / 255).permute(0, 3, 1, 2).half()).isfinite().all()
    assert np.array_equal(low.vqgan.encode(picture), exact.encode(picture))

    scaled(place, "transformer", "embed.conv.weight", 1e6)
    with pytest.raises(UserError, match=r"beyond what fp16 can hold: draw with precision bf16, or fp32"):
        Pipeline.load(place, batch_size=2, precision="fp16")(PROMPTS[:2], seeds=SEEDS[:2])
    Pipeline.load(place, batch_size=2, precision="bf16")(PROMPTS[:2], seeds=SEEDS[:2])


def test_a_lora_is_merged_before_the_precision_is_lowered(folder: str, tmp_path: Path) -> None:
    adapter = tiny.write_adapter(tmp_path / "ink", folder)
    exact, low = (Pipeline.load(folder, lora={adapter: 0.5}, precision=kind) for kind in ("fp32", "bf16"))
    for one, other in zip(exact.base.parameters(), low.base.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other)
    styled = Pipeline.load(folder, precision="bf16").styled({adapter: 0.5})
    for one, other in zip(exact.base.parameters(), styled.base.parameters(), strict=True):
        torch.testing.assert_close(one, other.float(), atol=0.02, rtol=0.02)


def test_a_precision_that_there_is_not_is_said(folder: str) -> None:
    with pytest.raises(UserError, match=r"^precision='int8': there are fp32, bf16, fp16"):
        Pipeline.load(folder, precision="int8")  # type: ignore[arg-type]


def test_the_limit_is_measured_in_the_precision_of_the_drawing(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "raymuse.serving.limit.measured_peak", lambda device, dtype: seen.append((device.type, dtype)) or 1e9
    )
    measure(Pipeline.load(folder, batch_size=1, precision="bf16"), 1)
    assert seen == [("cpu", torch.bfloat16)]


def test_the_limit_counts_what_graphs_would_hide(pipeline: Pipeline) -> None:
    assert measure(replace(pipeline, cuda_graphs=True), 1, 1e9) == measure(pipeline, 1, 1e9)


def test_a_job_s_styles_must_be_those_of_who_draws_them(folder: str, tmp_path: Path) -> None:
    ink, oil = (tiny.write_adapter(tmp_path / f"lora{seed}", folder, seed) for seed in (1, 2))

    def of(size: int, **styles: str) -> dict[str, Any]:
        return identity(folder, {}, size, "fp32", CheckingConfig(), styles)

    assert draws_as(of(4, ink=ink, oil=oil, gone="/nowhere"), of(4, ink=ink))
    assert draws_as(of(4, ink=ink), of(4))
    assert not draws_as(of(4), of(4, ink=ink))
    assert not draws_as(of(4, ink=oil), of(4, ink=ink))
    assert not draws_as(of(8, ink=ink), of(4, ink=ink))


# --- memory


def small(monkeypatch: pytest.MonkeyPatch, network: Any, method: str, most: int) -> list[int]:
    """A device whose memory holds the work for so many rows: more raise what PyTorch raises on a GPU."""
    call, seen = getattr(network, method), list[int]()

    def limited(*given: Any) -> Any:
        if len(given[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        seen.append(len(given[0]))
        return call(*given)

    monkeypatch.setattr(network, method, limited)
    return seen


def test_a_batch_that_is_too_large_is_split(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(folder, batch_size=8)
    wanted = pipeline(PROMPTS, seeds=SEEDS)
    assert pipeline.superres is not None
    rows = small(monkeypatch, pipeline.base, "features", 3)
    high = small(monkeypatch, pipeline.superres, "features", 8)
    decoded = small(monkeypatch, pipeline.vqgan.network, "draw", 1)
    with pytest.warns(
        UserWarning, match=r"rows at once do not fit into the memory of the device; .* in \d parts"
    ) as said:
        drawn = pipeline(PROMPTS, seeds=SEEDS)
    assert len(said) == 5  # the base in 2 parts, then 4; super-resolution in 2; pictures of either size one by one
    assert (set(rows), set(high), set(decoded)) == ({2}, {4}, {1})
    assert np.mean(drawn.ids == wanted.ids) > 0.9
    for number in (0, 3):
        with pytest.warns(UserWarning, match="do not fit"):
            assert np.array_equal(pipeline(PROMPTS[number:][:1], seeds=SEEDS[number:][:1]).ids[0], drawn.ids[number])


def test_one_row_that_is_too_large_is_said(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = Pipeline.load(folder, batch_size=2)
    small(monkeypatch, pipeline.base, "features", 0)
    with (
        pytest.warns(UserWarning, match="in 2 parts"),
        pytest.raises(UserError, match=r"^a step of 4 x 4 ids: not even one picture fits into the memory"),
    ):
        pipeline(PROMPTS[:1], seeds=[1])


# --- the step


class NoWaiting(TorchDispatchMode):
    """Operations that make the host wait for the device, or whose shapes depend on values, are errors."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket._qualified_op_name.removeprefix("aten::") not in self.waits, func
        return func(*args, **(kwargs or {}))


STEPS: list[dict[str, Any]] = [
    {},
    {"top_k": 3, "top_p": 0.5},
    {"order": "halton"},
    {"guidance_every": 2},
    {"masked_only": True, "guidance_every": 3},
    {"masked_only": True, "decode": "mean"},
]


@pytest.mark.parametrize("options", STEPS, ids=str)
def test_nothing_in_a_step_waits_for_the_device(
    options: dict[str, Any], pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Rows._run, []

    def watched(rows: Rows, kind: Any) -> None:
        steps.append(kind)
        with NoWaiting():
            step(rows, kind)

    monkeypatch.setattr(Rows, "_run", watched)
    pipeline(PROMPTS, seeds=SEEDS, superres=options, **options)  # type: ignore[arg-type]
    assert len(steps) == 5 + 3


class RecordedGraphs(StepGraphs):
    """StepGraphs with CUDA's part played by this machine, which has none: a capture runs nothing, a replay all."""

    captured: list[Any] = []  # noqa: RUF012 - of all, emptied by each test

    def _captured(self, kind: Any) -> Any:
        self.captured.append(kind)
        run, runs, state = self.run, 0, self.state()

        def counted(kind: Any) -> None:
            nonlocal runs
            runs += 1
            run(kind)

        @contextlib.contextmanager
        def graph(graph: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
            assert pool == (list(self._graphs) or [None])[0]
            before = [tensor.clone() for tensor in state]
            yield
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)
            graph.replay, graph.pool = lambda: run(kind), lambda: pool or kind

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes = {"Stream": lambda: stream, "current_stream": lambda: stream, "graph": graph}
        fakes |= {"stream": lambda stream: contextlib.nullcontext(), "CUDAGraph": SimpleNamespace}
        self.run = counted
        with pytest.MonkeyPatch.context() as patch:
            for name, fake in fakes.items():
                patch.setattr(torch.cuda, name, fake)
            made = super()._captured(kind)
        self.run = run
        assert runs == WARM_UPS + 1
        return made


def test_steps_that_are_graphs_draw_the_same_in_place(
    pipeline: Pipeline, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA itself is not here: what is held is that a step stays where it is, leaves no trace before, and is kept."""
    monkeypatch.setattr("raymuse.drawing.sampler.StepGraphs", RecordedGraphs)
    monkeypatch.setattr("raymuse.drawing.networks.require_graphs", lambda device: None)
    RecordedGraphs.captured.clear()
    graphed = Pipeline.load(folder, batch_size=8, cuda_graphs=True)
    scheduler, tickets, done = Scheduler(graphed), [], {}
    for _ in range(2):
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
            span: Any = {"guidance_span": (0.0, 0.5), "guidance_every": 2, "decode": "mean"}
            tickets.append(Ticket(graphed.request(prompt, seed, **span)))
            scheduler.submit(tickets[-1])
        places = set()
        while scheduler.busy:
            done.update(scheduler.advance())
            for lane in (*scheduler._lanes.values(), *scheduler._idle.values()):
                assert lane.high is not None
                places.add((lane.base.rows.ids.data_ptr(), lane.high.rows.ids.data_ptr()))
        assert len(places) == 1
        captures = len(RecordedGraphs.captured)
    assert captures == len(RecordedGraphs.captured) == 3 + 1  # fresh, kept and no guidance; the super-resolution's
    wanted = pipeline(PROMPTS, seeds=SEEDS, **span)
    for number, ticket in enumerate(tickets):
        assert np.array_equal(done[ticket].ids, wanted.ids[number % len(PROMPTS)])
        assert np.array_equal(done[ticket].base_pixels, wanted.base_pixels[number % len(PROMPTS)])
    longer = Ticket(graphed.request(PROMPTS[0], SEEDS[0], steps=9))  # its steps' values lie elsewhere
    scheduler.submit(longer)
    while scheduler.busy:
        done.update(scheduler.advance())
    assert np.array_equal(done[longer].ids, pipeline(PROMPTS[:1], seeds=SEEDS[:1], steps=9).ids[0])
    assert len(RecordedGraphs.captured) > captures
    for width, height in ((8, 8), (8, 16), (8, 24), (16, 8), (16, 16), (24, 8)):
        scheduler.submit(Ticket(graphed.request(PROMPTS[0], 1, size=(width, height), steps=1)))
    while scheduler.busy:
        scheduler.advance()
        assert len(scheduler._lanes) + len(scheduler._idle) <= MOST_LANES
    assert len(scheduler._idle) == MOST_LANES


def test_graphs_without_a_gpu_are_refused(folder: str) -> None:
    with pytest.raises(UserError, match=r"^cuda_graphs needs a GPU of NVIDIA's, and the model is on cpu"):
        Pipeline.load(folder, cuda_graphs=True)
    for config, words in ((GenerateConfig, {"prompts": "a.txt", "output": "b"}), (ServeConfig, {})):
        with pytest.raises(ValueError, match="cuda_graphs=true needs a GPU: set gpus_per_replica, too"):
            config(model="m", cuda_graphs=True, **words)  # type: ignore[arg-type]
        config(model="m", cuda_graphs=True, gpus_per_replica=1, **words)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="traced=true does what cuda_graphs=true does already"):
            config(model="m", cuda_graphs=True, gpus_per_replica=1, traced=True, **words)  # type: ignore[arg-type]


# --- steps that compute less


class Toy:
    """Logits that depend on the ids and on the condition (B, C), by a table."""

    config = SimpleNamespace(mask_id=6, codebook_size=6)

    def __init__(self) -> None:
        self.table = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
        self.rows: list[int] = []

    def precompute(self, condition: Tensor) -> tuple[Tensor]:
        return (condition,)

    def features(self, ids: Tensor, condition: tuple[Tensor], at: Tensor | None = None) -> Tensor:
        self.rows.append(len(ids))
        mixed = self.table[ids].mean(dim=(1, 2), keepdim=True)
        all_of = (self.table[ids] + mixed) * condition[0][:, None, None, :]
        return all_of if at is None else all_of.flatten(1, 2).gather(1, at[:, :, None].expand(-1, -1, 6))[:, :, None]

    def head(self, features: Tensor) -> Tensor:
        return features


def by_hand(network: Toy, said: Tensor, free: Tensor, scales: Sequence[float], fresh: Sequence[bool]) -> Tensor:
    """The ids (1, 9) after all steps, without chance, as docs/generate.md has it."""
    ids, added, count = torch.full((1, 3, 3), 6), torch.zeros(1, 9, 6), len(scales)
    half = torch.full((1, 9), 0.5, dtype=torch.float64)
    for step, (scale, anew) in enumerate(zip(scales, fresh, strict=True)):
        logits, other = (network.features(ids, (one,)).flatten(1, 2) for one in (said, free))
        added = logits - other if anew else added
        guided = guide(logits, logits - added, scale) if scale != 1 else logits
        left = torch.tensor([9 - 9 * (step + 1) // count])
        ids = reveal(guided, ids.flatten(1), half, half, left, torch.zeros(1), mask_id=6, top_k=1).view(1, 3, 3)
    return ids.flatten(1)


@pytest.mark.parametrize("masked_only", [False, True])
def test_what_guidance_adds_is_kept_between_its_steps(masked_only: bool) -> None:
    said, free = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(1))
    for every, fresh in ((1, [1, 1, 1, 0]), (2, [1, 0, 1, 0]), (5, [1, 0, 0, 0])):
        scales, network = [3.0, 2.0, 4.0, 1.0], Toy()
        assert fresh_steps(scales, every) == [bool(one) for one in fresh]
        wanted = by_hand(network, said, free, scales, [bool(one) for one in fresh])
        course = Course(
            [9 - 9 * (step + 1) // 4 for step in range(4)], [0.0] * 4, scales, None, fresh_steps(scales, every)
        )
        other = Course([4, 0], [0.0] * 2, [2.0, 2.0])  # a neighbour that always has its own
        rows = Rows(network, (2, 3, 3), Draws(top_k=1, masked_only=masked_only))
        both, none = torch.cat([said, -said]), torch.cat([free, 2 * free])
        ids = torch.full((2, 3, 3), 6)
        network.rows.clear()
        rows.admit([0], both[:1], none[:1], ids=ids[:1], seeds=[0], courses=[course])
        rows.step()
        rows.admit([1], both[1:], none[1:], ids=ids[1:], seeds=[1], courses=[other])
        for _ in range(3):
            rows.step()
        assert torch.equal(rows.ids[0].flatten(), wanted[0])
        # Twice the rows where anyone asks anew: the neighbour does in the second and third of the steps.
        assert network.rows == [4, 4, 4, 2]


def test_a_neighbour_that_keeps_guidance_changes_no_bit_of_a_row_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    said, free = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []

    def watched(logits: Tensor, *more: Any, **how: Any) -> Tensor:
        seen.append(logits[0])
        return reveal(logits, *more, **how)

    monkeypatch.setattr(sampler, "reveal", watched)
    plain = Course([6, 3, 0], [0.0] * 3, [3.0, 2.0, 4.3])
    for other in (plain, replace(plain, fresh=[True, False, True])):
        rows = Rows(Toy(), (2, 3, 3), Draws(top_k=1))
        rows.admit([0, 1], said, free, ids=torch.full((2, 3, 3), 6), seeds=[0, 1], courses=[plain, other])
        for _ in range(3):
            rows.step()
    assert torch.equal(torch.stack(seen[:3]), torch.stack(seen[3:]))


def test_kept_guidance_costs_one_pass_and_does_not_depend_on_the_batch(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, features = list[int](), pipeline.base.features
    monkeypatch.setattr(pipeline.base, "features", lambda ids, *more: rows.append(len(ids)) or features(ids, *more))
    drawn = pipeline(PROMPTS, seeds=SEEDS, steps=6, guidance_every=2)
    assert rows == [16, 8] * 3
    other = pipeline(PROMPTS, seeds=SEEDS, steps=6)
    assert not np.array_equal(other.base_ids, drawn.base_ids)
    requests = [
        pipeline.request(prompt, seed, steps=6 - seed % 2, guidance_every=1 + seed % 3)
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    together = pipeline.draw(requests)
    for request, picture in zip(requests, together, strict=True):
        assert np.array_equal(pipeline.draw([request])[0].ids, picture.ids)


@pytest.mark.parametrize("muse", [False, True])
def test_unknown_ids_alone_are_computed_where_that_is_enough(
    muse: bool, pipeline: Pipeline, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if muse:
        pipeline = Pipeline.load(tiny.write_model(tmp_path / "muse", folder, muse=True), batch_size=8)
    cells, head = list[int](), pipeline.base.head
    monkeypatch.setattr(pipeline.base, "head", lambda x: cells.append(x.shape[1] * x.shape[2]) or head(x))
    wanted = pipeline(PROMPTS, seeds=SEEDS)
    whole, most = set(cells), cells[0]
    cells.clear()
    few: Any = {"masked_only": True}
    drawn = pipeline(PROMPTS, seeds=SEEDS, superres=few if pipeline.superres else None, **few)
    assert whole == {most}
    assert cells[0] == most
    assert cells == sorted(cells, reverse=True)
    assert cells[-1] < most / 2
    assert all(count % (most // 8) == 0 for count in cells)
    assert np.mean(drawn.ids == wanted.ids) > 0.95  # but for rounding
    picture = np.full((32, 32, 3), 200, np.uint8)
    once, again = (
        pipeline.edit("mask-free", PROMPTS[:2], [picture] * 2, seeds=[1, 2], rounds=3, share=0.3, **options).ids
        for options in ({}, few)
    )
    assert np.mean(once == again) > 0.9
    with pytest.raises(UserError, match="masked_only has steps of other shapes, each of which would be compiled"):
        pipeline.compiled("aot_eager")(PROMPTS[:1], seeds=[1], masked_only=True)


# --- means of the codes


@pytest.mark.parametrize("masked_only", [False, True])
def test_a_mean_is_of_all_vectors_by_the_probabilities_that_an_id_was_drawn_from(masked_only: bool) -> None:
    """By hand, in two steps; what was known keeps its own vector, to the bit."""
    network, random = Toy(), torch.Generator().manual_seed(1)
    said, vectors = torch.randn(1, 6, generator=random), torch.randn(6, 4, generator=random)
    draws = Draws(top_k=1, masked_only=masked_only, decode="mean")
    rows, ids = Rows(network, (1, 3, 3), draws, vectors=vectors), torch.full((1, 3, 3), 6)
    ids[0, 1, 1] = 2
    rows.admit([0], said, None, ids=ids, seeds=[0], courses=[Course([4, 0], [0.0] * 2, [1.0] * 2)])
    wanted, unknown = torch.zeros(1, 9, 4), (ids == 6).flatten(1)
    for left in (4, 0):
        probabilities = network.features(rows.ids, (said,)).flatten(1, 2).softmax(dim=-1)
        rows.step()
        drawn = unknown & (rows.ids != 6).flatten(1)
        wanted[drawn] = (probabilities @ vectors)[drawn]
        unknown &= ~drawn
        assert int(unknown.sum()) == left
    assert rows.means is not None
    torch.testing.assert_close(rows.means.values[:, [0, 1, 2, 3, 5, 6, 7, 8]], wanted[:, [0, 1, 2, 3, 5, 6, 7, 8]])
    assert torch.equal(rows.means.values[0, 4], vectors[2])


def test_means_are_decoded_and_told_to_the_super_resolution(pipeline: Pipeline) -> None:
    """Both stages by hand, in one step each; the ids are those that are drawn without."""
    once: Any = {"steps": 1, "guidance": 1.0, "decode": "mean"}
    drawn = pipeline(PROMPTS, seeds=SEEDS, superres=once, **once)
    plain: Any = {**once, "decode": "drawn"}
    assert np.array_equal(drawn.base_ids, pipeline(PROMPTS, seeds=SEEDS, superres=plain, **plain).base_ids)
    base, superres, vqgan = pipeline.base, pipeline.superres, pipeline.superres_vqgan
    assert superres is not None
    assert vqgan is not None
    with torch.no_grad():
        states, pooled = pipeline.text(PROMPTS)
        micro = torch.tensor([[*pipeline.settings.micro_conditioning]] * len(PROMPTS))
        ids = torch.from_numpy(drawn.base_ids)
        unknown = torch.full_like(ids, base.config.mask_id)
        likely = base(unknown, states, pooled, micro).softmax(dim=-1)
        low = pipeline.vqgan.decode_codes(likely @ pipeline.vqgan.codebook)
        told = superres.condition(states, ids, likely @ superres.low_embed.weight[: pipeline.vqgan.codes])
        high_ids = torch.full(drawn.ids.shape, superres.config.mask_id)
        high = superres.head(superres.features(high_ids, told)).softmax(dim=-1)
        wanted = vqgan.decode_codes(high @ vqgan.codebook)
    for pixels, by_hand in ((drawn.base_pixels, low), (drawn.pixels, wanted)):
        assert np.abs(pixels.astype(int) - to_bytes(by_hand)).max() <= 1
        assert np.abs(pixels.astype(int) - to_bytes(by_hand).mean()).max() > 10
    assert not np.array_equal(drawn.base_pixels, pipeline.vqgan.decode(drawn.base_ids))


# --- the super-resolution's options


def test_a_call_changes_the_super_resolutions_options(pipeline: Pipeline) -> None:
    plain = pipeline(PROMPTS, seeds=SEEDS)
    other = pipeline(PROMPTS, seeds=SEEDS, superres={"guidance": 9.0, "top_k": 2})
    assert np.array_equal(plain.base_ids, other.base_ids)
    assert not np.array_equal(plain.ids, other.ids)
    picture = np.full((16, 16, 3), 90, np.uint8)
    few, many = (
        pipeline.edit("super-resolution", ["a"], [picture], seeds=[1], superres={"steps": steps}).ids
        for steps in (1, 4)
    )
    assert not np.array_equal(few, many)
    with pytest.raises(ConfigError, match=r"super-resolution's sampling.*\n.*top_q: no such key; did you mean top_p"):
        pipeline(PROMPTS, seeds=SEEDS, superres={"top_q": 1})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(UserError, match="a critic judges the base's ids"):
        pipeline(PROMPTS, seeds=SEEDS, superres={"order": "critic"})


def test_a_base_alone_has_no_super_resolution_to_change(folder: str, tmp_path: Path) -> None:
    alone = Pipeline.load(tiny.write_model(tmp_path / "base", folder), batch_size=1)
    with pytest.raises(UserError, match="no super-resolution, and so no sampling of one to be changed"):
        alone(["a"], seeds=[1], superres={"steps": 1})


def test_what_has_a_field_of_its_own_is_said_once() -> None:
    with pytest.raises(ValueError, match=r"steps is a field of its own: write steps=\.\.\. instead of sampling\.steps"):
        GenerateConfig(model="m", prompts="p.txt", output="o", sampling={"steps": 3})


# --- a model in an object store


def test_a_model_in_a_store_is_fetched_once_and_again_where_it_changed(
    folder: str, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store, address = fsspec.filesystem("memory"), "memory://models/tiny"
    store.put(folder, "/models/tiny", recursive=True)
    fetches, fetch = [], remote_model._fetch
    monkeypatch.setattr(remote_model, "_fetch", lambda *given: fetches.append(given) or fetch(*given))
    remote = Pipeline.load(address, batch_size=8)
    assert np.array_equal(remote(PROMPTS, seeds=SEEDS).ids, pipeline(PROMPTS, seeds=SEEDS).ids)
    assert model_sha256(address) == model_sha256(folder)
    assert local_folder(address) == local_folder(address)
    assert len(fetches) == 1
    settings = (Path(folder) / "generation_config.json").read_bytes()
    store.pipe_file("/models/tiny/generation_config.json", settings.replace(b'"steps": 5', b'"steps": 4'))
    assert Pipeline.load(address).settings.base.steps == 4
    assert model_sha256(address) != model_sha256(folder)
    assert len(fetches) == 2
    with pytest.raises(UserError, match=r"^there is no model at memory://models/none: the store holds nothing there"):
        Pipeline.load("memory://models/none")
    with pytest.raises(UserError, match=r"^nosuch://a/b cannot be reached: .*Check the address"):
        Pipeline.load("nosuch://a/b")

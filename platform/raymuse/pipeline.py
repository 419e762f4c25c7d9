"""Prompts to pictures, and pictures to others.

pipeline = Pipeline.load("runs/demo/model")
drawn = pipeline(["a large red circle on a white background"], seeds=[7])
drawn.images[0].save("circle.png")
again = pipeline.edit("inpaint", ["a small blue star on a white background"], [picture], masks=[mask], seeds=[7])
"""

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, Unpack, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from raymuse.config.edit import Task
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.explain import sentences
from raymuse.config.export import SamplingConfig
from raymuse.drawing import tasks
from raymuse.drawing.inputs import Mask, PictureLike, Pixels, fit, fit_mask, grown, read_mask, read_picture
from raymuse.drawing.model_folder import Settings, check_widths, load_superres, load_uvit, local_folder
from raymuse.drawing.packed import is_packed, pack
from raymuse.drawing.sampler import Course, OnStep, TokenTransformer, sample_ids
from raymuse.drawing.tasks import UNKNOWN, Ids, Request, Stage
from raymuse.encoding.pictures import downscale
from raymuse.masking import CHOICE, CONFIDENCE, HIGH_CHOICE, HIGH_CONFIDENCE
from raymuse.models.lora import Adapter
from raymuse.models.superres import SuperRes
from raymuse.models.text import TextEncoder
from raymuse.models.uvit import UVit
from raymuse.models.vqgan import Vqgan

if TYPE_CHECKING:
    from raymuse.models.clip import Clip  # seconds to import, and few need it

Size = tuple[int, int]
Texts = str | Sequence[str]


class Options(TypedDict, total=False):
    """How the base is sampled, where not as the model's own settings say; see `SamplingConfig`."""

    steps: int
    guidance: float
    guidance_schedule: Literal["constant", "linear", "cosine"]
    guidance_span: tuple[float, float]
    temperature: float
    end_temperature: float
    top_p: float
    top_k: int
    masking: Literal["cosine", "linear", "arccos", "square", "root", "power", "sigmoid"]
    order: Literal["confidence", "halton", "random"]


@dataclass(frozen=True)
class Picture:
    """One drawn picture, uint8 (H, W, 3) with its ids (h, w), and the base's own where a cascade drew it."""

    pixels: NDArray[np.uint8]
    base_pixels: NDArray[np.uint8]
    ids: Ids
    base_ids: Ids


@dataclass(frozen=True)
class Drawn:
    """The pictures of one call, in the order of its prompts. The arrays need pictures of one size."""

    pictures: Sequence[Picture]

    @property
    def images(self) -> list[Image.Image]:
        return [Image.fromarray(picture.pixels) for picture in self.pictures]

    @property
    def pixels(self) -> NDArray[np.uint8]:
        return np.stack([picture.pixels for picture in self.pictures])

    @property
    def base_pixels(self) -> NDArray[np.uint8]:
        return np.stack([picture.base_pixels for picture in self.pictures])

    @property
    def ids(self) -> Ids:
        return np.stack([picture.ids for picture in self.pictures])

    @property
    def base_ids(self) -> Ids:
        return np.stack([picture.base_ids for picture in self.pictures])


def image_seed(run_seed: int, prompt: int, sample: int) -> int:
    """The seed of one picture of a run, from the run's seed and its place: 63 bits."""
    digest = hashlib.blake2b(f"{run_seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass(frozen=True)
class Pipeline:
    """Everything that draws: text encoder, base transformer, VQGAN, and super-resolution where there is one.

    Attributes:
        batch_size: rows that every network call is padded to, so that a picture does not depend on its batch.
    """

    vqgan: Vqgan
    text: TextEncoder
    base: UVit
    settings: Settings
    superres: SuperRes | None = None
    superres_vqgan: Vqgan | None = None
    batch_size: int = 16

    @classmethod
    def load(cls, folder_or_id: str, *, device: str = "cpu", batch_size: int = 16, variant: str | None = None) -> Self:
        """Open a model folder (ours, or diffusers' aMUSEd layout) or a Hugging Face id.

        Args:
            variant: read the weights from the files of that name, e.g. "fp16".

        Raises:
            UserError: for a folder that is missing, incomplete, or holds pickled weights.
        """
        folder = local_folder(folder_or_id)
        vqgan = Vqgan.load(str(folder), device, variant=variant)
        base = load_uvit(folder / "transformer", device, variant)
        settings = Settings.load(folder, base.config, vqgan.factor)
        superres = superres_vqgan = None
        if (folder / "superres").exists():
            superres = load_superres(folder / "superres", device, variant)
            own = folder / "superres_vqvae"
            superres_vqgan = Vqgan.load(str(own), device, variant=variant) if own.exists() else vqgan
        text = TextEncoder.load(str(folder), device, variant=variant)
        check_widths(folder_or_id, "transformer", base.config, vqgan.codes, text)
        if superres is not None and superres_vqgan is not None:
            check_widths(folder_or_id, "superres", superres.config, superres_vqgan.codes, text)
        return cls(vqgan, text, base, settings, superres, superres_vqgan, batch_size)

    def styled(self, adapters: Mapping[str, float]) -> Self:
        """This model with LoRA adapters merged into it, by address and scale; this one itself stays as it is.

        Raises:
            UserError: for an adapter that cannot be read, or was made for another model.
        """
        if is_packed(self.base):
            raise UserError("styles are merged into plain weights: call styled() first, then packed().")
        loaded = [(Adapter.load(address), scale) for address, scale in adapters.items()]
        base, superres, text = copy.deepcopy((self.base, self.superres, self.text.network))
        for adapter, scale in loaded:
            adapter.merge(base, "transformer", scale)
            adapter.merge(text, "text_encoder", scale)
            if superres is not None:
                adapter.merge(superres, "superres", scale)
            elif "superres" in adapter.changes:
                raise UserError(f"{adapter.name} was made for a cascade, and this model has no super-resolution.")
        return replace(self, base=base, superres=superres, text=replace(self.text, network=text))

    def packed(self) -> Self:
        """This model with its linears laid out for oneDNN: quicker on a CPU; add styles before.

        Raises:
            UserError: where it is not on the CPU, or PyTorch has no oneDNN.
        """
        rows = self.batch_size * (self.settings.base_size // self.vqgan.factor) ** 2
        base = pack(self.base, rows)
        return replace(self, base=base, superres=None if self.superres is None else pack(self.superres, rows))

    # --- what is asked for

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative: Texts = "",
        size: Size | Sequence[Size] | None = None,
        ids: Ids | None = None,
        on_step: OnStep | None = None,
        **options: Unpack[Options],
    ) -> Drawn:
        """Draw one picture a prompt.

        Args:
            prompts: B captions.
            seeds: B seeds.
            negative: one for all, or one each.
            size: (width, height) in pixels, of all or one each; None: the model's.
            ids: the base's ids (B, h, w) where some are known already, and `UNKNOWN` elsewhere.
            on_step: told of the base's ids after each step, a batch at a time.
            options: of the base; what is not given is the model's own. The super-resolution keeps its own.

        Raises:
            UserError: before any work, for what does not fit together.
        """
        sizes = size if isinstance(size, list) else [size] * len(prompts)
        known = [None] * len(prompts) if ids is None else list(ids)
        each = _each(len(prompts), seeds=seeds, negatives=_texts(negative, prompts), sizes=sizes, ids=known)
        requests = [self.request(*parts, **options) for parts in zip(prompts, *each, strict=True)]
        return Drawn(self.draw(requests, on_step))

    def request(
        self,
        prompt: str,
        seed: int,
        negative: str = "",
        size: Size | None = None,
        ids: Ids | None = None,
        **options: Unpack[Options],
    ) -> Request:
        """One picture from a prompt, to `draw` together with others; the arguments are those of a call."""
        sampling = self._sampling(options)
        grid, high = self._grids(size)
        base = tasks.from_nothing(grid, sampling) if ids is None else tasks.from_known(self._known(ids, grid), sampling)
        return Request(prompt, negative, seed, base, self._high(high))

    def best_of(
        self,
        count: int,
        clip: "Clip",
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative: Texts = "",
        size: Size | None = None,
        **options: Unpack[Options],
    ) -> Drawn:
        """Of `count` variations of each prompt the one that CLIP finds nearest to it (Muse draws 16).

        The variations of a seed have the seeds `image_seed(seed, 0, 0)`, `image_seed(seed, 0, 1)`, ...
        """
        if count < 1:
            raise UserError(f"best of {count}: draw at least one picture a prompt")
        each = _each(len(prompts), seeds=seeds, negatives=_texts(negative, prompts))
        requests = [
            self.request(prompt, image_seed(seed, 0, sample), said, size, **options)
            for prompt, seed, said in zip(prompts, *each, strict=True)
            for sample in range(count)
        ]
        drawn = self.draw(requests)
        scores = clip.score(np.stack([one.pixels for one in drawn]), [request.prompt for request in requests])
        best = scores.reshape(len(prompts), count).argmax(axis=1)
        return Drawn([drawn[row * count + column] for row, column in enumerate(best)])

    def edit(
        self,
        task: Task,
        prompts: Sequence[str],
        pictures: Sequence[PictureLike],
        *,
        seeds: Sequence[int],
        negative: Texts = "",
        masks: Sequence[PictureLike] | None = None,
        strength: float = 0.8,
        sides: tuple[int, int, int, int] = (0, 0, 0, 0),
        rounds: int = tasks.ROUNDS,
        share: float = tasks.SHARE,
        size: Size | None = None,
        paste: bool = False,
        on_step: OnStep | None = None,
        **options: Unpack[Options],
    ) -> Drawn:
        """Draw one picture from a prompt and a picture each.

        Args:
            task: see `tasks`.
            pictures: B pictures: Pillow's, uint8 arrays (H, W, 3), or paths.
            masks: of `inpaint`: B masks as large as their pictures, white (True) where to draw.
            strength: of `image-to-image`: 0 keeps the picture, 1 ignores it.
            sides: of `outpaint`: pixels that come to the left, top, right and bottom, in whole cells.
            rounds, share: of `mask-free`: how often, and what share of the ids, is drawn again.
            size: (width, height) that pictures and masks are first resized and cut to; None: as they are.
            paste: of `inpaint` and `outpaint`: outside the mask put the picture's own pixels back, which otherwise are
                as the VQGAN decodes them.
            seeds, negative, on_step, options: as for a call. Inpainting unmasks linearly unless `masking` is given
                (aMUSEd); mask-free editing draws from the 3 likeliest codes unless `top_k` is (Muse).

        Raises:
            UserError: before any work, for what does not fit together.
        """
        if (masks is not None) != (task == "inpaint"):
            raise UserError(f"{task} takes {'one mask a picture: masks=[...]' if masks is None else 'no masks'}")
        known = [None] * len(prompts) if masks is None else masks
        each = _each(len(prompts), seeds=seeds, negatives=_texts(negative, prompts), pictures=pictures, masks=known)
        requests = []
        for prompt, seed, said, picture, mask in zip(prompts, *each, strict=True):
            pixels, area = self._read(picture, mask, size)
            if task == "inpaint" and area is not None:
                stages = self._filled(pixels, area, options)
            elif task == "outpaint":
                pixels, area = grown(pixels, _sides(sides))
                stages = self._filled(pixels, area, options)
            elif task == "super-resolution":
                stages = self._enlarged(pixels)
            elif task == "image-to-image":
                base = tasks.from_picture(self._base_ids(pixels), self._sampling(options), strength, seed)
                stages = base, self._anew(pixels)
            elif task == "mask-free":
                few = self._sampling({"top_k": tasks.TOP_K, **options})
                stages = tasks.resampled(self._base_ids(pixels), few, seed, rounds, share), self._anew(pixels)
            else:
                raise UserError(f"there is no task {task!r}; there are {', '.join(get_args(Task))}")
            own = (pixels, area) if paste and area is not None else None
            requests.append(Request(prompt, said, seed, *stages, own))
        return Drawn(self.draw(requests, on_step))

    def _filled(self, pixels: Pixels, area: Mask, options: Options) -> tuple[Stage, Stage | None]:
        """Inpainting: the ids that the mask touches are drawn, the base's, then, given these, the high-res ones."""
        (height, width), high = self._grids(_size(pixels))
        cells = tasks.touched(area, (height, width))
        sampling = self._sampling({"masking": "linear", **options})
        base = tasks.from_known(np.where(cells, UNKNOWN, self._base_ids(pixels)), sampling)
        if high is None:
            return base, None
        assert self.superres_vqgan is not None
        assert self.settings.superres is not None
        known = np.where(tasks.touched(area, high), UNKNOWN, self.superres_vqgan.encode(pixels[None])[0])
        return base, tasks.from_known(known, self.settings.superres.model_copy(update={"masking": "linear"}))

    def _enlarged(self, pixels: Pixels) -> tuple[Stage, Stage | None]:
        """Super-resolution: a picture of the base's size keeps its ids, and gets high-res ones."""
        if self.superres is None:
            raise UserError("this model has no super-resolution: its folder holds no superres/")
        (width, height), scale = _size(pixels), self.settings.size // self.settings.base_size
        high = self._grids((width * scale, height * scale))[1]
        return tasks.kept(self.vqgan.encode(pixels[None])[0]), self._high(high)

    # --- what does not fit

    def _sampling(self, options: Options) -> SamplingConfig:
        given = {name: value for name, value in options.items() if value is not None}
        try:
            return SamplingConfig.model_validate({**self.settings.base.model_dump(), **given})
        except ValidationError as error:
            raise ConfigError("sampling", sentences(SamplingConfig, error.errors(), lambda path: "")) from None

    def _grids(self, size: Size | None) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Base and high-res grid (h, w) of a picture of `size`, (width, height); None: the model's own.

        Raises:
            UserError: for sides that are no whole cells, or too large for the super-resolution.
        """
        width, height = size or (self.settings.size, self.settings.size)
        scale = self.settings.size // self.settings.base_size
        cell = self.vqgan.factor * scale * (2 if self.base.config.downsample else 1)
        if width % cell or height % cell or min(width, height) < cell:
            raise UserError(
                f"{width} x {height} pixels: this model draws in cells of {cell}, so sides are multiples of it"
            )
        base = height // scale // self.vqgan.factor, width // scale // self.vqgan.factor
        if self.superres is None or self.superres_vqgan is None:
            return base, None
        most = self.superres.config.high_grid * self.superres_vqgan.factor
        if max(width, height) > most:
            raise UserError(f"{width} x {height} pixels: the super-resolution draws at most {most} on a side")
        return base, (height // self.superres_vqgan.factor, width // self.superres_vqgan.factor)

    def _read(self, picture: PictureLike, mask: PictureLike | None, size: Size | None) -> tuple[Pixels, Mask | None]:
        """A picture and its mask, both resized and cut to `size` where it is given."""
        pixels, area = read_picture(picture), None if mask is None else read_mask(mask)
        if area is not None and area.shape != pixels.shape[:2]:
            raise UserError(
                f"the mask has {area.shape[1]} x {area.shape[0]} pixels and its picture {pixels.shape[1]} x "
                f"{pixels.shape[0]}: they must be of one size"
            )
        if size is None:
            return pixels, area
        return fit(pixels, size), None if area is None else fit_mask(area, size)

    def _known(self, ids: Ids, grid: tuple[int, int]) -> Ids:
        if ids.shape != grid or ids.min() < UNKNOWN or ids.max() >= self.base.config.codebook_size:
            raise UserError(
                f"known ids of shape {ids.shape}, {ids.min()} to {ids.max()}: they must be {grid}, "
                f"{UNKNOWN} (unknown) to {self.base.config.codebook_size - 1}"
            )
        return ids

    def _base_ids(self, pixels: Pixels) -> Ids:
        """The base's ids of a picture of the final size."""
        height, width = (side * self.vqgan.factor for side in self._grids(_size(pixels))[0])
        ids: Ids = self.vqgan.encode(downscale(pixels, (height, width))[None])[0]
        return ids

    def _anew(self, pixels: Pixels) -> Stage | None:
        """The high-res ids of a picture's size, all to be drawn."""
        return self._high(self._grids(_size(pixels))[1])

    def _high(self, grid: tuple[int, int] | None) -> Stage | None:
        if grid is None:
            return None
        assert self.settings.superres is not None, "a model folder with superres/ says how to sample it"
        return tasks.from_nothing(grid, self.settings.superres)

    # --- drawing

    def draw(self, requests: Sequence[Request], on_step: OnStep | None = None) -> list[Picture]:
        """Draw any mix of requests, those that can share a batch together; the answers keep their order."""
        if cut := self.text.truncated(list(dict.fromkeys(request.prompt for request in requests))):
            warnings.warn(
                f"{len(cut)} prompts have more than {self.text.length} tokens, and what is beyond is not read, as of: "
                f"{cut[0][:80]!r}",
                stacklevel=2,
            )
        drawn: dict[int, Picture] = {}
        for places in _batches(requests, self.batch_size):
            batch = [requests[place] for place in places]
            drawn.update(zip(places, self._draw(batch, on_step), strict=True))
        return [drawn[place] for place in range(len(requests))]

    @torch.no_grad()
    def _draw(self, requests: Sequence[Request], on_step: OnStep | None) -> Iterator[Picture]:
        """One batch, padded to `batch_size` rows with rows that have nothing to draw."""
        first, spare = requests[0], self.batch_size - len(requests)
        blank = replace(
            first, prompt="", negative="", seed=0, base=_still(first.base), high=_still(first.high), paste=None
        )
        rows = [*requests, *[blank] * spare]
        states, pooled = self._said([row.prompt for row in rows])
        free_states, free_pooled = self._said([row.negative for row in rows])
        micro = self._micro(first.base.ids.shape, len(rows))
        base_ids = self._sample(
            self.base,
            self.base.condition(states, pooled, micro),
            lambda: self.base.condition(free_states, free_pooled, micro),
            [row.base for row in rows],
            [row.seed for row in rows],
            (CHOICE, CONFIDENCE),
            None if on_step is None else lambda step, ids: on_step(step, ids[: len(requests)]),
        )
        base_pixels = self.vqgan.decode(base_ids)
        ids, pixels = base_ids, base_pixels
        if first.high is not None:
            assert self.superres is not None
            assert self.superres_vqgan is not None
            superres, condition = self.superres, self.superres.condition(states, base_ids)
            ids = self._sample(
                superres,
                condition,
                lambda: superres.retold(condition, free_states),
                [row.high for row in rows if row.high is not None],
                [row.seed for row in rows],
                (HIGH_CHOICE, HIGH_CONFIDENCE),
                None,
            )
            pixels = self.superres_vqgan.decode(ids)
        arrays = (pixels, base_pixels, ids.cpu().numpy(), base_ids.cpu().numpy())
        for request, *parts in zip(requests, *(array[: len(requests)] for array in arrays), strict=True):
            yield _pasted(Picture(*parts), request.paste)

    def _sample(
        self,
        network: TokenTransformer,
        condition: Any,
        free: Any,
        stages: Sequence[Stage],
        seeds: Sequence[int],
        streams: tuple[int, int],
        on_step: OnStep | None,
    ) -> Tensor:
        """Ids (B, h, w). `free` makes the unconditional condition, where a course needs it."""
        ids = torch.from_numpy(np.stack([stage.ids for stage in stages])).to(self.vqgan.network.device)
        return sample_ids(
            network,
            condition,
            free() if any(stage.course.guided for stage in stages) else None,
            ids=torch.where(ids == UNKNOWN, int(network.config.mask_id), ids),
            seeds=seeds,
            courses=[stage.course for stage in stages],
            draws=stages[0].draws,
            streams=streams,
            on_step=on_step,
        )

    def _said(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States and pooled vectors of B prompts, of which each is encoded once. B rows, whatever they say."""
        distinct = list(dict.fromkeys(prompts))
        states, pooled = self.text([*distinct, *[""] * (len(prompts) - len(distinct))])
        places = torch.tensor([distinct.index(prompt) for prompt in prompts], device=states.device)
        return states[places], pooled[places]

    def _micro(self, grid: tuple[int, ...], count: int) -> Tensor:
        """Micro-conditions (B, 5): the model's own, with width and height in proportion to the size that is drawn."""
        width, height, top, left, aesthetic = self.settings.micro_conditioning
        side = self.settings.base_size // self.vqgan.factor
        row = [width * grid[1] / side, height * grid[0] / side, top, left, aesthetic]
        return torch.tensor([row] * count, device=self.vqgan.network.device)


def _batches(requests: Sequence[Request], most: int) -> Iterator[list[int]]:
    """Places of the requests that share a shape, at most so many at a time."""
    shapes = list(dict.fromkeys(request.shape for request in requests))
    order = sorted(range(len(requests)), key=lambda place: shapes.index(requests[place].shape))
    for _, group in groupby(order, key=lambda place: requests[place].shape):
        places = list(group)
        yield from (places[start : start + most] for start in range(0, len(places), most))


def _still(stage: Stage | None) -> Any:
    """A stage of the same shape with nothing to draw."""
    if stage is None:
        return None
    return replace(stage, ids=np.zeros_like(stage.ids), course=Course([], [], []))


def _pasted(picture: Picture, paste: tuple[Pixels, Mask] | None) -> Picture:
    if paste is None:
        return picture
    own, mask = paste
    return replace(picture, pixels=np.where(mask[:, :, None], picture.pixels, own))


def _size(pixels: Pixels) -> Size:
    return pixels.shape[1], pixels.shape[0]


def _sides(sides: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    if min(sides) < 0 or not any(sides):
        raise UserError(f"sides {sides}: pixels to add at the left, top, right and bottom, at least one above 0")
    return sides


def _texts(negative: Texts, prompts: Sequence[str]) -> Sequence[str]:
    return [negative] * len(prompts) if isinstance(negative, str) else negative


def _each(count: int, **given: Sequence[Any]) -> list[Sequence[Any]]:
    """What is given, one a prompt each."""
    if count == 0:
        raise UserError("no prompts: give one caption a picture")
    for name, things in given.items():
        if len(things) != count:
            raise UserError(f"{count} prompts and {len(things)} {name} differ: give one each")
    return list(given.values())

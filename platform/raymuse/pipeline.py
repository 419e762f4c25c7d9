"""Prompts to pictures, and pictures to others.

pipeline = Pipeline.load("runs/demo/model")
drawn = pipeline(["a large red circle on a white background"], seeds=[7])
drawn.images[0].save("circle.png")
again = pipeline.edit("inpaint", ["a small blue star on a white background"], [picture], masks=[mask], seeds=[7])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from raymuse.config.edit import ROUNDS, SHARE, STRENGTH, Task
from raymuse.config.errors import ConfigError, UserError
from raymuse.config.explain import sentences
from raymuse.config.sampling import Options, SamplingConfig
from raymuse.drawing import batches, tasks
from raymuse.drawing.batches import OnStep
from raymuse.drawing.compiled import is_compiled
from raymuse.drawing.inputs import Mask, PictureLike, Pixels, fit, fit_mask, grown, read_mask, read_picture
from raymuse.drawing.networks import Grid, Networks, Size
from raymuse.drawing.scheduler import Picture
from raymuse.drawing.seeds import image_seed as image_seed
from raymuse.drawing.tasks import UNKNOWN, Ids, Request, Stage
from raymuse.encoding.pictures import downscale
from raymuse.models.clip import Clip

Texts = str | Sequence[str]

MOST_SIDE = 8192  # pixels that a picture to edit is enlarged to


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


class Pipeline(Networks):
    """What can be asked of a model: pictures from prompts, and from pictures."""

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative: Texts = "",
        size: Size | Sequence[Size | None] | None = None,
        ids: Ids | None = None,
        on_step: OnStep | None = None,
        superres: Options | None = None,
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
            options, superres: of the base, and of the super-resolution; what is not given is the model's own.

        Raises:
            UserError: before any work, for what does not fit together.
        """
        sizes = _sizes(size, len(prompts))
        given = [None] * len(prompts) if ids is None else list(ids)
        each = _each(len(prompts), seeds=seeds, negatives=_texts(negative, prompts), sizes=sizes, ids=given)
        requests = [
            self.request(prompt, seed, said, side, known, superres, **options)
            for prompt, seed, said, side, known in zip(prompts, *each, strict=True)
        ]
        return Drawn(self.draw(requests, on_step))

    def request(
        self,
        prompt: str,
        seed: int,
        negative: str = "",
        size: Size | None = None,
        ids: Ids | None = None,
        superres: Options | None = None,
        **options: Unpack[Options],
    ) -> Request:
        """One picture from a prompt, to `draw` together with others; the arguments are those of a call."""
        sampling = self._sampling(options)
        grid, high = self.grids(size)
        base = tasks.from_nothing(grid, sampling) if ids is None else tasks.from_known(self._known(ids, grid), sampling)
        return Request(prompt, negative, seed, base, self._high(high, superres))

    def draw(self, requests: Sequence[Request], on_step: OnStep | None = None) -> list[Picture]:
        """Draw any mix of requests, those that can share a batch together; the answers keep their order."""
        return batches.draw(self, requests, on_step)

    def best_of(
        self,
        count: int,
        clip: Clip,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negative: Texts = "",
        size: Size | None = None,
        superres: Options | None = None,
        **options: Unpack[Options],
    ) -> Drawn:
        """Of `count` variations of each prompt the one that CLIP finds nearest to it (Muse draws 16).

        The variations of a seed have the seeds `image_seed(seed, 0, 0)`, `image_seed(seed, 0, 1)`, ...
        """
        if count < 1:
            raise UserError(f"best of {count}: draw at least one picture a prompt")
        each = _each(len(prompts), seeds=seeds, negatives=_texts(negative, prompts))
        requests = [
            self.request(prompt, image_seed(seed, 0, sample), said, size, superres=superres, **options)
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
        strength: float = STRENGTH,
        sides: tuple[int, int, int, int] = (0, 0, 0, 0),
        rounds: int = ROUNDS,
        share: float = SHARE,
        size: Size | None = None,
        paste: bool = False,
        on_step: OnStep | None = None,
        superres: Options | None = None,
        **options: Unpack[Options],
    ) -> Drawn:
        """Draw one picture from a prompt and a picture each.

        Args:
            task: see `tasks`.
            pictures: B pictures: Pillow's, uint8 arrays (H, W, 3), or paths.
            masks: of `inpaint`: B masks as large as their pictures, white (True) where to draw.
            strength: of `image-to-image`: 0 keeps the picture, 1 ignores it.
            sides: of `outpaint`: pixels that come to the left, top, right and bottom, in whole cells.
            rounds: of `mask-free`: how often ids are drawn again.
            share: of `mask-free`: what share of them each time.
            size: (width, height) that pictures and masks are first resized and cut to; None: as they are.
            paste: of `inpaint` and `outpaint`: outside the mask put the picture's own pixels back, which otherwise are
                as the VQGAN decodes them.

        The rest is as for a call. Inpainting unmasks linearly unless `masking` is given (aMUSEd); mask-free editing
        draws from the 3 likeliest codes unless `top_k` is (Muse).

        Raises:
            UserError: before any work, for what does not fit together.
        """
        known = [None] * len(prompts) if masks is None else masks
        each = _each(len(prompts), seeds=seeds, negatives=_texts(negative, prompts), pictures=pictures, masks=known)
        how: Any = {
            "strength": strength,
            "sides": sides,
            "rounds": rounds,
            "share": share,
            "size": size,
            "paste": paste,
            "superres": superres,
        }
        requests = [
            self.edit_request(task, prompt, picture, seed, said, mask, **how, **options)
            for prompt, seed, said, picture, mask in zip(prompts, *each, strict=True)
        ]
        return Drawn(self.draw(requests, on_step))

    def edit_request(
        self,
        task: Task,
        prompt: str,
        picture: PictureLike,
        seed: int,
        negative: str = "",
        mask: PictureLike | None = None,
        *,
        strength: float = STRENGTH,
        sides: tuple[int, int, int, int] = (0, 0, 0, 0),
        rounds: int = ROUNDS,
        share: float = SHARE,
        size: Size | None = None,
        paste: bool = False,
        superres: Options | None = None,
        **options: Unpack[Options],
    ) -> Request:
        """One picture from a prompt and a picture, to `draw` together with others; the arguments are `edit`'s."""
        if (mask is not None) != (task == "inpaint"):
            raise UserError(f"{task} takes {'one mask a picture: masks=[...]' if mask is None else 'no masks'}")
        pixels, area = self._read(picture, mask, size)
        if task == "inpaint" and area is not None:
            stages = self._filled(pixels, area, options, superres)
        elif task == "outpaint":
            left, top, right, bottom = _sides(sides)
            self.grids((pixels.shape[1] + left + right, pixels.shape[0] + top + bottom))  # before it takes memory
            pixels, area = grown(pixels, sides)
            stages = self._filled(pixels, area, options, superres)
        elif task == "super-resolution":
            stages = self._enlarged(pixels, superres)
        elif task == "image-to-image":
            base = tasks.from_picture(self._base_ids(pixels), self._sampling(options), strength, seed)
            stages = base, self._anew(pixels, superres)
        elif task == "mask-free":
            few = self._sampling({"top_k": tasks.TOP_K, **options})
            stages = tasks.resampled(self._base_ids(pixels), few, seed, rounds, share), self._anew(pixels, superres)
        else:
            raise UserError(f"there is no task {task!r}; there are {', '.join(get_args(Task))}")
        return Request(prompt, negative, seed, *stages, (pixels, area) if paste and area is not None else None)

    def _filled(
        self, pixels: Pixels, area: Mask, options: Options, superres: Options | None
    ) -> tuple[Stage, Stage | None]:
        """Inpainting: the ids that the mask touches are drawn, the base's, then, given these, the high-res ones."""
        (height, width), high = self.grids(_size(pixels))
        cells = tasks.touched(area, (height, width))
        sampling = self._sampling({"masking": "linear", **options})
        base = tasks.from_known(np.where(cells, UNKNOWN, self._base_ids(pixels)), sampling)
        if high is None:
            self._high(None, superres)
            return base, None
        assert self.superres_vqgan is not None
        known = np.where(tasks.touched(area, high), UNKNOWN, self.superres_vqgan.encode(pixels[None])[0])
        return base, tasks.from_known(known, self._superres_sampling({"masking": "linear", **(superres or {})}))

    def _enlarged(self, pixels: Pixels, superres: Options | None) -> tuple[Stage, Stage | None]:
        """Super-resolution: a picture of the base's size keeps its ids, and gets high-res ones."""
        if self.superres is None:
            raise UserError("this model has no super-resolution: its folder holds no superres/")
        (width, height), scale = _size(pixels), self.settings.size // self.settings.base_size
        high = self.grids((width * scale, height * scale))[1]
        return tasks.kept(self.vqgan.encode(pixels[None])[0]), self._high(high, superres)

    # --- what does not fit

    def _sampling(self, options: Options) -> SamplingConfig:
        sampling = changed("sampling", self.settings.base, options)
        if sampling.order == "critic" and self.critic is None:
            raise UserError("order critic: this model has no critic/. `raymuse train critic` trains one.")
        return self._possible(sampling)

    def _superres_sampling(self, options: Options) -> SamplingConfig:
        assert self.settings.superres is not None, "a model folder with superres/ says how to sample it"
        sampling = changed("super-resolution's sampling", self.settings.superres, options)
        if sampling.order == "critic":
            raise UserError("order critic: a critic judges the base's ids, so the super-resolution has another order.")
        return self._possible(sampling)

    def _possible(self, sampling: SamplingConfig) -> SamplingConfig:
        if sampling.masked_only and is_compiled(self.base):
            raise UserError("masked_only has steps of other shapes, each of which would be compiled: draw without it.")
        return sampling

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
        if max(size) > MOST_SIDE:
            raise UserError(f"size {size[0]} x {size[1]}: {MOST_SIDE} pixels a side are the most")
        return fit(pixels, size), None if area is None else fit_mask(area, size)

    def _known(self, ids: Ids, grid: Grid) -> Ids:
        if ids.shape != grid or ids.min() < UNKNOWN or ids.max() >= self.base.config.codebook_size:
            raise UserError(
                f"known ids of shape {ids.shape}, {ids.min()} to {ids.max()}: they must be {grid}, "
                f"{UNKNOWN} (unknown) to {self.base.config.codebook_size - 1}"
            )
        return ids

    def _base_ids(self, pixels: Pixels) -> Ids:
        """The base's ids of a picture of the final size."""
        height, width = (side * self.vqgan.factor for side in self.grids(_size(pixels))[0])
        ids: Ids = self.vqgan.encode(downscale(pixels, (height, width))[None])[0]
        return ids

    def _anew(self, pixels: Pixels, superres: Options | None) -> Stage | None:
        """The high-res ids of a picture's size, all to be drawn."""
        return self._high(self.grids(_size(pixels))[1], superres)

    def _high(self, grid: Grid | None, superres: Options | None) -> Stage | None:
        if grid is not None:
            return tasks.from_nothing(grid, self._superres_sampling(superres or {}))
        if superres:
            raise UserError("this model has no super-resolution, and so no sampling of one to be changed")
        return None


def changed(where: str, own: SamplingConfig, options: Options) -> SamplingConfig:
    """A sampling with some options instead, those that are not None. Raises ConfigError, which says `where`."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return SamplingConfig.model_validate({**own.model_dump(), **given})
    except ValidationError as error:
        raise ConfigError(where, sentences(SamplingConfig, error.errors(), lambda path: "")) from None


def _size(pixels: Pixels) -> Size:
    return pixels.shape[1], pixels.shape[0]


def _sides(sides: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    if min(sides) < 0 or not any(sides):
        raise UserError(f"sides {sides}: pixels to add at the left, top, right and bottom, at least one above 0")
    return sides


def _sizes(size: Size | Sequence[Size | None] | None, count: int) -> Sequence[Size | None]:
    """`size` as one each. A size of its own may come as a list, too."""
    if not size:
        return [None] * count
    sizes: list[Any] = list(size)
    return [(sizes[0], sizes[1])] * count if isinstance(sizes[0], int) else sizes


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

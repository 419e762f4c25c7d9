"""The networks of a model and how they are sampled by default."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from raymuse.config.drawing import DrawPrecision
from raymuse.config.errors import UserError
from raymuse.drawing.attention import Attention, require_kernel
from raymuse.drawing.compiled import compile_blocks, is_compiled
from raymuse.drawing.graphs import require_graphs
from raymuse.drawing.model_folder import Settings, check_widths, load_base, load_superres, local_folder
from raymuse.drawing.packed import is_packed, pack
from raymuse.drawing.sampler import rows_at_once
from raymuse.drawing.traced import is_traced, trace
from raymuse.models.base import Base
from raymuse.models.lora import Adapter
from raymuse.models.maskgit import MaskGit
from raymuse.models.precision import DTYPES, Precision
from raymuse.models.superres import SuperRes
from raymuse.models.text import TextEncoder
from raymuse.models.uvit import UVit
from raymuse.models.vqgan import Vqgan

Size = tuple[int, int]
Grid = tuple[int, int]

MOST_CELLS = 128 * 128  # ids of the base: 16 times those of a 512-pixel aMUSEd


class SelfCritic:
    """A base that was trained to judge as well, as the critic of what it drew."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.config: Any = base.config

    def condition(self, states: Tensor, pooled: Tensor, micro: Tensor) -> Any:
        return self.base.condition(states, pooled, micro)

    def precompute(self, condition: Any) -> Any:
        return self.base.precompute(condition)

    def features(self, ids: Tensor, condition: Any, at: Tensor | None = None, before: Tensor | None = None) -> Tensor:
        return self.base.features(ids, condition, at, before)

    def head(self, features: Tensor) -> Tensor:
        return self.base.judge(features)


@dataclass(frozen=True)
class Networks:
    """Everything that draws: text encoder, base transformer, VQGAN, and super-resolution where there is one.

    Attributes:
        batch_size: rows that every network call is padded to, so that a picture does not depend on its batch.
        attention: the kernel of the transformers.
        critic: tells drawn ids of the base from true ones: a network like it with one logit an id, or itself.
        cuda_graphs: whether sampling steps are CUDA graphs.
    """

    vqgan: Vqgan
    text: TextEncoder
    base: Base
    settings: Settings
    superres: SuperRes | None = None
    superres_vqgan: Vqgan | None = None
    batch_size: int = 16
    critic: Base | SelfCritic | None = None
    attention: Attention = "auto"
    cuda_graphs: bool = False

    @classmethod
    def load(
        cls,
        folder_or_id: str,
        *,
        device: str = "cpu",
        batch_size: int = 16,
        variant: str | None = None,
        lora: Mapping[str, float] | None = None,
        attention: Attention = "auto",
        precision: DrawPrecision = "fp32",
        cuda_graphs: bool = False,
    ) -> Self:
        """Open a model folder (ours, or diffusers' aMUSEd layout) or a Hugging Face id.

        Args:
            variant: read the weights from the files of that name, e.g. "fp16".
            lora: adapters to merge, as for `styled`.
            attention: "flash", "memory-efficient", "math", or "auto": PyTorch chooses.
            precision: of the transformers. VQGAN and text encoder count in fp32 always, the former's products through
                TF32 on CUDA where this is another.
            cuda_graphs: start each step's kernels by one call; on CUDA alone.

        Raises:
            UserError: for a folder that is missing, incomplete, or holds pickled weights, and what the device cannot.
        """
        if precision not in get_args(DrawPrecision):
            raise UserError(f"precision={precision!r}: there are {', '.join(get_args(DrawPrecision))}")
        if cuda_graphs:
            require_graphs(device)
        require_kernel(attention, device, precision)
        folder = local_folder(folder_or_id)
        inexact: Precision = "fp32" if precision == "fp32" else "tf32"
        vqgan = Vqgan.load(str(folder), device, inexact, variant=variant)
        base = load_base(folder / "transformer", device, variant)
        if isinstance(base, MaskGit) and attention == "flash":
            raise UserError(
                "attention='flash' cannot leave out a caption's padding, as Muse's base must: leave it at auto."
            )
        settings = Settings.load(folder, base.config, vqgan.factor)
        superres = superres_vqgan = None
        if (folder / "superres").exists():
            superres = load_superres(folder / "superres", device, variant)
            own = folder / "superres_vqvae"
            superres_vqgan = Vqgan.load(str(own), device, inexact, variant=variant) if own.exists() else vqgan
        text = TextEncoder.load(str(folder), device, variant=variant)
        critic: Base | SelfCritic | None = SelfCritic(base) if base.config.self_critic else None
        if (folder / "critic").exists():
            critic = load_base(folder / "critic", device, variant)
        parts = vqgan, text, base, settings, superres, superres_vqgan
        loaded = cls(*parts, batch_size, critic, attention, cuda_graphs)
        loaded._require_whole(folder_or_id)
        if lora:
            loaded = loaded.styled(lora)
        for network in (loaded.base, loaded.superres, loaded.critic):
            if isinstance(network, nn.Module):  # a self-critic is the base once more
                network.to(DTYPES[precision])
        return loaded

    def _require_whole(self, name: str) -> None:
        """Raise UserError where the parts of the model folder `name` do not fit together, or what is asked of it."""
        base, superres, sampling = self.base.config, self.superres, self.settings
        check_widths(name, "transformer", base, self.vqgan.codes, self.text)
        if superres is not None and self.superres_vqgan is not None:
            check_widths(name, "superres", superres.config, self.superres_vqgan.codes, self.text)
        if self.critic is not None and not isinstance(self.critic, SelfCritic):
            check_widths(name, "critic", self.critic.config, 1, self.text)
        if sampling.base.order == "critic" and self.critic is None:
            raise UserError(f"{name} is sampled with order: critic and has no critic/: export one with it.")
        if sampling.superres is not None and sampling.superres.order == "critic":
            raise UserError(f"{name}: a critic judges the base's ids, so superres_sampling has another order.")
        if self.cuda_graphs and (base.self_conditioning or (superres and superres.config.self_conditioning)):
            raise UserError(f"cuda_graphs: not with {name}, which is self-conditioned: draw without.")

    def styled(self, adapters: Mapping[str, float]) -> Self:
        """This model with LoRA adapters merged into it, by address and scale; this one itself stays as it is.

        Raises:
            UserError: for an adapter that cannot be read, or was made for another model.
        """
        self._require_plain("styled")
        loaded = [(Adapter.load(address), scale) for address, scale in adapters.items()]
        base, superres, text = copy.deepcopy((self.base, self.superres, self.text.network))
        for adapter, scale in loaded:
            adapter.merge(base, "transformer", scale)
            adapter.merge(text, "text_encoder", scale)
            if superres is not None:
                adapter.merge(superres, "superres", scale)
            elif "superres" in adapter.changes:
                raise UserError(f"{adapter.name} was made for a cascade, and this model has no super-resolution.")
        told = replace(self.text, network=text)
        return replace(self, base=base, superres=superres, text=told, critic=self._critic_with(base))

    def packed(self) -> Self:
        """This model with its linears laid out for oneDNN: quicker on a CPU; add styles before.

        Raises:
            UserError: where it is not on the CPU, or PyTorch has no oneDNN.
        """
        self._require_plain("packed")
        cells = (self.settings.base_size // self.vqgan.factor) ** 2
        rows = cells * rows_at_once(self.batch_size, cells, self.vqgan.network.device)
        base = pack(self.base, rows)
        superres = None if self.superres is None else pack(self.superres, rows)
        return replace(self, base=base, superres=superres, critic=self._critic_with(base))

    def compiled(self, backend: str = "inductor") -> Self:
        """This model with its transformers' blocks compiled by `torch.compile`: quicker, but for the first picture of
        every size, which takes a minute. Add styles before.

        Raises:
            UserError: where there is no C++ compiler.
        """
        self._require_plain("compiled")
        base = compile_blocks(self.base, backend)
        superres = None if self.superres is None else compile_blocks(self.superres, backend)
        return replace(self, base=base, superres=superres, critic=self._critic_with(base))

    def _critic_with(self, base: Base) -> Base | SelfCritic | None:
        return SelfCritic(base) if isinstance(self.critic, SelfCritic) else self.critic

    def traced(self) -> Self:
        """This model with its transformers' operations recorded, and called without Python: quicker where the model is
        small, and the same ids; the first picture of every size takes a second more. Add styles before.
        """
        self._require_plain("traced")
        return replace(self, base=trace(self.base), superres=None if self.superres is None else trace(self.superres))

    def _require_plain(self, wanted: str) -> None:
        if is_packed(self.base) or is_compiled(self.base) or is_traced(self.base):
            raise UserError(
                f"{wanted}() starts from plain weights: call styled() first, and of packed(), compiled() and traced() "
                "only one."
            )

    @property
    def group(self) -> int:
        """Rows in which pictures are begun and decoded: as constant as `batch_size`, a quarter of it or less."""
        return next(rows for rows in range(max(1, self.batch_size // 4), 0, -1) if self.batch_size % rows == 0)

    def preview(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A picture on its way, of its final size (H, W, 3), from the base's ids (h, w): grey where one is unknown."""
        unknown = ids >= self.vqgan.codes
        likely = np.bincount(ids[~unknown]).argmax() if not unknown.all() else 0
        pixels = self.vqgan.decode(np.where(unknown, likely, ids)[None])[0]
        cells = unknown.repeat(self.vqgan.factor, axis=0).repeat(self.vqgan.factor, axis=1)
        scale = self.settings.size // self.settings.base_size
        return np.where(cells[:, :, None], np.uint8(128), pixels).repeat(scale, axis=0).repeat(scale, axis=1)

    def grids(self, size: Size | None) -> tuple[Grid, Grid | None]:
        """Base and high-res grid (h, w) of a picture of `size`, (width, height); None: the model's own.

        Raises:
            UserError: for sides that are no whole cells, or too large for the super-resolution.
        """
        width, height = size or (self.settings.size, self.settings.size)
        scale = self.settings.size // self.settings.base_size
        halves = isinstance(self.base, UVit) and self.base.config.downsample
        cell = self.vqgan.factor * scale * (2 if halves else 1)
        if width % cell or height % cell or min(width, height) < cell:
            raise UserError(
                f"{width} x {height} pixels: this model draws in cells of {cell}, so sides are multiples of it"
            )
        base = height // scale // self.vqgan.factor, width // scale // self.vqgan.factor
        if base[0] * base[1] > MOST_CELLS:
            raise UserError(f"{width} x {height} pixels: {base[0] * base[1]} ids are more than {MOST_CELLS}")
        if isinstance(self.base, MaskGit) and max(base) > self.base.config.sample_size:
            most = self.base.config.sample_size * self.vqgan.factor * scale
            raise UserError(f"{width} x {height} pixels: the base has learned the positions of at most {most} a side")
        if self.superres is None or self.superres_vqgan is None:
            return base, None
        most = self.superres.config.high_grid * self.superres_vqgan.factor
        if max(width, height) > most:
            raise UserError(f"{width} x {height} pixels: the super-resolution draws at most {most} on a side")
        return base, (height // self.superres_vqgan.factor, width // self.superres_vqgan.factor)

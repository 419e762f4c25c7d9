"""The network that a masked training begins with: of a fresh shape, or another model's, checked against the data."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from raymuse.config.errors import ConfigError, UserError
from raymuse.config.training import BaseConfig, CriticConfig, MaskedConfig, SuperresConfig
from raymuse.drawing.model_folder import load_base, load_superres, local_folder
from raymuse.models.base import SHAPES, Base, BaseShape, new_base
from raymuse.models.maskgit import MaskGitConfig
from raymuse.models.superres import SuperRes, SuperResConfig
from raymuse.training.tokens import TokenStream

FIXED = ("codebook_size", "encoder_hidden_size", "cond_embed_dim", "low_vocab_size")
"""What data and text encoder decide of a network that a training starts from."""
GRIDS = ("low_grid", "high_grid", "positions")
"""Sides that such a network must have room for."""
RESAMPLING = ("downsample", "upsample")
GROWN = (*RESAMPLING, "self_conditioning", "self_critic")
"""What a network that a training starts from may be given."""
ADDED = ("down_block.downsample.", "up_block.upsample.", "self_conditioning.", "critic_head.")


def first_network(config: BaseConfig | SuperresConfig, stream: TokenStream) -> Base | SuperRes:
    """The base or super-resolution transformer as it stands before the first step.

    Raises:
        ConfigError: for a shape that there is not.
        UserError: for a model to start from that does not fit the token shards.
    """
    if config.start_from is not None:
        return _loaded(config, config.start_from, stream)
    shape = fresh_shape(config, stream)
    network: Base | SuperRes = SuperRes(shape) if isinstance(shape, SuperResConfig) else new_base(shape)
    network.initialise(config.seed)
    return network


def fresh_shape(config: BaseConfig | SuperresConfig, stream: TokenStream | None) -> BaseShape | SuperResConfig:
    """The shape that `model` and the token shards say; without shards, `model` and the network's defaults."""
    made: BaseShape | SuperResConfig
    if isinstance(config, SuperresConfig):
        made = shape_of(SuperResConfig, config, {} if stream is None else superres_shape(stream))
    else:
        kind = SHAPES[config.architecture]
        made = shape_of(kind, config, {} if stream is None else base_shape(stream, kind))
    return made


def _loaded(config: BaseConfig | SuperresConfig, address: str, stream: TokenStream) -> Base | SuperRes:
    """The network of a model folder, all its weights to be trained."""
    folder = local_folder(address)
    network: Base | SuperRes
    if isinstance(config, SuperresConfig):
        network = load_superres(folder / "superres")
        require_fit(f"{folder}/superres", network.config, superres_shape(stream), config.source)
    else:
        network = load_base(folder / "transformer")
        require_fit(f"{folder}/transformer", network.config, base_shape(stream, type(network.config)), config.source)
        shape = grown_shape(network.config, config, stream.grid[0])
        if shape != network.config:
            network = _grown(network, shape, config.seed)
    return network.requires_grad_(True).train()


def _grown(network: Base, shape: BaseShape, seed: int) -> Base:
    """The same base with the layers that it lacks, which start as in a fresh one."""
    grown = new_base(shape)
    grown.initialise(seed)
    missing, unknown = grown.load_state_dict(network.state_dict(), strict=False)
    assert not unknown, unknown
    assert all(name.startswith(ADDED) for name in missing), missing
    return grown


def grown_shape(shape: BaseShape, config: BaseConfig, side: int) -> BaseShape:
    """A base's shape with what of `GROWN` the `model` asks for; a U-ViT's for a grid of that side.

    By down- and up-sampling aMUSEd went from 256 to 512 pixels (arXiv 2401.01808). With a LoRA the shape as it is.

    Raises:
        ConfigError: for a model that cannot get them, or is to lose them, or for one of the two without the other.
    """
    asked = {name: config.model[name] for name in GROWN if name in config.model}
    lacks = [name for name, value in asked.items() if value and not getattr(shape, name, False)]
    if config.lora is not None:
        if lacks:
            problem = f"model.{lacks[0]}: {config.start_from} does not, and a LoRA adds no layers"
            raise ConfigError(config.stage, [problem])
        return shape
    if isinstance(shape, MaskGitConfig):
        if wrong := [name for name in lacks if name in RESAMPLING]:
            problem = f"model.{wrong[0]}: {config.start_from} does not, and Muse's base has none"
            raise ConfigError(config.stage, [problem])
        own: dict[str, Any] = {name: value for name, value in asked.items() if name not in RESAMPLING}
    else:
        own = {**asked, "sample_size": side}
    try:
        made = replace(shape, **own)
    except (ValueError, TypeError) as error:
        raise ConfigError(config.stage, [f"model: {error}"]) from error
    if getattr(shape, "downsample", False) and not getattr(made, "downsample", False):
        raise ConfigError(config.stage, [f"model: {config.start_from} down-samples, and that cannot be taken out"])
    if lost := [name for name in GROWN if getattr(shape, name, False) and not getattr(made, name)]:
        raise ConfigError(config.stage, [f"model.{lost[0]}: {config.start_from} does, and that cannot be taken out"])
    return made


def base_shape(stream: TokenStream, kind: type[BaseShape]) -> dict[str, Any]:
    """What the data decides of a base: widths of the text, codes, the mask's id after them, and the grid."""
    shape: dict[str, Any] = {
        "encoder_hidden_size": stream.empty_states.shape[-1],
        "codebook_size": stream.codes,
        "vocab_size": stream.codes + 64,
    }
    if kind is MaskGitConfig:
        return {**shape, "sample_size": max(stream.grid)}
    return {**shape, "cond_embed_dim": stream.empty_pooled.shape[-1], "sample_size": stream.grid[0]}


def superres_shape(stream: TokenStream) -> dict[str, Any]:
    """The same of a super-resolution transformer."""
    return {
        "encoder_hidden_size": stream.empty_states.shape[-1],
        "codebook_size": stream.codes,
        "vocab_size": stream.codes + 64,
        "low_vocab_size": stream.store.codes("low_ids"),
        "low_grid": max(stream.store.grid("low_ids")),
        "high_grid": max(stream.grid),
    }


def require_fit(address: str, shape: BaseShape | SuperResConfig, known: Mapping[str, Any], tokens: str) -> None:
    """Raise UserError where a network was made for other token shards (`known`: what they ask)."""
    facts = asdict(shape)
    if isinstance(shape, MaskGitConfig):
        facts, known = {**facts, "positions": shape.sample_size}, {**known, "positions": known["sample_size"]}
    wrong = [
        f"{name} is {facts[name]} and must be {known[name]}"
        for name in FIXED
        if name in facts and facts[name] != known[name]
    ]
    for name in GRIDS:
        if name in facts and facts[name] < known[name]:
            wrong.append(f"{name} is {facts[name]} and must be at least {known[name]}")
    if wrong:
        raise UserError(
            f"{address} was made for another VQGAN, text encoder or size than {tokens}: {', '.join(wrong)}. "
            "Pretokenize with the parts of that model."
        )


def shape_of(kind: Callable[..., Any], config: MaskedConfig, known: dict[str, Any]) -> Any:
    """The network's own config from the recipe's `model` and what the data decides.

    Raises:
        ConfigError: naming fields that the network does not have, and sizes that do not fit.
    """
    assert isinstance(config, BaseConfig | SuperresConfig | CriticConfig)
    allowed = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    unknown = [name for name in config.model if name not in allowed]
    if unknown:
        problems = [f"model.{name}: no such field; it has {', '.join(sorted(allowed))}" for name in unknown]
        raise ConfigError(config.stage, problems)
    wrong = [name for name in FIXED[:3] if name in known and config.model.get(name, known[name]) != known[name]]
    side = known.get("sample_size", 0)
    asked = config.model.get("sample_size", side)
    if side and (asked < side if kind is MaskGitConfig else asked != side):
        wrong.append("sample_size")
    if wrong:
        problems = [f"model.{name}: is {config.model[name]}, and of the token shards {known[name]}" for name in wrong]
        raise ConfigError(config.stage, problems)
    try:
        return kind(**{**known, **config.model})
    except (ValueError, TypeError) as error:
        raise ConfigError(config.stage, [f"model: {error}"]) from error

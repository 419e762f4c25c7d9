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
from raymuse.models.uvit import UVit
from raymuse.training.tokens import TokenStream

FIXED = ("codebook_size", "encoder_hidden_size", "cond_embed_dim", "low_vocab_size")
"""What data and text encoder decide of a network that a training starts from."""
GRIDS = ("low_grid", "high_grid", "positions")
"""Sides that such a network must have room for."""
RESAMPLING = ("downsample", "upsample")


def first_network(config: BaseConfig | SuperresConfig, stream: TokenStream) -> Base | SuperRes:
    """The base or super-resolution transformer as it stands before the first step.

    Raises:
        ConfigError: for a shape that there is not.
        UserError: for a model to start from that does not fit the token shards.
    """
    if config.start_from is not None:
        return _loaded(config, config.start_from, stream)
    network: Base | SuperRes
    if isinstance(config, BaseConfig):
        kind = SHAPES[config.architecture]
        network = new_base(shape_of(kind, config, base_shape(stream, kind)))
    else:
        network = SuperRes(shape_of(SuperResConfig, config, superres_shape(stream)))
    network.initialise(config.seed)
    return network


def _loaded(config: BaseConfig | SuperresConfig, address: str, stream: TokenStream) -> Base | SuperRes:
    """The network of a model folder, all its weights to be trained."""
    folder = local_folder(address)
    network: Base | SuperRes
    if isinstance(config, SuperresConfig):
        network = load_superres(folder / "superres")
        require_fit(f"{folder}/superres", network.config, superres_shape(stream), config.input)
    else:
        network = load_base(folder / "transformer")
        require_fit(f"{folder}/transformer", network.config, base_shape(stream, type(network.config)), config.input)
        if isinstance(network, UVit) and config.lora is None:
            network = _resampled(network, config, stream.grid[0])
    return network.requires_grad_(True).train()


def _resampled(network: UVit, config: BaseConfig, side: int) -> UVit:
    """The same U-ViT for a grid of that side; with the down- and up-sampling that `model` asks for and it lacks.

    So aMUSEd went from 256 to 512 pixels (arXiv 2401.01808, section 3): every other weight is kept.
    """
    asked = {name: config.model[name] for name in RESAMPLING if name in config.model}
    try:
        shape = replace(network.config, sample_size=side, **asked)
    except (ValueError, TypeError) as error:
        raise ConfigError(config.stage, [f"model: {error}"]) from error
    if network.config.downsample and not shape.downsample:
        raise ConfigError(config.stage, [f"model: {config.start_from} down-samples, and that cannot be taken out"])
    grown = UVit(shape)
    grown.initialise(config.seed)
    missing, unknown = grown.load_state_dict(network.state_dict(), strict=False)
    assert not unknown, unknown
    assert all(name.startswith(("down_block.downsample.", "up_block.upsample.")) for name in missing), missing
    return grown


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
    try:
        return kind(**{**known, **config.model})
    except (ValueError, TypeError) as error:
        raise ConfigError(config.stage, [f"model: {error}"]) from error

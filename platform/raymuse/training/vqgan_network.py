"""The VQGAN that a recipe asks for: a fresh one, or one to go on with, and what of its sizes cannot work."""

import torch

from raymuse.config.errors import ConfigError
from raymuse.config.training import VqganConfig
from raymuse.models.lpips import LEAST_SIDE
from raymuse.models.vqgan import Vqgan
from raymuse.models.vqmodel import VqModel, VqModelConfig
from raymuse.training.adversary import least_side


def build_vqgan(config: VqganConfig) -> VqModel:
    """A `VqModel`, codes looked up by id: of `start_from`, or a fresh one of the recipe's shape, without attention.

    With `train: decoder` only what lies behind the codes has gradients.

    Raises:
        ConfigError: for fields that there are not, or sizes that do not fit.
        UserError: for a folder to start from that is no VQGAN's.
    """
    torch.manual_seed(config.seed)
    if config.start_from is not None:
        network = Vqgan.load(config.start_from).network.requires_grad_(True)
    else:
        network = _fresh(config)
    if problems := _misfits(config, network.config.factor):
        raise ConfigError(config.stage, problems)
    if config.train == "decoder":
        for frozen in (network.encoder, network.quant_conv):
            frozen.requires_grad_(False)
    elif config.rate_weight > 0:
        _keep_place_for_prices(config, network)
    return network.train()


def _fresh(config: VqganConfig) -> VqModel:
    try:
        return VqModel(VqModelConfig(**{"sample_size": config.crop, **config.model}))
    except (TypeError, ValueError) as error:
        raise ConfigError(config.stage, [f"model: {error}"]) from error


def _keep_place_for_prices(config: VqganConfig, network: VqModel) -> None:
    """Hold the last of the latents' channels at 0, and out of the decoder: there the codes carry their prices.

    So the network stays a plain VQModel of diffusers, whose nearest code is the entropy-constrained one for everybody.
    """
    to_codes, from_codes = network.quant_conv, network.post_quant_conv
    assert to_codes.bias is not None
    if to_codes.out_channels < 2:
        raise ConfigError(config.stage, [f"rate_weight={config.rate_weight} needs latent_channels of 2 or more"])
    if config.start_from is not None and bool(to_codes.weight[-1].any()):
        raise ConfigError(
            config.stage,
            [f"rate_weight={config.rate_weight}: {config.start_from} was trained without, and has no place for prices"],
        )
    for parameter, axis in ((to_codes.weight, 0), (to_codes.bias, 0), (from_codes.weight, 1)):
        kept = torch.ones_like(parameter)
        kept.select(axis, -1).zero_()
        parameter.data.mul_(kept)
        parameter.register_hook(lambda gradient, kept=kept: gradient * kept.to(gradient.device))  # type: ignore[no-untyped-call]


def _misfits(config: VqganConfig, factor: int) -> list[str]:
    """What of the pictures' sizes cannot work with a VQGAN of this factor, or with the losses."""
    crops = {f"curriculum={side}": side for side in config.curriculum} | {f"crop={config.crop}": config.crop}
    sides = {f"resolutions={side}": side for side in config.resolutions}
    problems = [
        f"{name} is no multiple of the VQGAN's factor {factor}"
        for name, side in (crops | sides).items()
        if side % factor
    ]
    for crop, side in crops.items():
        problems += [f"{name} is below {crop}" for name, short in sides.items() if short < side]
    whole = (max(config.resolutions) // config.crop) ** 2
    if config.whole_share > 0 and config.batch_size < whole:
        problems.append(f"whole_share={config.whole_share} takes one picture in {whole}: batch_size is below that")
    return problems + _too_small(config, crops)


def _too_small(config: VqganConfig, crops: dict[str, int]) -> list[str]:
    """Which crops the losses that look at more than pixels cannot see, and an adversary that would never start."""
    problems = []
    name, side = min(crops.items(), key=lambda crop: crop[1])
    if config.perceptual is not None and side < LEAST_SIDE:
        problems.append(f"{name} is below the {LEAST_SIDE} pixels that perceptual looks at")
    if config.adversarial is not None:
        layers, start = config.adversarial.layers, config.adversarial.start
        if side < least_side(layers):
            problems.append(f"{name} is below the {least_side(layers)} pixels that adversarial.layers={layers} needs")
        if start >= config.steps:
            problems.append(f"adversarial.start={start} is not below steps={config.steps}")
    return problems

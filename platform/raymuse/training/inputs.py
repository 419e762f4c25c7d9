"""What a training reads, as one text: a run goes on only with the data and the frozen weights that it began with."""

from raymuse.config.training import (
    CriticConfig,
    GeneratorConfig,
    MaskedConfig,
    SuperresConfig,
    TrainConfig,
    VqganConfig,
)
from raymuse.drawing.model_folder import trained_part
from raymuse.models.lpips import files_sha256
from raymuse.models.weights import weights_sha256
from raymuse.storage.images import list_shards
from raymuse.storage.tokens import TokenStore
from raymuse.training.surveying import stream_digest


def data_fingerprint(config: TrainConfig) -> str:
    """What the training reads, by content where the input says it, else by the names of its shards."""
    if isinstance(config, MaskedConfig):
        frozen = {"text_encoder": config.text_encoder}
        if isinstance(config, GeneratorConfig):
            frozen["superres" if isinstance(config, SuperresConfig) else "transformer"] = config.start_from
        elif isinstance(config, CriticConfig):
            frozen["transformer"] = str(trained_part(config.base, "transformer"))
        sums = [weights_sha256(address, part) for part, address in frozen.items() if address is not None]
        read = TokenStore(config.input).fingerprint if config.stream is None else stream_digest(config.stream)
        return " ".join([read, *sums])
    names = " ".join(shard.name for shard in list_shards(str(getattr(config, "input", ""))))
    if isinstance(config, VqganConfig):
        if config.start_from is not None:
            names += f" {weights_sha256(config.start_from, 'vqvae')}"
        if config.perceptual is not None:
            names += f" {files_sha256(config.perceptual.vgg, config.perceptual.lpips)}"
    return names

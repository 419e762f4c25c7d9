"""Whether what a training shows of itself fits its data: held-out shards, and who reads and draws a user's prompts."""

import json
from collections.abc import Callable, Iterator

from raymuse.config.errors import ConfigError, UserError
from raymuse.config.training import GeneratorConfig, SuperresConfig, TrainConfig
from raymuse.drawing.model_folder import trained_part
from raymuse.models.base import read_shape
from raymuse.models.text import text_length
from raymuse.models.vqgan import Vqgan
from raymuse.models.weights import tokenizer_sha256, weights_sha256
from raymuse.training.evaluation import differing, evaluation_of
from raymuse.training.start import base_shape, require_fit
from raymuse.training.task import Task
from raymuse.training.tokens import TokenStream


def require_shown(config: TrainConfig, task: Task) -> None:
    """Check before any work what else would fail at the first held-out loss or sheet of samples.

    Raises:
        ConfigError: naming every one of `evaluation.input`, `vqgan`, `samples.prompts` and `samples.base` that does
            not fit the data.
    """
    if not isinstance(config, GeneratorConfig):
        return
    from raymuse.training.masked import MaskedTask

    assert isinstance(task, MaskedTask)
    problems: list[str] = []
    checks: list[Callable[[], object]] = [
        lambda: evaluation_of(config, task, 1),
        lambda: _require_samples(config, task.stream),
    ]
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems += error.problems
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(type(config).model_fields["stage"].default, problems)


def _require_samples(config: GeneratorConfig, stream: TokenStream) -> None:
    """Raises ConfigError with what is wrong with the samples' parts."""
    problems: list[str] = []
    for check in (_vqgan, _prompts, _low_ids):
        try:
            problems += check(config, stream)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("samples", problems)


def _vqgan(config: GeneratorConfig, stream: TokenStream) -> Iterator[str]:
    if config.vqgan is not None and (codes := Vqgan.load(config.vqgan).codes) != stream.codes:
        yield (
            f"vqgan: {config.vqgan} has {codes} codes, and {config.ids} of {config.source} are of {stream.codes}: to "
            "draw samples set it to the VQGAN that encoded them."
        )


def _prompts(config: GeneratorConfig, stream: TokenStream) -> Iterator[str]:
    """Of whoever reads the prompts: it must be who read the captions."""
    if not config.samples.prompts:
        return
    address = str(config.text_encoder)
    asked = {"text encoder": weights_sha256(address, "text_encoder"), "tokenizer": tokenizer_sha256(address)}
    if wrong := differing(asked, stream.encoders()):
        yield (
            f"samples.prompts: the {' and '.join(wrong)} of {address} did not read the captions of {config.source}: "
            "set text_encoder to the one that did, or leave the prompts out."
        )
    elif (length := text_length(address)) != stream.empty_states.shape[1]:
        yield (
            f"samples.prompts: {address} makes {length} tokens a caption, and the token shards hold "
            f"{stream.empty_states.shape[1]}: leave the prompts out, or pretokenize at its own text_length."
        )


def _low_ids(config: GeneratorConfig, stream: TokenStream) -> Iterator[str]:
    """Of the base that draws low-res ids under a super-resolution's prompts."""
    if not isinstance(config, SuperresConfig) or config.samples.base is None or not config.samples.prompts:
        return
    folder = trained_part(config.samples.base, "transformer")
    try:
        shape = read_shape(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"samples.base: {folder} holds no base: {error}") from error
    known = base_shape(stream, type(shape)) | {"codebook_size": stream.store.codes("low_ids")}
    known["sample_size"] = max(stream.store.grid("low_ids"))
    try:
        require_fit(config.samples.base, shape, known, f"the low_ids of {config.source}")
    except UserError as error:
        yield f"samples.base: {error}"

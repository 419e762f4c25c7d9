"""The trainings: VQGAN and CLIP from pictures; base, super-resolution and token critic from token shards."""

from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raymuse.config.base import Address, Config, StageConfig, runtime
from raymuse.config.nodes import NetworkConfig, ShardCacheConfig
from raymuse.config.pretokenize import StreamConfig
from raymuse.config.sampling import MaskingSchedule, SamplingConfig

Precision = Literal["fp32", "bf16", "fp16", "auto"]


OptimizerName = Literal["adamw", "adamw-8bit", "adafactor", "lion", "muon"]

WHOLE = {
    "adamw-8bit": "a block of 256 moments shares a scale, and a shard would cut the blocks",
    "adafactor": "it keeps means over a matrix's rows and columns, and a shard is a piece of neither",
}
"""Optimizers that must hold every parameter whole, and why."""


class OptimizerConfig(Config):
    """What changes the weights, with warm-up and a schedule. Weight decay is decoupled, and on matrices only."""

    name: OptimizerName = Field(
        "adamw", description="muon: Muon for the hidden matrices, AdamW for embeddings, first and last layers, vectors"
    )
    lr: float = Field(1e-3, gt=0, description="of what is not Muon's; Adafactor's: the share of a weight's size")
    muon_lr: float = Field(0.02, gt=0, description="of what Muon trains; warm-up and schedule are the same")
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.96, ge=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    final_lr: float = Field(0.05, ge=0, le=1, description="share of the learning rate that is left at the end")
    clip_norm: float | None = Field(1.0, gt=0)


class CheckpointConfig(Config):
    """How often work is committed, and how much of it is kept."""

    every: int = Field(200, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(
        False,
        description="keep the best too: of the lowest held-out loss where there is `evaluation`, measured with every "
        "checkpoint then; else of the lowest mean training loss since the one before",
    )


class TrainConfig(StageConfig):
    """What every training shares. `output` holds the checkpoints and, at the end, the trained model."""

    steps: int = Field(ge=1)
    batch_size: int = Field(64, ge=1, description="samples a step, over all workers")
    micro_batch_size: int | None = runtime(
        None, "samples a worker holds at once; None: all of its share, or `exact_rows`", ge=1
    )
    seed: int = 0
    precision: Precision = Field(
        "fp32",
        description="of the network's matrix products and convolutions; weights and losses are fp32 always; "
        "fp16 scales the loss; auto: bf16 where all workers' hardware multiplies in it, else fp32",
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float | None = Field(None, gt=0, lt=1)
    checkpoint: CheckpointConfig = runtime(CheckpointConfig(), "checkpoints")
    workers: int = runtime(
        2,
        "processes that train together; 0: this process, without Ray; {min: 1, max: 4}: as the cluster has room",
        ge=0,
    )
    min_workers: int | None = runtime(None, "fewest workers to train with; None: all of them", ge=1)
    cpus_per_worker: float = runtime(1, "cores reserved for a worker", gt=0)
    resources: dict[str, float] = runtime({}, "other Ray resources reserved for a worker, such as {trainers: 1}")
    use_gpu: bool = runtime(False, "one GPU a worker")
    network: NetworkConfig = runtime(NetworkConfig(), "how workers on several machines reach each other")
    price_per_hour: float = runtime(0.0, "of all machines together, for the cost that --dry-run says", ge=0)
    max_failures: int = runtime(2, "lost workers survived before the job fails", ge=0)
    max_skipped: int = runtime(10, "steps in a row without a finite loss and gradients before the run stops", ge=1)
    log_every: int = runtime(20, "steps between logged losses", ge=1)
    sample_every: int = runtime(400, "steps between sample pictures in MLflow", ge=1)
    notice: float = runtime(
        25, "seconds in which a training that is told to stop must have written its checkpoint", gt=0
    )
    peak_tflops: float | None = runtime(
        None, "what a worker's device can do, for the share of it that is used; None: as known of GPUs in bf16", gt=0
    )
    profile: bool = runtime(False, "write torch's trace of three steps to output/profile")
    model: dict[str, Any] = Field(default_factory=dict, description="shape of the network, by its own field names")

    @model_validator(mode="before")
    @classmethod
    def _range_of_workers(cls, values: Any) -> Any:
        """`workers: {min: 1, max: 4}` is `workers: 4` and `min_workers: 1`."""
        if isinstance(values, dict) and isinstance(found := values.get("workers"), dict):
            if set(found) != {"min", "max"}:
                raise ValueError("workers: a range has min and max, as in {min: 1, max: 4}")
            return {**values, "workers": found["max"], "min_workers": found["min"]}
        return values

    @model_validator(mode="after")
    def _some_range(self) -> "TrainConfig":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: {self.min_workers} is more than workers, {self.workers}")
        return self


TIMED_STEPS = 40
"""Steps by which a training with a budget knows its machine."""
PASS = 1.0
"""Rows that a pass through a network costs on a CPU beside those that it is given."""


class BudgetConfig(Config):
    """Minutes that a quick machine uses up: as many more steps than `steps` as fit into them, timed at the start.

    As long as it says is a training of fewer steps than are timed or of `max_steps` and more; of pictures that it
    encodes itself, which are laid out for a known number of steps; and with exact sums, to end alike everywhere.
    """

    minutes: float = runtime(..., "that all steps may take; `steps` are taken however long they need", gt=0)
    max_steps: int = Field(ge=1, description="enough, however quick the machine is")


class PerceptualConfig(Config):
    """LPIPS (Zhang et al., arXiv 1801.03924) as a loss, by weights from files on every worker's disk."""

    weight: float = Field(1.0, gt=0)
    vgg: Address = Field(description="file: state dict of torchvision's vgg16, .pth or .safetensors")
    lpips: Address | None = Field(
        None, description="file: LPIPS' linear layers (its weights/v0.1/vgg.pth); None: every feature counts the same"
    )


class AdversarialConfig(Config):
    """A patch discriminator against the VQGAN (Esser et al., arXiv 2012.09841, section 3.1)."""

    start: int = Field(ge=0, description="step from which it learns and is to be fooled")
    weight: float = Field(0.8, gt=0, description="of its term, on top of the ratio of gradients at the last layer")
    loss: Literal["hinge", "vanilla"] = Field("hinge", description="what the discriminator learns by")
    channels: int = Field(64, ge=8, multiple_of=8, description="of its first layer; they double up to eight times")
    layers: int = Field(3, ge=1, description="that halve the picture; 3 see patches of 70 pixels, 2 of 34")
    lr: float = Field(2e-4, gt=0, description="of its AdamW (betas 0.5, 0.9); warm-up and schedule are the optimizer's")


class VqganConfig(TrainConfig):
    """Train a VQGAN (diffusers `VQModel`) on random crops of pictures at several scales."""

    stage: Literal["train-vqgan"] = "train-vqgan"
    input: Address = Field(description="image shards")
    resolutions: tuple[int, ...] = Field((32, 64), description="short sides that the pictures are resized to")
    crop: int = Field(32, ge=8, description="side of the square training crops, pixels")
    curriculum: tuple[Annotated[int, Field(ge=8)], ...] = Field(
        (), description="sides of the crops before `crop`, each for an equal share of the steps: small ones first"
    )
    start_from: Address | None = Field(
        None, description="VQGAN folder or Hugging Face id whose weights to start from; `model` is then not used"
    )
    train: Literal["all", "decoder"] = Field(
        "all", description="decoder: encoder and codebook stay as they are, and so do the ids (Muse, section 2.5)"
    )
    whole_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="in this last share every second step is on whole squares of the largest resolution",
    )
    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(1.0, ge=0)
    gradient_weight: float = Field(0.5, ge=0, description="L1 of horizontal and vertical differences (edges)")
    commitment_weight: float = Field(0.25, ge=0)
    warm_steps: int = Field(
        50, ge=0, description="first steps without quantisation; the codebook then starts from data"
    )
    codebook_decay: float = Field(0.95, gt=0, lt=1, description="moving average that moves the codes")
    revive_below: float = Field(0.1, ge=0, description="a code used less than this often a step restarts from data")
    rate_weight: float = Field(
        0.0, ge=0, description="price of a code's -log share, in mean squared distances: fewer bits a picture"
    )
    revive_until: float = Field(0.7, ge=0, le=1, description="share of the steps in which dead codes are revived")
    perceptual: PerceptualConfig | None = Field(None, description="None: `gradient_weight`'s edges stand for it")
    adversarial: AdversarialConfig | None = Field(None, description="None: no discriminator")

    @model_validator(mode="after")
    def _decoder_of_something(self) -> "VqganConfig":
        if self.train == "decoder" and self.start_from is None:
            raise ValueError("train: decoder needs start_from, the VQGAN whose ids stay as they are")
        return self

    @model_validator(mode="after")
    def _one_loss_to_scale(self) -> "VqganConfig":
        if self.precision == "fp16" and self.adversarial is not None:
            raise ValueError(
                "precision: fp16 scales one loss, and with adversarial there are two, weighed by their gradients: take "
                "bf16 or fp32"
            )
        return self


class ClipConfig(TrainConfig):
    """Train a tokenizer on the captions and a CLIP (transformers `CLIPModel`) contrastively on the pairs."""

    stage: Literal["train-clip"] = "train-clip"
    input: Address = Field(description="image shards")
    resolution: int = Field(32, ge=16)
    vocabulary: int = Field(1024, ge=515, description="size of the byte-level BPE vocabulary; 514 are bytes and marks")
    text_length: int = Field(32, ge=4, le=256, description="tokens a caption is padded or cut to")


class ZeroConfig(Config):
    """DeepSpeed ZeRO. Changes memory and speed, never the loss."""

    stage: Literal[0, 1, 2, 3] = Field(2, description="0: every rank holds all; 3: parameters are sharded too")
    offload: bool = Field(
        False, description="moments and the weights that are updated lie in the CPU's memory; stage 1, 2"
    )

    @model_validator(mode="after")
    def _something_to_offload(self) -> "ZeroConfig":
        if self.offload and self.stage not in (1, 2):
            raise ValueError(
                f"offload: needs stage 1 or 2, where each worker updates its own share (it is {self.stage})"
            )
        return self


class LoraConfig(Config):
    """Which linears get a low-rank change, trained in place of the weights (Hu et al., arXiv 2106.09685)."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, description="the change counts alpha / rank")
    targets: tuple[str, ...] = Field(("to_q", "to_k", "to_v"), description="linears, by the ends of their names")
    text_targets: tuple[str, ...] = Field(
        (), description="of the text encoder, such as [q_proj, k_proj, v_proj]; needs shards with text ids"
    )


@lru_cache
def _cheapest_rows(batch_size: int, most: int | None, fewest_workers: int, workers: int) -> int:
    """Pieces of the batch, of at most so many rows, that cost least where they cost most, over the numbers of workers.

    As against each worker's share in one pass, where a pass costs `PASS` rows beside its own.
    """

    def cost(rows: int, world: int) -> float:
        share, pieces = -(-batch_size // world), -(-batch_size // (rows * world))
        return pieces * (rows + PASS) / (share + PASS)

    worlds = range(fewest_workers, workers + 1)
    sizes = range(min(batch_size, most or batch_size), 0, -1)
    return min(sizes, key=lambda rows: max(cost(rows, world) for world in worlds))


class MaskedConfig(TrainConfig):
    """Training on token shards, or on pictures encoded as it runs, with some ids masked."""

    input: Address = Field(description="token shards")
    stream: StreamConfig | None = Field(None, description="pictures to encode as it trains, in place of token shards")
    ids: Literal["image_ids", "low_ids"] = Field("image_ids", description="column of the ids to be learned")
    zero: ZeroConfig = runtime(ZeroConfig(), "DeepSpeed ZeRO")
    shard_cache: ShardCacheConfig | None = runtime(
        None, "copies of token shards on each machine's disk; None: a part is read from `input` each time"
    )
    budget: BudgetConfig | None = Field(None, description="more steps than `steps`, where they fit into some minutes")
    exact_rows: int | Literal["auto"] | None = runtime(
        "auto",
        "rows whose gradients are computed together and then summed exactly, so that the number of workers changes no "
        "bit of the weights; auto: where it is a range, on CPUs; null: each worker's share, and sums as they come",
    )
    gradient_checkpointing: bool = runtime(False, "recompute activations in the backward pass")
    caption_dropout: float = Field(0.1, ge=0, le=1, description="share of samples whose caption becomes the empty one")
    min_masking_ratio: float = Field(0.0, ge=0, lt=1)
    rectangle_share: float = Field(
        0.0, ge=0, le=1, description="share of samples whose masked ids are one rectangle: learns to in- and outpaint"
    )
    masking: MaskingSchedule = Field("cosine", description="schedule of the masking ratio")
    text_encoder: Address | None = Field(
        None, description="folder with text_encoder/; needed where the shards hold text ids, not states"
    )

    @property
    def text_reader(self) -> str | None:
        """Folder of the text encoder that reads captions in the step, where they are ids."""
        return self.text_encoder if self.stream is None else self.stream.text_encoder

    @property
    def source(self) -> str:
        """Where its data lies, for messages."""
        return self.input if self.stream is None else ", ".join(self.stream.inputs)

    @model_validator(mode="before")
    @classmethod
    def _needs_no_shards(cls, values: Any) -> Any:
        """With `stream` the key may be left out."""
        return {"input": "", **values} if isinstance(values, dict) and values.get("stream") is not None else values

    @model_validator(mode="after")
    def _reads_something(self) -> "MaskedConfig":
        if not self.input and self.stream is None:
            raise ValueError("input: name the token shards, or give `stream` with pictures to encode as it trains")
        return self

    @property
    def stretch(self) -> BudgetConfig | None:
        """The budget, where the training may be longer by it."""
        if self.budget is None or self.stream is not None or self.exact is not None:
            return None
        return self.budget if TIMED_STEPS <= self.steps < self.budget.max_steps else None

    @property
    def exact(self) -> int | None:
        """`exact_rows` as a number: what `auto` stands for where it is that."""
        if self.exact_rows != "auto":
            return self.exact_rows
        fixed = self.min_workers is None or self.min_workers == self.workers
        if fixed or self.use_gpu or self.stream is not None or not self._holds_whole_gradients:
            return None
        assert self.min_workers is not None
        return _cheapest_rows(self.batch_size, self.micro_batch_size, self.min_workers, self.workers)

    @property
    def _holds_whole_gradients(self) -> bool:
        return self.workers == 0 or (self.zero.stage < 3 and not self.zero.offload)

    @field_validator("exact_rows", mode="before")
    @classmethod
    def _some_rows(cls, value: Any) -> Any:
        if value in (None, "auto") or (type(value) is int and value > 0):
            return value
        raise ValueError(f"must be a whole number of at least 1, auto or null (it is {value!r})")

    @model_validator(mode="after")
    def _sums_where_it_can(self) -> "MaskedConfig":
        if not isinstance(self.exact_rows, int):
            return self
        if not self._holds_whole_gradients:
            raise ValueError("exact_rows: needs zero.stage 0, 1 or 2 and no zero.offload: workers sum whole gradients")
        if self.exact_rows > self.batch_size:
            raise ValueError(
                f"exact_rows: {self.exact_rows} are more than the rows of a step, batch_size ({self.batch_size})"
            )
        if self.micro_batch_size is not None:
            raise ValueError("exact_rows: is the micro batch already; leave micro_batch_size out")
        if self.stream is not None:
            raise ValueError("exact_rows: reads token shards; pictures that are encoded as it trains go out otherwise")
        return self

    @model_validator(mode="after")
    def _whole_where_needed(self) -> "MaskedConfig":
        if self.zero.offload and self.workers == 0:
            raise ValueError("zero.offload: workers: 0 trains without DeepSpeed, which moves it; take workers: 1")
        name = self.optimizer.name
        if name in WHOLE and self.workers > 0 and self.zero.stage > 0:
            raise ValueError(
                f"optimizer.name: {name} needs zero.stage: 0 (it is {self.zero.stage}): {WHOLE[name]}. "
                "adamw, lion and muon take every stage"
            )
        return self


class EvaluationConfig(Config):
    """The loss on held-out token shards at given masking ratios, without dropout; the average's where there is one."""

    input: Address = Field(description="token shards that the training does not see")
    every: int = Field(500, ge=1, description="steps")
    rows: int = Field(512, ge=1, description="of the shards, the same ones each time")
    mask_ratios: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field((0.1, 0.3, 0.5, 0.7, 0.9), min_length=1)


class SamplesConfig(Config):
    """What is drawn every `sample_every` steps, with seeds that stay the same."""

    prompts: tuple[str, ...] = Field((), description="none: the first captions of the data, under their pictures")
    sampling: SamplingConfig = Field(SamplingConfig(temperature=0.5, guidance=1.0), description="steps, guidance, ...")
    base: Address | None = Field(
        None, description="of a super-resolution with prompts: who draws the low-res ids; as the export's base"
    )

    @model_validator(mode="after")
    def _plainly_drawn(self) -> "SamplesConfig":
        if self.sampling.order == "critic":
            raise ValueError("sampling.order: samples have no critic, so take another order")
        if self.sampling.decode == "mean":
            raise ValueError("sampling.decode: samples show the codes that are drawn, so leave it at drawn")
        return self


class GeneratorConfig(MaskedConfig):
    """Training of what draws ids: base and super-resolution."""

    label_smoothing: float = Field(0.0, ge=0, lt=1)
    unmasked_weight: float = Field(0.0, ge=0, le=1, description="of the loss on ids that are not masked")
    fed_back_share: float = Field(
        0.9, ge=0, le=1, description="of samples that see the network's own features, where model.self_conditioning is"
    )
    vqgan: Address | None = Field(None, description="VQGAN folder, to draw samples with")
    samples: SamplesConfig = runtime(SamplesConfig(), "what is drawn while it trains")
    evaluation: EvaluationConfig | None = runtime(None, "held-out loss while it trains")
    start_from: Address | None = Field(
        None, description="model folder or Hugging Face id whose weights to start from; `model` is then not used"
    )
    lora: LoraConfig | None = Field(None, description="train a LoRA of `start_from`, whose weights stay as they are")

    @model_validator(mode="after")
    def _lora_of_something(self) -> "GeneratorConfig":
        if self.lora is not None and self.start_from is None:
            raise ValueError("lora needs start_from, the model folder that it changes")
        return self

    @model_validator(mode="after")
    def _prompts_can_be_drawn(self) -> "GeneratorConfig":
        wanted = {"vqgan": self.vqgan, "text_encoder": self.text_encoder}
        if self.samples.prompts and (missing := [name for name, address in wanted.items() if address is None]):
            raise ValueError(f"samples.prompts: to read and draw them, set {' and '.join(missing)} as well")
        return self


class BaseConfig(GeneratorConfig):
    """Train the base transformer: aMUSEd's U-ViT, or Muse's own."""

    stage: Literal["train-base"] = "train-base"
    architecture: Literal["uvit", "maskgit"] = Field(
        "uvit", description="uvit: aMUSEd's; maskgit: Muse's. With start_from it is that model's"
    )
    critic_weight: float = Field(1.0, gt=0, description="of the loss of telling true ids, where model.self_critic is")


class SuperresConfig(GeneratorConfig):
    """Train Muse's super-resolution transformer: high-res ids from low-res ids and text."""

    stage: Literal["train-superres"] = "train-superres"
    low_noise: float = Field(0.1, ge=0, lt=1, description="largest share of the low-res ids replaced at random")

    @model_validator(mode="after")
    def _low_ids_can_be_drawn(self) -> "SuperresConfig":
        if self.samples.prompts and self.samples.base is None:
            raise ValueError("samples.prompts of a super-resolution: set samples.base, which draws their low-res ids")
        return self


class CriticConfig(MaskedConfig):
    """Train a token critic: it tells the ids that a base drew from true ones, and then orders what sampling keeps."""

    stage: Literal["train-critic"] = "train-critic"
    base: Address = Field(description="output of train-base, or a model folder: whose ids it judges; stays as it is")

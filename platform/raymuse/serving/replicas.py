"""How many replicas of the generator there are, what each has of the machine, and what it takes in."""

from typing import Any

from ray import serve

from raymuse.clusters.placement import place
from raymuse.config.generate import CheckingConfig, GenerateConfig, ServeConfig, ServedModel
from raymuse.serving.generator import GeneratorActor
from raymuse.serving.instance import QUIET

Generator = serve.deployment(GeneratorActor, name="Generator", logging_config=QUIET)


def deployed(config: GenerateConfig) -> serve.Application:
    """The generator of a batch job. It lets in whatever comes: who asks bounds how much that is."""
    return _bound("Generator", config, config, {"num_replicas": config.replicas}, grace=20)


def served(config: ServeConfig, model: ServedModel, name: str) -> serve.Application:
    """The generator of one of the API's models, as a deployment of a name that stays the same over updates."""
    replicas: dict[str, Any] = {"num_replicas": model.replicas}
    if model.max_replicas is not None:
        rows = model.batch_size * batches_at_a_time(model.cpus_per_replica, model.gpus_per_replica)
        replicas = {
            "autoscaling_config": {
                "min_replicas": model.replicas,
                "max_replicas": model.max_replicas,
                "target_ongoing_requests": rows,
            }
        }
    return _bound(name, model, config, replicas, grace=config.deadline + 5)


def _bound(
    name: str, config: GenerateConfig | ServedModel, checking: CheckingConfig, replicas: dict[str, Any], grace: float
) -> serve.Application:
    generator = Generator.options(
        name=name,
        # Requests wait at the replica, where they meet to a batch: Serve's router lets them in a few a second.
        max_ongoing_requests=most_pictures(config) + 1,
        health_check_period_s=2,  # a lost replica is noticed in seconds, not half a minute
        graceful_shutdown_wait_loop_s=0.1,  # who stops it has all answers
        graceful_shutdown_timeout_s=grace,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
            "label_selector": place("draw", config.gpus_per_replica),
        },
        **replicas,
    )
    return generator.bind(*placed(config, checking))


def placed(config: GenerateConfig | ServedModel, checking: CheckingConfig) -> tuple[Any, ...]:
    """The arguments of a `GeneratorActor`."""
    cpus, gpus = config.cpus_per_replica, config.gpus_per_replica
    drawers, device = batches_at_a_time(cpus, gpus), "cuda" if gpus else "cpu"
    checks = CheckingConfig(**{name: getattr(checking, name) for name in CheckingConfig.model_fields})
    styles, numerics = (config.styles, config.most_styles), (config.precision, config.cuda_graphs, config.traced)
    return config.model, config.adapters, config.batch_size, drawers, device, *styles, checks, *numerics


def most_pictures(config: GenerateConfig | ServedModel) -> int:
    """Pictures, or batches of them, that are on their way at a time: two batches a drawer, or those that may wait."""
    rows = config.batch_size * batches_at_a_time(config.cpus_per_replica, config.gpus_per_replica)
    if isinstance(config, GenerateConfig):
        return 2 * rows
    return rows * (config.max_replicas or config.replicas) + config.max_queue


def batches_at_a_time(cpus: float, gpus: float) -> int:
    """Batches that a replica draws at a time: one a core, or one on its GPU."""
    return 1 if gpus else max(1, int(cpus))

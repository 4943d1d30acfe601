"""What a run would do and need, worked out from its config alone (`fqgan run CONFIG --dry-run`).

The full-size models are built on the meta device: parameters and saved activations are exact, and
nothing is downloaded, trained or written.
"""

from __future__ import annotations

from fqgan_dist.stages.codes import count_code_views
from fqgan_dist.stages.config import RunConfig
from fqgan_dist.stages.frozen_networks import describe_random_weights
from fqgan_dist.stages.placement import (
    configured_sizes,
    plan_placement,
    planned_sizes,
    training_stages,
    valid_sizes,
)
from fqgan_dist.stages.preflight import check_settings, find_missing_files
from fqgan_dist.stages.shards import ShardsStage
from fqgan_dist.stages.stage import find_stages
from fqgan_dist.stages.stage_record import load_record, record_path
from fqgan_dist.stages.teachers import stores_features
from fqgan_dist.stages.training_plan import IMAGENET_IMAGES, Plan, plan_training
from fqgan_dist.storage.storage import Storage

# Of a float16 feature value and of a uint16 code.
_HALF_BYTES = 2


def plan_run(config: RunConfig) -> Plan:
    """Work out sizes, memory, steps and placement of a run; of the stages that it would run.

    Raises:
        ConfigError: settings that only show their conflict when models or stores are built.
    """
    check_settings(config)
    num_images, images_source = _count_images(config)
    return {
        "name": config.name,
        "storage_root": config.storage.root,
        "stages": [stage.name for stage in find_stages(config) if stage.is_wanted(config)],
        "placement": plan_placement(config),
        "dataset": {"training_images": num_images, "known_from": images_source},
        **{stage.name: stage.plan(config) for stage in training_stages(config)},
        "stored": _plan_stored(config, num_images),
        "notes": _collect_notes(config),
    }


def _plan_stored(config: RunConfig, num_images: int) -> Plan:
    model = config.tokenizer.model
    features = 0
    if stores_features(config):
        values = sum(book.feature_dim or 0 for book in model.codebooks)
        features = num_images * (config.data.num_views or 0) * values * _HALF_BYTES
    crops = count_code_views(config.codes.views)
    codes_per_crop = model.num_codebooks * model.num_positions * _HALF_BYTES
    return {
        "feature_views": config.data.num_views if features else 0,
        "features_bytes": features,
        "code_crops": crops,
        "codes_bytes": num_images * crops * codes_per_crop,
    }


def _count_images(config: RunConfig) -> tuple[int, str]:
    """Return the number of training images, and how it is known."""
    storage = Storage(config.storage.root)
    # Only on a disk: a dry run asks nothing of a network.
    path = record_path(ShardsStage.name)
    record = load_record(storage, path) if storage.is_local else None
    if record is not None and record.is_done:
        return int(record.metrics["shards/train_images"]), "the run's shards"
    return IMAGENET_IMAGES, "assumed: ImageNet-1k; the shards are not written yet"


def _collect_notes(config: RunConfig) -> list[str]:
    notes = [
        "Memory is that of states, frozen networks and the activations kept for the backward pass "
        "of one rank's images; temporaries, communication buffers, workspaces and fragmentation "
        "come on top."
    ]
    notes += describe_random_weights(config)
    if config.teachers.networks and not config.teachers.precompute:
        notes.append("The teachers run in the training step; their memory is not counted.")
    if config.tokenizer.losses.discriminator_start_step > config.tokenizer.training.steps:
        notes.append("The discriminator never starts: its start step is after the last step.")
    notes += [*_describe_sizes(config), *_describe_idle_passes(config)]
    missing = [
        problem for stage in find_stages(config) for problem in find_missing_files(stage, config)
    ]
    notes += [f"Not here yet: {problem}." for problem in dict.fromkeys(missing)]
    return notes


def _describe_idle_passes(config: RunConfig) -> list[str]:
    notes: list[str] = []
    for stage in training_stages(config):
        training = stage.training(config)
        sizes = valid_sizes(config, training)
        for size in sizes:
            plan = plan_training(training, size)
            idle, num = plan["idle_passes_per_step"], plan["micro_batches_per_step"]
            if idle:
                which = f" with {size} train workers" if len(sizes) > 1 else ""
                notes.append(
                    f"{stage.name}: {idle} of {num + idle} passes per step{which} have no weight, "
                    f"as {num} micro-batches do not divide evenly among the groups of ranks."
                )
    return notes


def _describe_sizes(config: RunConfig) -> list[str]:
    """Say what holds of a range of train workers: its valid sizes, and which numbers are whose."""
    if len(configured_sizes(config)) == 1:
        return []
    return [
        f"{stage}: valid numbers of train workers: {', '.join(map(str, sizes))}. Ranks and passes "
        f"are shown of the largest, memory of the smallest."
        for stage, sizes in planned_sizes(config).items()
    ]

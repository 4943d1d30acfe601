"""Settings of a training run that the trainer and the engines share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from fqgan_dist.config import Config
from fqgan_dist.storage.uri import Location
from fqgan_dist.world import World


class OptimizerConfig(Config):
    """Adam or AdamW; the defaults are FQGAN's (fqgan.md 1.10)."""

    kind: Literal["adam", "adamw"] = "adam"
    """AdamW decouples the weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Per unit of learning rate."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


class ScheduleConfig(Config):
    """Linear warm-up, then a constant, cosine or linear course; FQGAN and FAR use a constant."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    kind: Literal["constant", "cosine", "linear"] = "constant"
    """Course after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to its peak; 0 starts at the peak."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the decay ends, as a fraction of the peak; cosine and linear only."""

    def find_problems(self) -> Iterator[str]:
        if self.kind == "constant" and self.min_ratio:
            yield (
                f"min_ratio: {self.min_ratio} has no effect with kind: constant; "
                f"remove it, or choose kind: cosine or linear"
            )


class RetentionPolicy(Config):
    """What rotation keeps; a checkpoint stays if any rule names it, and the newest always does."""

    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints; with 1 there is nothing to fall back to if the newest is damaged."""
    keep_every: int | None = Field(default=None, gt=0)
    """Keep steps that are multiples of this; None keeps none of them."""
    best_metric: str | None = None
    """Metric whose best checkpoint is kept; None keeps none for its metrics."""
    best_mode: Literal["min", "max"] = "min"
    """Which end of the metric is best."""
    grace_s: float = Field(default=0.0, ge=0)
    """Seconds for which the files of a checkpoint that was given up stay, at least: for readers of
    that very step. The next save or `fqgan checkpoints prune` after them deletes the files."""


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept."""

    every: int = Field(gt=0)
    """Steps between checkpoints; the last step is always saved."""
    every_s: float | None = Field(default=None, gt=0)
    """Seconds after which one is written too, so that an interval costs no more at any speed; None:
    steps alone decide."""
    retention: RetentionPolicy = RetentionPolicy()
    """Which are kept; the newest always is."""


class AnomalyConfig(Config):
    """What is done about numbers that go wrong (training/anomalies.py).

    They are found within two steps; each event is in the log, the metrics and the ledger.
    """

    on_not_finite: Literal["skip", "rollback", "stop"] = "skip"
    """A loss or gradient that is not finite, in a step that moves no weight in any case. `skip`:
    training goes on. `rollback`: it goes on from the newest checkpoint, and past these images.
    `stop`: it ends."""
    max_skips: int = Field(default=3, ge=0)
    """Steps skipped between two checkpoints; one more is a rollback."""
    max_rollbacks: int = Field(default=2, ge=0)
    """Rollbacks before a checkpoint is past what was bad; one more ends the training."""
    on_spike: Literal["report", "rollback", "stop"] = "report"
    """A gradient norm far beyond the usual. `report`: a warning."""
    spike_factor: float = Field(default=20.0, gt=1)
    """How far: a multiple of the median."""
    spike_window: int = Field(default=200, ge=4, le=10_000)
    """Steps that the median is of."""


class TrainingConfig(Config):
    """How long, how large and how precisely a task is trained."""

    steps: int = Field(gt=0)
    """Optimizer steps of the main model."""
    global_batch_size: int = Field(gt=0)
    """Images per step over all train workers."""
    micro_batch_size: int = Field(gt=0)
    """Images of one loss group (design.md section 3); a forward pass where no ranks share it."""
    ranks_per_micro_batch: int = Field(default=1, gt=0)
    """Ranks that share one micro-batch, a loss group (g): batch-dependent losses see all of it."""
    engine: Literal["plain", "deepspeed"] = "plain"
    """`plain`: torch, DDP between ranks. `deepspeed`: ZeRO."""
    zero_stage: int = Field(default=1, ge=0, le=3)
    """What DeepSpeed partitions: 1 optimizer state, 2 gradients too, 3 parameters too."""
    seed: int = 0
    """Key of initial weights and all randomness in a step; `data.seed` is the sample order's."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Autocast dtype; parameters, code lookup and losses stay fp32."""
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the averaged weights; None keeps no average."""
    log_every: int = Field(default=50, gt=0)
    """Steps between metric records; on others the host waits for no step but those before the last
    two, whose numbers it looks at (`anomalies`)."""
    evaluate_every: int = Field(gt=0)
    """Steps between evaluations on held-out data; the last step is always evaluated."""
    evaluation_samples: int = Field(gt=0)
    """Held-out samples per evaluation during training."""
    checkpoint: CheckpointConfig
    anomalies: AnomalyConfig = AnomalyConfig()
    deterministic: bool = False
    """Use deterministic GPU kernels only: bit-equal continuation at some cost."""

    def find_problems(self) -> Iterator[str]:
        size, micro = self.global_batch_size, self.micro_batch_size
        if size % micro:
            below = size // micro * micro
            near = " and ".join(str(value) for value in (below, below + micro) if value)
            yield (
                f"global_batch_size: {size} is not a multiple of micro_batch_size ({micro}); "
                f"nearest valid values are {near}"
            )
        if micro % self.ranks_per_micro_batch:
            yield (
                f"micro_batch_size: {micro} cannot be shared by ranks_per_micro_batch "
                f"({self.ranks_per_micro_batch}) ranks; make it a multiple"
            )

    @property
    def micro_batches_per_step(self) -> int:
        """M, the fixed number of micro-batches of a global batch."""
        return self.global_batch_size // self.micro_batch_size

    @property
    def images_per_pass(self) -> int:
        """Images per forward pass of one rank: its share of a micro-batch."""
        return self.micro_batch_size // self.ranks_per_micro_batch

    def gradient_accumulation_steps(self, world: World) -> int:
        """Micro-batches that each rank takes part in per step, idle slots included."""
        return -(-self.micro_batches_per_step // (world.world_size // self.ranks_per_micro_batch))


class CheckpointTarget(Config):
    """What an action works on, beside the run's own settings."""

    to: Location | None = None
    """File to export to, a path or `s3://` URI; None outside `export`."""
    format: Literal["ours", "published"] = "ours"
    """`ours`: safetensors by our names, and a JSON file beside it. `published`: a .pt file that the
    released code loads."""
    ledger: bool = False
    """`verify`: whether to prove from the log, instead of reading files, that every image of every
    epoch was trained on exactly once, and to list what was not."""
    step: int | None = Field(default=None, ge=0)
    """Checkpoint of this step; None takes the newest good one, or, for `verify`, all."""

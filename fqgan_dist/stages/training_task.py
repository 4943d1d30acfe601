"""What both training tasks share: a model, its average, its checkpoints, what encloses a pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import Tensor, nn

from fqgan_dist.activity import ACTIVITY
from fqgan_dist.config import Config
from fqgan_dist.randomness import keyed_torch_rng
from fqgan_dist.training.anomalies import Evidence
from fqgan_dist.training.autocast import autocast
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs
from fqgan_dist.training.config import TrainingConfig
from fqgan_dist.training.ema import ExponentialMovingAverage
from fqgan_dist.training.engine import Engine
from fqgan_dist.training.schedule import compute_lr
from fqgan_dist.training.step_layout import Slot, StepLayout
from fqgan_dist.training.task import Parts

ModelT = TypeVar("ModelT", bound=nn.Module)
BatchT = TypeVar("BatchT")


class TrainingTask(ABC, Generic[ModelT, BatchT]):
    """One model that an engine trains; with its abstract methods, a `Task` of the trainer."""

    def __init__(
        self,
        stage: str,
        model_type: type[ModelT],
        *,
        engine: Engine,
        training: TrainingConfig,
        evaluate_fn: Callable[[ModelT], dict[str, float]],
    ) -> None:
        """Put the parts together; `stage` names parts of a checkpoint and keys all randomness."""
        self.stage: str = stage
        self.model_type = model_type
        self.engine = engine
        self.engines: dict[str, Engine] = {stage: engine}
        """All engines of the task, by the name of their parts of a checkpoint."""
        self.training = training
        self._evidence: list[Evidence] = []
        self.evaluate_fn = evaluate_fn
        self.ema = (
            ExponentialMovingAverage(engine.local_parameters(), training.ema_decay)
            if training.ema_decay
            else None
        )

    @property
    @abstractmethod
    def architecture(self) -> Config:
        """Settings of the model."""

    @abstractmethod
    def train_step(self, micro_batches: Sequence[BatchT], step: int) -> dict[str, Tensor]:
        """Run one step, see `Task`."""

    @property
    def model(self) -> ModelT:
        return self._check_type(self.engine.module)

    @property
    def layout(self) -> StepLayout:
        return self.engine.layout

    def take_evidence(self) -> list[Evidence]:
        evidence, self._evidence = self._evidence, []
        return evidence

    def evaluate(self, step: int) -> dict[str, float]:
        averages = self.ema.state_dict() if self.ema is not None else None
        with (
            ACTIVITY.during(f"the evaluation after step {step}"),
            self.engine.whole_weights(averages) as module,
        ):
            model = self._check_type(module)
            model.eval()
            try:
                return self.evaluate_fn(model)
            finally:
                model.train()

    def state_dict(self) -> Parts:
        parts: Parts = {}
        for name, engine in self.engines.items():
            state = engine.state_dict()
            parts |= {name: state["weights"], f"{name}_optimizer": state["optimizer"]}
        if self.ema is not None:
            parts[f"{self.stage}_ema"] = self.engine.share(self.ema.state_dict())
        return parts

    def needed_state(self) -> dict[str, Needs]:
        needs: dict[str, Needs] = {}
        for name, engine in self.engines.items():
            state = engine.needed_state()
            needs |= {name: state["weights"], f"{name}_optimizer": state["optimizer"]}
        if self.ema is not None:
            needs[f"{self.stage}_ema"] = self.engine.needed_parameters()
        return needs

    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        for name, engine in self.engines.items():
            engine.load_state_dict(
                {"weights": parts[name], "optimizer": parts[f"{name}_optimizer"]}
            )
        if self.ema is not None:
            self.ema.load_state_dict(self.engine.localize(parts[f"{self.stage}_ema"]))

    @contextmanager
    def _training_pass(self, step: int, slot: Slot) -> Iterator[None]:
        """Enclose a pass of the model: its own random numbers, and autocast."""
        key = (self.training.seed, self.stage, step, slot.micro_batch)
        device, loss_group = self.engine.device, self.layout.loss_group
        with (
            keyed_torch_rng(*key, device=device, loss_group=loss_group),
            autocast(self.training.precision, device),
        ):
            yield

    def _lr(self, step: int) -> float:
        return compute_lr(self.training.schedule, step, self.training.steps)

    def _update_average(self) -> None:
        if self.ema is not None:
            self.ema.update(self.engine.local_parameters())

    def _check_type(self, module: nn.Module) -> ModelT:
        assert isinstance(module, self.model_type), f"engine of {type(module).__name__}"
        return module

"""Numbers that go wrong while training: found within two steps, named, and answered by a policy.

A step whose loss or gradient is not finite moves no weight: the engines refuse it on the device.
Which loss it was and whose images is read from a copy of the step's numbers, which a GPU makes
beside its work and the host looks at two steps later: no step waits for it, and every rank sees the
same numbers of the same step, so that all do the same.

A spike is a step whose gradient norm exceeds `spike_factor` times the median of the `spike_window`
finite norms before it; as long as there are fewer than a quarter of those, none is.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fqgan_dist.training.config import AnomalyConfig

DEVICE_LAG = 2
"""Steps that the host runs ahead of a GPU before it looks at the numbers."""

NO_CHECKPOINT = "there is no checkpoint yet"

Answer = Literal["report", "skip", "rollback", "stop"]
_MOST_NAMES = 8


@dataclass(frozen=True, eq=False)
class Evidence:
    """What one optimizer's step was made of, on the device and the same on every rank."""

    terms: Sequence[str]
    """Names of the losses."""
    rows: Tensor
    """(M, n) float, the losses of each micro-batch."""
    norm_name: str
    norm: Tensor
    """Gradient norm before clipping, a scalar."""


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """A step with numbers that went wrong."""

    step: int
    kind: Literal["not_finite", "spike"]
    terms: tuple[str, ...]
    """Losses and gradient norms that are not finite, or the norm that is a spike."""
    micro_batches: tuple[int, ...]
    """Those with such losses; all where only a gradient tells."""
    detail: str = ""
    """How large a spike is."""

    def describe(self) -> str:
        terms = ", ".join(self.terms[:_MOST_NAMES])
        more = len(self.terms) - _MOST_NAMES
        terms += f" and {more} more" if more > 0 else ""
        what = "is not finite" if self.kind == "not_finite" else f"is a spike ({self.detail})"
        return f"step {self.step}: {terms} {what}"


@dataclass(frozen=True, eq=False)
class _Noted:
    step: int
    layout: list[tuple[Sequence[str], tuple[int, ...], str]]
    """Terms, shape of the rows and name of the norm, in the order of the numbers."""
    numbers: Tensor
    """On the host; there once the event has passed."""
    event: torch.cuda.Event | None


class AnomalyWatch:
    """Looks at the numbers of every step of a training; every rank has one and sees the same."""

    def __init__(self, config: AnomalyConfig) -> None:
        """Begin without a history."""
        self._config = config
        self._noted: deque[_Noted] = deque()
        self._norms: dict[str, deque[float]] = {}

    def note(self, step: int, evidence: Sequence[Evidence]) -> None:
        """Take the numbers of a step, without waiting for them."""
        if not evidence:
            return
        layout = [(each.terms, tuple(each.rows.shape), each.norm_name) for each in evidence]
        flat = torch.cat(
            [
                part.detach().float().reshape(-1)
                for each in evidence
                for part in (each.rows, each.norm)
            ]
        )
        event = None
        if flat.is_cuda:
            # Memory of its own for each step: a later copy must not reach what is not read yet.
            numbers = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
            numbers.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            numbers = flat
        self._noted.append(_Noted(step, layout, numbers, event))

    def look(self, step: int) -> list[Anomaly]:
        """Look at all steps that are old enough, after `step` was noted."""
        found: list[Anomaly] = []
        while self._noted:
            oldest = self._noted[0]
            if oldest.event is not None and oldest.step > step - DEVICE_LAG:
                break
            found += self._examine(self._noted.popleft())
        return found

    def drain(self) -> list[Anomaly]:
        """Look at all that was noted, and wait for it: before a save, or where one waits anyway."""
        found: list[Anomaly] = []
        while self._noted:
            found += self._examine(self._noted.popleft())
        return found

    def forget(self) -> None:
        """Look at nothing that was noted before: it is void."""
        self._noted.clear()

    def state(self) -> dict[str, Any]:
        """Give the history, to be saved with all that was noted drained; JSON-able."""
        return {name: list(norms) for name, norms in self._norms.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a history; checkpoints of versions before have none."""
        self._norms = {
            name: deque((float(each) for each in norms), maxlen=self._config.spike_window)
            for name, norms in state.items()
        }

    def _examine(self, noted: _Noted) -> list[Anomaly]:
        if noted.event is not None:
            noted.event.synchronize()
        values = noted.numbers.tolist()
        bad_terms: list[str] = []
        bad_rows: set[int] = set()
        num_rows = 0
        spikes: list[Anomaly] = []
        position = 0
        for terms, (rows, columns), norm_name in noted.layout:
            num_rows = max(num_rows, rows)
            for index in range(rows * columns):
                if not math.isfinite(values[position + index]):
                    bad_rows.add(index // columns)
                    bad_terms.append(terms[index % columns])
            position += rows * columns
            norm = values[position]
            position += 1
            if not math.isfinite(norm):
                bad_terms.append(norm_name)
            else:
                spikes += self._find_spike(noted.step, norm_name, norm, rows)
        if bad_terms:
            return [
                Anomaly(
                    step=noted.step,
                    kind="not_finite",
                    terms=tuple(dict.fromkeys(bad_terms)),
                    micro_batches=tuple(sorted(bad_rows or range(num_rows))),
                )
            ]
        return spikes

    def _find_spike(self, step: int, name: str, norm: float, num_rows: int) -> list[Anomaly]:
        history = self._norms.setdefault(name, deque(maxlen=self._config.spike_window))
        found: list[Anomaly] = []
        if len(history) >= self._config.spike_window / 4:
            usual = statistics.median(history)
            if norm > self._config.spike_factor * usual:
                found.append(
                    Anomaly(
                        step=step,
                        kind="spike",
                        terms=(name,),
                        micro_batches=tuple(range(num_rows)),
                        detail=f"{norm:.4g}, usually {usual:.4g}",
                    )
                )
        history.append(norm)
        return found


class AnomalyPolicy:
    """What is done about anomalies: the configured answer, and a stronger one if it helps not."""

    def __init__(self, config: AnomalyConfig) -> None:
        self._config = config
        self.left_out: dict[int, str] = {}
        """Steps whose images are left out from here on, and why."""
        self.num_skipped = 0
        """Steps that moved no weight, of this process."""
        self.num_rollbacks = 0
        """Of this process."""
        self._skips = 0
        self._rollbacks = 0
        self._last_step = 0

    def answer(self, anomaly: Anomaly, *, has_checkpoint: bool) -> tuple[Answer, str]:
        """Choose what is done, and say why in words for the log."""
        config = self._config
        self._last_step = max(self._last_step, anomaly.step)
        if anomaly.kind == "spike":
            wanted: Answer = config.on_spike
        else:
            wanted = config.on_not_finite
        if wanted == "report":
            return wanted, "on_spike: report"
        self.left_out[anomaly.step] = anomaly.describe()
        self.num_skipped += 1
        why = f"{'on_spike' if anomaly.kind == 'spike' else 'on_not_finite'}: {wanted}"
        if wanted == "skip":
            self._skips += 1
            if self._skips <= config.max_skips:
                return "skip", f"{why}, {self._skips} of {config.max_skips} since a checkpoint"
            wanted, why = "rollback", f"more than max_skips ({config.max_skips}) since a checkpoint"
        if wanted == "rollback":
            if not has_checkpoint:
                return "stop", f"{why}; {NO_CHECKPOINT} to go back to"
            if self._rollbacks < config.max_rollbacks:
                self._rollbacks += 1
                self.num_rollbacks += 1
                self._skips = 0
                return "rollback", f"{why}, rollback {self._rollbacks} of {config.max_rollbacks}"
            why = f"more than max_rollbacks ({config.max_rollbacks}) without getting past it"
        return "stop", why

    def committed(self, step: int) -> None:
        """Note a save: skips are counted anew, and rollbacks too once it is past what was bad."""
        self._skips = 0
        if step > self._last_step:
            self._rollbacks = 0

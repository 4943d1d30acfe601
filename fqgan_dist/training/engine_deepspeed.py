"""The DeepSpeed engine: ZeRO 0 to 3 over torch's fused Adam, in fp32 or under autocast.

The only module that imports deepspeed. Of DeepSpeed it uses the passes, the reduction and
partition of gradients, and the step; names, state and averages go through `Piece`, as in the plain
engine. Read with deepspeed 0.19.8: what is taken from inside its optimizers is in `_find_pieces`
and `_refresh_weights`.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any, Literal

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.utils import groups
from torch import Tensor, nn

from fqgan_dist.errors import ClusterError, ConfigError
from fqgan_dist.training.checkpoint_files import Fragment
from fqgan_dist.training.checkpoint_format import Needs
from fqgan_dist.training.engine_base import EngineBase
from fqgan_dist.training.engine_settings import EngineSettings
from fqgan_dist.training.named_tensors import whole_tensors
from fqgan_dist.training.parameter_pieces import Piece, needed_spans, share_pieces
from fqgan_dist.training.step_layout import Slot
from fqgan_dist.world import World

# Gradients reduced at once: 200 MB; DeepSpeed's 500 million would take 2 GB for each engine.
_MAX_BUCKET_ELEMENTS = 50_000_000

# The world that DeepSpeed's process groups are of.
_known_world: dist.ProcessGroup | None = None


class DeepSpeedEngine(EngineBase):
    """Train one module with ZeRO; implements `fqgan_dist.training.engine.Engine`."""

    def __init__(self, module: nn.Module, settings: EngineSettings) -> None:
        """Build the optimizer as `EngineBase` does, and hand both to DeepSpeed.

        The module's forward returns tensors, dataclasses or nests of them; under ZeRO-3 tensors or
        tuples of them, and all of its parameters are trained.

        Raises:
            ClusterError: there is no process group, which one rank needs too.
            ConfigError: ZeRO-3 and a parameter that is not trained.
        """
        super().__init__(module, settings)
        self.zero_stage = settings.training.zero_stage
        self._has_partitions = self.zero_stage > 0
        self._whole_norm = torch.zeros((), device=self.device)
        if self.zero_stage == 0:
            # DeepSpeed clips here too, but says neither the norm nor whether it is finite.
            self.optimizer.register_step_pre_hook(lambda *_: self._clip_whole())
        if self.zero_stage == 3:
            _require_all_trained(module, self.name)
            self._skeleton = _copy_without_storage(module)
        _prepare_deepspeed(self.world, self.device)
        self._deepspeed: Any = deepspeed.initialize(
            model=_Passes(module),
            optimizer=self.optimizer,
            config=self._deepspeed_config(settings.training.precision),
            dist_init_required=False,
        )[0]
        if self._has_partitions:
            self._pieces = self._find_pieces()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self._deepspeed(*inputs, **options)[0]

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        # DeepSpeed reduces by itself, in each pass or in the step.
        return nullcontext()

    def backward(self, loss: Tensor, slot: Slot) -> None:
        self._deepspeed.backward(self._weigh(loss, slot), scale_wrt_gas=False)

    def step(self, *, lr: float, losses: Tensor) -> Tensor:
        self._begin_step()
        self._note_if_not_finite(losses)
        self._set_lr(lr)
        with self._sum_over_ranks():
            self._deepspeed.step()
        norm = self._whole_norm
        if self.zero_stage > 0:
            # Infinite where DeepSpeed found that it is not finite and left everything alone.
            norm = torch.as_tensor(self._deepspeed.get_global_grad_norm(), device=self.device)
            self._note_if_not_finite(norm)
        return norm

    @torch.no_grad()
    def load_state_dict(self, parts: Mapping[str, Mapping[str, Tensor | Fragment]]) -> None:
        super().load_state_dict(parts)
        self._refresh_weights()

    def local_parameters(self) -> dict[str, Tensor]:
        if self.zero_stage < 3:
            return super().local_parameters()
        return {name: piece.find(piece.owner.detach()) for name, piece in self._pieces.items()}

    def share(self, values: Mapping[str, Tensor]) -> dict[str, Tensor | Fragment]:
        return super().share(values) if self.zero_stage < 3 else share_pieces(self._pieces, values)

    def needed_parameters(self) -> Needs:
        return super().needed_parameters() if self.zero_stage < 3 else needed_spans(self._pieces)

    def localize(self, values: Mapping[str, Tensor | Fragment]) -> dict[str, Tensor]:
        if self.zero_stage < 3:
            return super().localize(values)
        # A name that is not there is for the receiver to refuse.
        known = {
            name: self._pieces[name].cut(values[name]) for name in self._pieces if name in values
        }
        return known | whole_tensors(values, values.keys() - known.keys())

    @contextmanager
    def whole_weights(self, values: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        # Under ZeRO-3 a copy without DeepSpeed's hooks: those would gather parameters during the
        # block, which breaks training if that is under `torch.inference_mode`.
        if self.zero_stage < 3:
            with super().whole_weights(values) as module:
                yield module
            return
        known: dict[int, Any] = {
            id(self._skeleton.get_parameter(name)): nn.Parameter(tensor, requires_grad=False)
            for name, tensor in self._gather(values or self.local_parameters())
        }
        known |= {
            id(self._skeleton.get_buffer(name)): buffer
            for name, buffer in self.module.named_buffers()
        }
        yield copy.deepcopy(self._skeleton, known)

    def _gather(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Put ZeRO-3's pieces of all ranks together, one parameter at a time."""
        for name, piece in self._pieces.items():
            size = math.prod(piece.shape)
            padded = torch.zeros(
                -(-size // self.world.world_size), dtype=values[name].dtype, device=self.device
            )
            padded[: piece.count] = values[name].view(-1)
            chunks = [torch.empty_like(padded) for _ in range(self.world.world_size)]
            dist.all_gather(chunks, padded)
            yield name, torch.cat(chunks)[:size].view(piece.shape)

    def _clip_whole(self) -> None:
        """Clip gradients that are reduced and not partitioned, right before they are applied."""
        self._whole_norm = self._clip()
        self._note_if_not_finite(self._whole_norm)

    @contextmanager
    def _sum_over_ranks(self) -> Iterator[None]:
        # ZeRO-3 has but the mean: the sum divided by N in every element. A loss scale of 1/N is
        # taken out of the norm, the clipping and the gradient again. Below ZeRO-3 a setting asks
        # for the sum.
        if self.zero_stage < 3:
            yield
            return
        zero = self._deepspeed.optimizer
        zero.loss_scale = 1 / self.world.world_size
        try:
            yield
        finally:
            zero.loss_scale = 1.0

    def _deepspeed_config(self, precision: Literal["fp32", "bf16"]) -> dict[str, Any]:
        num_elements = sum(parameter.numel() for parameter in self._parameters)
        config: dict[str, Any] = {
            # Sizes are the task's: for DeepSpeed a pass is one sample, a step is when we call it.
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "steps_per_print": None,
            "gradient_allreduce_op": "mean" if self.zero_stage == 3 else "sum",
            "gradient_clipping": self.config.gradient_clip if self.zero_stage > 0 else 0.0,
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": min(num_elements, _MAX_BUCKET_ELEMENTS),
                # It would replace torch.nn.functional.linear in the whole process, for good.
                "memory_efficient_linear": False,
            },
        }
        if precision == "bf16":
            # Never `bf16.enabled`: it casts parameters, and with them codebooks. The list of
            # modules is of those whose gradients are reduced in bf16: none.
            config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }
        return config

    def _find_pieces(self) -> dict[str, Piece]:
        """Read from DeepSpeed's optimizer which elements this rank moves."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        zero = self._deepspeed.optimizer
        pieces: dict[str, Piece] = {}
        if self.zero_stage < 3:
            owners = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
            for group, owner in owners:
                for parameter in group:
                    pieces[names[id(parameter)]] = _piece_of_flat_group(parameter, owner)
            return pieces
        owners = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
        for group, owner in owners:
            position = 0
            for parameter in group:
                size = parameter.partition_numel()
                start = min(self.world.rank * size, parameter.ds_numel)
                count = min(size, parameter.ds_numel - start)
                shape = tuple(parameter.ds_shape)
                pieces[names[id(parameter)]] = Piece(owner, shape, start, position, count)
                position += size
        return pieces

    def _refresh_weights(self) -> None:
        """Bring what passes compute with in line with the partitions; every rank calls it."""
        zero = self._deepspeed.optimizer
        if self.zero_stage in (1, 2):
            zero.update_lp_params()
        elif self.zero_stage == 3:
            # As a step ends (stage3.py: step, _post_step).
            zero.parameter_offload.partition_all_parameters()
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            persistent = zero.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)


class _Passes(nn.Module):
    """Calls the model, and shows DeepSpeed the tensors in dataclasses that it returns.

    DeepSpeed prepares for the backward pass in hooks of the output's tensors, for which it looks
    into lists, tuples and dicts only. Being the root, it also keeps hooks off the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        output = self.model(*inputs, **options)
        is_record = is_dataclass(output) and not isinstance(output, type)
        return output, dict(vars(output)) if is_record else {}


def _piece_of_flat_group(parameter: Any, owner: Tensor) -> Piece:
    """Describe a parameter of ZeRO-1 and 2, whose flat groups are cut into N equal partitions."""
    mapping = parameter._hp_mapping
    shape = tuple(parameter.shape)
    if mapping is None:
        return Piece(owner, shape, start=0, position=0, count=0)
    fragment, address = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
    return Piece(owner, shape, fragment.start, address.start, fragment.numel)


def _require_all_trained(module: nn.Module, name: str) -> None:
    for parameter_name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            raise ConfigError(
                f"training.zero_stage: 3 partitions what is trained, but {name} has the frozen "
                f"parameter {parameter_name}; use zero_stage 0, 1 or 2"
            )


def _copy_without_storage(module: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _prepare_deepspeed(world: World, device: torch.device) -> None:
    """Tie DeepSpeed to the device and to the present process group."""
    if not dist.is_initialized():
        raise ClusterError(
            "the DeepSpeed engine found no process group, which it needs for one process too; "
            "start training through fqgan_dist.training.run, or use training.engine=plain"
        )
    # It reads this at any time; launchers set it, a process that nobody launched has it not.
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    accelerator: Any = get_accelerator()
    if accelerator.device_name() != device.type:
        set_accelerator(CPU_Accelerator() if device.type == "cpu" else CUDA_Accelerator())
    # By itself it prints; so its messages go where ours go, and name the rank.
    messages = logging.getLogger("DeepSpeed")
    messages.handlers.clear()
    messages.propagate = True
    # Compiling DeepSpeed's collectives for one CPU host takes 30 s and g++, and two ranks race.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It keeps process groups beyond the end of the world that they were made in.
    global _known_world
    if _known_world is not dist.group.WORLD:
        groups._release_process_group_references()
        _known_world = dist.group.WORLD

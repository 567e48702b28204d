"""A run's weights split over its ranks: torch's fully_shard (FSDP2), over NCCL or gloo, and DeepSpeed's result.

Each rank keeps its share of every weight, gradient and optimiser state. A layer's weights are gathered while it runs.
The rest of a draft (embeddings, norm, output heads; all of a head) is gathered for a whole micro-batch, because losses
read the output heads' weights themselves. Of the frozen target only the layers are split: drafts read its embedding
and its head.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from draftsmith.infer.models.layers import find_parts

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from draftsmith.train.drafts.trainable import Weights
    from draftsmith.train.run.module import Training
    from draftsmith.train.run.run_record import RunRecord

M_MMAP_THRESHOLD = -3
LARGE = 1 << 20


class ShardedStrategy(ModelParallelStrategy):
    """Data parallelism over `ranks`, whose LightningModule splits itself (`shard_run`).

    Lightning's FSDPStrategy does not run on CPUs. `offload`: the shards stay in the machine's memory.
    """

    def __init__(self, ranks: int, device: str, offload: bool = False) -> None:
        # Norms of gradients in the machine's memory are summed over gloo.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl" if offload else None
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1, process_group_backend=backend)
        self.offload = offload
        self._device = device

    def setup_environment(self) -> None:
        if self._device == "cpu":
            _return_what_is_freed()
        super().setup_environment()

    def model_to_device(self) -> None:
        if not self.offload:
            super().model_to_device()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        from torch.distributed.checkpoint import CheckpointException

        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        except CheckpointException as error:  # of all ranks, each with its own
            raise next(iter(failure for failure, _ in error.failures.values())) from error


def _return_what_is_freed() -> None:
    """Have the C library take large tensors from the system and give them back one by one.

    It raises the size from which it does so to that of what is freed, and then keeps what layers have gathered: 1.38
    GiB instead of 0.96 for the ten layers of tests/train/run/test_memory.py.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it, and needs it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)


def shard_run(module: Training, target: Any | None) -> None:
    """Split the draft of `module`, and the frozen `target`, before the optimiser is made. `module` is the outermost
    unit, so that it is to be called as a module."""
    from torch.distributed.fsdp import fully_shard

    strategy = module.trainer.strategy
    assert isinstance(strategy, ShardedStrategy)
    mesh = strategy.device_mesh["data_parallel"]
    options = _options(mesh, strategy.offload)
    for layer in module.draft.layers():
        fully_shard(layer, **options)
    fully_shard(module, **options)
    _sum_where_no_mean_is(module, mesh)
    if target is not None:
        shard_frozen(target, mesh, strategy.root_device, strategy.offload)


def shard_frozen(model: Any, mesh: DeviceMesh, device: torch.device, offload: bool = False) -> None:
    """Split the layers of `model`, which only runs forward; the rest moves to `device`."""
    from torch.distributed.fsdp import fully_shard

    layers = find_parts(model).layers
    split = {id(weight) for weight in layers.parameters()}
    whole = {weight for weight in model.parameters() if id(weight) not in split}
    for weight in whole:
        weight.data = weight.data.to(device)
    options = _options(mesh, offload)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=True, **options)
    # Without weights of its own it is the outermost unit, which gathers the next layer while one runs.
    fully_shard(model.base_model, ignored_params=whole, **options)


def _options(mesh: DeviceMesh, offload: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    return {"mesh": mesh, "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}


def _sum_where_no_mean_is(module: nn.Module, mesh: DeviceMesh) -> None:
    """gloo reduces to sums only."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")


def make_whole(trainer: lightning.Trainer, module: Training, record: RunRecord) -> None:
    """After the last step: on the first rank `module` holds its whole weights again, on the CPU."""
    state: dict[str, Any] = {}
    if isinstance(trainer.strategy, ShardedStrategy):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif type(trainer.strategy).__name__ == "DeepSpeedStrategy":
        from lightning.pytorch.utilities.deepspeed import convert_zero_checkpoint_to_fp32_state_dict

        folder, whole = record.path / "resume" / "final", record.path / "resume" / "final.pt"
        trainer.save_checkpoint(folder)
        if trainer.is_global_zero:
            convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(whole))
            state = torch.load(whole, map_location="cpu", weights_only=True)["state_dict"]
        trainer.strategy.barrier()
    else:
        module.cpu()
        return
    if trainer.is_global_zero:
        put_weights(module, state)


def put_weights(module: nn.Module, weights: Weights) -> None:
    """Put `weights`, by name, in the place of the module's; those that were one remain one. Buffers go to the CPU."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # holds the old ones, so that no new one takes the id of one
    for path, owner in module.named_modules():
        for name, old in list(owner.named_parameters(recurse=False)):
            if old not in made:
                full = weights[f"{path}.{name}" if path else name]
                made[old] = nn.Parameter(full.to(old.dtype), requires_grad=old.requires_grad)
            setattr(owner, name, made[old])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, buffer.cpu())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, gathered if it is a rank's share of one."""
    # A DTensor; importing its class takes long.
    gathered: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of `tensor`."""
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def part_like(tensor: Any, whole: torch.Tensor) -> torch.Tensor:
    """Of `whole`, which every rank has, what this rank holds of `tensor`."""
    if not hasattr(tensor, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    part: torch.Tensor = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return part

"""One process or many: found in the environment that torchrun (`lmopt launch`) sets, served by accelerate."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lmopt.backends.torch.calibration import find_stack
from lmopt.errors import DeviceError, UnsupportedOptionError
from lmopt.training.config import TrainingConfig


@contextmanager
def accelerated(config: TrainingConfig) -> Iterator[Accelerator]:
    """Join the other processes, if there are any, and choose device and precision.

    Gloo connects processes on CPUs, NCCL those on GPUs. The process group outlives this context, so that a
    process can train twice; `lmopt.training.parallel.leave` ends it.

    Yields:
        accelerate's own object. What else uses accelerate in this process is put aside meanwhile.

    Raises:
        DeviceError: `device="cuda"`, but torch finds no GPU.
        UnsupportedOptionError: Precision and device or sharding do not go together.
    """
    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise DeviceError(
            f"device 'cuda' was asked for, but torch {torch.__version__} finds no usable CUDA device. "
            "Use device='cpu', or see `lmopt doctor`."
        )
    cpu = config.device == "cpu" or not gpu
    if config.fp16 and cpu:
        raise UnsupportedOptionError("fp16 needs a GPU; on a CPU use bf16=True, or float32")
    if config.fp16 and config.sharding == "full":
        raise UnsupportedOptionError(
            "fp16 scales the loss, which sharded weights do not serve; use bf16=True"
        )
    precision = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    # accelerate keeps one state a process, in which precision and device can be chosen only once.
    shared = [one._shared_state for one in (AcceleratorState, PartialState, GradientState)]
    aside = [dict(one) for one in shared]
    try:
        for one in shared:
            one.clear()
        yield Accelerator(mixed_precision=precision, cpu=cpu)
    finally:
        for one, before in zip(shared, aside, strict=True):
            one.clear()
            one.update(before)


def leave() -> None:
    """End the process group, if this process is in one; for the end of a program."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shard(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Make a copy whose weights, gradients and optimiser state are spread over all processes (FSDP2).

    Args:
        module: Stays whole, on its device.
        accelerator: Knows the processes.

    Raises:
        UnsupportedOptionError: There is only one process.
    """
    if accelerator.num_processes == 1:
        raise UnsupportedOptionError(
            "sharding='full' spreads the model over processes, but there is only one: start several with "
            "`lmopt launch --nproc 2 -- train ...`, or use sharding='none'"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    spread = copy.deepcopy(module)
    stack = find_stack(spread)
    for block in () if stack is None else stack[1]:
        fully_shard(block, mesh=mesh)
    fully_shard(spread, mesh=mesh)
    return spread


def whole(tensor: Tensor) -> Tensor:
    """Give a tensor without gradient, gathered if it is spread over processes, which must all ask for it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Put a whole tensor where another lies: on its device, or in parts over the same processes."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    # Each process has all of it and takes its own part: nothing is sent.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def take_back(module: nn.Module, spread: nn.Module) -> None:
    """Copy weights and buffers from a sharded copy into the module that it was made of."""
    state: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, one in [*spread.named_parameters(), *spread.named_buffers()]:
            state[name].copy_(whole(one))

"""`python -m lmopt.backends.torch.tensor_parallel_rank`: one rank of a model that is split over processes.

Every rank holds its part of the weights and of the state, and makes the same calls as the others; their sums and
gathers go through torch.distributed. The parent says what to do, and hears the logits from rank 0.
"""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from lmopt.backends.torch.engine import TorchEngine
from lmopt.backends.torch.language_model import as_decoder
from lmopt.children import Channel, as_failure, serve
from lmopt.errors import InputError, UnsupportedError
from lmopt.signature import ArrayState
from lmopt.types import AnyArray, ModelFacts

# A dead peer is noticed at once, by its connection; this is for one that hangs.
_TIMEOUT: Final = timedelta(minutes=10)


def main() -> None:
    """Serve one parent until it goes away."""
    channel = serve()
    try:
        frame = channel.receive()
        if frame is not None:
            rank = _Rank(channel, frame[0])
            while (frame := channel.receive()) is not None:
                rank.answer(*frame)
    except BrokenPipeError:
        pass
    except Exception as error:
        channel.send({"error": as_failure(error)})
    # Without the farewells of torch.distributed, which wait for ranks that may be gone.
    os._exit(0)


class _Rank:
    """The engine of one rank, and the states that the parent knows by number."""

    def __init__(self, channel: Channel, order: Mapping[str, Any]) -> None:
        self._channel = channel
        self._number = order["rank"]
        self._states: dict[int, ArrayState] = {}
        device = torch.device(order["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.set_num_threads(order["threads"])
        # A file, and no TCP store: that would listen on every address of the machine.
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{order['meeting']}",
            rank=self._number,
            world_size=order["size"],
            timeout=_TIMEOUT,
        )
        module = _load(Path(order["model"]), order, device)
        self._engine = TorchEngine(
            as_decoder(module.eval()), ModelFacts.from_dict(order["facts"]), device, order["threads"]
        )
        report = self._engine.report()
        self._channel.send(
            {"ragged": self._engine.ragged, "rewinds": self._engine.rewinds, "dtype": report.dtype}
        )

    def answer(self, order: dict[str, Any], arrays: list[AnyArray]) -> None:
        """Do what the parent asks; an error that all ranks have in common leaves the states of others alone."""
        for key in order.pop("drop"):
            self._states.pop(key, None)
        try:
            found = getattr(self, f"_{order.pop('do')}")(order, arrays)
        except Exception as error:
            self._channel.send({"error": as_failure(error)})
            return
        self._channel.send({}, found if self._number == 0 else [])

    def _begin(self, order: dict[str, Any], _: list[AnyArray]) -> list[AnyArray]:
        return self._keep(order.pop("key"), self._engine.begin(**order))

    def _forward(self, order: dict[str, Any], arrays: list[AnyArray]) -> list[AnyArray]:
        logits, state = self._engine.forward(
            arrays[0], arrays[1], self._take(order["state"]), last_only=order["last_only"]
        )
        return [*self._keep(order["key"], state), logits]

    def _select(self, order: dict[str, Any], arrays: list[AnyArray]) -> list[AnyArray]:
        return self._keep(order["key"], self._engine.select(self._take(order["state"]), arrays[0]))

    def _join(self, order: dict[str, Any], _: list[AnyArray]) -> list[AnyArray]:
        return self._keep(order["key"], self._engine.join([self._take(key) for key in order["states"]]))

    def _rewind(self, order: dict[str, Any], arrays: list[AnyArray]) -> list[AnyArray]:
        return self._keep(order["key"], self._engine.rewind(self._take(order["state"]), arrays[0]))

    def _copy(self, order: dict[str, Any], _: list[AnyArray]) -> list[AnyArray]:
        state = self._take(order["state"])
        self._states[order["state"]] = state
        return self._keep(order["key"], self._engine.copy(state, capacity=order["capacity"]))

    def _keep(self, key: int, state: ArrayState) -> list[AnyArray]:
        self._states[key] = state
        return [np.asarray(state.lengths, np.int64)]

    def _take(self, key: int) -> ArrayState:
        try:
            return self._states.pop(key)
        except KeyError:
            raise InputError(
                "this state was consumed by an earlier call; use the one that it returned"
            ) from None


def _load(model: Path, order: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Load this rank's part of the model."""
    dtype = getattr(torch, order["dtype"])
    if order["plan"] is None:
        return _load_transformers(model, order["size"], dtype)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    # Written by the parent, a moment ago, into a folder that only this user can enter.
    whole: nn.Module = torch.load(model, map_location=device, weights_only=False)
    styles: dict[str, Any] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "colwise_gather": lambda: ColwiseParallel(output_layouts=Replicate()),
    }
    mesh = init_device_mesh(device.type, (order["size"],))
    return parallelize_module(
        whole.to(dtype), mesh, {pattern: styles[style]() for pattern, style in order["plan"].items()}
    )


def _load_transformers(folder: Path, size: int, dtype: torch.dtype) -> nn.Module:
    """Let transformers read this rank's shards of the weights."""
    import transformers

    from lmopt.backends.torch.loading import quiet, require_complete

    try:
        from transformers.distributed import DistributedConfig

        config = DistributedConfig(tp_size=size)
    except (ImportError, TypeError) as error:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no DistributedConfig(tp_size=...), which tensor parallelism "
            "needs. Update it: pip install --upgrade transformers"
        ) from error
    with quiet():
        module, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            distributed_config=config,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    require_complete(report, "the split model")
    found: nn.Module = module
    return found


if __name__ == "__main__":
    main()

"""Start several processes that train one model: torchrun's own agent, on this machine alone.

For several machines use torchrun itself; `lmopt.training.train` finds its environment the same way.
"""

import datetime
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousInfo,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lmopt.errors import UnsupportedOptionError, WorkerDiedError
from lmopt.platform import usable_cpus

_HOST: Final = "127.0.0.1"
_NAME: Final = "lmopt-loopback"
_GRACE_S: Final = "10"


def launch(arguments: Sequence[str], *, nproc: int, max_restarts: int = 0) -> None:
    """Run one command in several processes that know of each other, and wait for them.

    Nothing but the loopback interface is listened on. If a process ends early, the others are ended too, and
    all begin again as long as restarts are left; `lmopt.training.train` then goes on from its last checkpoint.

    Args:
        arguments: A Python script (`.py`) and its arguments, or a verb of lmopt and its options.
        nproc: Processes, at least 1. Each is given an equal share of the CPUs, and the GPU of its number.
        max_restarts: How often to begin again.

    Raises:
        UnsupportedOptionError: A number is out of range, or there is nothing to run.
        WorkerDiedError: A process ended early and no restart is left; its rank is named.
    """
    if nproc < 1 or max_restarts < 0 or not arguments:
        raise UnsupportedOptionError(
            f"launch needs nproc >= 1, max_restarts >= 0 and a command; given: nproc={nproc}, "
            f"max_restarts={max_restarts}, {len(arguments)} words. Example: lmopt launch --nproc 2 -- train MODEL "
            "--data text.txt --output out"
        )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _GRACE_S)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cpus() // nproc)))
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, loopback)
    rendezvous_handler_registry.register(_NAME, _Loopback)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=f"lmopt-{os.getpid()}",
        rdzv_backend=_NAME,
        max_restarts=max_restarts,
        local_addr=_HOST,
    )
    script = arguments[0].endswith(".py")
    program = ["-u"] if script else ["-u", "-P", "-c", "from lmopt.cli import main; main()"]
    try:
        elastic_launch(config, sys.executable)(*program, *arguments)
    except ChildFailedError as error:
        # The one that was killed comes first, then those that noticed, then those that the agent ended.
        failed = sorted(error.failures.items(), key=lambda one: (_standing(one[1].exitcode), one[0]))
        rank, failure = failed[0]
        code = failure.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        others = ", ".join(str(other) for other, _ in failed[1:])
        also = f"; rank {others} ended with it" if others else ""
        raise WorkerDiedError(
            f"rank {rank} of {nproc} (process {failure.pid}) {how}{also}. What was left was ended; what they said "
            "stands above. Checkpoints are whole: the same command goes on from the last one, and --max-restarts 1 "
            "does so by itself."
        ) from error
    except SignalException as error:
        raise KeyboardInterrupt from error


def _standing(exit_code: int) -> int:
    return 2 if exit_code == -signal.SIGTERM else 1 if exit_code >= 0 else 0


class _Loopback(RendezvousHandler):
    """The meeting point of one machine's processes, like torchrun's static one, but on the loopback interface."""

    def __init__(self, parameters: RendezvousParameters) -> None:
        self._run_id = parameters.run_id
        self._store: TCPStore | None = None

    @property
    def use_agent_store(self) -> bool:
        """Say that workers meet at the agent's store."""
        return True

    def get_backend(self) -> str:
        """Name this kind of meeting point."""
        return _NAME

    def next_rendezvous(self) -> RendezvousInfo:
        """Open a new store: workers that begin again must not find the addresses of dead ones."""
        # By itself the store listens on all interfaces: it is given a socket that does not.
        listener = socket.create_server((_HOST, 0))
        self._store = TCPStore(
            _HOST,
            listener.getsockname()[1],
            is_master=True,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=60),
            master_listen_fd=listener.detach(),
        )
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo(_HOST, self._store.port))

    def is_closed(self) -> bool:
        """Say that it stays open."""
        return False

    def set_closed(self) -> None:
        """Do nothing: the store ends with this process."""

    def num_nodes_waiting(self) -> int:
        """Say that no other machine comes."""
        return 0

    def get_run_id(self) -> str:
        """Give the name of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Do nothing: the store ends with this process."""
        return True

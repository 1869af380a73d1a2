"""`python -m lmopt.scaling`: the worker process of a local corpus job; serves one parent until it goes away."""

import time
from typing import Final

from lmopt.children import Channel, as_failure, serve
from lmopt.scaling.inputs import Shard
from lmopt.scaling.worker import Worker

_TELL_S: Final = 0.2


class _Teller:
    """Tells the parent how far a shard is, a few times a second at most."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._told = time.monotonic()

    def __call__(self, rows: int) -> None:
        if time.monotonic() - self._told > _TELL_S:
            self._channel.send({"kind": "progress", "rows": rows})
            self._told = time.monotonic()


def main() -> None:
    """Serve one parent until it goes away."""
    channel = serve()
    try:
        frame = channel.receive()
        if frame is None:
            return
        worker = Worker(frame[0])
        channel.send({"kind": "ready"})
        while (frame := channel.receive()) is not None:
            shard = Shard(**frame[0])
            result = worker.run(shard, _Teller(channel))
            channel.send(
                {"kind": "done", "number": result.number, "rows": result.rows, "errors": result.errors}
            )
    except BrokenPipeError:
        return
    except Exception as error:
        channel.send({"kind": "failed", **as_failure(error)})


if __name__ == "__main__":
    main()

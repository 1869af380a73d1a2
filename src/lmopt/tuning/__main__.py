"""`python -m lmopt.tuning`: a process that does one piece of work for a search, and ends."""

import importlib
import time
from typing import Final

from lmopt.children import as_failure, serve

_TELL_S: Final = 0.2


def main() -> None:
    """Do the work that the parent sends."""
    channel = serve()
    frame = channel.receive()
    if frame is None:
        return
    order = frame[0]
    told = ("", 0.0)

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal told
        if stage != told[0] or time.monotonic() - told[1] > _TELL_S:
            told = (stage, time.monotonic())
            channel.send({"kind": "progress", "stage": stage, "done": done, "total": total})

    try:
        module, _, name = order["call"].partition(":")
        function = getattr(importlib.import_module(module), name)
        channel.send({"kind": "done", "result": function(**order["arguments"], tell=tell)})
    except BrokenPipeError:
        return
    except Exception as error:
        channel.send({"kind": "failed", **as_failure(error)})


if __name__ == "__main__":
    main()

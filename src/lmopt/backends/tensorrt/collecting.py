"""A logger that keeps what TensorRT says: a build that fails returns nothing, and says why only there."""

import threading
from typing import Any, Final, Protocol

MOST_MESSAGES: Final = 500
"""Messages that are kept; the latest ones."""


class Log(Protocol):
    """What `logger_for` gives."""

    @property
    def native(self) -> Any:
        """The `ILogger` that TensorRT is given. Keep it for as long as whatever was given it."""
        ...

    def errors(self) -> tuple[str, ...]:
        """Errors since the last `clear`, oldest first."""
        ...

    def warnings(self) -> tuple[str, ...]:
        """Warnings since the last `clear`, oldest first."""
        ...

    def clear(self) -> None:
        """Forget all messages."""
        ...


def logger_for(module: Any) -> Log:
    """Make a collecting logger for a live TensorRT module.

    Its class derives from that module's `ILogger`, so it cannot exist before one is chosen. Builders log from
    threads of their own: all methods may be called from any thread.

    Args:
        module: `Flavour.module`, or any bindings with an `ILogger` (the lean runtime's, too).
    """
    error, warning = int(module.ILogger.ERROR), int(module.ILogger.WARNING)

    class CollectingLogger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._lock = threading.Lock()
            self._messages: list[tuple[int, str]] = []

        @property
        def native(self) -> Any:
            return self

        def log(self, severity: Any, message: str) -> None:
            # The lower, the worse; a class of 3 or 4 is chatter.
            if int(severity) <= warning:
                with self._lock:
                    self._messages.append((int(severity), message.strip()))
                    del self._messages[:-MOST_MESSAGES]

        def errors(self) -> tuple[str, ...]:
            with self._lock:
                return tuple(text for level, text in self._messages if level <= error)

        def warnings(self) -> tuple[str, ...]:
            with self._lock:
                return tuple(text for level, text in self._messages if level == warning)

        def clear(self) -> None:
            with self._lock:
                self._messages.clear()

    return CollectingLogger()

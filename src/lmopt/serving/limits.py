"""How much a server takes on."""

from dataclasses import dataclass, fields

from lmopt.errors import UnsupportedOptionError


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """How much a server takes on; what is beyond is refused at once, with an error that says so.

    How many rows are decoded at once is the runtime's own limit, `max_num_seqs`.

    Attributes:
        max_queue: Most rows that wait for a place in the batch. One more is answered with 503.
        max_tokens: Most new tokens of a row; what a request asks beyond is answered with 400.
        max_body_bytes: Most bytes of a request's body; a larger one is answered with 413.
        body_timeout_s: Seconds in which the body of a request has to arrive; else 408.
        stop_timeout_s: Seconds that running requests have to finish once the server is told to stop.

    Raises:
        UnsupportedOptionError: One is out of range.
    """

    max_queue: int = 128
    max_tokens: int = 4096
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0
    stop_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        least = {"max_queue": 0, "stop_timeout_s": 0, "body_timeout_s": 0}
        for one in fields(self):
            value = getattr(self, one.name)
            kinds = (int, float) if one.type in (float, "float") else (int,)
            low = least.get(one.name, 1)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= low:
                raise UnsupportedOptionError(
                    f"{one.name}={value!r} is not possible; expected a number >= {low}."
                )

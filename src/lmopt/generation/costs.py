"""How long calls of an engine take, as far as it was seen: what a draft costs beside a plain step."""

from statistics import median
from typing import Final

_LADDER: Final = (1, 2, 4, 8, 16, 32)  # drafts of like length are measured together
_KEPT: Final = 9  # the last so many calls count: a text that grows slows all of them
# Until something is measured: a call reads the weights once, which takes as long as computing so many
# tokens. (About 12 where prefill reads 700 tokens/s and decoding 55, as in fp32 on 2 cores; 3 where
# decoding gives 170, as in int4.)
_WEIGHTS_IN_TOKENS: Final = 4.0


class CallCosts:
    """Times of decoding calls by batch and draft length; shared by all requests of an engine.

    They decide how long drafts are, never which tokens come out.
    """

    def __init__(self) -> None:
        # Tuples are replaced and never changed: what another thread reads is whole.
        self._times: dict[tuple[int, int], tuple[float, ...]] = {}

    def record(self, rows: int, drafted: int, seconds: float) -> None:
        """Note a call on `rows` rows that read one token and up to `drafted` more of each."""
        key = rows, _rung(drafted)
        self._times[key] = (*self._times.get(key, ())[1 - _KEPT :], seconds)

    def ratio(self, rows: int, drafted: int) -> float:
        """Time of a call with `drafted` more tokens a row, over that of a plain one."""
        prior = 1.0 + drafted * rows / (rows + _WEIGHTS_IN_TOKENS)
        plain = self._seconds(rows, 0)
        if plain is None:
            return prior
        # The nearest rung that was measured, and a straight line from there.
        for rung in sorted(_LADDER, key=lambda one: abs(one - drafted)):
            seconds = self._seconds(rows, rung)
            if seconds is not None:
                measured = max(1.0, seconds / plain)
                return measured if rung == _rung(drafted) else 1.0 + (measured - 1.0) * drafted / rung
        return prior

    def _seconds(self, rows: int, rung: int) -> float | None:
        times = self._times.get((rows, rung))
        return median(times) if times else None


def _rung(drafted: int) -> int:
    return next((one for one in _LADDER if one >= drafted), _LADDER[-1]) if drafted else 0

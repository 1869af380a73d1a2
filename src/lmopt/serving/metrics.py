"""What a server counts, as text that Prometheus reads."""

import threading
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Final

_KEPT: Final = 8192
_QUANTILES: Final = (0.5, 0.99)


class Metrics:
    """Counters of a server and times of its last tokens; used by the batch's thread and by the server's.

    Attributes:
        prompt_tokens: Tokens of prompts whose rows have ended.
        new_tokens: Tokens generated.
        answers: HTTP answers by their status.
        gaps_s: Seconds between two tokens of a row, the last 8192 of them.
        first_token_s: Seconds from a request to its first token, the last 8192 of them.
        row_s: Seconds that the last rows took, waiting included.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.new_tokens = 0
        self.answers: Counter[int] = Counter()
        self.gaps_s: deque[float] = deque(maxlen=_KEPT)
        self.first_token_s: deque[float] = deque(maxlen=_KEPT)
        self.row_s: deque[float] = deque(maxlen=64)
        self._lock = threading.Lock()

    def note_tokens(self, gaps_s: Iterable[float], first_s: Iterable[float], count: int) -> None:
        """Note the tokens of one step of the batch."""
        with self._lock:
            self.gaps_s.extend(gaps_s)
            self.first_token_s.extend(first_s)
            self.new_tokens += count

    def quantiles_s(self) -> dict[str, dict[float, float]]:
        """Median and 99th percentile of the gaps between tokens, and of the times to the first one."""
        with self._lock:
            kept = {"inter_token": list(self.gaps_s), "time_to_first_token": list(self.first_token_s)}
        return {
            name: {q: _quantile(sorted(values), q) for q in _QUANTILES}
            for name, values in kept.items()
            if values
        }

    def text(self, rows: Mapping[str, int]) -> str:
        """Write everything in Prometheus' text format.

        Args:
            rows: Rows by what they do at this moment.
        """
        lines = ["# TYPE lmopt_http_answers_total counter"]
        lines += [
            f'lmopt_http_answers_total{{status="{code}"}} {n}' for code, n in sorted(self.answers.items())
        ]
        for name, value in (("prompt", self.prompt_tokens), ("new", self.new_tokens)):
            lines += [f"# TYPE lmopt_{name}_tokens_total counter", f"lmopt_{name}_tokens_total {value}"]
        lines += [
            "# TYPE lmopt_rows gauge",
            *(f'lmopt_rows{{state="{name}"}} {n}' for name, n in rows.items()),
        ]
        for name, found in self.quantiles_s().items():
            lines.append(f"# TYPE lmopt_{name}_seconds summary")
            lines += [f'lmopt_{name}_seconds{{quantile="{q}"}} {value:.6f}' for q, value in found.items()]
        return "\n".join(lines) + "\n"


def _quantile(values: list[float], share: float) -> float:
    """Value below which a share of the sorted values lies: the nearest one, none is made up."""
    return values[min(len(values) - 1, int(share * len(values)))]

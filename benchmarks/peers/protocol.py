"""What an adapter speaks with the benchmark: one JSON object a line, in by stdin and out by stdout.

Adapters run in the peer's own virtual environment, where lmopt is not; so this file and they use the
standard library, NumPy (which every peer needs itself) and the peer, nothing else. The orders:

- `{"do": "import"}`: import the peer. -> `versions`
- `{"do": "load", "path": ..., "threads": N or null, "options": {...}}`: open the model. -> `settings`,
  which says what was set
- `{"do": "generate", "prompts": [[id, ...], ...], "new_tokens": N}`: greedy, without stopping at an end
  token. -> `tokens` and `stamps_ns`, both `[row][token]`; a stamp is the time from the start of the
  work (prompt as ids in Python) to when the token's id is in Python
- `{"do": "logits", "ids": [...], "file": PATH}`: logits after each id of one row, `(sequence, vocab)`
  float32, written by `numpy.save`.
- `{"do": "transcribe", "files": [PATH, ...], "num_beams": N}`: write down what is said, one clip after the other.
  -> `texts` and `file_s`, the seconds that each took
- `{"do": "translate", "sources": [[id, ...], ...], "new_tokens": N, "num_beams": N}`: exactly so many tokens a source,
  all sources in one batch. -> `tokens`
- `{"do": "close"}`

Each reply has `seconds`, the time that the order took inside this process; a reply with `problem` says
why there is nothing else. What the peer prints goes to stderr.
"""

import itertools
import json
import os
import sys
import time
from typing import Any, Protocol


class Adapter(Protocol):
    """One peer."""

    def imports(self) -> dict[str, str]:
        """Import the peer; return versions by distribution."""
        ...

    def load(self, path: str, *args: Any, **options: Any) -> dict[str, Any]:
        """Open a model; return what was set.

        `threads` is always among the options, and `None` leaves the peer's own choice; each peer has
        further ones of its own. (To a type checker, `*args` says: whatever the peer takes.)
        """
        ...

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Generate greedily; return tokens and stamps."""
        ...

    def logits(self, ids: list[int]) -> Any:
        """Return `(sequence, vocab)` float32."""
        ...


class SpeechAdapter(Protocol):
    """One peer that recognises speech; `imports` and `load` are those of `Adapter`."""

    def transcribe(self, file: str, num_beams: int) -> str:
        """Write down what is said in a WAV file."""
        ...


class TranslationAdapter(Protocol):
    """One peer that translates; `imports` and `load` are those of `Adapter`."""

    def translate(self, sources: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        """Give `new_tokens` tokens a source, without those that decoders begin with."""
        ...


def serve(adapter: Any) -> None:
    """Obey orders until there are none."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "close":
            break
        start = time.perf_counter()
        try:
            reply = _obey(adapter, order)
        except Exception as error:
            reply = {"problem": f"{type(error).__name__}: {error}"[:500]}
        reply["seconds"] = time.perf_counter() - start
        replies.write(json.dumps(reply) + "\n")
    replies.flush()
    os._exit(0)  # some engines hang or crash when the interpreter takes them down


def _obey(adapter: Any, order: dict[str, Any]) -> dict[str, Any]:
    match order["do"]:
        case "import":
            return {"versions": adapter.imports()}
        case "load":
            return {"settings": adapter.load(order["path"], threads=order["threads"], **order["options"])}
        case "generate":
            tokens, stamps = adapter.generate(order["prompts"], order["new_tokens"])
            return {"tokens": tokens, "stamps_ns": stamps}
        case "logits":
            import numpy as np

            np.save(order["file"], np.asarray(adapter.logits(order["ids"]), np.float32))
            return {}
        case "transcribe":
            texts, stamps = [], [time.perf_counter()]
            for file in order["files"]:
                texts.append(adapter.transcribe(file, order["num_beams"]))
                stamps.append(time.perf_counter())
            return {"texts": texts, "file_s": [b - a for a, b in itertools.pairwise(stamps)]}
        case "translate":
            return {"tokens": adapter.translate(order["sources"], order["new_tokens"], order["num_beams"])}
    raise ValueError(f"no order is called {order['do']!r}")


def padded(prompts: list[list[int]], pad: int, *, side: str) -> tuple[Any, Any]:
    """Lay rows of unequal length into one `(row, sequence)` int64 array, with its mask."""
    import numpy as np

    width = max(map(len, prompts))
    ids = np.full((len(prompts), width), pad, np.int64)
    mask = np.zeros_like(ids)
    for line, seen, row in zip(ids, mask, prompts, strict=True):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        line[place] = row
        seen[place] = 1
    return ids, mask


def version_of(*names: str) -> dict[str, str]:
    """Versions of installed distributions."""
    from importlib.metadata import version

    return {name: version(name) for name in names}

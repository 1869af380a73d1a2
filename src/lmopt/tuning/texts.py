"""Which text a search scores, and which one calibrated steps read; the two never overlap."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from lmopt.errors import InputError

Text: TypeAlias = str | os.PathLike[str] | Sequence[str]
"""Path of a text file, or texts."""

_LEAST: Final = 2000
# Characters; 32 stretches of 512 tokens take some 70,000.
_CALIBRATION: Final = 20_000


@dataclass(frozen=True, slots=True)
class Texts:
    """Files of text, and where they come from.

    Attributes:
        score: Text that is scored; `None` for a model without a tokenizer.
        calibration: Text that calibrated steps read; `None` lets the model write it.
        origins: `"quality"` and `"calibration"`, in words.
        hashes: Of both.
    """

    score: Path | None
    calibration: Path | None
    origins: dict[str, str]
    hashes: dict[str, str]


def lay_out(text: Text | None, calibration: Text | None, folder: Path) -> Texts:
    """Put the texts of a search into files.

    Args:
        text: Text that quality is measured on. Where it is long and `calibration` is `None`, its first half is
            scored and its second half calibrates. `None` scores Python's own reference.
        calibration: Text for calibrated steps.
        folder: Existing folder.

    Raises:
        InputError: A file cannot be read as UTF-8, or the text is too short.
    """
    origins = {}
    if text is None:
        words = _builtin()
        origins["quality"] = (
            "Python's own reference (pydoc_data.topics), because no text was given: give text= (lmopt tune "
            "--text FILE) of the kind that the model will meet"
        )
    else:
        words = _read(text)
        origins["quality"] = f"the given text{_name(text)}"
    if len(words) < _LEAST:
        raise InputError(
            f"the text to score has {len(words)} characters; at least {_LEAST:,} are needed, and 10,000 give figures "
            "that settle"
        )
    other: str | None = None
    if calibration is not None:
        other = _read(calibration)
        origins["calibration"] = f"the given calibration text{_name(calibration)}"
    elif text is not None and len(words) >= 2 * _CALIBRATION:
        half = len(words) // 2
        words, other = words[:half], words[half:]
        origins["quality"] = f"the first half of the given text{_name(text)}"
        origins["calibration"] = f"the second half of the given text{_name(text)}"
    else:
        origins["calibration"] = "written by the model itself, because no text was given for it"
    found = Texts(
        _write(folder / "score.txt", words),
        None if other is None else _write(folder / "given-calibration.txt", other),
        origins,
        {"score": _hash(words), "calibration": "" if other is None else _hash(other)},
    )
    if other is not None and other == words:
        raise InputError(
            "the calibration text is the text to score: what a recipe has been fitted to says nothing of its loss. "
            "Give another text, or leave calibration out: then the two halves of the text are used"
        )
    return found


def _read(given: Text) -> str:
    if not isinstance(given, str | os.PathLike):
        return "\n".join(given)
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{os.fspath(given)!r} is no text file ({error}); give a path, or a list of texts"
        ) from None


def _builtin() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _name(given: Text) -> str:
    return f" ({Path(given).name})" if isinstance(given, str | os.PathLike) else ""


def _write(path: Path, words: str) -> Path:
    path.write_text(words, encoding="utf-8")
    return path


def _hash(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()

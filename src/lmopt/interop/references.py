"""Hold what an encoder-decoder writes against what is right: word error rate by jiwer, chrF and BLEU by sacrebleu."""

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from lmopt.errors import InputError, NotInstalledError, UnsupportedError
from lmopt.registry import pip_line
from lmopt.runtime import Runtime
from lmopt.speech import LogMel, read_audio
from lmopt.types import FloatArray, SourceFacts

# Rows that are handed to the runtime at once, so that progress can be told.
_AT_ONCE: Final = 16
_AUDIO: Final = "audio"
_SOURCE: Final = "source"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Sources, and what is right for each.

    Attributes:
        sources: Texts, or paths of sound files.
        texts: What is right.
        are_sound: Whether the sources are sound files.
    """

    sources: tuple[str, ...]
    texts: tuple[str, ...]
    are_sound: bool

    def read(self, facts: SourceFacts) -> list[str] | list[FloatArray]:
        """Give the sources as an encoder takes them: texts, or log-mel features `(size, positions)`.

        Raises:
            InputError: A clip is longer than the encoder takes.
        """
        if not self.are_sound:
            return list(self.sources)
        assert facts.length is not None
        hear = LogMel(facts.size, facts.length)
        found = []
        for path in self.sources:
            pieces = hear.pieces(read_audio(path, hear.sampling_rate))
            if len(pieces) > 1:
                raise InputError(
                    f"{path} is longer than the encoder takes; cut it, and its text, in {len(pieces)}"
                )
            found.append(pieces[0])
        return found


@dataclass(frozen=True, slots=True)
class Judgement:
    """How close texts are to what is right.

    Attributes:
        metrics: Of sound `"word_error_rate"` and `"character_error_rate"` (0 is best, above 1 is possible), of texts
            `"chrf"` and `"bleu"` (0 to 100).
        counts: Numbers behind them: `"items"`, and of sound `"words"` and `"wrong_words"`.
        how: Which library computed them, and how: figures of other settings do not compare.
        texts: What was written.
    """

    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    how: str
    texts: tuple[str, ...]


def read_pairs(path: str | Path) -> Pairs:
    """Read a file of lines `{"audio": PATH, "text": ...}` or `{"source": TEXT, "text": ...}`.

    Paths are relative to the file.

    Raises:
        InputError: A line is something else, lines are of both kinds, or there is none.
    """
    path = Path(path)
    sources, texts, kinds = [], [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        kind = next((one for one in (_AUDIO, _SOURCE) if isinstance(row, dict) and one in row), None)
        if row is None or kind is None or not all(isinstance(row.get(one), str) for one in (kind, "text")):
            raise InputError(
                f'{path}, line {number} is {line[:80]!r}; expected {{"audio": PATH, "text": ...}} or '
                '{"source": TEXT, "text": ...}'
            )
        kinds.add(kind)
        sources.append(str(path.parent / row[kind]) if kind == _AUDIO else row[kind])
        texts.append(row["text"])
    if len(kinds) != 1:
        raise InputError(f"{path} has {'lines of both kinds' if kinds else 'no lines'}; expected one kind")
    return Pairs(tuple(sources), tuple(texts), _AUDIO in kinds)


def judge(
    runtime: Runtime,
    pairs: Pairs,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Judgement:
    """Let a model translate or transcribe, and hold the results against what is right.

    Args:
        runtime: An encoder-decoder on any engine.
        pairs: From `read_pairs`.
        progress: Called with the stage's name, the sources done and their number.
        **options: As for `Runtime.translate` and `Runtime.transcribe`: `num_beams`, `language`, ... Times of speech
            are never asked for.

    Raises:
        NotInstalledError: jiwer or sacrebleu is missing; the message has the command.
        UnsupportedError: The model reads something else than the sources are.
    """
    library = judging_library(pairs)
    source = runtime.facts.source
    if source is None or (source.kind == "features") != pairs.are_sound:
        raise UnsupportedError(
            f"the pairs have {'sound files' if pairs.are_sound else 'texts'} as sources, and the model reads "
            f"{'no source' if source is None else 'sound' if source.kind == 'features' else 'texts'}"
        )
    write = runtime.transcribe if pairs.are_sound else runtime.translate
    if pairs.are_sound:
        # Words are compared, whatever the model's own defaults are.
        options["return_timestamps"] = False
    texts: list[str] = []
    for start in range(0, len(pairs.sources), _AT_ONCE):
        if progress is not None:
            progress("write", start, len(pairs.sources))
        texts += write(list(pairs.sources[start : start + _AT_ONCE]), **options)
    if pairs.are_sound:
        return word_errors(pairs.texts, texts)
    chrf, bleu = library.CHRF(), library.BLEU()
    scores = [one.corpus_score(texts, [list(pairs.texts)]).score for one in (chrf, bleu)]
    return Judgement(
        dict(zip(("chrf", "bleu"), scores, strict=True)),
        {"items": len(texts)},
        f"sacrebleu {library.__version__}; {chrf.get_signature()}; {bleu.get_signature()}",
        tuple(texts),
    )


def plain_words(text: str) -> str:
    """Leave letters, digits and apostrophes within words, in lower case: what is spoken has no more.

    >>> plain_words("Don't -- he said: 'Stop!'")
    "don't he said stop"
    """
    words = re.findall(r"[^\W_]+(?:['\u2019][^\W_]+)*", text.lower())
    return " ".join(words).replace("\u2019", "'")


def word_errors(right: Sequence[str], texts: Sequence[str]) -> Judgement:
    """Count the words to insert, drop or change, by their `plain_words`.

    Args:
        right: What is right.
        texts: What was written, one for each.

    Raises:
        InputError: A right text has no word.
        NotInstalledError: jiwer is missing.
    """
    library = _library("jiwer")
    truth, found = [plain_words(one) for one in right], [plain_words(one) for one in texts]
    if not all(truth):
        raise InputError(f"nothing is said in pair {truth.index('')}: its text has no word")
    words = library.process_words(truth, found)
    wrong = words.substitutions + words.deletions + words.insertions
    return Judgement(
        {"word_error_rate": float(words.wer), "character_error_rate": float(library.cer(truth, found))},
        {
            "items": len(texts),
            "words": words.hits + words.substitutions + words.deletions,
            "wrong_words": wrong,
        },
        "jiwer, lower case without punctuation",
        tuple(texts),
    )


def judging_library(pairs: Pairs) -> ModuleType:
    """Import what judges texts of such sources.

    Raises:
        NotInstalledError: It is missing; the message has the command.
    """
    return _library("jiwer" if pairs.are_sound else "sacrebleu")


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        line = pip_line('"lmopt[eval]"')
        raise NotInstalledError(f"this needs {name}: {line}") from error

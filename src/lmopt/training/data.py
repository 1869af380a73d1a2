"""From texts, files or data sets to one row of token ids; nothing is dropped."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import InputError, TokenIdError, TokenizerError
from lmopt.tokenizer import Tokenizer

Data: TypeAlias = Any
"""Texts (`str`), files (`pathlib.Path`: `.txt`, or `.jsonl` with a field "text"), rows of a data set (mappings
with "text" or "input_ids"), rows of token ids, one integer array of ids, a `Corpus`; one of them or many."""

_LONGEST_PATH: Final = 4096


@dataclass(frozen=True)
class Corpus:
    """A text as token ids.

    Attributes:
        ids: `(tokens,)` int32, documents one after the other, each closed by the end-of-text id where there is one.
        documents: Number of documents.
    """

    ids: NDArray[np.int32]
    documents: int

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, 64 hexadecimal digits."""
        return hashlib.sha256(np.ascontiguousarray(self.ids).data).hexdigest()


def read_corpus(
    data: Data, tokenizer: Tokenizer | None, *, vocab_size: int, eos_token_id: int | None = None
) -> Corpus:
    """Read all documents and join them.

    Args:
        data: See `Data`.
        tokenizer: Needed for texts. No special tokens are added but the one between documents.
        vocab_size: Ids must lie below it.
        eos_token_id: Closes each document; `None` takes the tokenizer's. A single array of ids is taken as it is.

    Raises:
        InputError: There is nothing to read, or something that is neither text nor ids.
        TokenizerError: Texts are given, but no tokenizer.
        TokenIdError: An id is outside the vocabulary.
    """
    if isinstance(data, Corpus):
        return _checked(data, vocab_size)
    if _is_id_array(data):
        return _checked(Corpus(np.asarray(data, np.int32), 1), vocab_size)
    if eos_token_id is None and tokenizer is not None:
        eos_token_id = tokenizer.eos_token_id
    end = [] if eos_token_id is None else [eos_token_id]
    parts = []
    for document in _documents(data):
        if isinstance(document, str):
            if tokenizer is None:
                raise TokenizerError(
                    "texts are given, but the model has no tokenizer: give rows of token ids, or the model a "
                    "tokenizer: lmopt.Model.from_module(module, tokenizer)"
                )
            document = tokenizer.encode(document, add_special_tokens=False)
        parts.append(np.array([*document, *end], np.int32))
    if not parts:
        raise InputError("the training data hold no document; give texts, pathlib.Path files, or rows of ids")
    return _checked(Corpus(np.concatenate(parts), len(parts)), vocab_size)


def _documents(data: Data) -> Iterator[str | Iterable[int]]:
    """Yield each document as text or as ids."""
    if isinstance(data, str | Path | Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise InputError(
            f"training data are {type(data).__name__}; expected texts, pathlib.Path files, or rows of ids"
        )
    for one in data:
        if isinstance(one, Path):
            yield from _file(one)
        elif isinstance(one, str):
            _refuse_path(one)
            yield one
        elif isinstance(one, Mapping):
            yield _row(one, "a row of the training data")
        elif _is_id_array(one):
            yield np.asarray(one).tolist()
        else:
            raise InputError(
                f"a document is {type(one).__name__}; expected a text, a pathlib.Path, a mapping with 'text' or "
                "'input_ids', or a row of token ids"
            )


def _file(path: Path) -> Iterator[str | Iterable[int]]:
    try:
        if path.suffix != ".jsonl":
            yield path.read_text(encoding="utf-8")
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise InputError(f"{path}, line {number} is no JSON: {error}") from error
                yield _row(row, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); convert it: iconv -t utf-8 {path}") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Check the path.") from error


def _row(row: Any, where: str) -> str | Iterable[int]:
    if isinstance(row, Mapping):
        for name in ("input_ids", "text"):
            if name in row:
                found: str | Iterable[int] = row[name]
                return found
    has = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
    raise InputError(f"{where} has neither 'text' nor 'input_ids', but: {has}. Rename the column to 'text'.")


def _refuse_path(text: str) -> None:
    """Catch a path that was given as text: it would be trained on as a very short document."""
    if 0 < len(text) < _LONGEST_PATH and "\n" not in text and "\0" not in text and os.path.isfile(text):
        raise InputError(
            f"{text!r} is text, but a file has this name: to train on the file give pathlib.Path({text!r})"
        )


def _is_id_array(value: Any) -> bool:
    """Say whether a value is one row of integers."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(one, int | np.integer) for one in value)
    if isinstance(value, str | Path | Mapping) or not hasattr(value, "__array__"):
        return False
    array = np.asarray(value)
    return array.ndim == 1 and np.issubdtype(array.dtype, np.integer)


def _checked(corpus: Corpus, vocab_size: int) -> Corpus:
    if corpus.ids.size < 2:
        raise InputError(
            f"the data hold {corpus.ids.size} tokens; learning to predict the next needs at least 2"
        )
    least, most = int(corpus.ids.min()), int(corpus.ids.max())
    if least < 0 or most >= vocab_size:
        raise TokenIdError(
            f"the data hold token ids {least} .. {most}; the model knows 0 .. {vocab_size - 1}. Is this the model's "
            "own tokenizer?"
        )
    return corpus

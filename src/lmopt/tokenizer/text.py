"""A tokenizer that gives what transformers' `AutoTokenizer` gives, from its files alone."""

import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import tokenizers

from lmopt.errors import (
    ArtifactNotFoundError,
    LmoptError,
    TemplateError,
    TokenIdError,
    TokenizerError,
    UnsafeArtifactError,
)
from lmopt.safefiles import parse_json
from lmopt.tokenizer.settings import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    TEMPLATE_FOLDER,
    TOKENIZER_FILE,
    TokenizerSettings,
    read_text,
)
from lmopt.tokenizer.template import render

Result = TypeVar("Result")

_SLOW_FILES: Final = ("*.model", "vocab.txt", "vocab.json", "*.tiktoken", "tekken.json", "*.spm", "*.bpe")
_LARGEST_ID: Final = 2**32 - 1
_CLEAN_UP: Final = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class Tokenizer:
    """Turn text into token ids and back, and conversations into text.

    One object may be used from any number of threads: nothing changes the Rust tokenizer inside
    after it is built, and only changing it while it is in use raises "Already borrowed".

    Args:
        tokenizer_json: Content of a `tokenizer.json`.
        settings: What stands beside it; none of it where omitted.

    Raises:
        TokenizerError: The content is not a tokenizer.
    """

    def __init__(self, tokenizer_json: str, settings: TokenizerSettings | None = None) -> None:
        self.settings = settings or TokenizerSettings()
        self._backend = _guarded(lambda: tokenizers.Tokenizer.from_str(tokenizer_json), "load tokenizer.json")
        _guarded(self._prepare, "add the special tokens")
        self._cleans = self.settings.clean_up and (
            self.settings.clean_up_bpe or type(self._backend.model).__name__ != "BPE"
        )

    def _prepare(self) -> None:
        # Padding and truncation are the business of whoever builds batches.
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = self.settings.split_special_tokens
        self._backend.add_tokens(list(self.settings.added))

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and what stands beside it. No code of the folder runs.

        A few tokenizer classes of transformers change what `tokenizer.json` says when they load it.
        `lmopt.Model` saves the changed form, so in an artefact of lmopt both agree.

        Args:
            path: Model folder or lmopt artefact.

        Raises:
            ArtifactNotFoundError: There is no such folder.
            TokenizerError: It holds no tokenizer, only an older form of one, or a malformed one.
            UnsafeArtifactError: A file is a link out of the folder.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ArtifactNotFoundError(
                f"{folder} is not a folder; give the folder that holds tokenizer.json."
            )
        text = read_text(folder, TOKENIZER_FILE)
        if text is None:
            raise TokenizerError(_missing(folder))
        parsed = parse_json(text.encode(), str(folder / TOKENIZER_FILE))
        if not isinstance(parsed, dict):
            raise TokenizerError(f"{folder / TOKENIZER_FILE} must hold a JSON object.")
        try:
            settings = TokenizerSettings.from_folder(folder, parsed)
        except LmoptError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TokenizerError(f"{folder}: the tokenizer's settings are malformed ({error!r}).") from error
        return cls(text, settings)

    # Text ---------------------------------------------------------------------------------------

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: Any text. Special tokens written out in it are recognised, as transformers does.
            add_special_tokens: Whether to add what the model's template puts around a text, such
                as a beginning-of-sequence token.

        Raises:
            TokenizerError: The text has unpaired surrogates, or the tokenizer failed on it.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"encode takes a string, not a {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text holds an unpaired surrogate, U+{ord(text[error.start]):04X} at position "
                f"{error.start}, which is not a character. Repair it: text.encode(errors='replace').decode()"
            ) from None
        encoding = _guarded(
            lambda: self._backend.encode(text, add_special_tokens=add_special_tokens), "encode the text"
        )
        ids: list[int] = encoding.ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text.

        Args:
            ids: Token ids; those without a token (padding rows of a vocabulary) give nothing.
            skip_special_tokens: Whether to leave out special tokens.

        Raises:
            TokenIdError: An id is negative or no integer.
        """
        numbers = _token_ids(list(ids))
        text: str = _guarded(
            lambda: self._backend.decode(numbers, skip_special_tokens=skip_special_tokens), "decode the ids"
        )
        if self._cleans:
            for before, after in _CLEAN_UP:
                text = text.replace(before, after)
        return text

    # Vocabulary ---------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id. A model's own vocabulary may be padded beyond it."""
        return max(self.vocabulary().values(), default=-1) + 1

    def vocabulary(self) -> dict[str, int]:
        """Give the id of every token, special ones included, by its spelling."""
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocabulary

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary spells it, or `None` where the id has none."""
        token: str | None = self._backend.id_to_token(_token_id(token_id))
        return token

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._special("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._special("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the token that fills up a row."""
        return self._special("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the token that stands for what the vocabulary lacks."""
        return self._special("unk_token")

    def _special(self, name: str) -> int | None:
        content = self.settings.special_tokens.get(name)
        found: int | None = None if content is None else self._backend.token_to_id(content)
        return found

    # Chat ---------------------------------------------------------------------------------------

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the default chat template, `None` where there is none."""
        return self.settings.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """Write a conversation as the text that the model was trained on.

        The template comes with the model and is not trusted: it runs in Jinja's sandbox with a
        budget of time and memory.

        Args:
            messages: Such as `[{"role": "user", "content": "Hello"}]`, at least one.
            add_generation_prompt: Whether to end with the start of the model's answer.
            chat_template: Name of one of the model's templates, or the Jinja source of another.
            tools: JSON schemas of functions that the model may call.
            documents: Documents for retrieval templates.
            **variables: Further variables that the template reads.

        Returns:
            Text to encode with `add_special_tokens=False`.

        Raises:
            TemplateError: There is no template, it is malformed or unsafe, it refuses the
                messages, or it exceeds its budget.
        """
        source = self._template(chat_template, tools is not None)
        given = {**self.settings.special_tokens, **variables}
        context = {"tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        return render(source, messages, {**given, **context})

    def _template(self, wanted: str | None, has_tools: bool) -> str:
        templates = self.settings.chat_templates
        if wanted is not None:
            return templates.get(wanted, wanted)
        # With several templates transformers prefers this one as soon as there are tools.
        if has_tools and len(templates) > 1 and "tool_use" in templates:
            return templates["tool_use"]
        if "default" in templates:
            return templates["default"]
        known = f"It has templates named {', '.join(sorted(templates))}: name one. " if templates else ""
        raise TemplateError(
            f"the tokenizer has no default chat template. {known}"
            "Give one with chat_template=..., or use a plain prompt (a base model has none)."
        )

    # Files --------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and the chat templates into a folder.

        Args:
            folder: Existing folder; files of these names are replaced.

        Raises:
            UnsafeArtifactError: A template's name would lead out of the folder.
        """
        root = Path(folder)
        # Without indentation: that of a vocabulary of 49,152 takes more room than what it indents.
        (root / TOKENIZER_FILE).write_text(self._backend.to_str(), encoding="utf-8")
        config = json.dumps(self.settings.to_config(), indent=2, ensure_ascii=False, sort_keys=True)
        (root / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        for name, source in self.settings.chat_templates.items():
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                raise UnsafeArtifactError(f"a chat template is named {name!r}, which cannot be a file name.")
            target = root / (TEMPLATE_FILE if name == "default" else f"{TEMPLATE_FOLDER}/{name}.jinja")
            target.parent.mkdir(exist_ok=True)
            target.write_text(source, encoding="utf-8")


def _token_ids(values: list[int]) -> list[int]:
    """Check many ids at once: streams decode at each token, and one by one the checks cost more than the decoding."""
    try:
        numbers = list(map(operator.index, values))
    except TypeError:
        return [_token_id(one) for one in values]  # raises at the one that is wrong
    if numbers and not 0 <= min(numbers) <= max(numbers) <= _LARGEST_ID:
        return [_token_id(one) for one in values]
    return numbers


def _token_id(value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TokenIdError(f"token ids must be integers, not {type(value).__name__}.") from None
    if not 0 <= number <= _LARGEST_ID:
        raise TokenIdError(f"token id {number} is out of range; expected 0 .. vocab_size - 1.")
    return number


def _guarded(work: Callable[[], Result], what: str) -> Result:
    """Run Rust code; its panics derive from BaseException and must not end the program."""
    try:
        return work()
    except Exception as error:
        raise TokenizerError(f"could not {what}: {type(error).__name__}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(
            f"could not {what}: the tokenizers library panicked ({error}). The tokenizer file is malformed; "
            f"get a fresh copy of the model."
        ) from error


def _missing(folder: Path) -> str:
    slow = sorted({path.name for pattern in _SLOW_FILES for path in folder.glob(pattern)})
    if not slow:
        return f"{folder} has no {TOKENIZER_FILE}. Pass tokenizer=None to work with token ids only."
    return (
        f"{folder} has no {TOKENIZER_FILE}, only the older form {', '.join(slow)}. Convert it once "
        f"(needs transformers and sentencepiece):\n"
        f'  python -c "from transformers import AutoTokenizer as A; '
        f'A.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"'
    )

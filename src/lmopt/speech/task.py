"""The tokens by which a Whisper model is told what to write."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.tokenizer import Tokenizer

TASKS: Final = ("transcribe", "translate")


@dataclass(frozen=True, slots=True)
class SpeechTask:
    """What a speech model can be asked for.

    Attributes:
        start: Token that its decoder begins with.
        languages: Language code to token, such as `"en"`; empty for a model of one language.
        tasks: `"transcribe"` and `"translate"` (into English) to token; empty for a model of one language.
        no_timestamps: Token that asks for text alone; `None` where the model knows no other.
    """

    start: int
    languages: Mapping[str, int]
    tasks: Mapping[str, int]
    no_timestamps: int | None

    @classmethod
    def of(cls, start: int, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> "SpeechTask":
        """Read it off a model's tokenizer and the content of its `generation_config.json`.

        Raises:
            UnsupportedError: The model speaks several languages, but does not say by which tokens.
        """
        known = tokenizer.vocabulary()
        no_timestamps = settings.get("no_timestamps_token_id", known.get("<|notimestamps|>"))
        if not settings.get("is_multilingual", False):
            return cls(start, {}, {}, no_timestamps)
        languages = {name.strip("<|>"): token for name, token in (settings.get("lang_to_id") or {}).items()}
        tasks = dict(
            settings.get("task_to_id") or {one: known[f"<|{one}|>"] for one in TASKS if f"<|{one}|>" in known}
        )
        if not languages or not tasks:
            raise UnsupportedError(
                "the model's generation_config.json says is_multilingual, but has no lang_to_id or task_to_id. Give "
                "the tokens yourself: Runtime.generate(features, decoder_input_ids=[...])"
            )
        return cls(start, languages, tasks, no_timestamps)

    def prompt(self, language: str | None, task: str | None, *, timestamps: bool = False) -> list[int]:
        """Give what the decoder has been said to write before the text.

        Args:
            language: Code of the language that is spoken; needed by models of several.
            task: One of `TASKS`, or `None`: `"transcribe"`.
            timestamps: Whether it is to write times between the words.

        Raises:
            UnsupportedOptionError: The model has no such language or task, or no choice of them; or it writes no
                times.
        """
        if timestamps and self.no_timestamps is None:
            raise UnsupportedOptionError(
                "return_timestamps=True: the model has no token <|notimestamps|>, so it writes no times. Leave it out."
            )
        end = [] if self.no_timestamps is None or timestamps else [self.no_timestamps]
        if not self.languages:
            if language is not None or task not in (None, "transcribe"):
                raise UnsupportedOptionError(
                    f"language={language!r}, task={task!r}: this model transcribes one language. Leave them out."
                )
            return [self.start, *end]
        if language is None or language not in self.languages:
            raise UnsupportedOptionError(
                f"language {language!r} is unknown; the model knows {', '.join(sorted(self.languages))}"
            )
        if (chosen := task or TASKS[0]) not in self.tasks:
            raise UnsupportedOptionError(
                f"task {task!r} is unknown; the model knows {', '.join(sorted(self.tasks))}"
            )
        return [self.start, self.languages[language], self.tasks[chosen], *end]

"""Translation and speech recognition: thin layers on `generate`, which every runtime has."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lmopt.errors import UnsupportedError
from lmopt.generation import GenerationConfig
from lmopt.generation.config import DEFAULT_NEW_TOKENS
from lmopt.speech import LogMel, SpeechTask, read_audio
from lmopt.tokenizer import Tokenizer
from lmopt.types import FloatArray, ModelFacts

_logger = logging.getLogger(__name__)


class Applications:
    """What `lmopt.Runtime` can do with an encoder-decoder beside generating."""

    facts: ModelFacts
    _source: str
    _defaults: Mapping[str, Any]

    def translate(
        self,
        texts: str | Sequence[str],
        config: GenerationConfig | None = None,
        *,
        decoder_input_ids: Sequence[int] | None = None,
        **options: Any,
    ) -> Any:
        """Translate texts, or whatever else an encoder-decoder of text was trained to make of them.

        Args:
            texts: A text, or a list of them.
            config: As for `generate`.
            decoder_input_ids: As for `generate`; models of several languages are told which by these, or by
                `forced_bos_token_id`.
            **options: As for `generate`. Without a limit, a result may be twice as long as the longest source and 20
                tokens more; what comes to its end before it is finished is warned of.

        Returns:
            A text, or a list of them.

        Raises:
            UnsupportedError: The model has no encoder, or one that reads no text.
        """
        if self.facts.source is None or self.facts.source.kind != "ids":
            raise UnsupportedError(
                f"{self._source} has no encoder that reads text; Runtime.generate continues one"
            )
        many = not isinstance(texts, str)
        sources = [self._ids(text) for text in ([texts] if isinstance(texts, str) else texts)]
        settings = self._config(config, options)
        if settings.max_new_tokens is None and settings.max_length is None and sources:
            room = (self.facts.context_length or sys.maxsize) - len(decoder_input_ids or [0])
            longest = 2 * max(len(one) for one in sources) + DEFAULT_NEW_TOKENS
            settings = settings.with_options(max_new_tokens=min(longest, room))
        return self._texts(sources, settings, decoder_input_ids, many)

    def transcribe(
        self,
        audio: Any,
        config: GenerationConfig | None = None,
        *,
        language: str | None = None,
        task: str | None = None,
        **options: Any,
    ) -> Any:
        """Write down what is said.

        Args:
            audio: Path of a sound file, or `(samples,)` floats in -1 .. 1, 16,000 a second; or a list of either.
            config: As for `generate`.
            language: Code of the language that is spoken, such as `"en"`; `None` lets a model of several languages
                hear it for itself, clip by clip.
            task: `"transcribe"`, or `"translate"` into English, for models of several languages.
            **options: As for `generate`.

        Returns:
            A text, or a list of them.

        Raises:
            UnsupportedError: The model reads no log-mel features.
            ContextLengthError: A clip is longer than the encoder takes.
            UnsupportedOptionError: The model has no such language or task.
        """
        source = self.facts.source
        if source is None or source.kind != "features" or source.length is None:
            raise UnsupportedError(f"{self._source} has no encoder that reads log-mel features of sound")
        many = isinstance(audio, Sequence) and not isinstance(audio, str)
        hear = LogMel(source.size, source.length)
        clips = [
            hear(read_audio(one, hear.sampling_rate) if isinstance(one, str | os.PathLike) else one)
            for one in (audio if many else [audio])
        ]
        asked = SpeechTask.of(source.start_token_id, self._need_tokenizer(), self._defaults)
        spoken = [language] * len(clips)
        if language is None and asked.languages:
            spoken = self._languages(clips, asked)
        settings = self._config(config, options)
        if settings.max_new_tokens is None and settings.max_length is None:
            settings = settings.with_options(max_length=self.facts.context_length)
        return self._texts(clips, settings, [asked.prompt(one, task) for one in spoken], many)

    def _languages(self, clips: Sequence[FloatArray], asked: SpeechTask) -> list[str | None]:
        """Hear which language is spoken in each clip."""
        names, tokens = list(asked.languages), list(asked.languages.values())
        found: Any = self.logits([[asked.start]] * len(clips), sources=list(clips))
        return [names[int(one[-1, tokens].argmax())] for one in found]

    def _texts(self, sources: list[Any], config: GenerationConfig, prompts: Any, many: bool) -> Any:
        """Generate texts from sources, and warn of those that were cut off."""
        found = self.generate(sources, config, decoder_input_ids=prompts) if sources else []
        cut = [place for place, one in enumerate(found) if one.finish_reason == "length"]
        if cut:
            _logger.warning(
                "%d of %d texts reached the limit before their end, the first of source %d: pass max_new_tokens",
                len(cut), len(found), cut[0],
            )  # fmt: skip
        texts = [(one.text or "").strip() for one in found]
        return texts if many else texts[0]

    # What a runtime gives.
    def generate(self, prompt: Any, config: Any = None, **options: Any) -> Any:
        """Generate; `prompt`, `config` and options are those of `lmopt.Runtime.generate`."""
        raise NotImplementedError

    def logits(self, ids: Any, *, sources: Any = None) -> Any:
        """Compute logits; `ids` and `sources` are those of `lmopt.Runtime.logits`."""
        raise NotImplementedError

    def _config(self, config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
        raise NotImplementedError

    def _ids(self, prompt: Any) -> Any:
        raise NotImplementedError

    def _need_tokenizer(self) -> Tokenizer:
        raise NotImplementedError

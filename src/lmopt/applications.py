"""Translation and speech recognition: thin layers on `generate`, which every runtime has."""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, Literal

from lmopt.errors import UnsupportedError, UnsupportedOptionError, VocabularyMismatchError
from lmopt.generation import GenerationConfig
from lmopt.generation.config import DEFAULT_NEW_TOKENS
from lmopt.generation.fusion import Fusion
from lmopt.generation.rescoring import rescored, start_token
from lmopt.speech import LogMel, Segment, SpeechTask, read_audio, segments
from lmopt.tokenizer import Tokenizer
from lmopt.types import FloatArray, ModelFacts

_logger = logging.getLogger(__name__)

_RESCORED_BEAMS: Final = 8


@dataclass(frozen=True, slots=True)
class Opinion:
    """A language model that is asked about what a speech or translation model writes.

    Attributes:
        language_model: An `lmopt.Runtime` of a decoder, on any engine.
        weight: Factor of its log-probabilities, at least 0.
        method: `"rescore"`: it chooses among the texts that beam search has found, whatever its vocabulary is
            (8 beams where no number is given). `"fuse"`: it has a say in each token, and must have the model's
            own tokenizer.
        word_bonus: Added to the score of a text for each of its words, since a language model likes short texts;
            for `"rescore"`.
    """

    language_model: Any
    weight: float = 0.3
    method: Literal["rescore", "fuse"] = "rescore"
    word_bonus: float = 0.0


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
        opinion: Opinion | None = None,
        **options: Any,
    ) -> Any:
        """Translate texts, or whatever else an encoder-decoder of text was trained to make of them.

        Args:
            texts: A text, or a list of them.
            config: As for `generate`.
            decoder_input_ids: As for `generate`; models of several languages are told which by these, or by
                `forced_bos_token_id`.
            opinion: A language model that is asked about the results.
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
        found = [_text(one) for one in self._written(sources, settings, decoder_input_ids, opinion)]
        return found if many else found[0]

    def transcribe(
        self,
        audio: Any,
        config: GenerationConfig | None = None,
        *,
        language: str | None = None,
        task: str | None = None,
        opinion: Opinion | None = None,
        **options: Any,
    ) -> Any:
        """Write down what is said.

        Args:
            audio: Path of a sound file, or `(samples,)` floats in -1 .. 1, 16,000 a second; or a list of either. What
                is longer than the encoder takes is cut where it is quietest.
            config: As for `generate`.
            language: Code of the language that is spoken, such as `"en"`; `None` lets a model of several languages
                hear it for itself, clip by clip.
            task: `"transcribe"`, or `"translate"` into English, for models of several languages.
            opinion: A language model that is asked about the results.
            **options: As for `generate`. With `return_timestamps=True` the model writes times too, and what comes
                back tells when each stretch of text is said.

        Returns:
            A text, or with `return_timestamps` a list of `lmopt.speech.Segment`; a list of these for a list of
            sounds.

        Raises:
            UnsupportedError: The model reads no log-mel features.
            UnsupportedOptionError: The model has no such language or task, or writes no times.
        """
        source = self.facts.source
        if source is None or source.kind != "features" or source.length is None:
            raise UnsupportedError(f"{self._source} has no encoder that reads log-mel features of sound")
        many = isinstance(audio, Sequence) and not isinstance(audio, str)
        hear = LogMel(source.size, source.length)
        sounds = [
            hear.cuts(read_audio(one, hear.sampling_rate) if isinstance(one, str | os.PathLike) else one)
            for one in (audio if many else [audio])
        ]
        clips = [[hear(one) for one in pieces] for pieces in sounds]
        asked = SpeechTask.of(source.start_token_id, self._need_tokenizer(), self._defaults)
        spoken = [language] * len(clips)
        if language is None and asked.languages and clips:
            spoken = self._languages([pieces[0] for pieces in clips], asked)
        settings = self._config(config, options)
        if settings.max_new_tokens is None and settings.max_length is None:
            settings = settings.with_options(max_length=self.facts.context_length)
        timed = settings.return_timestamps
        prompts = [
            asked.prompt(one, task, timestamps=timed)
            for one, pieces in zip(spoken, clips, strict=True)
            for _ in pieces
        ]
        written = iter(self._written([one for pieces in clips for one in pieces], settings, prompts, opinion))
        found: list[Any]
        if timed:
            rate = hear.sampling_rate
            found = [
                self._segments(pieces, [next(written) for _ in pieces], settings, rate) for pieces in sounds
            ]
        else:
            texts = [[_text(one) for one in islice(written, len(pieces))] for pieces in clips]
            found = [" ".join(text for text in several if text) for several in texts]
        return found if many else found[0]

    def _segments(
        self, pieces: Sequence[Any], written: Sequence[Any], config: GenerationConfig, sampling_rate: int
    ) -> list[Segment]:
        """Put together what has been written of the pieces of one sound."""
        assert config.no_timestamps_token_id is not None
        tokenizer, found, heard = self._need_tokenizer(), list[Segment](), 0
        for piece, one in zip(pieces, written, strict=True):
            found += segments(
                one.token_ids,
                lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                first_time=config.no_timestamps_token_id + 1,
                offset_s=heard / sampling_rate,
                length_s=piece.size / sampling_rate,
            )
            heard += piece.size
        return found

    def _languages(self, clips: Sequence[FloatArray], asked: SpeechTask) -> list[str | None]:
        """Hear which language is spoken in each clip."""
        names, tokens = list(asked.languages), list(asked.languages.values())
        found: Any = self.logits([[asked.start]] * len(clips), sources=list(clips))
        return [names[int(one[-1, tokens].argmax())] for one in found]

    def _written(
        self, sources: list[Any], config: GenerationConfig, prompts: Any, opinion: Opinion | None
    ) -> list[Any]:
        """Generate texts from sources, and warn of those that were cut off."""
        found: list[Any]
        if not sources:
            found = []
        elif opinion is None:
            found = self.generate(sources, config, decoder_input_ids=prompts)
        elif opinion.method == "rescore":
            beams = config.num_beams if config.num_beams > 1 else _RESCORED_BEAMS
            wide = config.with_options(num_beams=beams, num_return_sequences=beams)
            lists = self.generate(sources, wide, decoder_input_ids=prompts)
            if config.return_timestamps:
                lists = [[self._without_times(one, config) for one in several] for several in lists]
            judged = rescored(
                lists,
                opinion.language_model,
                weight=opinion.weight,
                word_bonus=opinion.word_bonus,
                length_penalty=wide.length_penalty,
            )
            found = [one[0] for one in judged]
        else:
            found = self.generate(
                sources,
                config,
                decoder_input_ids=prompts,
                fusion=self._fusion(opinion),
            )
        cut = [place for place, one in enumerate(found) if one.finish_reason == "length"]
        if cut:
            _logger.warning(
                "%d of %d texts reached the limit before their end, the first of source %d: pass max_new_tokens",
                len(cut), len(found), cut[0],
            )  # fmt: skip
        return found

    def _without_times(self, one: Any, config: GenerationConfig) -> Any:
        """Leave the tokens of time out of the text, which a language model is to read."""
        assert config.no_timestamps_token_id is not None
        words = [token for token in one.token_ids if token <= config.no_timestamps_token_id]
        return replace(one, text=self._need_tokenizer().decode(words, skip_special_tokens=True))

    def _fusion(self, opinion: Opinion) -> Fusion:
        if opinion.method != "fuse" or opinion.word_bonus:
            raise UnsupportedOptionError(
                f"method={opinion.method!r}, word_bonus={opinion.word_bonus}; expected 'rescore', or 'fuse' without "
                "word_bonus"
            )
        theirs, start = opinion.language_model.tokenizer, start_token(opinion.language_model)
        if theirs is None or theirs.vocabulary() != self._need_tokenizer().vocabulary():
            raise VocabularyMismatchError(
                "the language model has another tokenizer: fusion adds log-probabilities token by token. Let it "
                "choose among whole texts instead: method='rescore'"
            )
        if not start:
            raise UnsupportedOptionError(
                "the language model knows no token for the beginning of a text: its generation_config.json needs "
                "bos_token_id or eos_token_id"
            )
        return Fusion(opinion.language_model.engine, opinion.weight, start[0])

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


def _text(one: Any) -> str:
    return (one.text or "").strip()

"""The tokens that ask a speech model for a language and a task."""

import json
from typing import Any

import pytest

from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.speech import SpeechTask
from lmopt.tokenizer import Tokenizer

NAMES = ["<|start|>", "<|en|>", "<|de|>", "<|transcribe|>", "<|translate|>", "<|notimestamps|>", "a"]
TOKENIZER = Tokenizer(
    json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "model": {
                "type": "WordLevel",
                "vocab": {name: number for number, name in enumerate(NAMES)},
                "unk_token": "a",
            },
        }
    )
)
SEVERAL: dict[str, Any] = {"is_multilingual": True, "lang_to_id": {"<|en|>": 1, "<|de|>": 2}}


def test_several_languages() -> None:
    task = SpeechTask.of(0, TOKENIZER, SEVERAL)
    assert task.prompt("de", None) == [0, 2, 3, 5]
    assert task.prompt("en", "translate") == [0, 1, 4, 5]
    with pytest.raises(UnsupportedOptionError, match="language 'fr' is unknown; the model knows de, en"):
        task.prompt("fr", None)
    with pytest.raises(UnsupportedOptionError, match="task 'sing' is unknown"):
        task.prompt("de", "sing")


def test_one_language() -> None:
    task = SpeechTask.of(0, TOKENIZER, {"no_timestamps_token_id": 6})
    assert task.prompt(None, None) == [0, 6]
    with pytest.raises(UnsupportedOptionError, match="transcribes one language"):
        task.prompt("en", None)


def test_a_model_that_does_not_name_its_languages_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="lang_to_id"):
        SpeechTask.of(0, TOKENIZER, {"is_multilingual": True})

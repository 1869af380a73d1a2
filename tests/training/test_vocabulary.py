"""Two tokenizers that do not agree are found before a training begins."""

import numpy as np
import pytest
import tokenizers

from lmopt import Compressor, Model
from lmopt.compression import Magnitude
from lmopt.errors import InputError, TokenizerError, UnsupportedOptionError, VocabularyMismatchError
from lmopt.testing.models import VOCAB_SIZE, tiny_llama
from lmopt.tokenizer import Tokenizer
from lmopt.tokenizer.settings import TokenizerSettings
from lmopt.training.recovering import recover
from lmopt.training.steps import Distill
from lmopt.training.vocabulary import require_same_vocabulary

CHARACTERS = [chr(code) for code in range(32, 32 + VOCAB_SIZE - 2)]


def tokenizer(
    tokens: list[str] | None = None, merges: list[tuple[str, str]] | None = None, **special: str
) -> Tokenizer:
    known = [*(tokens or CHARACTERS), "qu", "<eos>"]
    model = tokenizers.models.BPE({token: place for place, token in enumerate(known)}, merges or [])
    return Tokenizer(tokenizers.Tokenizer(model).to_str(), TokenizerSettings(special_tokens=special))


def model(known: Tokenizer | None, **options: int) -> Model:
    return Model.from_module(tiny_llama(**options), known)


def test_models_that_agree_pass() -> None:
    require_same_vocabulary(model(tokenizer()), model(tokenizer(), seed=1))
    require_same_vocabulary(model(None), model(None))
    require_same_vocabulary(model(None), model(tokenizer()))


def test_the_first_tokens_that_differ_are_named() -> None:
    other = list(CHARACTERS)
    other[3], other[7] = other[7], other[3]
    with pytest.raises(
        VocabularyMismatchError, match=r"2 ids differ \(id 3 is '#' and \"'\", id 7 is \"'\" and '#'\)"
    ):
        require_same_vocabulary(model(tokenizer()), model(tokenizer(other)))
    assert issubclass(VocabularyMismatchError, TokenizerError)


def test_other_special_tokens_are_named() -> None:
    with pytest.raises(VocabularyMismatchError, match=r"eos_token_id is 96 and 1"):
        require_same_vocabulary(model(tokenizer(eos_token="<eos>")), model(tokenizer(eos_token="!")))


def test_the_same_tokens_cut_otherwise_are_found() -> None:
    with pytest.raises(VocabularyMismatchError, match=r"is cut into"):
        require_same_vocabulary(model(tokenizer()), model(tokenizer(merges=[("q", "u")])))


def test_without_tokenizers_the_widths_must_agree() -> None:
    class Wide:
        tokenizer = None
        facts = type("Facts", (), {"vocab_size": 200})

    with pytest.raises(VocabularyMismatchError, match="the teacher knows 200 tokens, the student 97"):
        require_same_vocabulary(Wide(), model(None))  # type: ignore[arg-type]


def test_it_is_found_before_the_first_step() -> None:
    small = model(tokenizer(), seed=1)
    called: list[object] = []
    with pytest.raises(VocabularyMismatchError):
        recover(
            small, model(tokenizer(CHARACTERS[::-1])), Distill(max_steps=1),
            data=["some text " * 200], progress=called.append,
        )  # fmt: skip
    assert not called


def test_nothing_to_recover_or_to_read_is_told() -> None:
    one = model(None)
    rows = np.random.default_rng(0).integers(0, VOCAB_SIZE, 500)
    with pytest.raises(UnsupportedOptionError, match=r"Put it behind them: Compressor\(\[DropBlocks"):
        Compressor([Distill(max_steps=1)]).compress(one)
    with pytest.raises(InputError, match="no text to learn on"):
        recover(one, one, Distill(max_steps=1))
    with pytest.raises(UnsupportedOptionError, match="train_from is 2, but LlamaForCausalLM has 2 blocks"):
        recover(one, one, Distill(max_steps=1, block_size=16, train_from=2), data=rows)
    with pytest.raises(UnsupportedOptionError, match="is not quantized"):
        recover(one, one, Distill(max_steps=1, block_size=16, learn_scales=True), data=rows)
    with pytest.raises(InputError, match="calibration"):
        Compressor([Magnitude(sparsity=0.5), Distill(max_steps=1)]).compress(model(tokenizer()))

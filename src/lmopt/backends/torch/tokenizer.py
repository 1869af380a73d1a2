"""Take over a tokenizer from transformers in the state that it has after loading."""

from pathlib import Path
from typing import Any, Final

import transformers

from lmopt.errors import LmoptError, TokenizerError
from lmopt.tokenizer import Tokenizer, TokenizerSettings

_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",
    "vocab.*",
    "tekken.json",
    "*.spm",
)


def load_tokenizer(folder: Path, *, trust: bool = False) -> Tokenizer | None:
    """Load a folder's tokenizer as transformers does, and keep the result without transformers.

    Raises:
        TokenizerError: There is one, but it cannot be loaded.
    """
    if not any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)):
        return None
    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust, local_files_only=True
        )
    except LmoptError:
        raise
    except Exception as error:
        raise TokenizerError(
            f"the tokenizer of {folder} cannot be loaded: {type(error).__name__}: {error}. If it needs "
            "sentencepiece: pip install sentencepiece. To go without: remove its files from the folder."
        ) from error
    return as_tokenizer(loaded)


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """Take over a tokenizer of transformers or of the tokenizers library.

    Some classes of transformers change what their `tokenizer.json` says; what is taken over is the
    state after that, so it equals transformers' from then on.

    Raises:
        TokenizerError: It is a pure Python tokenizer, or none at all.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "to_str"):
        raise TokenizerError(
            f"a {type(tokenizer).__name__} cannot be used without its Python code; give a fast tokenizer "
            "(AutoTokenizer), a tokenizers.Tokenizer or a lmopt.Tokenizer."
        )
    if backend is tokenizer:
        return Tokenizer(backend.to_str())
    templates = tokenizer.chat_template
    if isinstance(templates, str):
        templates = {"default": templates}
    return Tokenizer(
        backend.to_str(),
        TokenizerSettings(
            special_tokens=dict(tokenizer.special_tokens_map),
            extra_special_tokens=tuple(str(one) for one in tokenizer.extra_special_tokens or ()),
            chat_templates=dict(templates or {}),
            clean_up=bool(tokenizer.clean_up_tokenization_spaces),
            clean_up_bpe=bool(
                getattr(
                    tokenizer,
                    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
                    False,
                )
            ),
            split_special_tokens=bool(tokenizer.split_special_tokens),
        ),
    )

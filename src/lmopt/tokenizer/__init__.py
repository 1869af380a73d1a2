"""Text to token ids and back, and chat templates, without torch and without transformers."""

from lmopt.tokenizer.settings import TokenizerSettings
from lmopt.tokenizer.text import Tokenizer

__all__ = ["Tokenizer", "TokenizerSettings"]

"""From logits to text, once for every engine."""

from lmopt.generation.config import GenerationConfig
from lmopt.generation.loop import generate
from lmopt.generation.prefixes import PrefixReport, PrefixStore
from lmopt.generation.results import Generation, Token
from lmopt.generation.scoring import score
from lmopt.generation.streaming import stream
from lmopt.generation.workspace import Limits, Workspace

__all__ = [
    "Generation",
    "GenerationConfig",
    "Limits",
    "PrefixReport",
    "PrefixStore",
    "Token",
    "Workspace",
    "generate",
    "score",
    "stream",
]

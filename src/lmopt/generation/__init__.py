"""From logits to text, once for every engine."""

from lmopt.generation.config import GenerationConfig
from lmopt.generation.loop import generate
from lmopt.generation.results import Generation, Token
from lmopt.generation.scoring import score
from lmopt.generation.streaming import stream

__all__ = ["Generation", "GenerationConfig", "Token", "generate", "score", "stream"]

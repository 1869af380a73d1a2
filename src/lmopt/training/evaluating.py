"""Perplexity of held-out text while training, by the code that measures every engine."""

from typing import Final

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lmopt.contracts import Engine, EngineRequest
from lmopt.evaluation import Perplexity, perplexity
from lmopt.registry import backends
from lmopt.training.data import Corpus
from lmopt.types import ModelFacts

_LOGITS: Final = 1 << 24
"""Logits of one forward: 64 MiB in float32."""


class HeldOut:
    """A text that is not trained on.

    Args:
        module: The live module.
        facts: Its facts.
        corpus: The text.
        context: Tokens of a window; windows do not overlap.
    """

    def __init__(self, module: nn.Module, facts: ModelFacts, corpus: Corpus, context: int) -> None:
        self._module, self._facts, self._ids, self._context = module, facts, corpus.ids, context
        self._engine: Engine | None = None

    def measure(self) -> Perplexity:
        """Measure the module as it is now; leaves it in training mode."""
        self._module.eval()
        try:
            if self._engine is None:
                device = next(self._module.parameters()).device
                self._engine = backends.load("torch")(
                    EngineRequest(
                        facts=self._facts,
                        module=self._module,
                        device=str(device),
                        threads=torch.get_num_threads(),
                    )
                )
            batch = max(1, min(32, _LOGITS // (self._context * self._facts.vocab_size)))
            return perplexity(
                self._engine, self._ids.tolist(), context=self._context, stride=self._context, batch=batch
            )
        finally:
            if isinstance(self._module, FSDPModule):
                # A forward leaves the outermost weights gathered, for a backward that does not come.
                self._module.reshard()
            self._module.train()

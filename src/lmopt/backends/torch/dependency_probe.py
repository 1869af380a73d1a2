"""Run a model whose linears give noise, to see what depends on what.

A copy of the model that shares its weights is run on a few tokens with every linear replaced by noise of
its size, at no cost. What a linear reads is then a function of the noise of those linears only that feed it
directly: gradients follow it back, other noise forward.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from lmopt.backends.torch.calibration import Reading
from lmopt.backends.torch.compressing import shallow_copy
from lmopt.backends.torch.encoder_decoder import trial_inputs
from lmopt.backends.torch.language_model import device_of
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.backends.torch.quantizing import find_weights, matrix_of
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.types import SourceFacts

_ROWS: Final = 4
_TOKENS: Final = 8


class Probe:
    """A model whose linears give noise instead of products.

    Args:
        module: The model.
        vocab_size: Width of its logits.
        source: What its encoder reads, `None` where it has none.

    Raises:
        UnsupportedOptionError: Its weights are quantized.
    """

    def __init__(self, module: nn.Module, vocab_size: int, source: SourceFacts | None = None) -> None:
        if quantized_parts(module):
            raise UnsupportedOptionError(
                f"{type(module).__name__} has quantized weights, whose rows and columns are packed; prune first and "
                "quantize then: Compressor([PruneChannels(...), Quantize(...)])"
            )
        self._twin: Any = shallow_copy(module).eval()
        self.device = device_of(module)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab_size, (_ROWS, _TOKENS), generator=generator).to(self.device)
        self._reading = Reading(ids, trial_inputs(module, source, _ROWS))
        self._generator = generator
        self.noise: dict[str, Tensor] = {}
        self._offsets: Mapping[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}
        weights = find_weights(module, vocab_size)
        # A weight that others share cannot be cut for one of them.
        self._tied = {path for one in weights if one.tied is not None for path in (one.path, one.tied)}
        for weight in weights:
            if weight.part != "embedding":
                part: Any = self._twin.get_submodule(weight.path)
                part.forward = self._stub(weight.path, part)
        with torch.enable_grad():
            self.inputs = self._run({})
        with torch.no_grad():
            self._plain = self._run({})

    def _stub(self, path: str, part: nn.Module) -> Callable[[Tensor], Tensor]:
        outputs = matrix_of(part).shape[0]
        dtype = matrix_of(part).dtype

        def forward(x: Tensor) -> Tensor:
            if path in self._seen:
                raise UnsupportedError(
                    f"{path} is run more than once in a pass, so nothing can be cut out of it"
                )
            self._seen[path] = x
            shape = (*x.shape[:-1], outputs)
            if path not in self.noise:
                drawn = torch.randn(shape, generator=self._generator).to(self.device, dtype)
                self.noise[path] = drawn.requires_grad_()
            noise = self.noise[path]
            return noise if path not in self._offsets else noise + self._offsets[path]

        return forward

    def _run(self, offsets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the copy; give what each linear reads, in order, and the logits under an empty path."""
        self._offsets, self._seen = offsets, {}
        logits = self._reading.logits(self._twin)
        return {**self._seen, "": logits}

    def draw(self, *shape: int) -> Tensor:
        """Draw normal numbers."""
        return torch.randn(shape, generator=self._generator).to(self.device)

    def pull(self, seeds: Mapping[str, Tensor], sources: Iterable[str]) -> dict[str, Tensor]:
        """Follow weighted inputs back: gradients of their sum by the noise of `sources`, where there are any."""
        known = {path: seed for path, seed in seeds.items() if self.inputs[path].requires_grad}
        paths = list(sources)
        if not known or not paths:
            return {}
        found = torch.autograd.grad(
            [self.inputs[path] for path in known],
            [self.noise[path] for path in paths],
            [seed.expand_as(self.inputs[path]).to(self.inputs[path].dtype) for path, seed in known.items()],
            retain_graph=True,
            allow_unused=True,
        )
        return {path: one for path, one in zip(paths, found, strict=True) if one is not None}

    def reached(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Follow rows forward: `(in,)` bool of each linear, the inputs that change with the noise in them."""
        with torch.no_grad():
            after = self._run(
                {path: self.draw(*self.noise[path].shape) * mask for path, mask in rows.items()}
            )
        return {path: (one != self._plain[path]).flatten(0, -2).any(0) for path, one in after.items()}

    def closed(self) -> dict[str, dict[str, bool]]:
        """Find linears whose feeding linears feed nothing else.

        Returns:
            By path, the paths of the feeding linears, and whether they reach it from other tokens too.
        """
        feeds: dict[str, dict[str, bool]] = {}
        readers: dict[str, set[str]] = {}
        before: list[str] = []
        for path, x in self.inputs.items():
            seed = torch.zeros(x.shape, device=self.device)
            seed[..., -1, :] = self.draw(*x.shape)[..., -1, :]
            for source, gradient in self.pull({path: seed}, before).items():
                if bool((gradient != 0).any()):
                    feeds.setdefault(path, {})[source] = bool((gradient[..., :-1, :] != 0).any())
                    readers.setdefault(source, set()).add(path)
            before.append(path)
        return {
            path: sources
            for path, sources in feeds.items()
            if path
            and not self._tied & {path, *sources}
            and all(readers[source] == {path} for source in sources)
        }

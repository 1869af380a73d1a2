"""What a check is given: one engine that can be opened, and the truth about its model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from lmopt.contracts import ArtifactView, Engine, EngineFactory, EngineRequest
from lmopt.registry import backends
from lmopt.spec import BackendSpec
from lmopt.testing.sourced import SourcedEngine
from lmopt.types import AnyArray, FloatArray, ModelFacts

Reference = Callable[..., FloatArray]
"""Takes `(sequence,)` ids, and for encoder-decoders a source (`None` for that of `SOURCE_SEED`); gives
`(sequence, vocab)` float32 logits of eager PyTorch in float32."""

SOURCE_SEED: Final = 7
"""Seed of the source that rows of an encoder-decoder begin with, where a rule knows of no sources."""
SOURCE_LENGTH: Final = 7


@dataclass(frozen=True, slots=True)
class Subject:
    """A model in one format, and the truth about it.

    Attributes:
        name: Name of the model, for people.
        format: Format that the engine is to read.
        facts: Facts of the model.
        reference: Full forward pass over one unpadded row, no cache.
        artifact: Files of the model, `None` for the format `"module"`.
        module: Live `torch.nn.Module` for the format `"module"`.
    """

    name: str
    format: str
    facts: ModelFacts
    reference: Reference
    artifact: ArtifactView | None = None
    module: Any | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One combination that a backend declares: a model in a format, on a device, in a compute type.

    Attributes:
        backend: Name of the backend.
        subject: Model that it is to run.
        device: Declared device.
        dtype: Declared compute type.
        options: Options that every engine of the case is opened with.
        shared: The engine that checks share, if one is open.
        known: What has been looked up of the backend; to find a plug-in, the metadata of every installed
            distribution are read.
    """

    backend: str
    subject: Subject
    device: str = "cpu"
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    shared: list[Engine] = field(default_factory=list, repr=False, compare=False)
    known: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def spec(self) -> BackendSpec:
        """Spec of the backend."""
        if "spec" not in self.known:
            self.known["spec"] = backends.spec(self.backend)
        spec: BackendSpec = self.known["spec"]
        return spec

    @property
    def factory(self) -> EngineFactory:
        """What opens engines of the backend."""
        if "factory" not in self.known:
            self.known["factory"] = backends.load(self.backend)
        factory: EngineFactory = self.known["factory"]
        return factory

    def open(
        self,
        *,
        subject: Subject | None = None,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Engine:
        """Open an engine; each argument replaces what the case says.

        Without `threads` it gets one thread, where the backend can be told: on models this small
        a pool of threads costs more than it brings.
        """
        subject = subject or self.subject
        features = self.spec.can.features
        if threads is None and "threads" in features:
            threads = 1
        if options is None:
            # The kit wrote the files itself, so it may trust them.
            options = {**({"trust": True} if "trust" in features else {}), **self.options}
        request = EngineRequest(
            facts=subject.facts,
            artifact=subject.artifact,
            module=subject.module,
            device=device or self.device,
            dtype=dtype or self.dtype,
            threads=threads,
            options=options,
        )
        engine = self.factory(request)
        if subject.facts.source is not None:
            return SourcedEngine(engine, draw_source(subject.facts, SOURCE_LENGTH, seed=SOURCE_SEED))
        return engine

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Give the engine that the checks of a case share, opened as the case says.

        Opening takes most of the time of most checks. An engine on which a check fails is closed, and the next
        check gets a new one.
        """
        if not self.shared:
            self.shared.append(self.open())
        try:
            yield self.shared[0]
        except BaseException:
            close_shared(self.shared)
            raise


def close_shared(shared: list[Engine]) -> None:
    """Close the engine that the checks of a case have shared, if one is open."""
    while shared:
        shared.pop().close()


def draw_source(facts: ModelFacts, length: int, *, seed: int) -> AnyArray:
    """Draw a source of an encoder-decoder.

    Args:
        facts: Facts of the model.
        length: Positions, where the encoder does not take one length only.
        seed: Seed of the random numbers.
    """
    assert facts.source is not None
    random = np.random.default_rng(seed)
    if facts.source.kind == "ids":
        return random.integers(0, facts.source.size, length)
    positions = facts.source.length if facts.source.fixed and facts.source.length else length
    return random.normal(size=(facts.source.size, positions)).astype(np.float32)

"""What a check is given: one engine that can be opened, and the truth about its model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmopt.contracts import ArtifactView, Engine, EngineRequest
from lmopt.registry import backends
from lmopt.spec import BackendSpec
from lmopt.types import FloatArray, IntArray, ModelFacts

Reference = Callable[[IntArray], FloatArray]
"""Takes `(sequence,)` ids; gives `(sequence, vocab)` float32 logits of eager PyTorch in float32."""


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
    """

    backend: str
    subject: Subject
    device: str = "cpu"
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> BackendSpec:
        """Spec of the backend."""
        return backends.spec(self.backend)

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
        engine: Engine = backends.load(self.backend)(request)
        return engine

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """Open an engine as the case says, and close it."""
        engine = self.open()
        try:
            yield engine
        finally:
            engine.close()

"""What a plug-in says of itself before anything heavy is imported.

An entry point of the group `lmopt.backends`, `lmopt.exporters` or `lmopt.compressors` names a `BackendSpec`,
an `ExporterSpec` or a `StepSpec`. The module that holds it may import the standard library and `lmopt.spec`
only; what is behind it is a string that lmopt resolves when, and only when, the plug-in is asked for.
"""

import importlib.util
import sys
from dataclasses import dataclass
from typing import Final

from lmopt.errors import UnsupportedError

API_VERSION: Final = 1
"""Version of the contracts in `lmopt.contracts`; a spec states the one that it was written for."""


@dataclass(frozen=True, slots=True)
class Requirement:
    """A module that must be importable, and the pip argument that brings it.

    Attributes:
        module: Top-level import name, such as `"onnxruntime"`.
        install: What to hand to pip, such as `"lmopt[onnxruntime]"`.
        instead: Other modules that serve as well, for what comes under several names.
    """

    module: str
    install: str
    instead: tuple[str, ...] = ()

    def is_met(self) -> bool:
        """Say whether the module, or one that serves as well, can be found; none is imported."""
        return any(_is_there(name) for name in (self.module, *self.instead))


def _is_there(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return importlib.util.find_spec(module) is not None


@dataclass(frozen=True, slots=True)
class Support:
    """Answer to "can you do this?": yes, or every reason why not."""

    ok: bool
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend can run, as data that is readable without importing it.

    Attributes:
        formats: Artefact formats it opens: `"onnx"`, `"safetensors"`, ...; `"module"` means a live
            `torch.nn.Module`, which the runtime loads for it.
        devices: Device names: `"cpu"`, `"cuda"`, ...; `"cuda:1"` is covered by `"cuda"`.
        dtypes: Compute types it can honour.
        features: Optional abilities; each is a Protocol in `lmopt.contracts` or a word that the
            conformance kit tests: `"taps"` (intermediate values), `"threads"` (a thread count),
            `"trust"` (a format that runs code, opened only with the option `trust=True`), `"encoder"`
            (encoder-decoder models).
    """

    formats: tuple[str, ...]
    devices: tuple[str, ...] = ("cpu",)
    dtypes: tuple[str, ...] = ("float32",)
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """A backend as lmopt sees it before its engine is imported.

    Attributes:
        name: Lowercase, no version: `"onnxruntime"`. Equals the entry point's name.
        engine: `"module:attribute"` of an `EngineFactory` (see `lmopt.contracts`).
        can: Declared capabilities; the conformance kit proves them.
        requires: Modules that must be there.
        api: `API_VERSION` that the plug-in was written for.
        description: One line for `lmopt backends`.
    """

    name: str
    engine: str
    can: Capabilities
    requires: tuple[Requirement, ...] = ()
    api: int = API_VERSION
    description: str = ""

    @property
    def entry(self) -> str:
        """What the registry loads."""
        return self.engine

    def require(self, *, device: str, dtype: str) -> None:
        """Refuse a device or compute type that is not declared; engines call this first.

        Raises:
            UnsupportedError: With every reason.
        """
        support = self.supports(formats=self.can.formats, device=device, dtype=dtype)
        if not support.ok:
            raise UnsupportedError(f"backend {self.name!r} cannot do this: {'; '.join(support.reasons)}")

    def supports(self, *, formats: tuple[str, ...], device: str, dtype: str) -> Support:
        """Say whether an artefact can run, with every reason against it.

        Args:
            formats: Formats that the artefact holds.
            device: Requested device, with or without an index.
            dtype: Requested compute type, or `"auto"`.

        Returns:
            `Support(True)`, or `Support(False, reasons)`.
        """
        reasons = []
        if not set(formats) & set(self.can.formats):
            reasons.append(f"it reads {', '.join(self.can.formats)}; given: {', '.join(formats) or 'none'}")
        kind, colon, index = device.partition(":")
        if kind not in self.can.devices or (colon and not index.isdecimal()):
            reasons.append(f"it runs on {', '.join(self.can.devices)}; asked for: {device}")
        if dtype != "auto" and dtype not in self.can.dtypes:
            reasons.append(f"it computes in {', '.join(self.can.dtypes)}; asked for: {dtype}")
        return Support(not reasons, tuple(reasons))


@dataclass(frozen=True, slots=True)
class ExporterSpec:
    """An exporter as lmopt sees it before anything heavy is imported.

    Attributes:
        name: What the user writes: `Exporter("onnx")`.
        export: `"module:attribute"` of an `ExportFunction` (see `lmopt.contracts`).
        format: Artefact format that it writes, which `Capabilities.formats` of a backend names.
        targets: Dialects it knows; the first is the default.
        verify_with: Backend whose engine the parity gate runs the result on.
        verify_widened: Types that this engine lacks and computes in float32 where it is told to, by its option
            `widen=True`: the gate then compares in float32.
        requires: Modules that must be there.
        api: `API_VERSION` that the plug-in was written for.
        description: One line for people.
    """

    name: str
    export: str
    format: str
    targets: tuple[str, ...] = ("portable",)
    verify_with: str = ""
    verify_widened: tuple[str, ...] = ()
    requires: tuple[Requirement, ...] = ()
    api: int = API_VERSION
    description: str = ""

    @property
    def entry(self) -> str:
        """What the registry loads."""
        return self.export


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step of a compression recipe as lmopt sees it before anything heavy is imported.

    Attributes:
        name: What a recipe writes: `{"step": "gptq", ...}`.
        step: `"module:attribute"` of a class that is a `lmopt.compression.step.Step`.
        requires: Modules that must be there.
        api: `API_VERSION` that the plug-in was written for.
        description: One line for people.
    """

    name: str
    step: str
    requires: tuple[Requirement, ...] = ()
    api: int = API_VERSION
    description: str = ""

    @property
    def entry(self) -> str:
        """What the registry loads."""
        return self.step

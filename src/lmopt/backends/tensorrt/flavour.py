"""Find the TensorRT that is installed: the standard one, or the one for RTX cards.

Both have one API as far as lmopt uses it (`tests/backends/tensorrt/test_contract.py` holds every name
against the live bindings), so the module itself is a parameter of all that follows.
"""

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from typing import Any, Final

from lmopt.errors import BrokenPluginError, NotInstalledError, UnsupportedOptionError
from lmopt.registry import pip_line

AUTO: Final = "auto"
MODULES: Final[dict[str, tuple[str, ...]]] = {
    "tensorrt": ("tensorrt",),
    # The name without `_bindings` comes with an sdist only; the wheels have the other.
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
"""Import names of each flavour, the usual one first; `"auto"` tries the flavours in this order."""
_EXTRAS: Final = {"tensorrt": '"lmopt[tensorrt]"', "tensorrt_rtx": '"lmopt[tensorrt-rtx]"'}


@dataclass(frozen=True, slots=True)
class Flavour:
    """One TensorRT that could be imported.

    Attributes:
        name: `"tensorrt"` or `"tensorrt_rtx"`.
        module: The live module, which NVIDIA's examples call `trt`.
        version: Full version, such as `"1.7.1.116"`: a plan is loaded by the very same one only.
    """

    name: str
    module: Any
    version: str

    @property
    def has_targets(self) -> bool:
        """Whether it builds for named compute capabilities, which need no GPU: RTX does."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def has_timing_cache(self) -> bool:
        """Whether its builder times kernels, and can keep what it found: the standard one does."""
        return not self.has_targets

    @property
    def targets(self) -> tuple[str, ...]:
        """Compute capabilities that it can name, such as `"8.9"`; empty for the standard one."""
        if not self.has_targets:
            return ()
        names = (one.removeprefix("SM") for one in dir(self.module.ComputeCapability) if one.startswith("SM"))
        return tuple(f"{one[:-1]}.{one[-1]}" for one in sorted(names, key=int))


@dataclass(frozen=True, slots=True)
class FlavourStatus:
    """What `examine` found of one flavour.

    Attributes:
        name: `"tensorrt"` or `"tensorrt_rtx"`.
        module: Import name that was found, `""` where there is none.
        version: Version, `""` where it cannot be imported.
        problem: Why it cannot be used for building, `""` where it can.
    """

    name: str
    module: str
    version: str
    problem: str


def load(name: str = AUTO) -> Flavour:
    """Import a flavour.

    Args:
        name: `"tensorrt"`, `"tensorrt_rtx"`, or `"auto"`: the first of these that can be imported.

    Raises:
        UnsupportedOptionError: There is no such flavour.
        NotInstalledError: It is not installed; the message has the pip line.
        BrokenPluginError: It is installed, but cannot be imported: a library is missing. Its words are kept.
    """
    if name != AUTO and name not in MODULES:
        raise UnsupportedOptionError(f"flavour is {name!r}; expected {AUTO}, {' or '.join(MODULES)}")
    wanted = MODULES if name == AUTO else {name: MODULES[name]}
    broken: dict[str, Exception] = {}
    for flavour in wanted:
        found = _import(flavour)
        if isinstance(found, Flavour):
            return found
        if found is not None:
            broken[flavour] = found
    if broken:
        words = "; ".join(f"{one}: {type(error).__name__}: {error}" for one, error in broken.items())
        repair = pip_line("--force-reinstall " + _EXTRAS[next(iter(broken))])
        raise BrokenPluginError(
            f"TensorRT is installed but cannot be imported ({words}). A library of it, or of CUDA, is missing or "
            f"has another version. Repair it: {repair}"
        ) from next(iter(broken.values()))
    lines = "\n".join(f"  {one + ':':<14}{pip_line(_EXTRAS[one])}" for one in wanted)
    raise NotInstalledError(f"{' and '.join(wanted)} cannot be found. Install one:\n{lines}")


def examine() -> list[FlavourStatus]:
    """Try to import every flavour, for `lmopt doctor`; raises nothing."""
    found = []
    for name in MODULES:
        result = _import(name)
        module = next((one for one in MODULES[name] if _find(one)), "")
        if isinstance(result, Flavour):
            found.append(FlavourStatus(name, result.module.__name__, result.version, ""))
        elif result is None:
            found.append(FlavourStatus(name, module, "", "not installed"))
        else:
            found.append(FlavourStatus(name, module, "", f"{type(result).__name__}: {result}"))
    return found


def _import(name: str) -> Flavour | Exception | None:
    """Import a flavour under any of its names; the error of the first that is there but broken."""
    first: Exception | None = None
    for candidate in MODULES[name]:
        if not _find(candidate):
            continue
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError) as error:
            # A missing library shows as a plain ImportError, whose words name the library.
            first = first or error
            continue
        if not hasattr(module, "Builder"):
            first = first or ImportError(f"{candidate} has no Builder: it runs engines, but builds none")
            continue
        return Flavour(name, module, _version(module))
    return first


def _find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(module: Any) -> str:
    """Full version; the distribution's where it says more than the module (a fourth number)."""
    stated = str(module.__version__)
    versions = [version(owner) for owner in _owners(module.__name__)]
    return max([stated, *(one for one in versions if one.startswith(stated))], key=len)


@functools.cache
def _owners(module: str) -> tuple[str, ...]:
    """Distributions that a module comes with; a look at all that is installed, which takes up to a second."""
    return tuple(packages_distributions().get(module, ()))

"""What a TensorRT engine says of itself."""

from importlib.metadata import packages_distributions, version
from typing import Any, Final

from lmopt.accelerators import CudaDevice
from lmopt.backends.tensorrt.building import Plan
from lmopt.contracts import EngineReport

_MODULES: Final = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}


def report_of(plan: Plan, device: CudaDevice, **details: Any) -> EngineReport:
    """Put what is known of a plan and its device into a report.

    Args:
        plan: As built or found.
        device: Where it runs.
        details: More.
    """
    return EngineReport(
        backend="tensorrt",
        device=f"cuda:{device.index}",
        dtype=plan.compute_type,
        threads=0,
        versions=_versions(plan.flavour),
        details={
            "gpu": device.name,
            "compute_capability": device.compute_capability,
            "flavour": plan.flavour,
            "flavour_version": plan.version,
            "types": dict(plan.types),
            "profiles": [
                {"name": one.name, "batch": one.batch, "sequence": one.sequence, "past": one.past}
                for one in plan.profiles
            ],
            "plan": {"bytes": len(plan.data), "from_cache": plan.from_cache, "build_seconds": plan.seconds},
            **details,
        },
    )


def _versions(flavour: str) -> dict[str, str]:
    owners = packages_distributions()
    names = [name for module in (*_MODULES[flavour], "cuda") for name in owners.get(module, ())]
    return {name: version(name) for name in dict.fromkeys(names)}

"""lmopt takes a trained language model to its fastest trustworthy deployment.

The public names are loaded on first use, so `import lmopt` stays quick and imports no engine.
"""

import importlib
import os
from typing import TYPE_CHECKING

# ONNX Runtime reports usage by default since 1.29 and reads this once, before its first import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from lmopt.artifact import Artifact as Artifact
    from lmopt.compressor import Compressor as Compressor
    from lmopt.errors import LmoptError as LmoptError
    from lmopt.errors import ParityError as ParityError
    from lmopt.exporter import Exporter as Exporter
    from lmopt.generation import GenerationConfig as GenerationConfig
    from lmopt.model import Model as Model
    from lmopt.runtime import Runtime as Runtime
    from lmopt.scaling import BatchResult as BatchResult
    from lmopt.scaling import batch as batch
    from lmopt.tokenizer import Tokenizer as Tokenizer
    from lmopt.training import TrainingConfig as TrainingConfig
    from lmopt.training import train as train
    from lmopt.tuning import Constraints as Constraints
    from lmopt.tuning import TuneResult as TuneResult
    from lmopt.tuning import recommend as recommend
    from lmopt.tuning import tune as tune

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "lmopt.artifact",
    "BatchResult": "lmopt.scaling",
    "Compressor": "lmopt.compressor",
    "Constraints": "lmopt.tuning",
    "Exporter": "lmopt.exporter",
    "GenerationConfig": "lmopt.generation",
    "LmoptError": "lmopt.errors",
    "Model": "lmopt.model",
    "ParityError": "lmopt.errors",
    "Runtime": "lmopt.runtime",
    "Tokenizer": "lmopt.tokenizer",
    "TrainingConfig": "lmopt.training",
    "TuneResult": "lmopt.tuning",
    "batch": "lmopt.scaling",
    "recommend": "lmopt.tuning",
    "train": "lmopt.training",
    "tune": "lmopt.tuning",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    """Import the home of a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmopt' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names for completion."""
    return __all__

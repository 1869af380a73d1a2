"""All operators by their ONNX name. Each takes its inputs in order and its attributes by name."""

from collections.abc import Callable
from typing import Any

from lmopt_numpy.arithmetic import ARITHMETIC
from lmopt_numpy.networks import NETWORKS
from lmopt_numpy.shaping import SHAPING

OPERATORS: dict[str, Callable[..., Any]] = {**ARITHMETIC, **SHAPING, **NETWORKS}

"""Measures of quality, parity, speed and memory."""

from lmopt.evaluation.bisect import Divergence, locate
from lmopt.evaluation.divergence import DifferenceMeter, LogitsDifference, compare_logits, log_softmax
from lmopt.evaluation.memory import (
    PeakMemory,
    folder_size_bytes,
    peak_memory_bytes,
    reset_peak,
    resident_memory_bytes,
)
from lmopt.evaluation.parity import (
    Examination,
    Reference,
    engine_reference,
    engine_rounding,
    measure,
    require,
)
from lmopt.evaluation.perplexity import Perplexity, perplexity
from lmopt.evaluation.report import CaseResult, ParityReport
from lmopt.evaluation.speed import Figure, Lap, Speed, compare_speed, measure_speed, run_lap
from lmopt.evaluation.tolerances import TOLERANCES, Tolerance, tolerance_for

__all__ = [
    "TOLERANCES",
    "CaseResult",
    "DifferenceMeter",
    "Divergence",
    "Examination",
    "Figure",
    "Lap",
    "LogitsDifference",
    "ParityReport",
    "PeakMemory",
    "Perplexity",
    "Reference",
    "Speed",
    "Tolerance",
    "compare_logits",
    "compare_speed",
    "engine_reference",
    "engine_rounding",
    "folder_size_bytes",
    "locate",
    "log_softmax",
    "measure",
    "measure_speed",
    "peak_memory_bytes",
    "perplexity",
    "require",
    "reset_peak",
    "resident_memory_bytes",
    "run_lap",
    "tolerance_for",
]

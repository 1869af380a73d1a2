"""Steps that make a model smaller: one file a method, frozen dataclasses with the method's own knobs.

Nothing here needs torch: a method works on NumPy matrices. `lmopt.Compressor` applies steps to a model.
"""

from lmopt.compression.round_to_nearest import Quantize

__all__ = ["Quantize"]

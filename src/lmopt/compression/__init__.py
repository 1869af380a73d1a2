"""Steps that make a model smaller: one file a method, frozen dataclasses with the method's own knobs.

Nothing here needs torch: a method works on NumPy matrices. `lmopt.Compressor` applies steps to a model.
"""

from lmopt.compression.awq import AWQ
from lmopt.compression.calibration import Calibration
from lmopt.compression.cast import Cast
from lmopt.compression.channels import PruneChannels
from lmopt.compression.depth import DropBlocks
from lmopt.compression.gptq import GPTQ
from lmopt.compression.heads import PruneHeads
from lmopt.compression.hessian import DampedWarning
from lmopt.compression.hqq import HQQ
from lmopt.compression.magnitude import Magnitude
from lmopt.compression.mixed import Mixed
from lmopt.compression.recipe import load_recipe, save_recipe
from lmopt.compression.round_to_nearest import Quantize
from lmopt.compression.smoothquant import SmoothQuant
from lmopt.compression.sparsegpt import SparseGPT
from lmopt.compression.step import UnknownModuleWarning
from lmopt.compression.wanda import Wanda

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "Calibration",
    "Cast",
    "DampedWarning",
    "DropBlocks",
    "Magnitude",
    "Mixed",
    "PruneChannels",
    "PruneHeads",
    "Quantize",
    "SmoothQuant",
    "SparseGPT",
    "UnknownModuleWarning",
    "Wanda",
    "load_recipe",
    "save_recipe",
]

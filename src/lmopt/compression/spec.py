"""The steps that come with lmopt, as its entry points name them; imports nothing heavy."""

from typing import Final

from lmopt.spec import StepSpec

RTN: Final = StepSpec("rtn", "lmopt.compression:Quantize", description="weights rounded to the nearest code")
GPTQ: Final = StepSpec(
    "gptq", "lmopt.compression:GPTQ", description="codes chosen column by column, each making up for the last"
)
AWQ: Final = StepSpec(
    "awq", "lmopt.compression:AWQ", description="inputs scaled so that the columns that matter round finely"
)
HQQ: Final = StepSpec(
    "hqq", "lmopt.compression:HQQ", description="zeros by half-quadratic optimisation, without texts"
)
SMOOTHQUANT: Final = StepSpec(
    "smoothquant", "lmopt.compression:SmoothQuant", description="outliers moved from activations to weights"
)
MIXED: Final = StepSpec(
    "mixed", "lmopt.compression:Mixed", description="a width for each weight, under a budget of bits"
)
MAGNITUDE: Final = StepSpec(
    "magnitude", "lmopt.compression:Magnitude", description="small weights set to zero"
)
WANDA: Final = StepSpec(
    "wanda", "lmopt.compression:Wanda", description="weights zeroed by magnitude times input norm"
)
SPARSEGPT: Final = StepSpec(
    "sparsegpt", "lmopt.compression:SparseGPT", description="weights zeroed, the others make up for it"
)
CHANNELS: Final = StepSpec(
    "prune_channels", "lmopt.compression:PruneChannels", description="fewer channels in the MLPs"
)
HEADS: Final = StepSpec("prune_heads", "lmopt.compression:PruneHeads", description="fewer attention heads")
CAST: Final = StepSpec("cast", "lmopt.compression:Cast", description="16 bits, float32 where ranges need it")
BLOCKS: Final = StepSpec("drop_blocks", "lmopt.compression:DropBlocks", description="fewer blocks")

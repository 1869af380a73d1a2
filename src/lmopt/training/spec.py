"""The steps of recipes that train, as their entry points name them; imports nothing heavy."""

from typing import Final

from lmopt.spec import Requirement, StepSpec

DISTILL: Final = StepSpec(
    "distill",
    "lmopt.training.steps:Distill",
    requires=(Requirement("accelerate", "lmopt[torch]"),),
    description="recovers towards the original model by distillation",
)

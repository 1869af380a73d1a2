"""Train a language model: maximum likelihood by default, any `Loss` on the same loop.

Public names are loaded on first use, so that importing this package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmopt.training.config import TrainingConfig as TrainingConfig
    from lmopt.training.data import Corpus as Corpus
    from lmopt.training.data import read_corpus as read_corpus
    from lmopt.training.distillation import Distillation as Distillation
    from lmopt.training.entrance import train as train
    from lmopt.training.hidden_states import HiddenStates as HiddenStates
    from lmopt.training.objective import Batch as Batch
    from lmopt.training.objective import Loss as Loss
    from lmopt.training.objective import LossValue as LossValue
    from lmopt.training.objective import NextToken as NextToken
    from lmopt.training.objective import Outputs as Outputs
    from lmopt.training.on_policy import OnPolicy as OnPolicy
    from lmopt.training.recovering import recover as recover
    from lmopt.training.result import Evaluation as Evaluation
    from lmopt.training.result import TrainingProgress as TrainingProgress
    from lmopt.training.result import TrainingResult as TrainingResult
    from lmopt.training.steps import Distill as Distill
    from lmopt.training.teacher_cache import TeacherCache as TeacherCache
    from lmopt.training.teacher_cache_building import build_teacher_cache as build_teacher_cache
    from lmopt.training.teachers import LiveTeacher as LiveTeacher

_HOMES = {
    "recover": "recovering",
    "build_teacher_cache": "teacher_cache_building",
    "TeacherCache": "teacher_cache",
    "OnPolicy": "on_policy",
    "LiveTeacher": "teachers",
    "HiddenStates": "hidden_states",
    "Distillation": "distillation",
    "Distill": "steps",
    "Batch": "objective",
    "Corpus": "data",
    "Evaluation": "result",
    "Loss": "objective",
    "LossValue": "objective",
    "NextToken": "objective",
    "Outputs": "objective",
    "TrainingConfig": "config",
    "TrainingProgress": "result",
    "TrainingResult": "result",
    "read_corpus": "data",
    "train": "entrance",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    """Import the home of a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lmopt.training' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"lmopt.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names for completion."""
    return __all__

"""Find the best deployment of a model on this machine by measuring, and show it; or say beforehand what to try."""

from lmopt.tuning.entrance import tune
from lmopt.tuning.limits import Constraints
from lmopt.tuning.recommending import Recommendation, recommend
from lmopt.tuning.replaying import Replay, replay
from lmopt.tuning.result import TuneResult
from lmopt.tuning.trials import Trial
from lmopt.tuning.workload import Workload

__all__ = [
    "Constraints",
    "Recommendation",
    "Replay",
    "Trial",
    "TuneResult",
    "Workload",
    "recommend",
    "replay",
    "tune",
]

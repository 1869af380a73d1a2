"""One process of the parallel tests: trains a tiny model and writes down what came of it.

Argument: a JSON object with `model`, `config`, `out`, and optionally `keep` (write checkpoints) and `kill`: pairs of a
rank and a step at which that process kills itself, each once.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
from torch.distributed.tensor import DTensor

from lmopt import Model
from lmopt.testing import models
from lmopt.training import Batch, LossValue, NextToken, Outputs, TrainingConfig, entrance, train
from lmopt.training.parallel import leave, shard

TASK = json.loads(sys.argv[1])
OUT = Path(TASK["out"])
RANK = int(os.environ.get("RANK", "0"))


class Watched(NextToken):
    """The usual loss; kills its process, or looks around."""

    def __call__(self, batch: Batch, outputs: Outputs) -> LossValue:
        for rank, step in TASK.get("kill", []):
            killed = OUT / f"killed-{step}"
            if (rank, step) == (RANK, batch.step) and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if batch.step == 1:
            (OUT / f"listening-{RANK}.json").write_text(json.dumps(listening()))
        return super().__call__(batch, outputs)


def listening() -> list[str]:
    """List the addresses that this process and the launcher listen on."""
    processes = (psutil.Process(), psutil.Process().parent())
    return [
        one.laddr.ip
        for process in processes
        for one in process.net_connections(kind="inet")
        if one.status == psutil.CONN_LISTEN
    ]


def main() -> None:
    """Train."""
    ids = np.random.default_rng(1).integers(0, 7, 3000).cumsum() % models.VOCAB_SIZE
    shares = []

    def watched_shard(*given: object) -> object:
        spread = shard(*given)  # type: ignore[arg-type]
        shares.extend(
            one.to_local().numel() / one.numel() for one in spread.parameters() if isinstance(one, DTensor)
        )
        return spread

    entrance.shard = watched_shard  # type: ignore[assignment]
    model = Model.from_module(getattr(models, TASK["model"])())
    result = train(
        model,
        ids,
        evaluation=ids[:300],
        output=OUT / "run" if TASK.get("keep") else None,
        config=TrainingConfig(**TASK["config"]),
        loss=Watched(),
    )
    told = {**result.to_dict(), "weights": model.fingerprint(), "shares": shares}
    (OUT / f"rank-{RANK}.json").write_text(json.dumps(told))
    leave()


main()

"""A model split over two processes: the same numbers, named deaths, nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import lmopt
from lmopt.backends.torch.tensor_parallel_ranks import Ranks
from lmopt.errors import (
    ClosedError,
    InputError,
    ParityError,
    UnsupportedError,
    UnsupportedOptionError,
    WorkerDiedError,
)
from lmopt.testing.models import tiny_gpt, tiny_llama, tiny_lstm

OWN = '''
import torch
from torch import nn

class Own(nn.Module):
    """Embedding, one wide MLP with a skip, head; its state is a running sum."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.qkv = nn.Linear(16, 48)
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids, state=None):
        hidden = self.embedding(input_ids)
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        query, key, value = self.qkv(hidden).chunk(3, -1)
        hidden = hidden + (query * key)[..., :1] * value[..., :1]
        start = hidden.new_zeros(hidden.shape[0], 16) if state is None else state
        sums = start[:, None] + hidden.cumsum(1)
        return self.head(torch.tanh(sums)), sums[:, -1]
'''
CALLER = """
import sys, lmopt
from lmopt.testing.models import tiny_llama
if __name__ == "__main__":
    rt = lmopt.Runtime(lmopt.Model.from_module(tiny_llama()), backend="torch", tensor_parallel_size=2)
    print(*rt.report().actual.details["ranks"], flush=True)
    sys.stdin.read()
"""


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def all_gone(pids: list[int], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(map(gone, pids)):
        time.sleep(0.02)
    return all(map(gone, pids))


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal, on which a process listens."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{name}")
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].split(":")[0])
    return found


@pytest.fixture(scope="module")
def whole() -> lmopt.Model:
    return lmopt.Model.from_module(tiny_llama())


@pytest.fixture
def split(whole: lmopt.Model) -> Iterator[lmopt.Runtime]:
    with lmopt.Runtime(whole, backend="torch", tensor_parallel_size=2, threads=1) as found:
        yield found


def test_two_processes_compute_what_one_does(whole: lmopt.Model, split: lmopt.Runtime) -> None:
    rows = [list(range(3, 30)), [5, 6, 7], [9]]
    with lmopt.Runtime(whole, backend="torch", threads=1) as one:
        for mine, wanted in zip(split.logits(rows), one.logits(rows), strict=True):
            assert np.abs(mine - wanted).max() <= 1e-4
        options = {"max_new_tokens": 64, "eos_token_id": None}
        assert split.generate(rows, **options) == one.generate(rows, **options)
        sampled = {"max_new_tokens": 12, "do_sample": True, "seed": 3, "num_return_sequences": 2}
        assert split.generate(rows, **sampled) == one.generate(rows, **sampled)
        np.testing.assert_allclose(split.score(rows[0]), one.score(rows[0]), atol=1e-4)
    _check_states(split)
    details = split.report().actual.details
    pids = details["ranks"]
    assert details["tensor_parallel_size"] == len(pids) == 2
    assert os.getpid() not in pids
    # 127.0.0.1, as IPv4 and as IPv4 inside IPv6, and nothing else.
    for pid in pids:
        assert listening(pid) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    split.close()
    assert all_gone(pids)
    with pytest.raises(ClosedError):
        split.generate([5], max_new_tokens=1)


def _check_states(split: lmopt.Runtime) -> None:
    engine = split.engine
    ids, lengths = np.array([[3, 4, 5]]), np.array([3])
    state = engine.begin(1)
    _, after = engine.forward(ids, lengths, state)
    with pytest.raises(InputError, match="consumed"):
        engine.forward(ids, lengths, state)
    # All ranks refused alike, so they go on.
    again = engine.copy(after)  # type: ignore[attr-defined]
    first, _ = engine.forward(ids, lengths, after)
    second, last = engine.forward(ids, lengths, again)
    assert (first == second).all()
    assert last.lengths.tolist() == [6]
    back = engine.rewind(last, np.array([3]))  # type: ignore[attr-defined]
    third, _ = engine.forward(ids, lengths, back)
    assert np.abs(third - second).max() < 1e-5


def test_a_dead_rank_is_named_and_the_others_do_not_stay(split: lmopt.Runtime) -> None:
    pids = split.report().actual.details["ranks"]
    threading.Timer(0.3, os.kill, (pids[1], signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(WorkerDiedError, match=rf"rank 1 of 2 \(process {pids[1]}\).*SIGKILL"):
        _generate_for(split, seconds=30)
    assert time.monotonic() - began < 30
    assert all_gone(pids)


def test_an_interrupted_call_leaves_no_answer_for_the_next(
    split: lmopt.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = split.report().actual.details["ranks"]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "_collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            split.logits([5, 6, 7])
    with pytest.raises(ClosedError):
        split.logits([8, 9])
    assert all_gone(pids)


def _generate_for(split: lmopt.Runtime, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        split.generate([[5, 6]] * 4, max_new_tokens=100, eos_token_id=None)


def test_ranks_end_with_their_caller() -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert caller.stdout is not None
    pids = [int(one) for one in caller.stdout.readline().split()]
    assert len(pids) == 2
    caller.kill()
    caller.communicate()
    assert all_gone(pids)


def test_an_own_module_is_split_by_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module_for_ranks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    from own_module_for_ranks import Own  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = lmopt.Model.from_module(Own())
    plan = {"up": "colwise", "down": "rowwise", "head": "colwise_gather"}
    with (
        lmopt.Runtime(model, backend="torch") as one,
        lmopt.Runtime(model, backend="torch", tensor_parallel_size=2, tensor_parallel_plan=plan) as two,
    ):
        assert np.abs(one.logits([3, 4, 5]) - two.logits([3, 4, 5])).max() <= 1e-4
        options = {"max_new_tokens": 16}
        assert one.generate([[3, 4], [7]], **options) == two.generate([[3, 4], [7]], **options)
    # Its halves are no queries, keys and values, and nothing but the numbers would tell.
    wrong = {**plan, "qkv": "colwise"}
    with pytest.raises(ParityError, match="computes something else"):
        lmopt.Runtime(model, backend="torch", tensor_parallel_size=2, tensor_parallel_plan=wrong)
    for bad in (None, {"up": "diagonal"}):
        with pytest.raises(UnsupportedOptionError, match="tensor_parallel_plan"):
            lmopt.Runtime(model, backend="torch", tensor_parallel_size=2, tensor_parallel_plan=bad)


def test_what_cannot_be_split_is_refused_before_anything_starts(whole: lmopt.Model) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97, hidden_size=36, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=64,
    )  # fmt: skip
    like_smollm2 = lmopt.Model.from_module(LlamaForCausalLM(config))
    with pytest.raises(
        UnsupportedOptionError, match=r"9 attention heads and 3 key-value heads.*possible: 3$"
    ):
        lmopt.Runtime(like_smollm2, backend="torch", tensor_parallel_size=2)
    for size in (0, -1, 2.0, True):
        with pytest.raises(UnsupportedOptionError, match="tensor_parallel_size"):
            lmopt.Runtime(whole, backend="torch", tensor_parallel_size=size, tensor_parallel_plan={})
    with pytest.raises(UnsupportedOptionError, match="Recurrent layers cannot"):
        lmopt.Runtime(lmopt.Model.from_module(tiny_lstm()), backend="torch", tensor_parallel_size=2)
    with pytest.raises(UnsupportedError, match="can be imported"):
        lmopt.Runtime(
            lmopt.Model.from_module(tiny_gpt()),
            backend="torch",
            tensor_parallel_size=2,
            tensor_parallel_plan={"head": "colwise_gather"},
        )
    with pytest.raises(UnsupportedOptionError, match="'onnxruntime' has no option 'tensor_parallel_size'"):
        lmopt.Runtime(whole, backend="onnxruntime", tensor_parallel_size=2)

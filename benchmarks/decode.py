"""How fast lmopt's engines decode, beside what a plain Python loop gets from the same libraries.

    python benchmarks/decode.py [MODEL] [--device cuda] [--dtype float16] [--rounds 5] [--json FILE]

All run in this one process, round by round in turn (`lmopt.evaluation.compare_speed`), so that a
machine that slows down slows all of them:

- `torch`, `onnxruntime`: lmopt's engines, as `lmopt.Runtime` opens them.
- `transformers loop`: the module called with `use_cache` and its own cache, no padding mask.
- `onnxruntime loop`: a session's `run` with NumPy arrays in and out; on the CPU only, as it would carry the cache to a
  GPU and back for each token.

A difference between an engine and its loop is what lmopt costs, or gains.
"""

import argparse
import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lmopt
from lmopt.artifact import cache_folder
from lmopt.backends.torch.cache_name import cache_name, cache_of
from lmopt.cli.assets import fetch_smollm2
from lmopt.evaluation import Figure, compare_speed
from lmopt.platform import machine
from lmopt.types import FloatArray, IntArray, ModelFacts

_RATIOS = (("onnxruntime", "torch"), ("torch", "transformers loop"), ("onnxruntime", "onnxruntime loop"))


class TransformersLoop:
    """The loop that everybody writes around a transformers model, with the methods that are timed."""

    ragged = False

    def __init__(self, module: Any, facts: ModelFacts, device: str) -> None:
        self.facts = facts
        self._module = module if device == "cpu" else copy.deepcopy(module).to(device)
        self._device = device
        self._cache_name = cache_name(module)

    def begin(self, batch: int, *, capacity: int | None = None, padding_side: str = "right") -> Any:
        """Start without a cache; transformers makes one."""
        return None

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: Any, *, last_only: bool = False
    ) -> tuple[FloatArray, Any]:
        """Call the module."""
        import torch

        with torch.inference_mode():
            result = self._module(
                torch.from_numpy(input_ids).to(self._device),
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_name: state},
            )
            return result.logits.float().cpu().numpy(), cache_of(result)


class SessionLoop:
    """The loop that everybody writes around an ONNX Runtime session: NumPy in, NumPy out."""

    ragged = False

    def __init__(self, path: Path, facts: ModelFacts, threads: int) -> None:
        import onnxruntime as ort

        self.facts = facts
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._past = [one for one in self._session.get_inputs() if one.name.startswith("past")]

    def begin(self, batch: int, *, capacity: int | None = None, padding_side: str = "right") -> Any:
        """Make empty arrays."""
        sizes = {"batch_size": batch, "past_sequence_length": 0}
        return [np.zeros([sizes.get(axis, axis) for axis in one.shape], np.float32) for one in self._past]

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: Any, *, last_only: bool = False
    ) -> tuple[FloatArray, Any]:
        """Run the session."""
        batch, new = input_ids.shape
        past = state[0].shape[2]
        feeds = {
            "input_ids": input_ids,
            "attention_mask": np.ones((batch, past + new), np.int64),
            "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
            **{one.name: array for one, array in zip(self._past, state, strict=True)},
        }
        logits, *present = self._session.run(None, feeds)
        return logits[:, -1:], present


def run(
    source: str | Path,
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    batch: int,
    device: str = "cpu",
    dtype: str = "float32",
) -> dict[str, Any]:
    """Measure everything on one model.

    Args:
        source: What `lmopt.Model.from_pretrained` takes.
        prompt_tokens: Tokens of the prompt.
        new_tokens: Tokens generated in a round.
        rounds: Rounds that count.
        batch: Rows at once.
        device: Where all of them run.
        dtype: What all of them compute in.

    Returns:
        Plain values: `machine`, `load_average` before and after, `speed` by name, `decode_ratios`.
    """
    load_before = os.getloadavg()
    model = lmopt.Model.from_pretrained(source, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        artifact = lmopt.Exporter("onnx").export(model, Path(folder) / "onnx")
        graph = artifact.file("model.onnx")
        eager = lmopt.Runtime(model, backend="torch", device=device)
        exported = lmopt.Runtime(artifact, backend="onnxruntime", device=device)
        reports = {one.backend: one.report() for one in (eager, exported)}
        engines: dict[str, Any] = {
            "torch": eager.engine,
            "transformers loop": TransformersLoop(model.module, model.facts, device),
            "onnxruntime": exported.engine,
        }
        if device == "cpu":
            threads = reports["onnxruntime"].actual.threads
            engines["onnxruntime loop"] = SessionLoop(graph, model.facts, threads)
        if dtype == "float32":
            require_equal_tokens(engines)
        speed = compare_speed(
            engines,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            batch=batch,
            progress=lambda done, total: print(f"\rround {done}/{total}", end="", flush=True),
        )
        print()
        eager.close()
        exported.close()
    decode = {name: one.decode_tokens_per_s.median for name, one in speed.items()}
    return {
        "machine": machine(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "versions": {name: dict(one.actual.versions) for name, one in reports.items()},
        "threads": {name: one.actual.threads for name, one in reports.items()},
        "speed": {name: one.to_dict() for name, one in speed.items()},
        "decode_ratios": {
            f"{ours} / {other}": decode[ours] / decode[other] for ours, other in _RATIOS if other in decode
        },
    }


def require_equal_tokens(engines: dict[str, Any]) -> None:
    """Stop where the loops do not do the same work as the engines."""
    found = {}
    for name, engine in engines.items():
        ids, tokens = np.arange(100, 116)[None], []
        state = engine.begin(1, capacity=32)
        for _ in range(8):
            logits, state = engine.forward(ids, np.array([ids.shape[1]]), state, last_only=True)
            ids = logits[:, -1].argmax(-1)[:, None]
            tokens.append(int(ids[0, 0]))
        found[name] = tokens
    if len({tuple(tokens) for tokens in found.values()}) != 1:
        raise SystemExit(f"the tokens differ, so the speeds cannot be compared: {found}")


def main() -> None:
    """Measure, and print a table or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M, fetched as by `lmopt demo`")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16"))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args()
    result = run(
        asked.model or fetch_smollm2(cache_folder()),
        prompt_tokens=asked.prompt_tokens,
        new_tokens=asked.new_tokens,
        rounds=asked.rounds,
        batch=asked.batch,
        device=asked.device,
        dtype=asked.dtype,
    )
    print(f"{'':20} {'decode tokens/s':>24} {'prefill tokens/s':>24} {'first token ms':>24}")
    for name, figures in result["speed"].items():
        cells = [
            Figure(**figures[key])
            for key in ("decode_tokens_per_s", "prefill_tokens_per_s", "first_token_ms")
        ]
        print(f"{name:20} " + " ".join(f"{cell!s:>24}" for cell in cells))
    for name, ratio in result["decode_ratios"].items():
        print(f"decode, {name}: {ratio:.2f}")
    print(f"median (least .. most) of {asked.rounds} rounds; threads {result['threads']}")
    print(f"load average {result['load_average']}; {result['machine']}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

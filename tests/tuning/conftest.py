"""A machine that is made up: what jobs give is reckoned from the recipe, without any process."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from lmopt.artifact import publish
from lmopt.compression import Cast, Quantize
from lmopt.evaluation import Figure
from lmopt.tuning import TuneResult, entrance, tune
from lmopt.tuning.work import Limits, WorkError
from lmopt.types import ModelFacts

TEXT = " ".join(f"w{(7 * n * n + n) % 97}" for n in range(12_000))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a small Llama; nobody here computes with them."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": (97, 64), "model.norm.weight": (64,), "lm_head.weight": (97, 64)}
    for part, shape in (("q", (64, 64)), ("k", (32, 64)), ("v", (32, 64)), ("o", (64, 64))):
        shapes[f"model.layers.0.self_attn.{part}_proj.weight"] = shape
    save_file(
        {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_size": 64, "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of the tiny model's words."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


class MadeUp:
    """Gives what real processes would, by rules that a test can change.

    Attributes:
        calls: Every job: its name and arguments.
        now: Seconds of the made-up clock, which `costs` moves.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self.now = 0.0
        self.costs = {
            "prepare": 5.0,
            "compress": 10.0,
            "export": 40.0,
            "measure": 10.0,
            "save_float": 5.0,
            "write_calibration": 60.0,
        }
        self.ms_by_backend = {"torch": 60.0, "onnxruntime": 20.0, "numpy": 900.0}
        self.rules: list[Callable[[str, Mapping[str, Any]], None]] = []
        self.ms: Callable[[Mapping[str, Any], float], float] = lambda arguments, usual: usual
        self._made: dict[str, tuple[list[dict[str, Any]], Mapping[str, Any]]] = {}

    def clock(self) -> float:
        return self.now

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def __call__(self, call: str, arguments: Mapping[str, Any], limits: Limits, tell: Any) -> dict[str, Any]:
        name = call.partition(":")[2]
        self.calls.append((name, arguments))
        cost = self.costs[name]
        if cost > limits.seconds:
            self.now += limits.seconds
            raise WorkError("time", f"it took more than {limits.seconds:.0f} s", limits.seconds)
        self.now += cost
        for rule in self.rules:
            rule(name, arguments)
        result: dict[str, Any] = getattr(self, name)(**arguments)
        return {**result, "seconds": cost}

    def prepare(self, folder: str, **_: Any) -> dict[str, Any]:
        np.save(Path(folder) / "rows.npy", np.arange(64))
        np.save(Path(folder) / "logits.npy", np.zeros((1, 1)))
        return {"facts": {}, "tokens": 64, "text": True}

    def write_calibration(self, folder: str, **_: Any) -> dict[str, Any]:
        (Path(folder) / "calibration.txt").write_text("w1 w2")
        return {}

    def compress(
        self, source: str, steps: Any, keep: Mapping[str, float], target: str, **_: Any
    ) -> dict[str, Any]:
        loss = self.loss(steps)
        broken = (
            ["perplexity ratio too high"]
            if loss["perplexity_ratio"] > keep.get("perplexity_ratio", 9)
            else []
        )
        if not broken:
            self.artifact(Path(target), source, steps)
            self._made[target] = (steps, {})
        return {"loss": loss, "broken": broken}

    def export(
        self, source: str, target: str, exporter_target: str, options: Mapping[str, Any], **_: Any
    ) -> dict[str, Any]:
        steps = self._made.get(source, ([], {}))[0]
        self.artifact(Path(target), "", steps)
        self._made[target] = (steps, {**options, "target": exporter_target})
        return {"target": exporter_target, "fallback": None}

    def save_float(self, source: str, target: str, **_: Any) -> dict[str, Any]:
        self.artifact(Path(target), source, [])
        return {}

    def artifact(self, folder: Path, source: str, steps: Any) -> None:
        """Write an artefact that has the size of the tiny model's weights after the steps."""
        with publish(folder, overwrite=True) as staging:
            values = 30_000 if not steps else int(30_000 * bits(steps) / 32)
            (staging.path / "weights.bin").write_bytes(bytes(4 * values))
            staging.manifest["formats"] = {"onnx": {"files": ["weights.bin"]}}
            staging.manifest["model"] = asdict(ModelFacts(97, 128))
            staging.manifest["parity"] = {"onnx": {"backend": "onnxruntime"}}

    def measure(self, place: str, backend: str, threads: int | None, folder: str | None, give_up_ms: float | None,
                **others: Any) -> dict[str, Any]:  # fmt: skip
        steps, options = self._made.get(place, ([], {}))
        usual = self.ms_by_backend[backend] * (bits(steps) / 32) ** 0.8
        usual *= (0.7 if "accuracy_level" in options else 1.0) * (
            1.3 if options.get("target") == "portable" else 1.0
        )
        usual *= (2 / (threads or 2)) ** 0.7
        if backend == "torch" and steps:
            usual *= 20
        took = self.ms(
            {"place": place, "backend": backend, "steps": steps, "threads": threads, **others}, usual
        )
        return {
            "speed": speed(took),
            "peak_memory_bytes": int(5e7 + 2 * 120_000 * bits(steps) / 32),
            "load_s": 0.5,
            "loss": self.loss(steps) if folder is not None else None,
            "gave_up": give_up_ms is not None and took > give_up_ms,
            "notes": [],
            "engine": {},
        }

    def loss(self, steps: Any) -> dict[str, Any]:
        ratio = 1.0
        for step in steps:
            if step["step"] == "cast":
                ratio *= 1.0005
            elif step.get("bits") == 8:
                ratio *= 1.001
            else:
                ratio *= (1.02 if not step["symmetric"] else 1.3) if step["group_size"] == 32 else 1.4
                ratio = 1 + (ratio - 1) * (0.5 if step["step"] == "gptq" else 1.0)
        return {
            "perplexity": 20 * ratio, "float_perplexity": 20.0, "perplexity_ratio": ratio,
            "perplexity_ratio_stderr": 0.002 if steps else 0.0, "kl_mean": 0.7 * (ratio - 1), "kl_p99": 0.1,
            "top1": 0.95, "nonfinite": 0, "tokens": 512,
        }  # fmt: skip


def bits(steps: Any) -> float:
    """Bits a weight of a recipe, scales included."""
    if not steps:
        return 32.0
    step = steps[-1]
    return 16.0 if step["step"] == "cast" else step["bits"] + 16 / step["group_size"]


def speed(ms: float, spread: float = 0.01) -> dict[str, Any]:
    """Figures of speed whose token takes so long."""

    def figure(value: float) -> dict[str, float]:
        return asdict(Figure(value, value * (1 - spread), value * (1 + spread)))

    return {
        "token_p50_ms": figure(ms), "token_p95_ms": figure(1.2 * ms), "first_token_ms": figure(5 * ms),
        "decode_tokens_per_s": figure(1e3 / ms), "prefill_tokens_per_s": figure(1e4 / ms),
    }  # fmt: skip


Run = Callable[..., TuneResult]


@contextmanager
def searching(machine: MadeUp, tiny: Path, text: Path, output: Path) -> Iterator[Run]:
    """Let searches run on a made-up machine and by its clock; `report=True` draws, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        original = entrance.Search
        patch.setattr(entrance, "Search", lambda *a, **k: original(*a, **{**k, "clock": machine.clock}))
        drawn = entrance.write_report

        def run(*, report: bool = False, **options: Any) -> TuneResult:
            patch.setattr(entrance, "write_report", drawn if report else lambda result: None)
            usual: dict[str, Any] = {
                "output": output, "text": text, "backends": ["torch", "onnxruntime"], "threads": [2],
                "budget": 500.0, "runner": machine,
            }  # fmt: skip
            return tune(tiny, **{**usual, **options})

        yield run


@pytest.fixture
def made_up() -> MadeUp:
    """A made-up machine."""
    return MadeUp()


@pytest.fixture
def search(made_up: MadeUp, tiny: Path, text: Path, tmp_path: Path) -> Iterator[Run]:
    """Runs searches of the tiny model on `made_up`, on torch and ONNX Runtime with two threads."""
    with searching(made_up, tiny, text, tmp_path / "out") as run:
        yield run


@pytest.fixture(scope="session")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneResult, MadeUp]:
    """One search with everything in it, its report drawn, and the machine that it ran on."""
    folder, machine = tmp_path_factory.mktemp("whole"), MadeUp()
    (folder / "text.txt").write_text(TEXT)

    def break_some(name: str, arguments: Mapping[str, Any]) -> None:
        if name != "compress":
            return
        step = arguments["steps"][0]
        kind: Any = "memory" if step["step"] == "cast" else "crash" if step.get("bits") == 7 else ""
        if kind:
            raise WorkError(kind, f"it broke: <{kind}>")

    machine.rules.append(break_some)
    # Both run on the fastest engine there is: what only slower ones run is rightly not tried.
    recipes = {"my float16": Cast(dtype="float16"), "my seven bits": Quantize(bits=7, group_size=32)}
    with searching(machine, tiny, folder / "text.txt", folder / "out") as run:
        return run(report=True, threads=[2, 1], budget=700.0, recipes=recipes), machine

"""Hold lmopt's 4-bit weights against those of others at equal bytes, all scored by one path.

    python benchmarks/compression_peers.py [MODEL] --calibration FILE --text FILE [--tokens 4096] [--rows 16]
        [--peers FOLDER] [--only llama.cpp ...] [--peers-only] [--json FILE]

MODEL is a Hugging Face folder (default: SmolLM2-135M, fetched as by `lmopt demo`); FOLDER is where `make_peers.py`
puts environments and conversions. Peers:

- `llama.cpp`: Q4_K_M with an importance matrix: the mean squares of each linear's inputs on the calibration
  rows, as its own `llama-imatrix` gathers them, handed to its quantizer. Needs `venvs/llamacpp` and
  `models/KEY/llamacpp-f32.gguf`.
- `nncf`: 4 bits in groups of 64 with AWQ and scale estimation, embedding and head in 8 bits, as its defaults have
  them. Needs `venvs/nncf`.
- `genai`: the weights of onnxruntime-genai's own builder (`int4`, its defaults). Needs `models/KEY/genai-int4`.
- `torchao`: the scales of its AWQ observer and its int4 weights in groups of 64, each linear by itself. Needs
  `venvs/torchao`. Its GPTQ runs on CUDA only.

Each peer's weights are dequantized and computed with in float (NNCF's by OpenVINO in float32, where AWQ's scales may be
operators of their own; genai's by ONNX Runtime without rounded activations); lmopt then gets as many bytes for the same
tensors by `Mixed`. What is missing is named. Nothing is fetched but the default model.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.candidates import PEERS_FOLDER, model_key
from safetensors.torch import load_file, save_file

from lmopt import Compressor, Model
from lmopt.artifact import cache_folder
from lmopt.backends.torch.calibration import gathering, logits_of
from lmopt.backends.torch.quantizing import find_weights, put
from lmopt.backends.torch.reference import FullForward
from lmopt.cli.assets import fetch_smollm2
from lmopt.compression import AWQ, GPTQ, Calibration, Mixed
from lmopt.compression.step import Step
from lmopt.compressor import compare_models
from lmopt.evaluation.loss import CompressionReport, Pieces, measure_loss
from lmopt.evaluation.tolerances import Tolerance

_ANY = Tolerance("any", kl_mean=float("inf"), top1=0.0, perplexity_ratio=float("inf"))
# Windows of the scored text, as `compare_models` cuts them.
_WINDOW = 512
# Names of llama.cpp's tensors for those of a Llama.
_LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_QUANTIZE = """
import ctypes, sys, numpy as np, llama_cpp as lc
source, target, matrix = sys.argv[1:]
given = dict(np.load(matrix))
entries = (lc.llama_model_imatrix_data * (len(given) + 1))()
for entry, (name, values) in zip(entries, given.items()):
    entry.name, entry.size = name.encode(), values.size
    entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
options = lc.llama_model_quantize_default_params()
options.ftype, options.nthread = 15, 2
options.imatrix = ctypes.cast(entries, type(options.imatrix))
sys.exit(lc.llama_model_quantize(source.encode(), target.encode(), options))
"""
_TORCHAO = """
import sys, torch
from safetensors.torch import load_file, save_file
from torchao.prototype.awq.core import AWQObserver
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
given, config, made = load_file(sys.argv[1]), IntxWeightOnlyConfig(torch.int4, PerGroup(64)), {}
for path in sorted({key.partition(":")[0] for key in given}):
    weight, inputs = given[path + ":weight"], given[path + ":inputs"]
    observer = AWQObserver(weight, None, config)
    observer(inputs, None)
    scales = observer.calculate_qparams()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight * scales)
    quantize_(linear, config)
    made[path] = (linear.weight.dequantize() / scales).contiguous()
save_file(made, sys.argv[2])
"""
_NNCF = """
import json, sys
import numpy as np, nncf, openvino as ov, torch
from transformers import AutoModelForCausalLM
folder, given, made = sys.argv[1:]
given = dict(np.load(given))
rows, windows = given.pop("rows"), [given[name] for name in sorted(given)]
source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
class Logits(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.source = source
    def forward(self, ids):
        # Said outright, so that the masks' own code, which OpenVINO cannot convert, is not traced.
        places = torch.ones_like(ids).cumsum(1) - 1
        mask = (places[:, None, None, :] > places[:, None, :, None]) * -1e9
        return self.source(input_ids=ids, position_ids=places, attention_mask=mask, use_cache=False).logits
with torch.no_grad():
    whole = ov.convert_model(Logits(), example_input=torch.from_numpy(rows[:1]), input=[ov.PartialShape([1, -1])])
small = nncf.compress_weights(
    whole, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0, awq=True, scale_estimation=True,
    dataset=nncf.Dataset([row[None] for row in rows]), subset_size=len(rows),
)
size = sum(one.get_byte_size() for one in small.get_ops() if one.get_type_name() == "Constant")
options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
run = ov.compile_model(small, "CPU", options)
np.savez(made, size=size, **{name: run([row[None]])[0][0] for name, row in given.items()})
"""


class MissingError(Exception):
    """What a peer needs and is not there."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a peer is given.

    Attributes:
        model: The float model.
        source: Its folder.
        peers: Folder of environments and conversions.
        rows: Calibration texts as ids.
        windows: What is scored, as ids.
        folder: An empty folder of its own.
    """

    model: Model
    source: Path
    peers: Path
    rows: list[Any]
    windows: list[Any]
    folder: Path


def environment(peers: Path, name: str) -> Path:
    """Give the interpreter of a peer's environment."""
    python = peers / "venvs" / name / "bin/python"
    if not python.exists():
        raise MissingError(f"{python} is not there; python benchmarks/make_peers.py --only {name} makes it")
    return python


def run(python: Path, code: str, *arguments: Path) -> None:
    """Run a peer's part; its output is shown only where it fails."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, env=offline, check=False
    )
    if done.returncode:
        raise MissingError(f"it failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}")


def nncf(asked: Asked) -> tuple[Pieces, int]:
    """Quantize by NNCF, and let OpenVINO compute the logits in float32; embedding and head have 8 bits."""
    python = environment(asked.peers, "nncf")
    windows = {f"window{number:04d}": row for number, row in enumerate(asked.windows)}
    np.savez(asked.folder / "given.npz", rows=np.stack(asked.rows), **windows)
    run(python, _NNCF, asked.source, asked.folder / "given.npz", asked.folder / "made.npz")
    made = dict(np.load(asked.folder / "made.npz"))
    return stored_logits(asked, [made[name] for name in windows]), int(made["size"])


def genai(asked: Asked) -> tuple[Pieces, int]:
    """Take the weights of onnxruntime-genai's builder; ONNX Runtime computes with them in float32."""
    import onnx
    import onnxruntime

    whole = asked.peers / "models" / model_key(asked.source) / "genai-int4"
    if not whole.exists():
        raise MissingError(f"{whole} is not there; python benchmarks/make_peers.py converts the model")
    graph = onnx.load(whole / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1  # activations stay float32
    onnx.save(graph, asked.folder / "model.onnx")
    for file in whole.glob("*.data"):
        shutil.copy(file, asked.folder)
    session = onnxruntime.InferenceSession(asked.folder / "model.onnx", providers=["CPUExecutionProvider"])
    config = json.loads((asked.source / "config.json").read_text(encoding="utf-8"))
    heads = config["num_key_value_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    nothing = np.zeros((1, heads, 0, width), np.float32)
    logits = []
    for row in asked.windows:
        inputs = {one.name: nothing for one in session.get_inputs()}
        inputs |= {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64)}
        logits.append(session.run(["logits"], inputs)[0][0])
    size = sum(file.stat().st_size for file in whole.glob("*.data"))
    return stored_logits(asked, logits), size


def stored_logits(asked: Asked, logits: list[Any]) -> Pieces:
    """Give logits that a peer has computed, as `measure_loss` reads those of a model."""
    found = {row.tobytes(): one for row, one in zip(asked.windows, logits, strict=True)}

    def pieces(ids: Any, size: int) -> Any:
        one = found[ids.tobytes()]
        return (one[start : start + size] for start in range(0, len(one), size))

    return pieces


def llama_cpp(asked: Asked) -> tuple[Model, int]:
    """Quantize by llama.cpp; give the model of the dequantized weights and the bytes of its tensors."""
    import gguf

    model, source, peers, rows, folder = asked.model, asked.source, asked.peers, asked.rows, asked.folder
    python = environment(peers, "llamacpp")
    whole = peers / "models" / model_key(source) / "llamacpp-f32.gguf"
    if not whole.exists():
        raise MissingError(f"{whole} is not there; python benchmarks/make_peers.py converts the model")
    paths = [one.path for one in find_weights(model.module, model.facts.vocab_size) if one.part == "linear"]
    with gathering(model.module, paths) as gathered, torch.inference_mode():
        for row in rows:
            logits_of(model.module, torch.from_numpy(row)[None])
    matrix: dict[str, Any] = {}
    for path, one in gathered().items():
        number, _, kind = path.partition(".layers.")[2].partition(".")
        matrix[f"blk.{number}.{_LLAMA[kind]}.weight"] = np.ascontiguousarray(np.diagonal(one.gram))
    np.savez(folder / "matrix.npz", **matrix)
    target = folder / "q4_k_m.gguf"
    run(python, _QUANTIZE, whole, target, folder / "matrix.npz")
    size = sum(int(one.n_bytes) for one in gguf.GGUFReader(target).tensors)
    return Model.from_pretrained(target), size


def torchao(asked: Asked) -> tuple[Model, int]:
    """Quantize by torchao's AWQ; embedding and head stay in float."""
    model, peers, rows, folder = asked.model, asked.peers, asked.rows, asked.folder
    python = environment(peers, "torchao")
    paths = [one.path for one in find_weights(model.module, model.facts.vocab_size) if one.part == "linear"]
    given: dict[str, torch.Tensor] = {}
    hooks = []
    for path in paths:
        part: Any = model.module.get_submodule(path)
        given[f"{path}:weight"] = part.weight.detach().float().clone()

        def keep(module: Any, args: Any, path: str = path) -> None:
            # Some tokens of each row: the observer multiplies all of them for each of its 20 scales.
            some = args[0].reshape(-1, args[0].shape[-1])[::8].clone()
            key = f"{path}:inputs"
            given[key] = torch.cat([given[key], some]) if key in given else some

        hooks.append(part.register_forward_pre_hook(keep))
    with torch.inference_mode():
        for row in rows:
            logits_of(model.module, torch.from_numpy(row)[None])
    for hook in hooks:
        hook.remove()
    save_file(given, folder / "given.safetensors")
    run(python, _TORCHAO, folder / "given.safetensors", folder / "made.safetensors")
    module = copy.deepcopy(model.module)
    size = sum(one.numel() * one.element_size() for one in module.parameters())
    for path, weight in load_file(folder / "made.safetensors").items():
        put(module, path, weight.numpy())
        # Codes, a float32 scale and a zero point of 8 bits for each group.
        size += weight.numel() // 2 + 5 * weight.numel() // 64 - 4 * weight.numel()
    return model.with_module(module), size


PEERS: Mapping[str, Any] = {"llama.cpp": llama_cpp, "nncf": nncf, "genai": genai, "torchao": torchao}


def ours(model: Model, size: int, calibration: Calibration, text: str, *, head: bool) -> Model:
    """Compress to as many bytes.

    Args:
        model: The float model.
        size: Bytes of all weights.
        calibration: What is read meanwhile.
        text: What is scored.
        head: Whether embedding and head are quantized too.
    """
    parts = find_weights(model.module, model.facts.vocab_size)
    kinds = {"linear", "embedding", "head"} if head else {"linear"}
    counts = [
        int(np.prod(model.module.get_submodule(one.path).weight.shape))  # type: ignore[arg-type]
        for one in parts
        if one.part in kinds and one.tied is None
    ]
    rest = sum(one.numel() for one in model.module.parameters()) - sum(counts)
    bits = 8 * (size - 4 * rest) / sum(counts)
    form: dict[str, Any] = {"group_size": 64} if head else {"group_size": 64, "embedding": None, "head": None}
    steps: list[Step] = [
        AWQ(bits=4, group_size=64, n_grid=10, fold_only=True),
        Mixed(GPTQ(**form), average_bits=bits, tokens=2048),
    ]
    return Compressor(steps, tolerance=_ANY).compress(model, calibration=calibration, texts=[text])


def scored(asked: Asked, other: Model | Pieces, size: int, text: str) -> CompressionReport:
    """Hold what a peer gave against the float model."""
    if isinstance(other, Model):
        return compare_models(asked.model, other, texts=[text])
    reference = FullForward(asked.model.module, lean=True).pieces
    return measure_loss(reference, other, asked.windows, bytes=size, float_bytes=0, texts="given")


def main() -> None:
    """Measure, and print a table in Markdown as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--peers", type=Path, default=PEERS_FOLDER)
    parser.add_argument("--only", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--peers-only", action="store_true", help="do not compress by lmopt")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    source = Path(options.model or fetch_smollm2(cache_folder()))
    model = Model.from_pretrained(source)
    assert model.tokenizer is not None
    words = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
    text = model.tokenizer.decode(model.tokenizer.encode(words)[: options.tokens])
    calibration = Calibration((options.calibration.read_text(encoding="utf-8"),), rows=options.rows)
    rows = calibration.cut(model.tokenizer, model.facts.context_length)
    ids = np.array(model.tokenizer.encode(text), np.int64)
    windows = [ids[start : start + _WINDOW] for start in range(0, len(ids), _WINDOW) if len(ids) - start > 1]
    found: list[dict[str, Any]] = []
    print("| weights | MB | KL | perplexity | top-1 | seconds |\n|---|---|---|---|---|---|", flush=True)
    for name in options.only:
        size = 0
        for who in (name,) if options.peers_only else (name, "lmopt"):
            began = time.perf_counter()
            try:
                if who == name:
                    with tempfile.TemporaryDirectory() as folder:
                        asked = Asked(model, source, options.peers.expanduser(), rows, windows, Path(folder))
                        other, size = PEERS[name](asked)
                    report = scored(asked, other, size, text)
                else:
                    small = ours(model, size, calibration, text, head=name != "torchao")
                    assert small.report is not None
                    report, size = small.report, small.report.bytes
            except MissingError as missing:
                print(f"| {name} | missing: {missing} |", flush=True)
                break
            difference = report.to_dict()["difference"]
            found.append({"who": who, "against": name, "bytes": size, **report.to_dict()})
            print(
                f"| {who} | {size / 1e6:.1f} | {difference['kl_mean']:.4f} | x {report.perplexity_ratio:.4f} | "
                f"{difference['top1']:.1%} | {time.perf_counter() - began:.0f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

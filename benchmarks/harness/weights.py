"""How many bytes of a model a token reads."""

import json
from pathlib import Path

import numpy as np

from lmopt.safefiles import check_gguf


def bytes_a_token(path: Path, dtype: str) -> int | None:
    """Count the bytes of weights that one token of batch 1 reads: all but a separate embedding table.

    Args:
        path: Model of any candidate.
        dtype: In which the weights of a Hugging Face folder are held in memory.

    Returns:
        Bytes; `None` where the file does not say.
    """
    if path.suffix == ".gguf":
        tensors = check_gguf(path).tensors
        tied = "output.weight" not in tensors
        return sum(one.bytes for name, one in tensors.items() if tied or name != "token_embd.weight")
    if (graph := path / "model.onnx").exists():
        return _of_graph(graph)
    if (weights := path / "openvino_model.bin").exists():
        return weights.stat().st_size  # embedding and head are one matrix there where the model ties them
    return _of_folder(path, dtype)


def _of_graph(graph: Path) -> int:
    """Initializers that something else than a gather reads."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False).graph
    used: set[str] = set()
    for node in model.node:
        places = range(len(node.input))
        if node.op_type in {"Gather", "GatherBlockQuantized"}:
            places = range(1, 2)  # its table is read by the row
        used.update(node.input[place] for place in places)
    total = 0
    for one in model.initializer:
        if one.name in used:
            item = onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize
            total += int(np.prod(one.dims, dtype=np.int64)) * item
    return total


def _of_folder(folder: Path, dtype: str) -> int | None:
    from safetensors import safe_open

    width = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    total = 0
    files = list(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    for file in files:
        with safe_open(file, "numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if "embed_tokens" in name and not config.get("tie_word_embeddings", True):
                    continue
                total += int(np.prod(opened.get_slice(name).get_shape(), dtype=np.int64)) * width
    return total or None

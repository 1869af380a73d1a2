"""Turn a Whisper model of CTranslate2, as faster-whisper publishes them, into a Hugging Face folder.

    python scripts/whisper_from_ctranslate2.py FOLDER OUT

FOLDER holds `model.bin`, `config.json` and `tokenizer.json`. The weights come out in float32; the loading is
strict, so that none is missing and none is left over.
"""

import argparse
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# Width of the model to its attention heads, of which the file says nothing.
HEADS = {384: 6, 512: 8, 768: 12, 1024: 16, 1280: 20}
MULTILINGUAL = 51865


def read_ctranslate2(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Read the variables of a CTranslate2 `model.bin` (OpenNMT/CTranslate2, `model_spec.py`)."""

    def text(file: BinaryIO) -> str:
        (length,) = struct.unpack("H", file.read(2))
        return file.read(length)[:-1].decode()

    def number(file: BinaryIO) -> int:
        return int(struct.unpack("I", file.read(4))[0])

    found: dict[str, np.ndarray[Any, Any]] = {}
    with path.open("rb") as file:
        if number(file) >= 2:
            text(file), number(file)
        for _ in range(number(file)):
            name = text(file)
            axes = file.read(1)[0]
            shape = struct.unpack(f"{axes}I", file.read(4 * axes))
            dtype = DTYPES[file.read(1)[0]]
            found[name] = np.frombuffer(file.read(number(file)), dtype).reshape(shape)
        for _ in range(number(file)):
            alias, name = text(file), text(file)
            found[alias] = found[name]
    return found


def state_of(found: dict[str, np.ndarray[Any, Any]], layers: int) -> dict[str, Any]:
    """Give the variables transformers' names; joined projections are taken apart."""
    import torch

    given = {name: torch.from_numpy(array.copy()).float() for name, array in found.items()}
    width = given["decoder/embeddings/weight"].shape[1]
    state = {
        "model.decoder.embed_tokens.weight": given["decoder/embeddings/weight"],
        "proj_out.weight": given["decoder/embeddings/weight"],
    }
    for part in ("encoder", "decoder"):
        state[f"model.{part}.embed_positions.weight"] = given[f"{part}/position_encodings/encodings"]

    def put(name: str, source: str, kinds: tuple[str, str] = ("weight", "bias")) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = (given[f"{source}/{kind}"] for kind in kinds)

    def split(name: str, source: str, parts: tuple[str, ...]) -> None:
        weights, biases = given[f"{source}/weight"].split(width), given[f"{source}/bias"].split(width)
        for part, weight, bias in zip(parts, weights, biases, strict=True):
            state[f"{name}.{part}.weight"] = weight
            if part != "k_proj":  # it has none: what is there is zeros
                state[f"{name}.{part}.bias"] = bias

    norm = ("gamma", "beta")
    for conv in ("conv1", "conv2"):
        put(f"model.encoder.{conv}", f"encoder/{conv}")
    for part in ("encoder", "decoder"):
        put(f"model.{part}.layer_norm", f"{part}/layer_norm", norm)
        for layer in range(layers):
            here, there = f"model.{part}.layers.{layer}", f"{part}/layer_{layer}"
            split(f"{here}.self_attn", f"{there}/self_attention/linear_0", ("q_proj", "k_proj", "v_proj"))
            put(f"{here}.self_attn.out_proj", f"{there}/self_attention/linear_1")
            put(f"{here}.self_attn_layer_norm", f"{there}/self_attention/layer_norm", norm)
            if part == "decoder":
                split(f"{here}.encoder_attn", f"{there}/attention/linear_0", ("q_proj",))
                split(f"{here}.encoder_attn", f"{there}/attention/linear_1", ("k_proj", "v_proj"))
                put(f"{here}.encoder_attn.out_proj", f"{there}/attention/linear_2")
                put(f"{here}.encoder_attn_layer_norm", f"{there}/attention/layer_norm", norm)
            put(f"{here}.fc1", f"{there}/ffn/linear_0")
            put(f"{here}.fc2", f"{there}/ffn/linear_1")
            put(f"{here}.final_layer_norm", f"{there}/ffn/layer_norm", norm)
    return state


def convert(folder: Path, out: Path) -> None:
    """Write the Hugging Face folder."""
    import transformers

    found = read_ctranslate2(folder / "model.bin")
    vocab_size, width = found["decoder/embeddings/weight"].shape
    layers = sum(
        name.startswith("decoder/layer_") and name.endswith("/ffn/linear_0/weight") for name in found
    )
    several = vocab_size >= MULTILINGUAL
    start, end = (50258, 50257) if several else (50257, 50256)
    config = transformers.WhisperConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=HEADS[width],
        decoder_attention_heads=HEADS[width],
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=found["encoder/conv1/weight"].shape[1],
        decoder_start_token_id=start,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    model.load_state_dict(state_of(found, layers), strict=True)
    stated = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    end_of_text = dict.fromkeys(("eos_token", "bos_token", "pad_token", "unk_token"), "<|endoftext|>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), **end_of_text
    )
    settings: dict[str, Any] = {
        "decoder_start_token_id": start,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "max_length": 448,
        "is_multilingual": several,
        "suppress_tokens": stated["suppress_ids"],
        "begin_suppress_tokens": stated["suppress_ids_begin"],
        "no_timestamps_token_id": tokenizer.convert_tokens_to_ids("<|notimestamps|>"),
        "return_timestamps": False,
    }
    if several:
        tasks = ("transcribe", "translate")
        settings["task_to_id"] = {one: tokenizer.convert_tokens_to_ids(f"<|{one}|>") for one in tasks}
        settings["lang_to_id"] = {tokenizer.convert_ids_to_tokens(one): one for one in stated["lang_ids"]}
    model.generation_config = transformers.GenerationConfig(**settings)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    convert(arguments.folder, arguments.out)

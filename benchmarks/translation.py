"""Time a small translation model in lmopt beside CTranslate2, in one run.

    python benchmarks/make_peers.py --only ctranslate2              # once: its environment
    python benchmarks/translation.py FOLDER [--rounds 5] [--json FILE]

The model has the sizes of Marian's small ones (6 layers that read, 2 that write, 256 wide, 32,000 tokens) and drawn
weights: what it writes means nothing, what it costs is the same. It is made once below FOLDER, and converted for
each program by its own tool: eager, ONNX Runtime in float32, with products in 8 bits, and with 8-bit weights in
groups of 64; CTranslate2 in float32 and int8. Each runs in a process of its own and is stopped while another is
timed. A figure is new tokens of all rows over the whole time, sources included.
"""

import argparse
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness.candidates import PEERS_FOLDER, Candidate, our_candidate
from harness.worker import Worker, WorkerError, in_turn

import lmopt
from lmopt.compression import Quantize
from lmopt.evaluation import Figure
from lmopt.platform import machine, usable_cpus

_OURS = "lmopt_applications_peer.py"
_VOCABULARY = 32_000


def make_model(folder: Path) -> Path:
    """Draw a BART of Marian's sizes, with a tokenizer whose words are numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

    target = folder / "model"
    if (target / "config.json").exists():
        return target
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=_VOCABULARY,
        d_model=256,
        encoder_layers=6,
        decoder_layers=2,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        max_position_embeddings=512,
        init_std=0.1,
        forced_eos_token_id=None,
        normalize_before=False,  # read by CTranslate2's converter
        normalize_embedding=True,
    )
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    words |= {f"w{number}": number for number in range(len(words), _VOCABULARY)}
    pieces = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    BartForConditionalGeneration(config).eval().save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def make_ours(folder: Path, model: Path) -> dict[str, Path]:
    """Export it: as it is, with products in 8 bits, and with weights in groups of 64 as decoders have them."""
    found = {name: folder / f"ours-{name}" for name in ("float32", "int8", "groups")}
    original = lmopt.Model.from_pretrained(model)
    choices: dict[str, dict[str, Any]] = {"float32": {}, "int8": {"products": "int8"}}
    for name, options in choices.items():
        if not found[name].exists():
            lmopt.Exporter("onnx", target="onnxruntime", **options).export(original, found[name])
    if not found["groups"].exists():
        sources = [" ".join(f"w{n}" for n in row) for row in draw_sources(4, seed=9)]
        step = Quantize(bits=8, group_size=64, embedding=8, head=8)
        small = lmopt.Compressor([step]).compress(original, sources=sources)
        exporter = lmopt.Exporter("onnx", target="onnxruntime", accuracy_level=4)
        exporter.export(small, found["groups"])
    return found


def make_theirs(folder: Path, model: Path, peers: Path) -> Path:
    """Convert it by CTranslate2's own tool, which quantizes while it loads."""
    target = folder / "ctranslate2"
    if not target.exists():
        python = peers / "venvs/convert/bin/python"
        words = [
            "-m",
            "ctranslate2.converters.transformers",
            "--model",
            str(model),
            "--output_dir",
            str(target),
        ]
        subprocess.run([str(python), *words], check=True)
    return target


def draw_sources(batch: int, seed: int) -> list[list[int]]:
    """Sources of 10 to 40 tokens with an end."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(10, 41, batch)
    return [[*draw.integers(4, _VOCABULARY, length).tolist(), 2] for length in lengths]


def main() -> None:
    """Make what is missing, run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path, default=PEERS_FOLDER.expanduser())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=32, help="tokens a source")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    model = make_model(asked.folder)
    exported = make_ours(asked.folder, model)
    programs = [our_candidate("lmopt torch", model, "float32", script=_OURS, backend="torch")]
    programs += [
        our_candidate(f"lmopt {kind}", path, kind, script=_OURS, backend="onnxruntime")
        for kind, path in exported.items()
    ]
    try:
        theirs = make_theirs(asked.folder, model, asked.peers)
        python = asked.peers / "venvs/ctranslate2/bin/python"
        programs += [
            Candidate(
                f"CTranslate2 {kind}",
                "ctranslate2_translator_peer.py",
                python,
                theirs,
                kind,
                options={"compute_type": kind},
            )
            for kind in ("float32", "int8")
        ]
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            f"missing: CTranslate2: {error}; `python benchmarks/make_peers.py --only ctranslate2` installs it"
        )
    result: dict[str, Any] = {
        "machine": machine(),
        "threads": asked.threads,
        "new": asked.new,
        "workloads": {},
    }
    print(json.dumps(result["machine"]))
    workers: dict[str, Worker] = {}
    try:
        for one in programs:
            try:
                workers[one.name] = Worker(one, {"threads": asked.threads}, asked.log)
                workers[one.name].pause()
            except WorkerError as error:
                print(f"missing: {one.name}: {error}")
        for batch, beams in ((1, 1), (16, 1), (1, 4), (16, 4)):
            found = run(workers, batch, beams, asked)
            result["workloads"][f"batch {batch}, {beams} beams"] = found
            show(f"batch {batch}, {beams} beams", found)
    finally:
        for worker in workers.values():
            worker.close()
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(workers: dict[str, Worker], batch: int, beams: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Time all programs in turn on the same new sources in each round."""
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    tokens: dict[str, list[list[int]]] = {name: [] for name in workers}
    others: list[float] = []
    for number, name, worker in in_turn(workers, asked.rounds + 1):
        found, share = worker.timed(
            "translate", sources=draw_sources(batch, seed=number), new_tokens=asked.new, num_beams=beams
        )
        tokens[name] += found["tokens"]
        # The first round warms up.
        if number:
            speeds[name].append(batch * asked.new / found["seconds"])
            others.append(share)
    first = tokens["lmopt torch"]
    return {
        name: {
            "tokens_per_s": asdict(Figure.of(speeds[name])),
            "same_rows": sum(a == b for a, b in zip(first, tokens[name], strict=True)),
            "rows": len(first),
            "others": max(others),
        }
        for name in workers
    }


def show(title: str, found: dict[str, Any]) -> None:
    """Print a table."""
    print(f"\n{title}\n\n| program | new tokens/s | rows as eager |\n|---|---:|---:|")
    for name, one in found.items():
        s = one["tokens_per_s"]
        speed = f"{s['median']:.0f} ({s['least']:.0f} .. {s['most']:.0f})"
        print(f"| {name} | {speed} | {one['same_rows']} of {one['rows']} |")


if __name__ == "__main__":
    main()

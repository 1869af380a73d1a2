"""What can be timed: lmopt's own engines and every peer, with the settings that a sweep tries."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEERS_FOLDER = Path("~/.cache/lmopt-peers")
"""Where `make_peers.py` puts environments and models, and where `generation.py` looks for them."""


@dataclass(frozen=True)
class Candidate:
    """One program with one model file.

    Attributes:
        name: As the tables show it.
        script: Its adapter in `peers/`.
        python: Interpreter of its own environment.
        path: Model.
        precision: Of its weights. `"float32"` must give the reference's tokens.
        ours: Whether it is lmopt.
        options: Of its adapter.
        variants: Further options that the sweep tries besides thread counts.
        batch_option: Name of an option that tells it how many rows to make room for.
    """

    name: str
    script: str
    python: Path
    path: Path
    precision: str
    ours: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ({},)
    batch_option: str | None = None

    @property
    def missing(self) -> str | None:
        """What is missing to run it."""
        for part in (self.python, self.path):
            if not part.exists():
                return f"{part} is not there"
        return None


def model_key(model: Path) -> str:
    """Name the folder of a model's conversions: changed weights must not meet old conversions."""
    files = sorted(one for one in model.iterdir() if one.suffix in {".json", ".safetensors", ".bin"})
    facts = [f"{one.name} {one.stat().st_size}" for one in files]
    config = model / "config.json"
    digest = hashlib.sha256("\n".join(facts).encode() + (config.read_bytes() if config.exists() else b""))
    return f"{model.name}-{digest.hexdigest()[:8]}"


def ours(model: Path) -> list[Candidate]:
    """List lmopt's engines on the Hugging Face folder itself, the reference first."""
    return [
        our_candidate("lmopt torch fp32", model, "float32", backend="torch", dtype="float32"),
        our_candidate("lmopt torch bf16", model, "bfloat16", backend="torch", dtype="bfloat16"),
        our_candidate("lmopt onnxruntime portable fp32", model, "float32", backend="onnxruntime"),
    ]


def our_candidate(
    name: str, path: Path, precision: str, *, script: str = "lmopt_peer.py", **options: Any
) -> Candidate:
    """Run lmopt on a folder, with options of `lmopt.Runtime`."""
    return Candidate(name, script, Path(sys.executable), path, precision, ours=True, options=options)


def given_candidate(words: str, *, script: str = "lmopt_peer.py") -> Candidate:
    """Read `NAME=FOLDER[,option=value...]`; options are `lmopt.Runtime`'s, and `precision`."""
    name, _, rest = words.partition("=")
    place, *options = rest.split(",")
    if not rest or not Path(place).exists():
        raise SystemExit(
            f"--ours {words}: expected NAME=FOLDER[,option=value ...], and the folder must exist"
        )
    more: dict[str, Any] = {}
    for one in options:
        key, _, value = one.partition("=")
        more[key] = int(value) if value.isdigit() else value
    precision = str(more.pop("precision", "float32" if "fp32" in name or "float32" in name else "quantized"))
    return our_candidate(
        name, Path(place).resolve(), precision, script=script, **{"backend": "onnxruntime", **more}
    )


def peers(root: Path, model: Path) -> list[Candidate]:
    """Every peer, installed or not."""
    return list(_peers(root / "venvs", root / "models" / model_key(model), model))


def _peers(venvs: Path, models: Path, model: Path) -> Iterator[Candidate]:
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        yield Candidate(
            f"transformers eager {short}",
            "transformers_peer.py",
            Path(sys.executable),
            model,
            dtype,
            options={"dtype": dtype},
        )
    for precision, short in (("float32", "fp32"), ("int8", "int8"), ("int4", "int4")):
        yield Candidate(
            f"onnxruntime-genai {short}",
            "genai_peer.py",
            venvs / "genai/bin/python",
            models / f"genai-{short}",
            precision,
        )
    # OpenVINO computes in bfloat16 where the CPU can, unless told otherwise; in float32 it must be told.
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    for precision, folder in (("float32", "fp32"), ("int8", "int8"), ("int4", "int4-g64")):
        yield Candidate(
            f"OpenVINO GenAI {folder}",
            "openvino_peer.py",
            venvs / "openvino/bin/python",
            models / f"openvino-{folder}",
            precision,
            options=exact if precision == "float32" else {},
            variants=({}, {"ATTENTION_BACKEND": "SDPA"})
            if precision == "float32"
            else ({}, {"ATTENTION_BACKEND": "SDPA"}, exact),
        )
    for precision in ("float32", "int8"):
        yield Candidate(
            f"CTranslate2 {'fp32' if precision == 'float32' else precision}",
            "ctranslate2_peer.py",
            venvs / "ctranslate2/bin/python",
            models / "ctranslate2-fp32",  # quantised while it is loaded
            precision,
            options={"compute_type": precision},
        )
    for precision, short in (("float32", "f32"), ("Q8_0", "q8_0"), ("Q4_1", "q4_1"), ("Q4_0", "q4_0")):
        yield Candidate(
            f"llama.cpp {precision if precision[0] == 'Q' else 'fp32'}",
            "llamacpp_peer.py",
            venvs / "llamacpp/bin/python",
            models / f"llamacpp-{short}.gguf",
            precision,
            variants=({}, {"flash_attention": 0}, {"flash_attention": 1}),
            batch_option="rows",
        )

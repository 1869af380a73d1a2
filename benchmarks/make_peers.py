"""Install the peers that the benchmarks hold lmopt against, and convert one model for each.

    python benchmarks/make_peers.py [MODEL] [--gguf FILE] [--folder FOLDER] [--only genai ...]

MODEL is a Hugging Face folder (default: SmolLM2-135M, fetched as by `lmopt demo`). Each peer gets a
virtual environment of its own below FOLDER, which needs a package index and some gigabytes of disk;
llama.cpp is compiled for this very CPU, which needs a C++ compiler and minutes. The conversions use each
peer's own tool with its default recipe. What is there already is kept; what fails is named with the
reason, and the log tells more. Nothing is fetched from a model hub. `nncf` and `torchao`, whose weights
`compression_peers.py` scores, are made when they are named by `--only`.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from harness.candidates import PEERS_FOLDER, model_key

from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.safefiles import check_gguf

LLAMA_CPP = "llama-cpp-python==0.3.36"
GENAI = "onnxruntime-genai==0.18.0"
CTRANSLATE2 = "ctranslate2==4.8.5"
NNCF = "nncf==3.4.0"
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "genai": (GENAI,),
    "openvino": ("openvino-genai==2026.4.1.0",),
    "llamacpp": (LLAMA_CPP,),
    "ctranslate2": (CTRANSLATE2, "faster-whisper==1.2.1"),
    # Only converts; it may have another transformers than lmopt's own environment.
    "convert": (
        "optimum-intel[openvino]==2.2.0",
        NNCF,
        GENAI,
        CTRANSLATE2,
        "onnx-ir==1.1.0",
        "onnx",
        "sentencepiece",
    ),
    "nncf": (NNCF, "openvino==2026.4.1", "transformers"),
    "torchao": ("torchao", "transformers"),
}
WEIGHTS = ("nncf", "torchao")
PEERS = [name for name in ENVIRONMENTS if name not in ("convert", *WEIGHTS)]
# Number of llama.cpp's file type, by name.
QUANTIZED = {"q8_0": 7, "q4_0": 2, "q4_1": 3}
# GGUF type of most tensors -> name.
_GGUF_TYPES = {0: "f32", 2: "q4_0", 3: "q4_1", 8: "q8_0"}
_QUANTIZE = """
import sys, llama_cpp as lc
options = lc.llama_model_quantize_default_params()
options.ftype = int(sys.argv[3])
sys.exit(lc.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), options))
"""


class StepError(Exception):
    """Why something could not be made."""


class Maker:
    """Makes what is not there yet below a folder.

    Args:
        folder: Where everything goes.
        model: Hugging Face folder.
    """

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.models = folder / "models" / model_key(model)
        self.logs = folder / "logs"
        for one in (folder / "venvs", self.models, self.logs):
            one.mkdir(parents=True, exist_ok=True)

    def python(self, name: str) -> Path:
        """Interpreter of an environment."""
        return self.folder / "venvs" / name / "bin/python"

    def run(self, log: str, *command: str | Path, environment: Mapping[str, str] | None = None) -> None:
        """Run a command, at low priority and without a hub.

        Raises:
            StepError: It failed.
        """
        quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        with (self.logs / f"{log}.log").open("a") as file:
            done = subprocess.run(
                [os.fspath(one) for one in command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **quiet, **(environment or {})},
                preexec_fn=lambda: os.nice(10) and None,
                check=False,
            )
        if done.returncode:
            lines = Path(file.name).read_text(errors="replace").strip().splitlines() or ["no output"]
            raise StepError(f"{lines[-1][:200]} (status {done.returncode}; log: {file.name})")

    def environment(self, name: str) -> None:
        """Make a virtual environment and install into it."""
        ready = self.folder / "venvs" / name
        if self.python(name).exists():
            return
        unfinished = ready.with_name(f"{name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        venv.create(unfinished, with_pip=True)
        packages: list[str | Path] = [*ENVIRONMENTS[name]]
        more = {}
        if name == "llamacpp":
            if not any(map(shutil.which, ("c++", "g++", "clang++"))):
                raise StepError("it is compiled, and there is no C++ compiler (c++, g++, clang++)")
            packages = [self.llama_source()]
            more = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF"}
        if name not in PEERS:
            import torch

            packages.append(f"torch=={torch.__version__.partition('+')[0]}")
        pip = (unfinished / "bin/python", "-m", "pip")
        self.run(name, *pip, "install", *packages, environment=more)
        if name == "convert":
            # It is not needed, and its build often belongs to another torch.
            self.run(name, *pip, "uninstall", "-y", "torchvision")
        # Only what is run by its interpreter moves well; scripts with the old path in them are not used.
        unfinished.rename(ready)

    def llama_source(self) -> Path:
        """Fetch llama.cpp's source, which holds its converter too."""
        source = self.folder / "src" / "llama-cpp-python"
        if not source.exists():
            downloads = self.folder / "src" / "downloads"
            pip = (sys.executable, "-m", "pip", "download")
            self.run(
                "llama-source",
                *pip,
                "--no-deps",
                "--no-binary",
                "llama-cpp-python",
                "-d",
                downloads,
                LLAMA_CPP,
            )
            with tarfile.open(next(downloads.glob("llama_cpp_python-*.tar.gz"))) as packed:
                packed.extractall(downloads, filter="data")
            next(one for one in downloads.iterdir() if one.is_dir()).rename(source)
        return source

    def model_of(self, name: str, make: Callable[[Path], None]) -> None:
        """Make a converted model, under another name until it is whole."""
        if not (self.models / name).exists():
            unfinished = self.models / f"unfinished-{name}"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.unlink(missing_ok=True)
            make(unfinished)
            unfinished.rename(self.models / name)

    def genai(self, precision: str) -> None:
        """Run onnxruntime-genai's own builder."""
        found = self.folder.glob(
            "venvs/convert/lib/python3*/site-packages/onnxruntime_genai/models/builder.py"
        )
        builder = next(found, None)
        if builder is None:
            raise StepError("its builder needs the environment 'convert'")
        words: tuple[str | Path, ...] = (
            "-i",
            self.model,
            "-p",
            precision,
            "-e",
            "cpu",
            "-c",
            self.folder / "cache",
        )
        self.model_of(
            f"genai-{precision}",
            lambda out: self.run(f"genai-{precision}", self.python("convert"), builder, *words, "-o", out),
        )

    def openvino(self, name: str, *words: str) -> None:
        """Run optimum-intel's exporter."""
        command = (self.python("convert"), "-m", "optimum.commands.optimum_cli", "export", "openvino")
        what: tuple[str | Path, ...] = ("-m", self.model, "--task", "text-generation-with-past", *words)
        self.model_of(f"openvino-{name}", lambda out: self.run(f"openvino-{name}", *command, *what, out))

    def ctranslate2(self) -> None:
        """Run CTranslate2's own converter."""
        command = (self.python("convert"), "-m", "ctranslate2.converters.transformers", "--model", self.model)
        # Read by faster-whisper.
        beside = [
            one for one in ("tokenizer.json", "preprocessor_config.json") if (self.model / one).exists()
        ]
        words = ("--copy_files", *beside) if beside else ()
        self.model_of(
            "ctranslate2-fp32",
            lambda out: self.run("ctranslate2-fp32", *command, *words, "--output_dir", out),
        )

    def gguf(self, name: str) -> None:
        """Convert to float32, or quantise that, by llama.cpp itself."""
        if name == "f32":
            script = self.llama_source() / "vendor/llama.cpp/convert_hf_to_gguf.py"
            words: tuple[str | Path, ...] = (
                self.python("convert"),
                script,
                self.model,
                "--outtype",
                "f32",
                "--outfile",
            )
            self.model_of("llamacpp-f32.gguf", lambda out: self.run("llamacpp-f32", *words, out))
            return
        whole = self.models / "llamacpp-f32.gguf"
        if not whole.exists() and not (self.models / f"llamacpp-{name}.gguf").exists():
            raise StepError("it is made from llamacpp-f32.gguf, which is not there")
        self.model_of(
            f"llamacpp-{name}.gguf",
            lambda out: self.run(
                f"llamacpp-{name}", self.python("llamacpp"), "-c", _QUANTIZE, whole, out, str(QUANTIZED[name])
            ),
        )

    def given_gguf(self, file: Path) -> None:
        """Take a GGUF file as it is, in place of a conversion."""
        types = Counter(one.type for one in check_gguf(file).tensors.values() if len(one.shape) > 1)
        name = _GGUF_TYPES.get(types.most_common(1)[0][0])
        if name is None:
            raise StepError(
                f"{file} is of a type that is not timed; expected {', '.join(_GGUF_TYPES.values())}"
            )
        place = self.models / f"llamacpp-{name}.gguf"
        place.unlink(missing_ok=True)
        place.symlink_to(file.resolve())


def main() -> None:
    """Make everything, and name what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="Hugging Face folder; default: SmolLM2-135M")
    parser.add_argument("--gguf", type=Path, help="GGUF file of the same model, timed as it is")
    parser.add_argument("--folder", type=Path, default=PEERS_FOLDER.expanduser())
    parser.add_argument("--only", action="append", default=[], choices=[*PEERS, *WEIGHTS])
    asked = parser.parse_args()
    maker = Maker(asked.folder.resolve(), (asked.model or Path(fetch_smollm2(cache_folder()))).resolve())
    wanted = asked.only or PEERS
    steps: list[tuple[str, Callable[[], None]]] = [
        (f"environment {name}", partial(maker.environment, name))
        for name in [*wanted, *(["convert"] if set(wanted) & set(PEERS) else [])]
    ]
    if asked.gguf:
        steps.append((f"GGUF file {asked.gguf.name}", lambda: maker.given_gguf(asked.gguf)))
    if "genai" in wanted:
        steps += [(f"genai-{one}", partial(maker.genai, one)) for one in ("fp32", "int8", "int4")]
    if "openvino" in wanted:
        steps += [
            ("openvino-fp32", lambda: maker.openvino("fp32", "--weight-format", "fp32")),
            ("openvino-int8", lambda: maker.openvino("int8", "--weight-format", "int8")),
            (
                "openvino-int4-g64",
                lambda: maker.openvino("int4-g64", "--weight-format", "int4", "--group-size", "64"),
            ),
        ]
    if "ctranslate2" in wanted:
        steps.append(("ctranslate2-fp32", maker.ctranslate2))
    if "llamacpp" in wanted:
        steps += [(f"llamacpp-{one}", partial(maker.gguf, one)) for one in ("f32", *QUANTIZED)]
    problems = {}
    for name, make in steps:
        print(f"{name} ...", end=" ", flush=True)
        try:
            make()
            print("ready")
        except (StepError, OSError) as error:
            problems[name] = str(error)
            print("missing")
    for name, why in problems.items():
        print(f"missing: {name}: {why}")
    print(f"now: python benchmarks/generation.py {maker.model} --peers {maker.folder}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

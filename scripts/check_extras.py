"""Every extra can be installed, and gives what it promises.

    python scripts/check_extras.py                              # each extra resolves: nothing is installed
    python scripts/check_extras.py --install base onnxruntime   # ... and these are installed and tried
    python scripts/check_extras.py --install all --constraint constraints/ci.txt

Each is tried in a fresh virtual environment that is thrown away, with the wheel that would be published. Of extras that
need a GPU only the specs are tried. One whose libraries come from an index of their vendor is left out unless `--only`
names it.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BASE = "base"

_ENGINE = "from lmopt.registry import backends; backends.spec({0!r}); backends.load({0!r})"
_STEPS = "from lmopt.registry import steps; [steps.spec(name) for name in steps.names()]"

# What each extra is for, as a line of Python that must run; "base" is no extra at all.
PROMISES = {
    BASE: "import lmopt; lmopt.Runtime, lmopt.Tokenizer, lmopt.Artifact, lmopt.GenerationConfig",
    "torch": _ENGINE.format("torch") + "; import lmopt; lmopt.Model, lmopt.Compressor; " + _STEPS,
    "gguf": "import gguf; from lmopt.safefiles import gguf",
    "onnx": "import onnx, onnx_ir, onnxscript; from lmopt.safefiles import onnx",
    "onnxruntime": _ENGINE.format("onnxruntime"),
    "onnxruntime-gpu": "from lmopt.registry import backends; backends.spec('onnxruntime')",
    "cuda": "from lmopt.accelerators import cuda; cuda()",
    "tensorrt-rtx": "from lmopt.registry import backends; backends.spec('tensorrt')",
    "tensorrt": "from lmopt.registry import backends; backends.spec('tensorrt')",
    "train": "import lmopt, peft; lmopt.train; from lmopt.training import Distill",
    "parallel": "import ray; from lmopt.scaling import batch",
    "privacy": "import opacus, dp_accounting; from lmopt.training import spec",
    "tune": "import optuna, matplotlib; import lmopt.tuning",
    "serve": "import fastapi, uvicorn; import lmopt.serving",
    "eval": "from lmopt.interop.lm_eval import LmoptLM; from lmopt.interop.tasks import evaluate_tasks",
    "cli": "from lmopt.cli.app import app",
    "plot": "import matplotlib; from lmopt.cli import plot",
    "cpu": _ENGINE.format("torch") + "; " + _ENGINE.format("onnxruntime") + "; from lmopt.cli.app import app",
    "gpu": "from lmopt.registry import backends; backends.spec('onnxruntime')",
}

# Their libraries come from an index of a vendor only, which pip must be told of: left out unless they are named.
VENDOR = {"tensorrt"}

# Their modules need PyTorch at import, which the extra leaves to the user's choice of build.
WITH = {"privacy": "torch", "parallel": "torch"}


def extras() -> list[str]:
    """Names of the extras in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"])


def requirement(wheel: str, extra: str) -> str:
    """The wheel with an extra, as pip takes it."""
    names = [one for one in (extra, WITH.get(extra)) if one and one != BASE]
    return f"{wheel}[{','.join(names)}]" if names else wheel


def resolve(wheel: str, extra: str, constraint: list[str]) -> int:
    """Let pip choose distributions for an extra in an empty environment; gives their number."""
    line = [*_PIP, "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *constraint]
    done = subprocess.run([*line, requirement(wheel, extra)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"[{extra}] does not resolve:\n{done.stderr[-3000:]}")
    return len(json.loads(done.stdout)["install"])


def install(wheel: str, extra: str, constraint: list[str], folder: Path) -> None:
    """Install an extra in a fresh environment and run what it promises."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = str(folder / "bin" / "python")
    steps = {
        "installed": [
            *_PIP,
            "--python",
            python,
            "install",
            "--quiet",
            *constraint,
            requirement(wheel, extra),
        ],
        "consistent": [*_PIP, "--python", python, "check"],
        "what it promises": [python, "-I", "-c", PROMISES[extra]],
    }
    for what, command in steps.items():
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"[{extra}] is not {what}:\n{done.stdout[-1500:]}{done.stderr[-3000:]}")


def build() -> str:
    """Build the wheel that would be published."""
    folder = tempfile.mkdtemp(prefix="lmopt-wheel-")
    line = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    return str(next(Path(folder).glob("*.whl")))


_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> None:
    """Check the extras that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [BASE, *extras()]
    parser.add_argument("--install", nargs="*", default=[], choices=[*names, "all"], metavar="EXTRA")
    parser.add_argument(
        "--only", nargs="*", default=None, choices=names, metavar="EXTRA", help="leave out others"
    )
    parser.add_argument("--wheel", help="a wheel that was built already")
    parser.add_argument("--constraint", help="versions to stay with")
    arguments = parser.parse_args()
    if missing := set(names) ^ set(PROMISES):
        raise SystemExit(f"say what these extras promise, or drop them, in {__file__}: {sorted(missing)}")
    wheel = str(Path(arguments.wheel).resolve()) if arguments.wheel else build()
    constraint = ["--constraint", str(Path(arguments.constraint).resolve())] if arguments.constraint else []
    wanted = names if "all" in arguments.install else arguments.install
    public = [name for name in names if name not in VENDOR]
    for extra in arguments.only if arguments.only is not None else public:
        start = time.monotonic()
        count = resolve(wheel, extra, constraint)
        said = f"{extra:16} resolves to {count:3} distributions"
        if extra in wanted:
            folder = Path(tempfile.mkdtemp(prefix="lmopt-extra-"))
            try:
                install(wheel, extra, constraint, folder / "venv")
            finally:
                shutil.rmtree(folder)
            said += ", installs and gives what it promises"
        print(f"{said} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()

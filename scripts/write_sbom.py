"""Write a bill of materials (CycloneDX JSON) of lmopt and of all that an installation of it brings.

    python scripts/write_sbom.py --wheel dist/lmopt-*.whl --output lmopt.cdx.json
    python scripts/write_sbom.py --extra cpu --constraint constraints/ci.txt --output lmopt-cpu.cdx.json

Installs the wheel in a fresh environment and describes that by `cyclonedx-py`, which is fetched into another one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = "cyclonedx-bom>=7,<8"


def main() -> None:
    """Make the two environments, describe one by the other, check the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", help="a wheel that was built already; default: this repository")
    parser.add_argument("--extra", default="onnxruntime", help="what to install beside the base")
    parser.add_argument("--constraint", help="versions to stay with")
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    source = str(Path(arguments.wheel).resolve()) if arguments.wheel else str(ROOT)
    constraint = ["--constraint", arguments.constraint] if arguments.constraint else []
    with tempfile.TemporaryDirectory(prefix="lmopt-sbom-") as name:
        folder = Path(name)
        for place in ("subject", "tool"):
            venv.create(folder / place, with_pip=False, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python"]
        subject, tool = (str(folder / place / "bin" / "python") for place in ("subject", "tool"))
        line = [*pip, subject, "install", "--quiet", *constraint, f"{source}[{arguments.extra}]"]
        subprocess.run(line, check=True)
        subprocess.run([*pip, tool, "install", "--quiet", TOOL], check=True)
        describe = ["-m", "cyclonedx_py", "environment", "--output-format", "JSON", "--output-reproducible"]
        describe += ["--pyproject", str(ROOT / "pyproject.toml"), "--mc-type", "library"]
        done = subprocess.run([tool, *describe, subject], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    parts = {part["name"] for part in found["components"]}
    if found["bomFormat"] != "CycloneDX" or not {"numpy", "tokenizers"} <= parts:
        raise SystemExit(f"this is no bill of materials of lmopt: {sorted(parts)}")
    arguments.output.write_text(done.stdout, encoding="utf-8")
    print(f"{arguments.output}: {len(parts)} components, CycloneDX {found['specVersion']}")


if __name__ == "__main__":
    main()

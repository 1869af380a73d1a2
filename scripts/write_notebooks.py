"""Run the notebooks of examples/notebooks and write them with what they show.

    python scripts/write_notebooks.py            # all of them; the machine should have nothing else to do
    python scripts/write_notebooks.py own_lstm   # one of them

The `.py` file beside each `.ipynb` is its source: edit that, then run this. The notebook remembers the hash of the
source that its outputs come from, and a test compares the two, so that no notebook shows what its code no longer does.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"


def source_hash(path: Path) -> str:
    """Identify a notebook's source."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(path: Path, folder: Path, *, timeout_s: int = 1800) -> nbformat.NotebookNode:
    """Run a notebook's source in a folder; gives the notebook with its outputs."""
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=timeout_s, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        # When each cell ran is no result, and differs at every run.
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            # Warnings of libraries name files of this machine.
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("metadata", {}).clear()
                if "text/html" in output.get("data", {}):
                    output["data"].pop("text/plain", None)  # the same once more, with folders of this machine
    notebook.metadata["lmopt_source_sha256"] = source_hash(path)
    return notebook


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    parser.add_argument("names", nargs="*", choices=[*names, []], metavar="NAME")
    for name in parser.parse_args().names or names:
        source = FOLDER / f"{name}.py"
        with tempfile.TemporaryDirectory(prefix="lmopt-notebook-") as folder:
            notebook = run(source, Path(folder))
        for number, cell in enumerate(notebook.cells):
            cell["id"] = f"cell-{number}"  # random otherwise: a change would touch every cell
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        print(f"{source.with_suffix('.ipynb').name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()

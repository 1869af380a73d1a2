"""Write constraints/ci.txt: the versions that the running environment has of all that lmopt needs.

    python scripts/write_constraints.py            # in the environment that the tests have passed in
    python -m pip install -c constraints/ci.txt "lmopt[cpu]"

Only what follows from lmopt's own requirements, its extras and its dependency groups is listed: what else is installed
here does not matter. Extras that are not installed here (those of GPUs) are left out.
"""

import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "constraints" / "ci.txt"


def wanted(project: dict[str, Any]) -> list[str]:
    """Requirements of lmopt itself, of its extras, and of its dependency groups."""
    found = list(project["project"]["dependencies"])
    for extra in project["project"]["optional-dependencies"].values():
        found += extra
    for group in project["dependency-groups"].values():
        found += [one for one in group if isinstance(one, str)]
    return found


def closure(requirements: Iterable[str]) -> dict[str, str]:
    """Follow the metadata of installed distributions; gives name to version."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(text) for text in requirements]
    while queue:
        one = queue.pop()
        name, extras = canonicalize_name(one.name), frozenset(one.extras)
        if (
            (name, extras) in seen
            or name == "lmopt"
            or (one.marker and not one.marker.evaluate({"extra": ""}))
        ):
            continue
        seen.add((name, extras))
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        # The part behind "+" says which build it is, and an index has its own.
        versions[name] = Version(installed.version).public
        for text in installed.requires or []:
            need = Requirement(text)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                need.marker = None
                queue.append(need)
    return versions


def render() -> str:
    """The file's content."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    versions = closure(wanted(project))
    head = [
        "# Versions that lmopt's tests last passed with. Written by `python scripts/write_constraints.py`.",
        f"# CPython {sys.version_info.major}.{sys.version_info.minor}, {platform.system()} {platform.machine()}.",
    ]
    return "\n".join([*head, *(f"{name}=={versions[name]}" for name in sorted(versions))]) + "\n"


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(render(), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)}: {len(TARGET.read_text().splitlines()) - 2} versions")

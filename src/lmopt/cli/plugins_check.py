"""Does every plug-in import? Tried in another process, so that a native crash is a finding and no end.

Run as a program it imports the plug-ins named by its arguments (`backend:torch`, `exporter:onnx`) and prints
one line of JSON for each.
"""

import importlib.metadata
import json
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlparse

from lmopt.cli.finding import Finding
from lmopt.cli.output import Tell
from lmopt.errors import LmoptError
from lmopt.registry import PluginStatus, Registry, backends, exporters, pip_line, steps

_REGISTRIES: Final[dict[str, Registry[Any]]] = {
    "backend": backends,
    "exporter": exporters,
    "compressor": steps,
}
_LIMIT_S: Final = 300
_MARK: Final = "lmopt-plugin "


def check_plugins(tell: Tell) -> list[Finding]:
    """Import every engine, exporter and compression step that seems ready, and name what the others lack."""
    every = {f"{kind}:{one.name}": one for kind, registry in _REGISTRIES.items() for one in registry.status()}
    ready = [key for key, one in every.items() if not one.problem]
    problems: dict[str, str] = {}
    while left := [key for key in ready if key not in problems]:
        tell("import engines", len(problems), len(ready))
        died = _import_some(left, problems)
        if died:
            # The process ended without a word on the first that is still left: that one ended it.
            first = next(key for key in ready if key not in problems)
            problems[first] = died
    return [_finding(key, one, problems.get(key, "")) for key, one in every.items()]


def stale_entry_points() -> list[Finding]:
    """Compare the plug-ins that editable installs declare now with those that pip recorded then."""
    found = []
    for distribution in importlib.metadata.distributions():
        folder = _editable_folder(distribution)
        if folder is None:
            continue
        recorded = {(ep.group, ep.name, ep.value) for ep in distribution.entry_points}
        try:
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            tables = project.get("entry-points", {})
            declared = {(g, name, value) for g, table in tables.items() for name, value in table.items()}
        except (OSError, ValueError, KeyError, AttributeError):
            continue
        ours = {one for one in recorded | declared if one[0].startswith("lmopt.")}
        changed = sorted(f"{group} {name}" for group, name, _ in ours & (recorded ^ declared))
        name = distribution.metadata["Name"]
        if changed:
            text = f"the installed metadata is older than {folder / 'pyproject.toml'}: {', '.join(changed)}"
            found.append(Finding("packages", name, "broken", text, pip_line(f'-e "{folder}"')))
        elif ours:
            found.append(
                Finding("packages", name, "ok", f"editable install of {folder}, entry points are current")
            )
    return found


def _editable_folder(distribution: importlib.metadata.Distribution) -> Path | None:
    try:
        about = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return None
    if not about.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(about.get("url", "")).path))


def _import_some(keys: list[str], problems: dict[str, str]) -> str:
    """Import in a child; fill in the answers; say how it died, `""` if it did not."""
    command = [sys.executable, "-m", "lmopt.cli.plugins_check", *keys]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as late:
        _answers(late.stdout.decode() if isinstance(late.stdout, bytes) else "", problems)
        return f"importing it took more than {_LIMIT_S} s"
    _answers(done.stdout, problems)
    if all(key in problems for key in keys):
        return ""
    if done.returncode < 0:
        return f"importing it kills the process ({signal.Signals(-done.returncode).name})"
    words = done.stderr.strip().splitlines() or ["without a word"]
    return f"importing it ends the process with status {done.returncode}: {words[-1]}"


def _answers(output: str, problems: dict[str, str]) -> None:
    for line in output.splitlines():
        if line.startswith(_MARK):
            key, problem = json.loads(line.removeprefix(_MARK))
            problems[key] = problem


def _finding(key: str, one: PluginStatus[Any], problem: str) -> Finding:
    kind, _, name = key.partition(":")
    area = f"{kind}s"
    if one.spec is None:
        return Finding(area, name, "broken", one.problem, pip_line(f"--force-reinstall {one.distribution}"))
    if one.problem:
        missing = [need for need in one.spec.requires if not need.is_met()]
        wants = " ".join(f'"{install}"' for install in dict.fromkeys(need.install for need in missing))
        modules = ", ".join(need.module for need in missing)
        return Finding(area, name, "missing", f"the module {modules} is not installed", pip_line(wants))
    if problem:
        wants = " ".join(f'"{i}"' for i in dict.fromkeys(need.install for need in one.spec.requires))
        return Finding(
            area, name, "broken", problem, pip_line(f"--force-reinstall {wants or one.distribution}")
        )
    versions = ", ".join(_versions([need.module for need in one.spec.requires]))
    return Finding(
        area, name, "ok", f"of {one.distribution or 'this process'}" + (f"; {versions}" if versions else "")
    )


def _versions(modules: list[str]) -> Iterator[str]:
    owners = importlib.metadata.packages_distributions()
    for module in modules:
        for owner in dict.fromkeys(owners.get(module, [])):
            yield f"{owner} {importlib.metadata.version(owner)}"


def _main(keys: list[str]) -> None:
    for key in keys:
        kind, _, name = key.partition(":")
        try:
            _REGISTRIES[kind].load(name)
            problem = ""
        except LmoptError as error:
            problem = str(error)
        sys.stdout.write(f"\n{_MARK}{json.dumps([key, problem])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(sys.argv[1:])

"""lmopt opens no connection and writes nothing outside its cache and the caller's target.

A process of its own does the main job in a home folder that is empty, without `CI` in its
environment (ONNX Runtime reports nothing where `CI` is set, so with it the test would prove nothing), in
a network namespace without a network where that is permitted, watched by strace.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

MAIN_JOB = """
import sys
import lmopt
folder, target = sys.argv[1:]
model = lmopt.Model.from_pretrained(folder)
lmopt.Exporter("onnx").export(model, target)
for source, backend in ((model, "torch"), (target, "onnxruntime"), (model, "onnxruntime")):
    with lmopt.Runtime(source, backend=backend) as runtime:
        print(runtime.generate("the cat sat on", max_new_tokens=4).text)
        print(runtime.report())
"""

INDISCREET = """
import pathlib, socket
pathlib.Path.home().joinpath("deviceid").write_text("1234")
for kind, address in ((socket.SOCK_STREAM, ("192.0.2.1", 443)), (socket.SOCK_DGRAM, ("192.0.2.2", 53))):
    with socket.socket(socket.AF_INET, kind) as one:
        one.settimeout(0.2)
        try:
            one.sendto(b"", address) if kind == socket.SOCK_DGRAM else one.connect(address)
        except OSError:
            pass
"""

DISCREET = """
import os, socket, subprocess
with socket.create_server(("127.0.0.1", 0)) as server:
    try:
        socket.create_connection(server.getsockname(), timeout=1).close()
    except OSError:
        pass  # loopback is down in a fresh network namespace
subprocess.run(["true"], stdout=subprocess.DEVNULL)
folder = os.environ["LMOPT_CACHE"]
os.makedirs(folder)
at = os.open(folder, os.O_RDONLY)
os.close(os.open("inside", os.O_CREAT | os.O_WRONLY, dir_fd=at))
"""

# Left of "(": the call; then where the path starts from, the path, and the flags.
_OPENED = re.compile(
    r'(?:openat|openat2)\((?:AT_FDCWD|\d+)(?:<(?P<base>[^>]*)>)?, "(?P<path>[^"]*)", (?P<flags>[^)]*)'
)
_MADE = re.compile(r'(?:mkdir|creat)\("(?P<path>[^"]*)"')
_MADE_AT = re.compile(r'mkdirat\((?:AT_FDCWD|\d+)(?:<(?P<base>[^>]*)>)?, "(?P<path>[^"]*)"')
_ADDRESS = re.compile(r'inet_addr\("([^"]*)"\)|inet_pton\(AF_INET6, "([^"]*)"')


@dataclass(frozen=True)
class Watched:
    """What a process did.

    Attributes:
        written: Paths that it opened for writing or made, outside `/dev` and `/proc`.
        reached: Addresses beyond this machine that it connected or sent to.
        home: Its home folder.
        cache: lmopt's cache in that home folder.
        scratch: Its folder for temporary files.
        output: What it printed.
    """

    written: frozenset[Path]
    reached: frozenset[str]
    home: Path
    cache: Path
    scratch: Path
    output: str

    def strays(self, *allowed: Path) -> set[Path]:
        """Paths that it wrote outside some folders; to make a folder's parents is allowed with it."""
        return {
            path
            for path in self.written
            if not any(path.is_relative_to(one) or one.is_relative_to(path) for one in allowed)
        }


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _watch(code: str, place: Path, *arguments: str) -> Watched:
    """Run code under strace in an empty home folder below `place`."""
    home, scratch, trace = place / "home", place / "scratch", place / "trace"
    home.mkdir()
    scratch.mkdir()
    unwanted = ("CI", "LMOPT_", "XDG_", "ORT_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTEST_", "TORCH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    # Byte code is Python's own affair, not lmopt's.
    environment |= {"HOME": str(home), "TMPDIR": str(scratch), "PYTHONDONTWRITEBYTECODE": "1"}
    cache = home / ".cache" / "lmopt"
    if code is DISCREET:
        environment["LMOPT_CACHE"] = str(cache)
    calls = "connect,sendto,sendmsg,sendmmsg,openat,openat2,creat,mkdir,mkdirat"
    command = ["strace", "-f", "-qq", "-y", "-s", "4096", "-e", f"trace={calls}", "-o", str(trace)]
    command += [sys.executable, "-c", code, *arguments]
    if _works("unshare", "-rn", "true"):
        command = ["unshare", "-rn", *command]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    written, reached = set(), set()
    for line in trace.read_text(errors="replace").splitlines():
        if opened := _OPENED.search(line):
            if re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TMPFILE", opened["flags"]):
                written.add(home / (opened["base"] or "") / opened["path"])
        elif made := _MADE.search(line) or _MADE_AT.search(line):
            written.add(home / (made.groupdict().get("base") or "") / made["path"])
        elif re.search(r"\b(?:connect|sendto|sendmsg|sendmmsg)\(", line):
            found = {"".join(groups) for groups in _ADDRESS.findall(line)}
            reached |= {one for one in found if one != "::1" and not one.startswith("127.")}
    files = {Path(os.path.normpath(path)) for path in written}
    files = {path for path in files if not path.is_relative_to("/dev") and not path.is_relative_to("/proc")}
    return Watched(frozenset(files), frozenset(reached), home, cache, scratch, done.stdout)


@pytest.fixture(autouse=True)
def _strace(missing: Callable[[str], NoReturn]) -> None:
    if not shutil.which("strace"):
        missing("watching system calls needs strace; install it: apt-get install strace")
    if not _works("strace", "-o", "/dev/null", "true"):
        missing("strace is installed, but this machine does not let it watch a process (ptrace)")


def test_the_watch_notices_an_indiscreet_process(tmp_path: Path) -> None:
    seen = _watch(INDISCREET, tmp_path)
    assert seen.strays(seen.cache, seen.scratch) == {seen.home / "deviceid"}
    assert seen.reached == {"192.0.2.1", "192.0.2.2"}


def test_the_watch_lets_a_discreet_process_pass(tmp_path: Path) -> None:
    seen = _watch(DISCREET, tmp_path)
    assert seen.cache / "inside" in seen.written
    assert not seen.strays(seen.home / ".cache")
    assert not seen.reached


def test_the_main_job_stays_at_home(tiny_folder: Path, tmp_path: Path) -> None:
    """Import, load, export, and generation on each engine, with the cache where it is by default."""
    target = tmp_path / "target"
    before = {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}
    seen = _watch(MAIN_JOB, tmp_path, str(tiny_folder), str(target))
    assert (target / "lmopt.json").is_file()
    assert not seen.reached
    # An artefact is staged beside its target, and renamed.
    staged = {path for path in seen.written if path.name.startswith(f".{target.name}.")}
    assert not seen.strays(seen.cache, seen.scratch, target, *staged)
    # Temporary files are gone. (Tracing makes torch leave an empty folder, `torchinductor_USER`.)
    left = [path for place in (seen.home, seen.scratch) for path in place.rglob("*") if not path.is_dir()]
    assert not [path for path in left if not path.is_relative_to(seen.cache)]
    assert {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()} == before

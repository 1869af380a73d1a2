"""`kill -9` at any system call leaves the old artefact or the new one; the order on disk is right."""

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from lmopt.artifact import Artifact, publish
from lmopt.errors import ArtifactNotFoundError

CALLS = "write,fsync,fchmod,rename,renameat2,mkdir,flock,unlinkat,rmdir,unlink,close"
CHILD = """
import sys
from lmopt.artifact import publish
print(end="", flush=True)
with publish(sys.argv[1], overwrite=True) as draft:
    (draft.path / "sub").mkdir()
    for name in ("sub/a.txt", "b.txt"):
        with open(draft.path / name, "w") as file:
            file.write("new")
"""
FILES = {"sub/a.txt", "b.txt"}


def put_old(target: Path) -> None:
    with publish(target) as draft:
        (draft.path / "b.txt").write_text("old")


def state(target: Path) -> str:
    """Say which artefact is there; a half one raises."""
    try:
        artifact = Artifact.open(target)
    except ArtifactNotFoundError:
        assert not target.exists()
        return "nothing"
    texts = {name: artifact.file(name).read_text() for name in artifact.manifest["files"]}
    assert texts in ({"b.txt": "old"}, dict.fromkeys(FILES, "new"))
    return texts["b.txt"]


def calls_on(place: Path, log: str) -> list[tuple[str, int]]:
    """Calls that touch a folder, each by its name and its number among the calls of that name."""
    counts: Counter[str] = Counter()
    found = []
    for line in log.splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call is None:
            continue
        counts[call[1]] += 1
        if str(place) in line:
            found.append((call[1], counts[call[1]]))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("before", ["nothing", "old"])
def test_killed_at_any_call(tmp_path: Path, strace, full_sweep: bool, before: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    target = place / "artefact"
    if before == "old":
        put_old(target)
    points = calls_on(place, strace(["-e", f"trace={CALLS}"], CHILD, str(target)).stdout)
    assert state(target) == "new"
    assert len(points) > 20
    if not full_sweep:
        # Every fifth, and all around the move into place.
        move = next(number for number, (name, _) in enumerate(points) if name.startswith("rename"))
        points = [points[i] for i in sorted({*range(0, len(points), 5), *range(move - 1, move + 3)})]
    seen = set()
    for name, count in points:
        for left in place.iterdir():
            shutil.rmtree(left)
        if before == "old":
            put_old(target)
        done = strace(
            ["-e", f"trace={CALLS}", "-e", f"inject={name}:signal=SIGKILL:when={count}"], CHILD, str(target)
        )
        assert done.returncode in (-9, 137), f"not killed at {name} number {count}: {done.stderr}"
        seen.add(state(target))
        with publish(target, overwrite=True) as draft:
            (draft.path / "b.txt").write_text("old")
        assert os.listdir(place) == ["artefact"], f"after a kill at {name} number {count}"
    assert seen == {before, "new"}


def test_order_on_disk(tmp_path: Path, strace) -> None:
    target = tmp_path / "place" / "artefact"
    target.parent.mkdir()
    put_old(target)
    done = strace(["-e", "trace=fsync,rename,renameat,renameat2,write,openat"], CHILD, str(target))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    stage = re.search(r"/\.artefact\.tmp-\d+-[0-9a-f]{8}", done.stdout)[0]
    folder = str(target.parent) + stage

    def synced(path: str) -> int:
        (number,) = [
            i for i, line in enumerate(lines) if re.search(rf"fsync\(\d+<{re.escape(path)}>\)", line)
        ]
        return number

    moved = next(i for i, line in enumerate(lines) if "rename" in line)
    assert "RENAME_EXCHANGE" in lines[moved]
    manifest = next(i for i, line in enumerate(lines) if "lmopt.json" in line and "O_CREAT" in line)
    for name in FILES:
        assert synced(f"{folder}/{name}") < manifest
    assert synced(f"{folder}/sub") < manifest < synced(f"{folder}/lmopt.json") < synced(folder) < moved
    assert moved < synced(str(target.parent))
    last_write = max(i for i, line in enumerate(lines) if " write(" in line and folder in line)
    assert last_write < synced(f"{folder}/lmopt.json")

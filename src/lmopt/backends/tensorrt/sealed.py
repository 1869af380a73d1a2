"""Bytes on this user's disk that are only read again where this user's own key has sealed them.

A plan is native code, and a plain hash beside a file stops damage but no attacker. So a record of size and
SHA-256 is sealed with HMAC-SHA-256 by a random key that only this user can read, and owners, permissions and
links are checked before anything is read.
"""

import hashlib
import hmac
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from filelock import FileLock, Timeout

from lmopt.artifact import durable
from lmopt.artifact.cache import TIMEOUT
from lmopt.artifact.manifest import canonical
from lmopt.errors import ArtifactError, CorruptArtifactError, LockTimeoutError, UnsafeArtifactError
from lmopt.safefiles import parse_json

CONTENT: Final = "plan"
RECORD: Final = "record.json"
KEY: Final = "key"
_KEY_BYTES: Final = 32
_MOST_RECORD: Final = 1 << 22
_FOLDER: Final = 0o700
_FILE: Final = 0o600


class SealedFolder:
    """Entries of bytes with a record each, in a folder that belongs to this user alone.

    Args:
        path: The folder; it is made where it is not there.

    Raises:
        UnsafeArtifactError: It, or its key, is somebody else's, open to others, or a link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=_FOLDER, parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"the cache {path} cannot be written ({error}). Choose another: export LMOPT_CACHE=FOLDER"
            ) from error
        _require_own(path, folder=True)

    def read(self, name: str) -> tuple[bytes, dict[str, Any]] | None:
        """Give the content and the record of an entry, `None` where there is none.

        Raises:
            UnsafeArtifactError: A part is somebody else's, open to others, or a link.
            CorruptArtifactError: A part is missing, damaged, or was not sealed by this user's key.
        """
        entry = self.path / name
        if not os.path.lexists(entry):
            return None
        _require_own(entry, folder=True)
        raw = _read(entry / RECORD, _MOST_RECORD)
        sealed = parse_json(raw, str(entry / RECORD))
        if (
            not isinstance(sealed, dict)
            or sealed.keys() != {"seal", "record"}
            or not isinstance(sealed["record"], dict)
        ):
            raise CorruptArtifactError(f"{entry / RECORD} is not a record")
        record: dict[str, Any] = sealed["record"]
        if not hmac.compare_digest(str(sealed["seal"]).encode(), self._seal(name, record).encode()):
            raise CorruptArtifactError(f"{entry / RECORD} was not sealed by this user's key")
        content = _read(entry / CONTENT, record["bytes"])
        if len(content) != record["bytes"] or hashlib.sha256(content).hexdigest() != record["sha256"]:
            raise CorruptArtifactError(f"{entry / CONTENT} is not as it was written")
        return content, record

    def write(self, name: str, content: bytes, record: Mapping[str, Any]) -> None:
        """Put an entry there in one step, in place of one that may be there; the lock must be held."""
        entry = self.path / name
        staging = self.path / f".{name}.tmp-{secrets.token_hex(4)}"
        aside = staging.with_suffix(".old")
        full = {**record, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        staging.mkdir(mode=_FOLDER)
        try:
            durable.write(staging / CONTENT, content, mode=_FILE)
            body = canonical({"record": full, "seal": self._seal(name, full)}, RECORD)
            durable.write(staging / RECORD, body, mode=_FILE)
            durable.sync(staging, mode=_FOLDER)
            durable.move_into_place(staging, entry, aside, replace=entry.is_dir() and not entry.is_symlink())
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove an entry, whatever it is."""
        entry = self.path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)

    @contextmanager
    def locked(self, name: str, timeout: float = TIMEOUT) -> Iterator[None]:
        """Hold the lock of an entry, which the kernel frees if this process dies.

        Raises:
            LockTimeoutError: Another process has held it for longer than `timeout` seconds.
        """
        path = self.path / f"{name}.lock"
        try:
            with FileLock(path, timeout=timeout, mode=_FILE):
                self._sweep(name)
                yield
        except Timeout as error:
            raise LockTimeoutError(
                f"another process has held {path} for {timeout:g} s: it builds the same engine. "
                f"Wait for it, or see which it is: fuser -v {path}"
            ) from error

    def _sweep(self, name: str) -> None:
        """Remove what a builder that was killed has left; the lock is held, so none is at work."""
        for rest in self.path.glob(f".{name}.tmp-*"):
            shutil.rmtree(rest, ignore_errors=True)

    def _seal(self, name: str, record: Mapping[str, Any]) -> str:
        return hmac.new(
            self._key(), canonical({"name": name, "record": record}, RECORD), "sha256"
        ).hexdigest()

    def _key(self) -> bytes:
        """Read this user's key, or make one."""
        path = self.path / KEY
        if not os.path.lexists(path):
            fresh = self.path / f".{KEY}.{secrets.token_hex(8)}"
            durable.write(fresh, secrets.token_bytes(_KEY_BYTES), mode=_FILE)
            try:
                os.link(fresh, path)  # fails where another process was quicker
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        key = _read(path, _KEY_BYTES)
        if len(key) != _KEY_BYTES:
            raise UnsafeArtifactError(
                f"{path} is no key. Remove it and what it has sealed: rm -r {self.path}"
            )
        return key


def _read(path: Path, most: int) -> bytes:
    """Read a file of this user's own, not over a link, and not more than it should have."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise CorruptArtifactError(f"{path} is missing") from error
    except OSError as error:
        raise UnsafeArtifactError(f"{path} is not read: {error.strerror}; it may be a link") from error
    with open(descriptor, "rb") as file:
        _check_own(os.fstat(descriptor), path, folder=False)
        return file.read(most + 1)


def _require_own(path: Path, *, folder: bool) -> None:
    _check_own(os.lstat(path), path, folder=folder)


def _check_own(status: os.stat_result, path: Path, *, folder: bool) -> None:
    right = stat.S_ISDIR(status.st_mode) if folder else stat.S_ISREG(status.st_mode)
    if not right:
        raise UnsafeArtifactError(
            f"{path} is not a {'folder' if folder else 'regular file'} of its own; engines are native code and are not "
            f"read over links. Remove it: rm {path}"
        )
    if status.st_uid != os.getuid():
        raise UnsafeArtifactError(
            f"{path} belongs to user {status.st_uid}, this process runs as {os.getuid()}; engines are native code and "
            "only read where they are one's own. Choose another cache: export LMOPT_CACHE=FOLDER"
        )
    if status.st_mode & 0o077:
        raise UnsafeArtifactError(
            f"{path} is open to other users (mode {stat.S_IMODE(status.st_mode):04o}); engines are native code. "
            f"If nobody else has written there: chmod go= {path}"
        )

"""Read a sound file as samples."""

import os
import wave
from pathlib import Path

import numpy as np

from lmopt.errors import ArtifactNotFoundError, InputError, NotInstalledError
from lmopt.registry import pip_line
from lmopt.types import FloatArray


def read_audio(path: str | os.PathLike[str], sampling_rate: int) -> FloatArray:
    """Read a sound file as one channel.

    WAV files of whole numbers are read by the standard library, everything else (FLAC, OGG, MP3, WAV of floats)
    by the package soundfile. Several channels become their mean. Nothing is resampled.

    Args:
        path: The file.
        sampling_rate: Samples a second that it must have.

    Returns:
        `(samples,)` float32 in -1 .. 1.

    Raises:
        ArtifactNotFoundError: There is no such file.
        InputError: It is damaged, empty, or has another sampling rate.
        NotInstalledError: It needs soundfile, which is missing; the message has the pip line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ArtifactNotFoundError(f"there is no sound file at {path}")
    samples, rate = _read_wav(path) or _read_any(path)
    if rate != sampling_rate:
        raise InputError(
            f"{path} has {rate} samples a second; expected {sampling_rate}. Resample it: "
            f"ffmpeg -i {path} -ac 1 -ar {sampling_rate} {path.with_suffix('')}-{sampling_rate}.wav"
        )
    if not samples.size:
        raise InputError(f"{path} holds no sound")
    mono: FloatArray = samples.mean(axis=1, dtype=np.float32)
    return mono


def _read_wav(path: Path) -> tuple[FloatArray, int] | None:
    """Read a WAV file of whole numbers as `(samples, channels)`; `None` for any other file."""
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            data = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        return None
    data = data[: len(data) // (channels * width) * (channels * width)]
    numbers: FloatArray
    if width == 1:
        numbers = np.frombuffer(data, np.uint8).astype(np.float32) - np.float32(128)
    elif width == 3:
        # Three bytes as the upper ones of four.
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        numbers = wide.reshape(-1).view("<i4").astype(np.float32) / np.float32(256)
    else:
        numbers = np.frombuffer(data, f"<i{width}").astype(np.float32)
    return (numbers / np.float32(2 ** (8 * width - 1))).reshape(-1, channels), rate


def _read_any(path: Path) -> tuple[FloatArray, int]:
    try:
        import soundfile
    except ImportError as error:
        raise NotInstalledError(
            f"{path} is no WAV file of whole numbers; other sound files need soundfile: {pip_line('soundfile')}"
        ) from error
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{path} cannot be read as sound: {error}") from error
    return samples, int(rate)

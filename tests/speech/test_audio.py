"""Sound files are read as samples, whatever their width and channels."""

import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from lmopt.errors import ArtifactNotFoundError, InputError, NotInstalledError
from lmopt.speech import read_audio

SAMPLES = np.array([0.0, 0.5, -0.5, 0.999, -1.0])


def write(path: Path, width: int, channels: int = 1, rate: int = 16000) -> Path:
    whole = np.round(SAMPLES * 2 ** (8 * width - 1)).clip(-(2 ** (8 * width - 1)), 2 ** (8 * width - 1) - 1)
    numbers = np.repeat(whole[:, None], channels, axis=1).astype("<i4")
    if width == 1:
        data = (numbers + 128).astype(np.uint8).tobytes()
    else:
        data = numbers.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_widths_and_channels(tmp_path: Path, width: int, channels: int) -> None:
    found = read_audio(write(tmp_path / "a.wav", width, channels), 16000)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, SAMPLES, atol=2.0 ** (1 - 8 * width) + 1e-7)


def test_another_rate_names_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 2, rate=44100)
    with pytest.raises(InputError, match=r"44100 samples a second; expected 16000.*ffmpeg -i .*a\.wav"):
        read_audio(path, 16000)


def test_other_files_need_soundfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.flac"
    path.write_bytes(b"fLaC" + bytes(100))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(NotInstalledError, match="pip install soundfile"):
        read_audio(path, 16000)
    with pytest.raises(ArtifactNotFoundError, match="no sound file"):
        read_audio(tmp_path / "none.wav", 16000)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
    with pytest.raises(InputError, match="holds no sound"):
        read_audio(tmp_path / "a.wav", 16000)

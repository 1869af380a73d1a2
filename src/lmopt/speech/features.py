"""Log-mel features as Whisper reads them (Radford et al., arXiv:2212.04356), in NumPy."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lmopt.errors import ContextLengthError, DtypeError, ShapeError
from lmopt.speech.cutting import cut
from lmopt.types import FloatArray, SourceFacts

PREPROCESSOR: Final = "preprocessor_config.json"
"""File in which transformers looks for how sound becomes features."""

_WINDOW = 400
_HOP = 160
_MOST_HZ = 8000.0
_FLOOR = 1e-10
_RANGE = 8.0  # decades below the loudest value that are told apart


@dataclass(frozen=True)
class LogMel:
    """Turns sound into features; equal to transformers' `WhisperFeatureExtractor`.

    Attributes:
        size: Mel bins.
        frames: Frames that the encoder takes, one each 10 ms: shorter sound is padded with silence.
    """

    size: int
    frames: int

    sampling_rate = 16000

    @property
    def seconds(self) -> float:
        """Longest sound in seconds."""
        return self.frames * _HOP / self.sampling_rate

    def describe(self) -> dict[str, Any]:
        """Give the `preprocessor_config.json` by which transformers makes the same features."""
        return {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": self.size,
            "sampling_rate": self.sampling_rate,
            "hop_length": _HOP,
            "n_fft": _WINDOW,
            "chunk_length": self.frames * _HOP // self.sampling_rate,
            "n_samples": self.frames * _HOP,
            "nb_max_frames": self.frames,
            "padding_side": "right",
            "padding_value": 0.0,
            "dither": 0.0,
            "return_attention_mask": False,
        }

    def __call__(self, samples: NDArray[np.floating]) -> FloatArray:
        """Compute the features of one sound.

        Args:
            samples: `(samples,)` floats in -1 .. 1, 16,000 a second.

        Returns:
            `(size, frames)` float32.

        Raises:
            DtypeError: The samples are no floats.
            ShapeError: They have several axes, or there are none.
            ContextLengthError: The sound is longer than the encoder takes; see `pieces`.
        """
        samples = _checked(samples)
        length = self.frames * _HOP
        if samples.size > length:
            raise ContextLengthError(
                f"the sound is {samples.size / self.sampling_rate:.1f} s long; the encoder takes {self.seconds:g} s. "
                "LogMel.pieces cuts it."
            )
        padded = np.zeros(length, np.float64)
        padded[: samples.size] = samples
        padded = np.pad(padded, _WINDOW // 2, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP][: self.frames]
        power = np.abs(np.fft.rfft(windows * self._window)) ** 2
        decades = np.log10(np.maximum(power @ self._filters, _FLOOR)).T
        decades = np.maximum(decades, decades.max() - _RANGE)
        features: FloatArray = ((decades + 4.0) / 4.0).astype(np.float32)
        return features

    def pieces(self, samples: NDArray[np.floating]) -> list[FloatArray]:
        """Compute the features of a sound of any length, cut where it is quietest into what the encoder takes.

        Args:
            samples: As above.

        Returns:
            `(size, frames)` float32 of each piece, in order; one for a sound that the encoder takes whole.

        Raises:
            DtypeError, ShapeError: As above.
        """
        return [self(one) for one in self.cuts(samples)]

    def cuts(self, samples: NDArray[np.floating]) -> list[NDArray[np.floating]]:
        """Cut a sound of any length as `pieces` does, and give the samples themselves.

        Args:
            samples: As above.

        Returns:
            The pieces in order; together they are the sound.

        Raises:
            DtypeError, ShapeError: As above.
        """
        return cut(_checked(samples), self.frames * _HOP, self.sampling_rate)

    @cached_property
    def _window(self) -> NDArray[np.float64]:
        return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)

    @cached_property
    def _filters(self) -> NDArray[np.float64]:
        """`(bins, size)` triangles of equal area, evenly spaced on Slaney's mel scale."""
        mels = np.linspace(0.0, _mel(_MOST_HZ), self.size + 2)
        edges = np.where(
            mels < _mel(1000.0), mels * 200 / 3, 1000.0 * np.exp((mels - 15.0) * np.log(6.4) / 27.0)
        )
        bins = np.linspace(0, self.sampling_rate // 2, _WINDOW // 2 + 1)
        slopes = edges[None] - bins[:, None]
        widths = np.diff(edges)
        rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
        triangles = np.maximum(0.0, np.minimum(rising, falling))
        area: NDArray[np.float64] = triangles * (2.0 / (edges[2:] - edges[:-2]))
        return area


def write_preprocessor(folder: Path, config: Mapping[str, Any], source: SourceFacts | None) -> None:
    """Say beside a Whisper model how sound becomes features; nothing is written for other models.

    Args:
        folder: Folder of the model.
        config: Content of its `config.json`.
        source: What its encoder reads.
    """
    if config.get("model_type") == "whisper" and source is not None and source.length:
        described = json.dumps(LogMel(source.size, source.length).describe(), indent=2, sort_keys=True)
        (folder / PREPROCESSOR).write_text(described + "\n", encoding="utf-8")


def _checked(samples: NDArray[np.floating]) -> NDArray[np.floating]:
    samples = np.asarray(samples)
    if samples.dtype.kind != "f":
        raise DtypeError(f"samples have dtype {samples.dtype}; expected floats in -1 .. 1")
    if samples.ndim != 1 or not samples.size:
        raise ShapeError(f"samples have shape {samples.shape}; expected (samples,), one channel")
    return samples


def _mel(hertz: float) -> float:
    """Slaney's scale: even up to 1,000 Hz, logarithmic above."""
    return (
        3.0 * hertz / 200.0 if hertz < 1000.0 else float(15.0 + np.log(hertz / 1000.0) * 27.0 / np.log(6.4))
    )

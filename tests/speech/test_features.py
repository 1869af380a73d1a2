"""Log-mel features are those of transformers' own extractor."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmopt.errors import ContextLengthError, DtypeError, ShapeError
from lmopt.speech import PREPROCESSOR, LogMel


@pytest.mark.parametrize(("size", "seconds"), [(80, 2.37), (80, 30.0), (128, 0.01)])
def test_equal_to_transformers(size: int, seconds: float, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    rate = LogMel.sampling_rate
    random = np.random.default_rng(0)
    time = np.arange(int(seconds * rate)) / rate
    sound = 0.4 * np.sin(2 * np.pi * (200 + 900 * time) * time) + 0.02 * random.normal(size=time.size)
    # It is read from the file that lmopt writes beside a model.
    (tmp_path / PREPROCESSOR).write_text(json.dumps(LogMel(size, 3000).describe()))
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(tmp_path)
    assert extractor.to_dict().items() <= transformers.WhisperFeatureExtractor(size).to_dict().items()
    expected = extractor(sound, sampling_rate=rate, return_tensors="np").input_features[0]
    given = LogMel(size, 3000)(sound)
    assert given.shape == expected.shape == (size, 3000)
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, expected, atol=1e-4)


def test_bad_sound_is_refused() -> None:
    hear = LogMel(80, 100)
    assert hear.seconds == 1.0
    with pytest.raises(ContextLengthError, match=r"is 1\.0 s long; the encoder takes 1 s"):
        hear(np.zeros(16001, np.float32))
    with pytest.raises(DtypeError, match="int16; expected floats"):
        hear(np.zeros(100, np.int16))
    for shape in ((0,), (2, 100)):
        with pytest.raises(ShapeError, match="one channel"):
            hear(np.zeros(shape))

"""Log-mel features are those of transformers' own extractor."""

import numpy as np
import pytest

from lmopt.errors import ContextLengthError, DtypeError, ShapeError
from lmopt.speech import LogMel


@pytest.mark.parametrize(("size", "seconds"), [(80, 2.37), (80, 30.0), (128, 0.01)])
def test_equal_to_transformers(size: int, seconds: float) -> None:
    transformers = pytest.importorskip("transformers")
    rate = LogMel.sampling_rate
    random = np.random.default_rng(0)
    time = np.arange(int(seconds * rate)) / rate
    sound = 0.4 * np.sin(2 * np.pi * (200 + 900 * time) * time) + 0.02 * random.normal(size=time.size)
    extractor = transformers.WhisperFeatureExtractor(feature_size=size)
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

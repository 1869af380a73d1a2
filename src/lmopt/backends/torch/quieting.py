"""Keep torch's notes on itself off the user's screen."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Final

_TALKERS: Final = ("torch.onnx._internal.exporter._registration", "torch.onnx", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let torch's exporter warn and log errors only while the block runs."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)

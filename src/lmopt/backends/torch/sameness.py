"""Refuse a changed copy of a model that does not compute what it should."""

from typing import Final

import torch
from torch import nn

from lmopt.backends.torch.calibration import Reading
from lmopt.backends.torch.encoder_decoder import trial_inputs
from lmopt.backends.torch.language_model import as_decoder, device_of
from lmopt.errors import LmoptError, UnsupportedError
from lmopt.types import SourceFacts

# Share of the largest logit that the order of operations explains in a deep model.
_ROUNDING: Final = {torch.float32: 1e-3, torch.float64: 1e-6}


def require_same(small: nn.Module, expected: nn.Module, work: str, source: SourceFacts | None = None) -> None:
    """Refuse a changed copy that does not compute what it should.

    Args:
        small: The copy.
        expected: A model that computes what the copy should.
        work: What was done, for the message.
        source: What their encoders read, `None` where they have none.

    Raises:
        UnsupportedError: It cannot be run, or its logits differ.
    """
    name = type(small).__name__
    # Ids to compare the two on.
    sample = Reading(torch.arange(16, device=device_of(small)).reshape(2, 8), trial_inputs(small, source, 2))
    with torch.no_grad():
        theirs = sample.logits(expected)
    try:
        with torch.no_grad():
            ours = sample.logits(small)
        as_decoder(small, source)
    except Exception as error:
        reason = str(error) if isinstance(error, LmoptError) else f"{type(error).__name__}: {error}"
        raise UnsupportedError(
            f"{name} does not run after {work}: its code or a part of it fixes a size that has changed ({reason})"
        ) from error
    limit = _ROUNDING.get(theirs.dtype, 0.05) * float(theirs.float().abs().max())
    difference = (
        float((ours.float() - theirs.float()).abs().max()) if ours.shape == theirs.shape else float("inf")
    )
    if not difference <= limit:
        raise UnsupportedError(
            f"{name} computes something else after {work} (logits differ by {difference:.3g}, {limit:.3g} is "
            "rounding): its code depends on a size that has changed. Nothing was changed"
        )

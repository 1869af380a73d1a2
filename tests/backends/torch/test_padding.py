"""Whether a module keeps padding out of its rows is told from rounding."""

import torch

from lmopt.backends.torch.language_model import _honours_mask, as_decoder
from lmopt.testing.models import tiny_llama


def test_rounding_is_not_taken_for_padding() -> None:
    module = tiny_llama()
    # As large activations do: what is read in one call differs from what is read in two, padding or not.
    module.lm_head.register_forward_hook(lambda part, read, given: given + 0.01 * given.shape[1])
    assert as_decoder(module).signature.has_mask


def test_padding_that_is_seen_is_found() -> None:
    decoder = as_decoder(tiny_llama())
    seeing = type(decoder).forward

    def blind(input_ids, attention_mask, position_ids, state):
        return seeing(decoder, input_ids, torch.ones_like(attention_mask), position_ids, state)

    decoder.forward = blind
    assert not _honours_mask(decoder, torch.device("cpu"))

"""Each transformers model is called by the name that its own forward gives its cache."""

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import lmopt
from lmopt.backends.torch.cache_name import cache_name, cache_of
from lmopt.backends.torch.language_model import as_decoder
from lmopt.errors import UnsupportedError

IDS = torch.tensor([[3, 1, 4, 1, 5, 9]])
# What this version of transformers says; `test_both_names` asks for both, whatever it says.
SPOKEN = next(
    name
    for name in ("past_key_values", "cache")
    if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
)


def llama(kind: type[transformers.LlamaForCausalLM] = transformers.LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return kind(
        transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=96, **sizes)
    ).eval()


class Handing(transformers.LlamaForCausalLM):
    """A wrapper that names nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Old(transformers.LlamaForCausalLM):
    """Code that came with a model and was written before transformers 5.24."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        given = {} if past_key_values is None else {SPOKEN: past_key_values}
        return super().forward(input_ids, attention_mask, **given, **kwargs)


class New(transformers.LlamaForCausalLM):
    """Code for transformers 5.24 and later."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, cache: Any = None, **kwargs: Any
    ) -> Any:
        given = {} if cache is None else {SPOKEN: cache}
        return super().forward(input_ids, attention_mask, **given, **kwargs)


class Closed(nn.Module):
    def forward(self, input_ids: Any, use_cache: bool = True) -> Any: ...


@pytest.mark.parametrize(
    ("kind", "name"),
    [(transformers.LlamaForCausalLM, SPOKEN), (Handing, SPOKEN), (Old, "past_key_values"), (New, "cache")],
)
def test_the_name_is_that_of_the_forward(kind: Any, name: str) -> None:
    assert cache_name(llama(kind)) == name


def test_a_forward_put_on_the_instance_counts() -> None:
    model = llama()
    own = model.forward
    model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    assert cache_name(model) == SPOKEN
    as_decoder(model)


def test_a_module_without_a_cache_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="neither past_key_values nor cache"):
        cache_name(Closed())


@pytest.mark.parametrize("kind", [transformers.LlamaForCausalLM, Handing, Old, New])
def test_both_names(kind: Any) -> None:
    """Whatever the name, text read in pieces gives the logits of text read at once."""
    module = llama(kind)
    decoder = as_decoder(module)
    assert decoder.signature.has_mask
    mask, positions = torch.ones_like(IDS), torch.arange(6)[None]
    with torch.no_grad():
        whole = module(IDS).logits
        first, state = decoder(IDS[:, :4], mask[:, :4], positions[:, :4], decoder.zero_state(1))
        then, state = decoder(IDS[:, 4:], mask, positions[:, 4:], state)
    assert state[0].shape == (1, 2, 6, 8)
    torch.testing.assert_close(torch.cat([first, then], dim=1), whole)


def test_the_cache_is_found_in_old_and_new_results() -> None:
    class Result:
        def __init__(self, **fields: Any) -> None:
            vars(self).update(fields)

    assert cache_of(Result(past_key_values="old")) == "old"
    assert cache_of(Result(cache="new")) == "new"
    with torch.no_grad():
        assert cache_of(llama()(IDS, use_cache=True)).get_seq_length() == 6


def test_no_call_uses_a_deprecated_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers warns of an argument, and logs a field of a result, once a process: here each time."""
    monkeypatch.setattr(logging.Logger, "warning_once", logging.Logger.warning, raising=False)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            model = lmopt.Model.from_module(llama())
            artifact = lmopt.Exporter("onnx", target="onnxruntime").export(model, tmp_path / "out")
            with lmopt.Runtime(model, backend="torch") as runtime:
                runtime.generate([1, 2, 3], max_new_tokens=2)
    finally:
        logger.removeHandler(caplog.handler)
    assert artifact.manifest["formats"]["onnx"]["target"] == "onnxruntime"
    told = [str(one.message) for one in found] + caplog.messages
    assert not [one for one in told if "past_key_values" in one or "`cache`" in one]


def test_a_recurrent_model_is_refused_by_what_it_keeps() -> None:
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(UnsupportedError, match="key-value cache"):
        as_decoder(transformers.MambaForCausalLM(config).eval())

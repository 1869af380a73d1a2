"""Lets the tests of this folder import their fakes and their tiny models."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def hf_model(request):
    from generation_hf import tiny_model

    return tiny_model(request.param)


@pytest.fixture(scope="module")
def llama():
    from generation_hf import tiny_model

    return tiny_model("llama")

"""The real model: eager's tokens, torch's perplexity."""

import numpy as np
import pytest

import lmopt

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def artifact(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "portable"
    return lmopt.Exporter("onnx", target="portable").export(lmopt.Model.from_pretrained(smollm2), folder)


def test_tokens_are_those_of_eager_mode(smollm2, artifact, wiki_text):
    words = wiki_text.split()
    prompts = [" ".join(words[1900 * n : 1900 * n + 6 + 3 * n]) for n in range(20)]
    found = {}
    for backend, source in (("torch", smollm2), ("openvino", artifact)):
        with lmopt.Runtime(source, backend=backend) as runtime:
            rows = runtime.generate(prompts, max_new_tokens=64, do_sample=False)
        found[backend] = [row.token_ids for row in rows]
    assert sum(map(len, found["torch"])) > 1000
    assert found["openvino"] == found["torch"]


def test_perplexity_is_that_of_torch(artifact, wiki_text):
    with lmopt.Runtime(artifact, backend="openvino") as runtime:
        measured = runtime.perplexity(wiki_text, tokens=4096).value
    # As measured with torch in float32; see lmopt's docs/results.
    np.testing.assert_allclose(measured, 21.440, atol=2e-3)

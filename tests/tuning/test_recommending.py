"""`lmopt.tuning.recommend`: reckoned from headers and a probe, every reason with its source."""

import json
import re
from pathlib import Path

import pytest

from lmopt.errors import ArtifactNotFoundError, UnsupportedOptionError
from lmopt.evaluation import Figure
from lmopt.tuning import recommend
from lmopt.tuning.probe import Probe, measure_machine

ROOT = Path(__file__).parents[2]


def probe(bandwidth: float = 10e9, flops: float = 1e12) -> Probe:
    return Probe(Figure(bandwidth, bandwidth, bandwidth), Figure(flops, flops, flops), 2, 0.5)


def test_needs_are_reckoned(tiny: Path) -> None:
    found = recommend(tiny, context=64, probe=probe(), free_bytes=10**9)
    first = found.needs[0]
    assert first.weight_bytes == 4 * found.parameters
    assert first.cache_bytes == 64 * 4 * 2 * 1 * 2 * 16
    read = first.weight_bytes - 4 * 97 * 64 + first.cache_bytes
    assert first.tokens_per_s == pytest.approx(10e9 / read)
    assert [one.weight_bytes for one in found.needs] == sorted(
        (one.weight_bytes for one in found.needs), reverse=True
    )


def test_the_context_is_cut_down_to_the_models(tiny: Path) -> None:
    assert recommend(tiny, context=10**6, probe=probe()).context == 128


def test_what_does_not_fit_is_said(tiny: Path) -> None:
    found = recommend(tiny, probe=probe(), free_bytes=1000)
    assert not any(one.fits for one in found.needs)
    assert "does NOT fit" in str(found)


def test_arithmetic_can_be_the_limit(tiny: Path) -> None:
    found = recommend(tiny, probe=probe(bandwidth=1e15, flops=1e6))
    assert found.needs[0].bound == "arithmetic"


def test_every_reason_has_a_source_that_is_there(tiny: Path) -> None:
    reasons = [why for one in recommend(tiny, probe=probe()).suggestions for why in one.reasons]
    assert reasons
    for why in reasons:
        for file in re.findall(r"docs/[\w/.-]+\.md", why.source):
            assert (ROOT / file).is_file()
        assert re.search(r"docs/results|probe|headers|arXiv|lmopt\.", why.source), why


@pytest.mark.parametrize(
    ("figure", "file"),
    [("51.3", "generation"), ("15.4", "generation"), ("0.0022", "compression"), ("0.9987", "compression"),
     ("0.4035", "compression"), ("0.1733", "compression")],
)  # fmt: skip
def test_quoted_figures_stand_in_the_cited_file(figure, file, tiny: Path) -> None:
    assert figure in str(recommend(tiny, probe=probe()))
    assert figure in (ROOT / f"docs/results/2026-11-24-{file}.md").read_text()


def test_it_is_plain_data(tiny: Path) -> None:
    assert json.loads(json.dumps(recommend(tiny, probe=probe()).to_dict()))["context"] == 128


def test_a_gguf_file_keeps_its_codes(smollm2_gguf: Path) -> None:
    found = recommend(smollm2_gguf, probe=probe())
    assert found.stored_as == ("GGUF F32", "GGUF Q4_1", "GGUF Q8_0")
    assert found.needs[0].weight_bytes == pytest.approx(96.6e6, rel=0.01)
    assert "keep the codes" in found.suggestions[1].what


def test_bad_input_is_named(tiny: Path) -> None:
    with pytest.raises(UnsupportedOptionError, match="context"):
        recommend(tiny, context=0, probe=probe())
    with pytest.raises(ArtifactNotFoundError):
        recommend(tiny / "nothing", probe=probe())


def test_the_probe_measures_something() -> None:
    found = measure_machine()
    assert found.bandwidth_bytes_per_s.least > 1e7
    assert found.flops_per_s.least > 1e7
    assert found.threads >= 1

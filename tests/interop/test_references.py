"""Word errors, chrF and BLEU of what encoder-decoders write."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lmopt
from lmopt.errors import InputError, NotInstalledError, UnsupportedError
from lmopt.interop.references import judge, plain_words, read_pairs, word_errors
from lmopt.types import SourceFacts

TEXT, SOUND = SourceFacts("ids", 0, 10), SourceFacts("features", 0, 80, 3000, fixed=True)


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in rows))
    return path


def test_words_that_are_wrong_are_counted() -> None:
    found = word_errors(["The cat sat.", "Stop!"], ["the cat sit down", "stop"])
    assert found.counts == {"items": 2, "words": 4, "wrong_words": 2}
    assert found.metrics["word_error_rate"] == 0.5
    assert word_errors(["a b"], [""]).metrics["word_error_rate"] == 1
    assert word_errors(["a b"], ["A, b"]).metrics == {"word_error_rate": 0, "character_error_rate": 0}
    with pytest.raises(InputError, match="pair 1"):
        word_errors(["a", "!"], ["a", "b"])


@given(st.text())
def test_plain_words_are_plain(text: str) -> None:
    once = plain_words(text)
    assert plain_words(once) == once
    assert "  " not in once
    assert once == once.strip()


def test_translations_are_judged_by_sacrebleu(tmp_path: Path) -> None:
    import sacrebleu

    right = ["the cat sat on the mat today", "a dog ran home again and again"]
    wrote = ["the cat sat on the rug today", "a dog ran home again and again"]
    asked = []

    def translate(sources: list[str], **options: Any) -> list[str]:
        asked.append((sources, options))
        return wrote

    runtime: Any = SimpleNamespace(facts=SimpleNamespace(source=TEXT), translate=translate)
    pairs = read_pairs(
        write(tmp_path, *({"source": f"s{n}", "text": text} for n, text in enumerate(right)), "")
    )
    found = judge(runtime, pairs, num_beams=4)
    assert asked == [(["s0", "s1"], {"num_beams": 4})]
    assert found.texts == tuple(wrote)
    assert found.metrics == {
        "chrf": sacrebleu.corpus_chrf(wrote, [right]).score,
        "bleu": sacrebleu.corpus_bleu(wrote, [right]).score,
    }
    assert 50 < found.metrics["bleu"] < 100
    assert "tok:13a" in found.how
    wrote = right
    assert judge(runtime, pairs).metrics == pytest.approx({"chrf": 100, "bleu": 100})


def test_what_does_not_go_together_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = read_pairs(write(tmp_path, {"audio": "a.wav", "text": "x"}))
    assert pairs.sources == (str(tmp_path / "a.wav"),)
    for source, said in ((TEXT, "reads texts"), (None, "reads no source")):
        runtime: Any = SimpleNamespace(facts=SimpleNamespace(source=source))
        with pytest.raises(UnsupportedError, match=f"sound files as sources, and the model {said}"):
            judge(runtime, pairs)
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(NotInstalledError, match=r"jiwer.*lmopt\[eval\]"):
        judge(SimpleNamespace(facts=SimpleNamespace(source=SOUND)), pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no lines"),
        (["{"], "line 1"),
        ([["source", "text"]], "line 1"),
        ([{"source": "a", "text": "b"}, {"source": "a"}], "line 2"),
        ([{"source": 1, "text": "b"}], "line 1"),
        ([{"source": "a", "text": "b"}, {"audio": "a", "text": "b"}], "both kinds"),
    ],
)
def test_files_that_hold_no_pairs(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_pairs(write(tmp_path, *rows))


@pytest.mark.real_model
def test_whisper_in_eight_bits_hears_as_well(whisper_tiny: Path, librivox: Path, tmp_path: Path) -> None:
    """Its loss on pairs, in words: 3 of 71 are wrong before, and no more after."""
    from lmopt.compression import Quantize

    lines = (librivox / "transcription").read_text(encoding="utf-8").splitlines()
    said = {}
    for line in lines:
        text, _, name = line.rpartition("(")
        said[name.strip(") ")] = text.replace("<s>", "").replace("</s>", "").strip()
    rows = [
        {"audio": str(librivox / f"{name}.wav"), "text": text.replace("mister", "mr")}
        for name, text in said.items()
    ]
    pairs = read_pairs(write(tmp_path, *rows))
    model = lmopt.Model.from_pretrained(whisper_tiny)
    small = lmopt.Compressor([Quantize(bits=8, group_size=64)]).compress(
        model, sources=pairs.read(model.facts.source), texts=pairs.texts
    )
    assert small.report.difference.kl_mean < 0.01
    wrong = []
    for one in (model, small):
        with lmopt.Runtime(one) as runtime:
            wrong.append(judge(runtime, pairs).counts["wrong_words"])
    assert wrong[0] == 3
    assert wrong[1] <= 4

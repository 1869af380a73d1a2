"""Every document is read, and nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Raw
from tokenizers import models, pre_tokenizers

from lmopt import Tokenizer
from lmopt.errors import InputError, TokenIdError, TokenizerError
from lmopt.testing.models import VOCAB_SIZE
from lmopt.training import Corpus, read_corpus

EOS = 96


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = Raw(models.WordLevel({f"w{n}": n for n in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(words.to_str())


def read(data: Any, tokenizer: Tokenizer | None = None, **options: Any) -> Corpus:
    return read_corpus(data, tokenizer, vocab_size=VOCAB_SIZE, eos_token_id=EOS, **options)


def test_each_form_of_data_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    expected = [1, 2, 3, EOS, 4, EOS, 5, 6, EOS]
    files = []
    for number, text in enumerate(texts):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps({"text": text, "other": 1}) for text in texts) + "\n\n")
    rows = [[1, 2, 3], [4], [5, 6]]
    forms: list[Any] = [texts, files, [lines], lines, [{"text": text} for text in texts], rows]
    forms += [[np.array(row) for row in rows], [torch.tensor(row) for row in rows], iter(texts)]
    forms += [[{"input_ids": row} for row in rows], [texts[0], files[1], {"text": texts[2]}]]
    for form in forms:
        found = read(form, tokenizer)
        assert found.ids.tolist() == expected
        assert found.documents == 3


def test_a_data_set_of_hugging_face_is_read(tokenizer: Tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    found = read(datasets.Dataset.from_dict({"text": ["w1 w2", "w3"]}), tokenizer)
    assert found.ids.tolist() == [1, 2, EOS, 3, EOS]


@pytest.mark.parametrize("row", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3]), torch.tensor([1, 2, 3])])
def test_one_row_of_ids_is_taken_as_it_is(row: Any) -> None:
    assert read(row).ids.tolist() == [1, 2, 3]


def test_a_path_that_was_given_as_text_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("w1 w2")
    with pytest.raises(InputError, match=r"give pathlib\.Path"):
        read(str(path), tokenizer)


def test_what_cannot_be_read_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        read("w1 w2")
    with pytest.raises(TokenIdError, match=r"0 \.\. 97"):
        read([0, 97])
    with pytest.raises(InputError, match="no document"):
        read([])
    with pytest.raises(InputError, match="1 tokens"):
        read(np.array([3]))
    with pytest.raises(InputError, match="neither 'text' nor 'input_ids', but: body"):
        read([{"body": "w1"}], tokenizer)
    with pytest.raises(InputError, match="a document is float"):
        read([1.5], tokenizer)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.txt", tokenizer)
    (tmp_path / "bad.jsonl").write_text('{"text": "w1"}\n{"text"')
    with pytest.raises(InputError, match=r"bad\.jsonl, line 2 is no JSON"):
        read(tmp_path / "bad.jsonl", tokenizer)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        read(tmp_path / "latin.txt", tokenizer)


def test_the_fingerprint_is_of_the_ids() -> None:
    one = Corpus(np.array([1, 2, 3], np.int32), 1)
    assert one.fingerprint == Corpus(np.array([1, 2, 3], np.int32), 2).fingerprint
    assert one.fingerprint != Corpus(np.array([1, 2, 4], np.int32), 1).fingerprint

"""Encoding and decoding equal transformers' on every string, and bad input is a typed error."""

import contextlib
import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from lmopt.backends.torch.tokenizer import as_tokenizer, load_tokenizer
from lmopt.errors import (
    ArtifactNotFoundError,
    CorruptArtifactError,
    TokenIdError,
    TokenizerError,
    UnsafeArtifactError,
)
from lmopt.tokenizer import Tokenizer, TokenizerSettings

CORPUS = [
    "",
    " ",
    "a",
    " leading and trailing ",
    "The capital of France is Paris. Isn't it ? He 's gone , they 've left !",
    "漢字かな交じり文と한국어、以及中文。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇨🇭 a\u200db",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "\t\tif x:\r\n\n\treturn\u00a0y\u2003z\x0b\x0c\x00\x7f",
    "0123456789 3.14159 1,000,000 ١٢٣ ½ Ⅷ",
    "e\u0301 é ﬁ Å \u0323\u0307 ṩ ｆｕｌｌ",
    "<s>[CLS] hello [SEP]</s><unk>[MASK]<extra> <s > <|im_start|>user\n<|im_end|><pad>",
    "mid<s>dle</s>of[SEP]words<extra>here  <extra>  ",
    "x" * 3000,
    " " * 500 + "\n" * 500,
    "Ünïcödé ÀÉÎÕÜ ß ẞ İ ı ǅ",
    "def f(x):\n    return x**2  # 2-й комментарий\n",
    "\ufeff\ufffd\u2028\u2029\U0010ffff\ue000",
]
TEXT = CORPUS[4:] * 3

SPECIAL = ["<s>", "</s>", "<unk>", "<pad>", "[CLS]", "[SEP]", "[MASK]"]


def byte_level() -> tokenizers.Tokenizer:
    one = tokenizers.Tokenizer(models.BPE())
    one.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    one.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    one.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    one.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return one


def word_piece() -> tokenizers.Tokenizer:
    one = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    one.normalizer = normalizers.BertNormalizer(lowercase=True)
    one.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    one.decoder = decoders.WordPiece(cleanup=False)
    one.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL))
    one.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 4), ("[SEP]", 5)]
    )
    return one


def unigram() -> tokenizers.Tokenizer:
    one = tokenizers.Tokenizer(models.Unigram())
    one.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    one.pre_tokenizer = pre_tokenizers.Metaspace()
    one.decoder = decoders.Metaspace()
    one.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return one


def byte_fallback() -> tokenizers.Tokenizer:
    """As SentencePiece models of the Llama family are converted."""
    one = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    one.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    one.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL))
    state = json.loads(one.to_str())
    vocabulary = state["model"]["vocab"]
    for value in bytes_:
        vocabulary[value] = len(vocabulary)
    one = tokenizers.Tokenizer.from_str(json.dumps(state))
    one.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return one


KINDS = {one.__name__: one for one in (byte_level, word_piece, unigram, byte_fallback)}


@functools.cache
def trained(kind: str) -> str:
    return KINDS[kind]().to_str()


CONFIGS = {
    "plain": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "cleaning": {"clean_up_tokenization_spaces": True, "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "extra": {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True, "rstrip": True},
        "additional_special_tokens": ["<extra>", "<|im_start|>"],
        "image_token": "<image>",
        "add_bos_token": True,
        "add_eos_token": True,
    },
    "decoder": {
        "eos_token": "</s>",
        "added_tokens_decoder": {
            "1": {"content": "</s>", "special": True, "rstrip": True},
            "900": {"content": "<extra>", "single_word": True, "normalized": True, "special": False},
        },
    },
    "splitting": {"bos_token": "<s>", "split_special_tokens": True},
}
LEGACY = {
    "special_tokens_map.json": {
        "eos_token": {
            "content": "</s>",
            "lstrip": False,
            "normalized": False,
            "rstrip": True,
            "single_word": False,
        },
        "pad_token": "<pad>",
    },
    "added_tokens.json": {"<extra>": 950, "<pad>": 951},
}


def write(folder: Path, kind: str, config: dict, legacy: dict | None = None) -> Path:
    state = json.loads(trained(kind))
    # Baked-in batching must not leak into single texts.
    state["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, content in {"tokenizer_config.json": stated, **(legacy or {})}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def assert_equal(ours: Tokenizer, theirs: transformers.PreTrainedTokenizerFast) -> None:
    for text in CORPUS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, special) == ids, (text, special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip), (text, skip)
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    for token_id in (0, 5, ours.vocab_size - 1, ours.vocab_size + 7):
        assert ours.id_to_token(token_id) == theirs.convert_ids_to_tokens(token_id)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_reads_as_transformers_reads_it(tmp_path: Path, kind: str, config: str) -> None:
    folder = write(tmp_path, kind, CONFIGS[config])
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert_equal(Tokenizer.from_folder(folder), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_older_transformers(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, kind, {"bos_token": "<s>"}, LEGACY)
    assert_equal(Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_reads_the_same_in_both(tmp_path: Path, kind: str, config: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path / "a", kind, CONFIGS[config]))
    (tmp_path / "b").mkdir()
    Tokenizer.from_folder(tmp_path / "a").save(tmp_path / "b")
    assert_equal(Tokenizer.from_folder(tmp_path / "b"), theirs)
    assert_equal(
        Tokenizer.from_folder(tmp_path / "a"), transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    )


@pytest.mark.parametrize(
    "name", ["LlamaTokenizer", "GemmaTokenizer", "BertTokenizer", "T5Tokenizer", "GPT2Tokenizer"]
)
def test_classes_with_behaviour_of_their_own_are_taken_over_as_loaded(tmp_path: Path, name: str) -> None:
    kind = {"BertTokenizer": "word_piece", "T5Tokenizer": "unigram", "GPT2Tokenizer": "byte_level"}.get(
        name, "byte_fallback"
    )
    folder = write(tmp_path / "a", kind, {"tokenizer_class": name, **CONFIGS["plain"]})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == name
    ours = load_tokenizer(folder)
    assert ours is not None
    assert_equal(ours, theirs)
    (tmp_path / "b").mkdir()
    ours.save(tmp_path / "b")
    assert_equal(Tokenizer.from_folder(tmp_path / "b"), theirs)
    assert_equal(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "b"))


@pytest.mark.real_model
def test_smollm2(smollm2: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2)
    ours = Tokenizer.from_folder(smollm2)
    assert_equal(ours, theirs)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for prompt in (True, False):
        assert ours.apply_chat_template(messages, prompt) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt
        )
    assert ours.encode("The capital of France is") == [504, 3575, 282, 4649, 314]


def test_tokenizers_of_other_libraries_are_taken_over() -> None:
    backend = byte_level()
    assert as_tokenizer(backend).encode("hello") == backend.encode("hello").ids
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert as_tokenizer(wrapped).eos_token_id == 1
    ours = Tokenizer(backend.to_str())
    assert as_tokenizer(ours) is ours
    with pytest.raises(TokenizerError, match="fast tokenizer"):
        as_tokenizer(object())


def test_sixteen_threads_share_one_tokenizer() -> None:
    ours = Tokenizer(trained("byte_level"), TokenizerSettings(special_tokens={"bos_token": "<s>"}))
    expected = [ours.encode(text) for text in CORPUS]

    def work(seed: int) -> int:
        for turn in range(60):
            at = (seed + turn) % len(CORPUS)
            ids = ours.encode(CORPUS[at])
            assert ids == expected[at]
            ours.decode(ids)
            ours.id_to_token(ids[0])
        return seed

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(32))) == list(range(32))


# Bad input --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return Tokenizer(trained("byte_level"))


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "ok \ud83d\ud83d"])
def test_lone_surrogates(plain: Tokenizer, text: str) -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        plain.encode(text)


@pytest.mark.parametrize("text", [b"bytes", None, ["a"], 3])
def test_text_must_be_text(plain: Tokenizer, text: object) -> None:
    with pytest.raises(TokenizerError, match="string"):
        plain.encode(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("token_id", [-1, 2**32, 2**70, "1", 1.5, None])
def test_ids_must_be_ids(plain: Tokenizer, token_id: object) -> None:
    with pytest.raises(TokenIdError):
        plain.decode([token_id])  # type: ignore[list-item]
    with pytest.raises(TokenIdError):
        plain.id_to_token(token_id)  # type: ignore[arg-type]


def test_ids_of_padding_rows_give_nothing(plain: Tokenizer) -> None:
    assert plain.decode([plain.vocab_size, plain.vocab_size + 100]) == ""


def test_a_rust_panic_is_a_tokenizer_error() -> None:
    state = json.loads(trained("byte_level"))
    state["model"] |= {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]], "continuing_subword_prefix": "####"}
    state |= {"added_tokens": [], "post_processor": None}
    with pytest.raises(TokenizerError) as caught:
        Tokenizer(json.dumps(state))
    assert type(caught.value.__cause__).__name__ == "PanicException"


@pytest.mark.timeout(20)
def test_a_backtracking_regex_ends() -> None:
    state = json.loads(trained("byte_level"))
    state["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    hostile = Tokenizer(json.dumps(state))
    with contextlib.suppress(TokenizerError):
        hostile.encode("a" * 40 + "b")
    assert hostile.decode([0], False) == "<s>"


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 1}', "\xff", '{"a": 1, "a": 2}'])
def test_malformed_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises((TokenizerError, CorruptArtifactError), match="tokenizer"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "config",
    ["[]", "{", '{"bos_token": 3}', '{"added_tokens_decoder": [1]}', '{"added_tokens_decoder": {"x": "a"}}',
     '{"chat_template": 3}', '{"chat_template": [{"name": "a"}]}', '{"eos_token": {"text": "a"}}'],
)  # fmt: skip
def test_malformed_settings(tmp_path: Path, config: str) -> None:
    folder = write(tmp_path, "byte_level", {})
    (folder / "tokenizer_config.json").write_text(config)
    with pytest.raises((TokenizerError, CorruptArtifactError)):
        Tokenizer.from_folder(folder)


def test_slow_only_says_how_to_convert(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"AutoTokenizer.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ArtifactNotFoundError):
        Tokenizer.from_folder(tmp_path / "absent")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model", "byte_level", {})
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "outside").write_text("{}")
    os.symlink(tmp_path / "outside", folder / name)
    with pytest.raises(UnsafeArtifactError, match=name):
        Tokenizer.from_folder(folder)


def test_a_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = write(tmp_path / "models--a--b" / "blobs", "byte_level", {"bos_token": "<s>"})
    for file in blobs.iterdir():
        os.symlink(file, snapshot / file.name)
    assert Tokenizer.from_folder(snapshot).bos_token_id == 0


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden/..", "/abs", "nul\0"])
def test_template_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    ours = Tokenizer(trained("byte_level"), TokenizerSettings(chat_templates={name: "x"}))
    with pytest.raises(UnsafeArtifactError, match="named"):
        ours.save(tmp_path)

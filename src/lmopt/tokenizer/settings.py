"""What stands beside `tokenizer.json`: special tokens, clean-up switches and chat templates."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken

from lmopt.errors import ArtifactNotFoundError, CorruptArtifactError, TokenizerError
from lmopt.safefiles import contained, hub_blobs, open_regular, read_json

TOKENIZER_FILE: Final = "tokenizer.json"
CONFIG_FILE: Final = "tokenizer_config.json"
TEMPLATE_FILE: Final = "chat_template.jinja"
TEMPLATE_FOLDER: Final = "additional_chat_templates"

NAMED: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that transformers knows by name; a model may add its own `..._token` names."""

LARGEST_FILE: Final = 512 * 1024 * 1024
"""Bytes of a tokenizer file that are read at most; the largest known one has 40 MB."""

_JSON_LIMIT: Final = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The part of a tokenizer that transformers keeps outside `tokenizer.json`.

    Attributes:
        special_tokens: Text by name, such as `{"eos_token": "</s>"}`; chat templates see them.
        extra_special_tokens: Special tokens without a name.
        added: Tokens to add to the vocabulary in this order, if it lacks them.
        chat_templates: Jinja source by name; the one used by default is called `"default"`.
        clean_up: Whether decoding removes spaces before punctuation, as WordPiece needs.
        clean_up_bpe: Whether it does so for BPE too, where transformers otherwise ignores `clean_up`.
        split_special_tokens: Whether special tokens written out in a text are read as plain text.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    extra_special_tokens: tuple[str, ...] = ()
    added: tuple[AddedToken, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    clean_up: bool = False
    clean_up_bpe: bool = False
    split_special_tokens: bool = False

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Mapping[str, Any]) -> "TokenizerSettings":
        """Read `tokenizer_config.json` and its neighbours in the order in which transformers does.

        Args:
            folder: Folder of the model.
            tokenizer: Parsed `tokenizer.json`.

        Raises:
            TokenizerError: A value has the wrong type.
            CorruptArtifactError: A file is not valid JSON.
        """
        config = _read(folder, CONFIG_FILE)
        padding = tokenizer.get("padding")
        if isinstance(padding, dict):
            config.setdefault("pad_token", padding.get("pad_token"))
        extra = config.get("extra_special_tokens") or config.pop("additional_special_tokens", None) or ()
        names = [*NAMED, *(key for key in config if key.endswith("_token") and key not in NAMED)]
        if isinstance(extra, dict):
            config |= extra
            names += [name for name in extra if name not in names]
            extra = ()
        named: dict[str, AddedToken] = {}
        for name in names:
            # Switches such as add_bos_token end in _token too.
            if config.get(name) is not None and not isinstance(config[name], bool):
                named[name] = _token(config[name], name)
        others = [_token(one, "extra_special_tokens") for one in extra]
        known: dict[int, AddedToken] = {}
        if "added_tokens_decoder" in config:
            for index, one in config["added_tokens_decoder"].items():
                known[int(index)] = _token(one, "added_tokens_decoder", special=False)
        else:
            # Files of transformers 4, which newer ones only read where the above is absent.
            for name, value in _read(folder, "special_tokens_map.json").items():
                if isinstance(value, list):
                    others += [one for each in value if (one := _token(each, name)) not in others]
                elif value is not None:
                    named[name] = _token(value, name)
            special = {str(token.content) for token in [*named.values(), *others]}
            for content, index in _read(folder, "added_tokens.json").items():
                is_special = content in special
                known[index] = AddedToken(content, normalized=not is_special, special=is_special)
            for one in tokenizer.get("added_tokens", ()):
                known[one["id"]] = _token({key: one[key] for key in one if key != "id"}, TOKENIZER_FILE)
        by_content = {token.content: token for token in known.values()}
        named = {name: by_content.get(token.content, token) for name, token in named.items()}
        return cls(
            special_tokens={name: token.content for name, token in named.items()},
            extra_special_tokens=tuple(token.content for token in others),
            added=(*(known[index] for index in sorted(known)), *named.values(), *others),
            chat_templates=dict(_templates(folder, config.get("chat_template"))),
            clean_up=bool(config.get("clean_up_tokenization_spaces", False)),
            clean_up_bpe=bool(
                config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
            ),
            split_special_tokens=bool(config.get("split_special_tokens", False)),
        )

    def to_config(self) -> dict[str, Any]:
        """Write as the content of `tokenizer_config.json`, for lmopt and transformers alike."""
        config: dict[str, Any] = {
            # Read by every transformers version as "tokenizer.json is all there is".
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": self.clean_up,
            **self.special_tokens,
        }
        if self.extra_special_tokens:
            config["extra_special_tokens"] = list(self.extra_special_tokens)
        if self.clean_up_bpe:
            config["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True
        if self.split_special_tokens:
            config["split_special_tokens"] = True
        return config


def read_text(folder: Path, name: str) -> str | None:
    """Read a file of a model folder as UTF-8, or `None` where there is none.

    Raises:
        UnsafeArtifactError: The name or a link leads out of the folder.
        CorruptArtifactError: The file is too large or not UTF-8.
    """
    try:
        path = contained(folder, name, allow_symlinks_into=hub_blobs(folder))
    except ArtifactNotFoundError:
        return None
    with open_regular(path) as (file, size):
        if size > LARGEST_FILE:
            raise CorruptArtifactError(f"{path} holds {size} bytes; at most {LARGEST_FILE} are read.")
        raw = file.readall()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptArtifactError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start})."
        ) from None


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        path = contained(folder, name, allow_symlinks_into=hub_blobs(folder))
    except ArtifactNotFoundError:
        return {}
    content = read_json(path, limit=_JSON_LIMIT)
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def _token(value: Any, where: str, *, special: bool = True) -> AddedToken:
    """Make a token of `"<s>"` or `{"content": "<s>", "lstrip": false, ...}`."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        given = {flag: bool(value[flag]) for flag in flags if flag in value}
        return AddedToken(value["content"], **{"special": special, **given})
    raise TokenizerError(
        f"{where} holds {value!r:.80}; expected a token's text or an object with its 'content'."
    )


def _templates(folder: Path, given: Any) -> Iterator[tuple[str, str]]:
    """Find chat templates; files win over `tokenizer_config.json`."""
    extra = folder / TEMPLATE_FOLDER
    names = {"default": TEMPLATE_FILE}
    if extra.is_dir():
        names |= {path.stem: f"{TEMPLATE_FOLDER}/{path.name}" for path in sorted(extra.glob("*.jinja"))}
    found = {name: text for name, file in names.items() if (text := read_text(folder, file)) is not None}
    if found:
        # transformers opens these as text, which makes every line end a "\n".
        yield from ((name, text.replace("\r\n", "\n").replace("\r", "\n")) for name, text in found.items())
    elif isinstance(given, str):
        yield "default", given
    elif isinstance(given, list):
        for one in given:
            yield str(one["name"]), str(one["template"])
    elif isinstance(given, dict):
        yield from ((str(name), str(text)) for name, text in given.items())
    elif given is not None:
        raise TokenizerError(f"chat_template is a {type(given).__name__}; expected text or named texts.")

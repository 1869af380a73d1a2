"""Single tokens as text and as bytes, for the log-probabilities of an answer."""

from functools import lru_cache
from typing import TYPE_CHECKING, Final

from lmopt.generation.stopping import REPLACEMENT

if TYPE_CHECKING:
    from lmopt.tokenizer import Tokenizer


def _byte_alphabet() -> dict[str, int]:
    """Characters that byte-level vocabularies write for bytes (GPT-2's `bytes_to_unicode`, turned around)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES: Final = _byte_alphabet()


class Spelling:
    """Spells tokens of one vocabulary.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        # A token is read behind another one: some decoders drop the space in front of a text's first token.
        self._before = next(
            (
                one
                for one in range(tokenizer.vocab_size)
                if tokenizer.decode([one]).strip(REPLACEMENT).isalnum()
            ),
            None,
        )
        self.text = lru_cache(maxsize=65536)(self._text)

    def bytes(self, token: int) -> list[int] | None:
        """Give the bytes of a token, also where they are no whole characters; `None` where nobody knows."""
        text = self.text(token)
        if REPLACEMENT not in text:
            return list(text.encode())
        entry = self._tokenizer.id_to_token(token) or ""
        if len(entry) == 6 and entry.startswith("<0x"):
            return [int(entry[3:5], 16)]
        if all(character in _BYTES for character in entry):
            return [_BYTES[character] for character in entry]
        return None

    def unique(self, token: int) -> str:
        r"""Give the text of a token, or its bytes where it has no whole characters: OpenAI's `bytes:\xe2\x80`."""
        text = self.text(token)
        raw = self.bytes(token) if REPLACEMENT in text else None
        return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def _text(self, token: int) -> str:
        decode = self._tokenizer.decode
        if self._before is None:
            return decode([token], skip_special_tokens=False)
        start = decode([self._before], skip_special_tokens=False)
        whole = decode([self._before, token], skip_special_tokens=False)
        return whole[len(start) :] if whole.startswith(start) else decode([token], skip_special_tokens=False)

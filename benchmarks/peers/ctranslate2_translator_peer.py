"""CTranslate2: its own translator on a folder that its own converter wrote."""

import json
from typing import Any

from ctranslate2_peer import Ctranslate2Peer
from protocol import serve


class Ctranslate2TranslatorPeer(Ctranslate2Peer):
    """A folder with `model.bin` and `shared_vocabulary.json`."""

    def load(self, path: str, *, threads: int | None, compute_type: str = "default") -> dict[str, Any]:
        """Open the folder."""
        import ctranslate2

        self._translator = ctranslate2.Translator(
            path, "cpu", intra_threads=threads or 0, inter_threads=1, compute_type=compute_type
        )
        with open(f"{path}/shared_vocabulary.json", encoding="utf-8") as file:
            self._words: list[str] = json.load(file)
        self._ids = {word: number for number, word in enumerate(self._words)}
        return {"threads": threads or "its default", "compute_type": self._translator.compute_type}

    def translate(self, sources: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        """Translate a batch; it wants tokens as words, and counts the end of a text, which is never reached."""
        found = self._translator.translate_batch(
            [[self._words[one] for one in row] for row in sources],
            beam_size=num_beams,
            max_decoding_length=new_tokens,
            min_decoding_length=new_tokens,
            end_token=[],
        )
        return [[self._ids[word] for word in one.hypotheses[0]] for one in found]


if __name__ == "__main__":
    serve(Ctranslate2TranslatorPeer())

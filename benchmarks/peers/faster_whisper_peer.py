"""faster-whisper: CTranslate2 with its own features, on a folder that CTranslate2's converter wrote."""

from typing import Any

from protocol import serve, version_of


class FasterWhisperPeer:
    """A folder with `model.bin` and `tokenizer.json`."""

    def imports(self) -> dict[str, str]:
        """Import faster-whisper."""
        import faster_whisper

        del faster_whisper
        return version_of("faster-whisper", "ctranslate2")

    def load(self, path: str, *, threads: int | None, compute_type: str = "default") -> dict[str, Any]:
        """Open the folder."""
        from faster_whisper import WhisperModel

        self._model = WhisperModel(
            path, "cpu", cpu_threads=threads or 0, compute_type=compute_type, local_files_only=True
        )
        return {"threads": threads or "its default", "compute_type": self._model.model.compute_type}

    def transcribe(self, file: str, num_beams: int) -> str:
        """One pass without its second tries at other temperatures, which the others do not have."""
        pieces, _ = self._model.transcribe(
            file,
            language="en",
            beam_size=num_beams,
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return "".join(piece.text for piece in pieces)


if __name__ == "__main__":
    serve(FasterWhisperPeer())

"""lmopt itself, translating and recognising speech as users have it do."""

from typing import Any

from protocol import serve, version_of


class LmoptApplicationsPeer:
    """Whatever encoder-decoder `lmopt.Runtime` opens."""

    def imports(self) -> dict[str, str]:
        """Import lmopt; the engine's own modules come with the model."""
        import lmopt

        lmopt.Runtime  # noqa: B018 - the name is what imports it
        return version_of("lmopt")

    def load(self, path: str, *, threads: int | None, **options: Any) -> dict[str, Any]:
        """Open a runtime; options as for the runtime."""
        import lmopt

        self._runtime = lmopt.Runtime(path, threads=threads, **options)
        actual = self._runtime.report().actual
        return {"threads": actual.threads, "dtype": actual.dtype, "versions": dict(actual.versions)}

    def transcribe(self, file: str, num_beams: int) -> str:
        """Write down what is said."""
        text: str = self._runtime.transcribe(file, num_beams=num_beams)
        return text

    def translate(self, sources: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        """Translate a batch of ids."""
        from lmopt.generation import GenerationConfig

        config = GenerationConfig(max_new_tokens=new_tokens, num_beams=num_beams)
        return [one.token_ids for one in self._runtime.generate(sources, config)]


if __name__ == "__main__":
    serve(LmoptApplicationsPeer())

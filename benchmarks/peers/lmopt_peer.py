"""lmopt itself, by the same orders as its peers: `Runtime.generate`, as users call it, loop and all.

It also stands in for the reference: the `torch` engine in float32.
"""

import time
from typing import Any

from protocol import serve, version_of


class LmoptPeer:
    """Whatever `lmopt.Runtime` opens."""

    def imports(self) -> dict[str, str]:
        """Import lmopt; the engine's own modules come with the model."""
        import lmopt

        lmopt.Runtime  # noqa: B018 - the name is what imports it
        return version_of("lmopt")

    def load(
        self, path: str, *, threads: int | None, lookup: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """Open a runtime.

        Args:
            path: Model, artefact or GGUF file.
            threads: As for the runtime.
            lookup: `prompt_lookup_num_tokens` of every generation.
            **options: As for the runtime: `backend`, `dtype`, ...
        """
        import lmopt

        self._more: dict[str, Any] = {"prompt_lookup_num_tokens": lookup} if lookup else {}
        self._runtime = lmopt.Runtime(path, threads=threads, **options)
        actual = self._runtime.report().actual
        return {
            "threads": actual.threads,
            "dtype": actual.dtype,
            "versions": dict(actual.versions),
            **self._more,
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Generate in one call; a token's time is when the callback has it."""
        from lmopt.generation import GenerationConfig

        # A config of its own takes no end token from the model, so that generation never stops early.
        config = GenerationConfig(max_new_tokens=new_tokens, **self._more)
        stamps: list[list[int]] = [[] for _ in prompts]
        start = time.perf_counter_ns()
        found = self._runtime.generate(
            prompts,
            config,
            on_token=lambda token: stamps[token.prompt].append(time.perf_counter_ns() - start),
        )
        return [one.token_ids for one in found], stamps

    def logits(self, ids: list[int]) -> Any:
        """Logits of every position."""
        return self._runtime.logits(ids)


if __name__ == "__main__":
    serve(LmoptPeer())

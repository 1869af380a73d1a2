"""CTranslate2: its own generator on a folder that its own converter wrote."""

import time
from typing import Any

from protocol import serve, version_of


class Ctranslate2Peer:
    """A folder with `model.bin`."""

    def imports(self) -> dict[str, str]:
        """Import CTranslate2."""
        import ctranslate2

        del ctranslate2
        return version_of("ctranslate2")

    def load(self, path: str, *, threads: int | None, compute_type: str = "default") -> dict[str, Any]:
        """Open the folder."""
        import ctranslate2

        self._generator = ctranslate2.Generator(
            path, "cpu", intra_threads=threads or 0, inter_threads=1, compute_type=compute_type
        )
        with open(f"{path}/vocabulary.json", encoding="utf-8") as file:
            import json

            self._words: list[str] = json.load(file)
        return {"threads": threads or "its default", "compute_type": self._generator.compute_type}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Generate a batch; the callback of each token of each row stamps it. It wants tokens as words."""
        stamps: list[list[int]] = [[] for _ in prompts]

        def stamp(step: Any) -> bool:
            stamps[step.batch_id].append(time.perf_counter_ns() - start)
            return False

        start = time.perf_counter_ns()
        found = self._generator.generate_batch(
            [[self._words[one] for one in row] for row in prompts],
            beam_size=1,
            max_length=new_tokens,
            min_length=new_tokens,
            end_token=[],
            include_prompt_in_result=False,
            callback=stamp,
        )
        return [one.sequences_ids[0] for one in found], stamps

    def logits(self, ids: list[int]) -> Any:
        """One call over the whole row."""
        import ctranslate2
        import numpy as np

        found = self._generator.forward_batch([[self._words[one] for one in ids]])
        return np.array(found.to(ctranslate2.DataType.float32) if hasattr(found, "to") else found)[0]


if __name__ == "__main__":
    serve(Ctranslate2Peer())

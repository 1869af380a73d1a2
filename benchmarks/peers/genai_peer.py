"""onnxruntime-genai: its own generator on a graph that its own builder wrote."""

import json
import time
from typing import Any

from protocol import padded, serve, version_of


class GenaiPeer:
    """A folder with `genai_config.json`."""

    def imports(self) -> dict[str, str]:
        """Import onnxruntime-genai."""
        import onnxruntime_genai

        del onnxruntime_genai
        return version_of("onnxruntime-genai", "onnxruntime")

    def load(
        self, path: str, *, threads: int | None, session: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Open the folder; the thread count and other session options lie over its configuration."""
        import onnxruntime_genai as og

        config = og.Config(path)
        with open(f"{path}/genai_config.json", encoding="utf-8") as file:
            own = json.load(file)["model"]
        options = {**({"intra_op_num_threads": threads} if threads else {}), **(session or {})}
        # Without an end token generation never stops early. Nothing else changes.
        config.overlay(json.dumps({"model": {"eos_token_id": [], "decoder": {"session_options": options}}}))
        self._pad = own["pad_token_id"]
        self._model = og.Model(config)
        return {"threads": threads or "its default", **(session or {})}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Run the generator; unequal rows are padded as its own tokenizer does it."""
        import numpy as np

        tokens, stamps = [], []
        start = time.perf_counter_ns()
        generator = self._generator(len(prompts), max(map(len, prompts)) + new_tokens)
        rows = prompts[0] if len(prompts) == 1 else padded(prompts, self._pad, side="right")[0]
        generator.append_tokens(np.array(rows, np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            tokens.append(generator.get_next_tokens().tolist())
            stamps.append(time.perf_counter_ns() - start)
        return [list(row) for row in zip(*tokens, strict=True)], [stamps] * len(prompts)

    def logits(self, ids: list[int]) -> Any:
        """The graph's own output after the prompt."""
        import numpy as np

        generator = self._generator(1, len(ids) + 1)
        generator.append_tokens(np.array(ids, np.int32))
        return generator.get_output("logits")[0]

    def _generator(self, batch: int, length: int) -> Any:
        import onnxruntime_genai as og

        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length, batch_size=batch, do_sample=False, num_beams=1)
        return og.Generator(self._model, parameters)


if __name__ == "__main__":
    serve(GenaiPeer())

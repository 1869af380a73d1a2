"""transformers, eager: the loop that everybody writes around a model, with its own growing cache.

`generate` of transformers does the same calls with more Python between them; the peer gets the quicker
loop.
"""

import inspect
import time
from typing import Any

from protocol import padded, serve, version_of


class TransformersPeer:
    """A Hugging Face folder in eager mode."""

    def imports(self) -> dict[str, str]:
        """Import torch and transformers."""
        import torch
        import transformers
        from transformers import AutoModelForCausalLM  # the lazy module behind it takes seconds

        del torch, transformers, AutoModelForCausalLM
        return version_of("torch", "transformers")

    def load(
        self, path: str, *, threads: int | None, dtype: str = "float32", attention: str = "sdpa"
    ) -> dict[str, Any]:
        """Open the folder."""
        import torch
        from transformers import AutoModelForCausalLM

        if threads:
            torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation=attention
        ).eval()
        # transformers 5.24 renamed it, as argument and in the result.
        names = inspect.signature(self._model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        return {"threads": torch.get_num_threads(), "dtype": dtype, "attention": attention}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Call the module with its cache; rows of unequal length are padded on the left and masked."""
        import torch

        tokens, stamps = [], []
        with torch.inference_mode():
            start = time.perf_counter_ns()
            rows, seen = padded(prompts, 0, side="left")
            ids = torch.from_numpy(rows)
            more: dict[str, Any] = {}
            if not seen.all():
                mask = torch.from_numpy(seen)
                more = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
            past = None
            for _ in range(new_tokens):
                cache = {self._cache_name: past}
                found = self._model(ids, use_cache=True, logits_to_keep=1, **cache, **more)
                past = getattr(found, self._cache_name)
                ids = found.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(ids[:, 0].tolist())
                stamps.append(time.perf_counter_ns() - start)
                if more:
                    mask = torch.cat([more["attention_mask"], torch.ones_like(ids)], 1)
                    more = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
        return [list(row) for row in zip(*tokens, strict=True)], [stamps] * len(prompts)

    def logits(self, ids: list[int]) -> Any:
        """One call without a cache."""
        import torch

        with torch.inference_mode():
            return self._model(torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


if __name__ == "__main__":
    serve(TransformersPeer())

"""llama.cpp by llama-cpp-python's low-level functions: `llama_decode`, and its own greedy sampler.

The high-level class does the same calls with more Python between them; the peer gets the quicker loop.
"""

import ctypes
import time
from typing import Any

from protocol import serve, version_of

_CONTEXT = 2048


class LlamaCppPeer:
    """A GGUF file."""

    def imports(self) -> dict[str, str]:
        """Import llama-cpp-python."""
        import llama_cpp

        del llama_cpp
        return version_of("llama-cpp-python")

    def load(
        self, path: str, *, threads: int | None, flash_attention: int = -1, rows: int = 1
    ) -> dict[str, Any]:
        """Open the file.

        Args:
            path: GGUF file.
            threads: For prompts and new tokens alike.
            flash_attention: -1 its own choice, 0 off, 1 on.
            rows: Sequences that it makes room for; more than one for batches only.
        """
        import llama_cpp as lc

        lc.llama_backend_init()
        quiet = lc.llama_log_callback(lambda level, text, data: None)
        lc.llama_log_set(quiet, ctypes.c_void_p(0))
        self._keep = quiet
        model_options = lc.llama_model_default_params()
        self._model = lc.llama_model_load_from_file(path.encode(), model_options)
        if not self._model:
            raise ValueError(f"llama.cpp cannot open {path}")
        options = lc.llama_context_default_params()
        options.n_ctx = _CONTEXT * rows
        options.n_seq_max = rows
        options.n_batch = options.n_ubatch = 512
        options.flash_attn_type = flash_attention
        if threads:
            options.n_threads = options.n_threads_batch = threads
        self._context = lc.llama_init_from_model(self._model, options)
        self._vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model))
        self._sampler = lc.llama_sampler_init_greedy()
        self._batch = lc.llama_batch_init(_CONTEXT, 0, 1)
        system = lc.llama_print_system_info().decode()
        return {
            "threads": lc.llama_n_threads(self._context),
            "flash_attention": flash_attention,
            "system": " ".join(part.strip() for part in system.split("|") if "= 1" in part),
        }

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Decode prompt by prompt, then all rows together, one token each."""
        import llama_cpp as lc

        self._forget()
        tokens: list[list[int]] = [[] for _ in prompts]
        stamps: list[list[int]] = [[] for _ in prompts]
        start = time.perf_counter_ns()
        for row, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), 512):
                part = prompt[begin : begin + 512]
                last = begin + len(part) == len(prompt)
                self._decode(
                    [(one, begin + n, row, last and n == len(part) - 1) for n, one in enumerate(part)]
                )
            tokens[row].append(lc.llama_sampler_sample(self._sampler, self._context, -1))
            stamps[row].append(time.perf_counter_ns() - start)
        for step in range(new_tokens - 1):
            self._decode(
                [(tokens[row][-1], len(prompt) + step, row, True) for row, prompt in enumerate(prompts)]
            )
            for row in range(len(prompts)):
                tokens[row].append(lc.llama_sampler_sample(self._sampler, self._context, row))
            now = time.perf_counter_ns() - start
            for line in stamps:
                line.append(now)
        return tokens, stamps

    def logits(self, ids: list[int]) -> Any:
        """Logits of every position."""
        import llama_cpp as lc
        import numpy as np

        self._forget()
        found = np.empty((len(ids), self._vocab), np.float32)
        for begin in range(0, len(ids), 512):
            part = ids[begin : begin + 512]
            self._decode([(one, begin + n, 0, True) for n, one in enumerate(part)])
            values = lc.llama_get_logits(self._context)
            found[begin : begin + len(part)] = np.ctypeslib.as_array(values, (len(part), self._vocab))
        return found

    def _forget(self) -> None:
        import llama_cpp as lc

        lc.llama_memory_clear(lc.llama_get_memory(self._context), False)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> None:
        import llama_cpp as lc

        batch = self._batch
        batch.n_tokens = len(entries)
        for place, (token, position, row, wanted) in enumerate(entries):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = wanted
        status = lc.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")


if __name__ == "__main__":
    serve(LlamaCppPeer())

"""OpenVINO GenAI: its own pipeline on a folder that optimum-intel wrote."""

import time
from typing import Any

from protocol import padded, serve, version_of


class OpenVinoPeer:
    """A folder with `openvino_model.xml`."""

    def imports(self) -> dict[str, str]:
        """Import OpenVINO GenAI."""
        import openvino_genai

        del openvino_genai
        return version_of("openvino-genai", "openvino")

    def load(self, path: str, *, threads: int | None, **properties: Any) -> dict[str, Any]:
        """Open the folder with device properties, such as `ATTENTION_BACKEND`."""
        import openvino_genai as og

        self._path = path
        self._properties = {**({"INFERENCE_NUM_THREADS": threads} if threads else {}), **properties}
        self._pipeline = og.LLMPipeline(path, "CPU", **self._properties)
        self._network: Any = None
        return {"threads": threads or "its default", **properties}

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[list[list[int]], list[list[int]]]:
        """Run the pipeline. Its streamer takes one row only, so a batch's times are the pipeline's own."""
        import numpy as np
        import openvino as ov
        import openvino_genai as og

        config = og.GenerationConfig()
        config.max_new_tokens, config.ignore_eos = new_tokens, True
        config.do_sample, config.num_beams, config.apply_chat_template = False, 1, False
        stamps: list[int] = []

        class Clock(og.StreamerBase):  # type: ignore[misc]
            def write(self, token: Any) -> Any:
                now = time.perf_counter_ns() - start
                stamps.extend([now] * (len(token) if isinstance(token, list) else 1))
                return og.StreamingStatus.RUNNING

            def end(self) -> None:
                return None

        start = time.perf_counter_ns()
        if len(prompts) == 1:
            ids = np.array([prompts[0]], np.int64)
            inputs = og.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
            found = self._pipeline.generate(inputs, config, Clock())
            return [list(found.tokens[0])], [stamps]
        ids, mask = padded(prompts, 0, side="left")
        found = self._pipeline.generate(og.TokenizedInputs(ov.Tensor(ids), ov.Tensor(mask)), config)
        whole = time.perf_counter_ns() - start
        # Its own record of a batch is not by row; the time of the whole is measured, that between is spread.
        steps = [whole * (step + 1) // new_tokens for step in range(new_tokens)]
        return [list(row) for row in found.tokens], [steps] * len(prompts)

    def logits(self, ids: list[int]) -> Any:
        """Run the same graph by OpenVINO itself, from an empty state."""
        import numpy as np
        import openvino as ov

        if self._network is None:
            known = {key: value for key, value in self._properties.items() if key != "ATTENTION_BACKEND"}
            self._network = ov.Core().compile_model(f"{self._path}/openvino_model.xml", "CPU", known)
        request = self._network.create_infer_request()
        feeds = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        names = {name for one in self._network.inputs for name in one.get_names()}
        request.infer({name: array for name, array in feeds.items() if name in names})
        return request.get_tensor("logits").data[0].copy()


if __name__ == "__main__":
    serve(OpenVinoPeer())

"""Let a student be corrected on what it writes itself (on-policy, generalised distillation).

A student that only reads its teacher's texts never learns to go on from its own mistakes. Here a share of the batches
keeps the beginnings of its rows, the student writes on from them by the one generation loop, and both models then read
what it wrote, as long as the corpus's rows: behind an end of text it begins another, as packed rows do. Nothing flows
back through the sampling.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lmopt.contracts import EngineRequest
from lmopt.errors import UnsupportedError, UnsupportedOptionError
from lmopt.generation import GenerationConfig, generate
from lmopt.registry import backends
from lmopt.training.distillation import Distillation
from lmopt.training.objective import IGNORE, Batch, LossValue, Outputs
from lmopt.training.teacher_cache import TeacherCache
from lmopt.types import ModelFacts


class OnPolicy(nn.Module):
    """A distillation some of whose batches the student writes itself.

    Args:
        loss: What is minimised, with a teacher in memory. `beta` above 0 is usual here.
        facts: Of the student.
        share: Share of the steps that the student writes, 0 .. 1.
        prompt_tokens: Tokens that are kept of the beginning of each row; they are read, but not learnt.
        temperature: Of sampling.
        seed: Of choosing steps and of sampling: both are functions of it and of the step's number.

    Raises:
        UnsupportedOptionError: A number is out of its range, or the teacher's answers are cached, which the student's
            own texts are not among.

    References:
        Agarwal et al. 2024, On-Policy Distillation of Language Models, arXiv:2306.13649 (share: `lambda`).
    """

    hidden_states = False

    def __init__(
        self,
        loss: Distillation,
        facts: ModelFacts,
        *,
        share: float = 0.5,
        prompt_tokens: int = 16,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1 or type(prompt_tokens) is not int or prompt_tokens < 1:
            raise UnsupportedOptionError(
                f"share is {share!r} and prompt_tokens {prompt_tokens!r}; expected 0 .. 1 and at least 1"
            )
        if isinstance(loss.teacher, TeacherCache):
            raise UnsupportedOptionError(
                "a cache holds the teacher's answers to the corpus, not to what the student writes; keep the teacher "
                "in memory: LiveTeacher(module)"
            )
        self.loss = loss
        self.facts = facts
        self.share, self.prompt_tokens, self.temperature, self.seed = share, prompt_tokens, temperature, seed

    def prepare(self, batch: Batch, module: nn.Module) -> Batch:
        """Replace what stands behind the beginnings of rows by what the student writes; called by the loop.

        Args:
            batch: Rows of the corpus.
            module: The student, in training mode; it is in that mode again afterwards.

        Returns:
            The batch itself in steps that are not the student's. Otherwise labels of the prompt, and those behind a
            text that ended early, are `IGNORE`.

        Raises:
            UnsupportedOptionError: Rows are not longer than the prompt.
            UnsupportedError: The student is spread over processes, which must not write texts of unequal length.
        """
        if np.random.default_rng((self.seed, batch.step)).random() >= self.share:
            return batch
        ids = batch.input_ids.cpu().numpy()
        rows, length = ids.shape
        if length <= self.prompt_tokens:
            raise UnsupportedOptionError(
                f"rows have {length} tokens, the prompt takes {self.prompt_tokens}; use a larger block_size"
            )
        if any(isinstance(one, DTensor) for one in module.parameters()):
            raise UnsupportedError("a student with sharding='full' cannot write; use sharding='none' (DDP)")
        prompts = ids[:, : self.prompt_tokens]
        # One token more than is read: the label of the last.
        written = self._write(module, prompts.tolist(), length + 1 - self.prompt_tokens, batch)
        whole = np.zeros((rows, length + 1), np.int64)
        known = np.zeros((rows, length + 1), bool)
        whole[:, : self.prompt_tokens] = prompts
        for row, text in enumerate(written):
            end = self.prompt_tokens + len(text)
            whole[row, self.prompt_tokens : end] = text
            known[row, self.prompt_tokens : end] = True
        labels = np.where(known, whole, IGNORE)[:, 1:]
        device = batch.input_ids.device
        return Batch(
            torch.from_numpy(whole[:, :-1].copy()).to(device),
            torch.from_numpy(labels.copy()).to(device),
            batch.blocks,
            batch.step,
        )

    def forward(self, batch: Batch, outputs: Outputs) -> LossValue:
        """Judge what the student answered, whoever wrote the batch."""
        value: LossValue = self.loss(batch, outputs)
        return value

    def describe(self) -> Mapping[str, Any]:
        """Say by plain data what is minimised."""
        return {
            **self.loss.describe(),
            "on_policy": [self.share, self.prompt_tokens, self.temperature, self.seed],
        }

    def _write(
        self, module: nn.Module, prompts: list[list[int]], tokens: int, batch: Batch
    ) -> list[list[int]]:
        device = batch.input_ids.device
        name = str(device) if device.type == "cuda" else device.type
        threads, random = torch.get_num_threads(), torch.get_rng_state()
        engine = backends.load("torch")(
            EngineRequest(facts=self.facts, module=module, device=name, threads=threads)
        )
        configs = [
            GenerationConfig(
                max_new_tokens=tokens, do_sample=True, temperature=self.temperature, top_k=0,
                # The number of a row's block tells rows of one step apart, on all processes.
                seed=self.seed + 1_000_003 * batch.step + int(block),
            )
            for block in batch.blocks
        ]  # fmt: skip
        try:
            # Mixed precision keeps rounded weights for the forward that follows; these would have no gradient.
            with torch.autocast(device.type, enabled=False):
                found = generate(engine, prompts, configs)
        finally:
            engine.close()
            module.train()
            torch.set_rng_state(random)
        return [one[0].token_ids for one in found]

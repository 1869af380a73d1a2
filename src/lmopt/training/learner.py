"""Model and loss as one module: what is wrapped for mixed precision and for many processes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lmopt.backends.torch.language_model import is_transformers
from lmopt.errors import UnsupportedError
from lmopt.training.objective import Batch, Loss, Outputs


class Learner(nn.Module):
    """Reads a batch and gives its loss. The logits stay inside, so that no wrapper copies them.

    Args:
        module: The language model.
        loss: What is minimised; its weights, if it has any, are part of this module.
        carry: Whether states are given back, for rows that go on.

    Raises:
        UnsupportedError: The loss needs hidden states that the module does not show.
    """

    def __init__(self, module: nn.Module, loss: Loss, *, carry: bool = False) -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        self._carry = carry
        self._transformers = is_transformers(module)
        if loss.hidden_states and not self._transformers:
            raise UnsupportedError(
                f"{type(loss).__name__} needs hidden states, which {type(module).__name__}.forward does not return: "
                "they are for transformers models. For an own module let the loss watch its blocks by forward hooks."
            )

    def forward(self, batch: Batch, state: Any = None) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Compute the loss.

        Args:
            batch: What to read.
            state: State of the rows before this batch, `None` at their start.

        Returns:
            Mean loss, its parts without gradient, and the state behind the batch without gradient, `None`
            where states are not carried.
        """
        # A loss may choose what is read, as on-policy distillation does.
        if hasattr(self.loss, "prepare"):
            batch = self.loss.prepare(batch, self.module)
        outputs, after = self._read(batch.input_ids, state)
        value = self.loss(batch, outputs)
        parts = {name: part.detach() for name, part in value.parts.items()}
        if not self._carry:
            return value.loss, parts, None
        return value.loss, parts, pytree.tree_map_only(Tensor, Tensor.detach, after)

    def state_structure(self, device: torch.device) -> pytree.TreeSpec:
        """Find out how the module nests its state, by running it on one token."""
        self.module.eval()
        with torch.no_grad():
            _, after = self._read(torch.zeros(1, 1, dtype=torch.int64, device=device), None)
        self.module.train()
        return pytree.tree_structure(after)

    def trained(self) -> dict[str, nn.Parameter]:
        """Give the weights that are trained, by name, shared ones once."""
        return {name: one for name, one in self.named_parameters() if one.requires_grad}

    def kept(self) -> dict[str, Tensor]:
        """Give buffers that forwards may change and that belong to the model, by name."""
        stated = self.state_dict().keys()
        return {name: one for name, one in self.named_buffers() if name in stated}

    def frozen(self) -> dict[str, Tensor]:
        """Give the weights that are not trained, by name."""
        return {name: one for name, one in self.named_parameters() if not one.requires_grad}

    def _read(self, ids: Tensor, state: Any) -> tuple[Outputs, Any]:
        if self._transformers:
            wanted = self.loss.hidden_states
            found = self.module(input_ids=ids, use_cache=False, output_hidden_states=wanted)
            return Outputs(found.logits, found.hidden_states if wanted else None), None
        found = self.module(ids) if state is None else self.module(ids, state)
        if isinstance(found, torch.Tensor):
            return Outputs(found), None
        return Outputs(found[0]), found[1]

"""Write and read torch.export programs (.pt2)."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass

from lmopt.backends.torch.language_model import Decoder, as_decoder, dtype_name
from lmopt.backends.torch.tracing import export_program
from lmopt.contracts import ArtifactView, ExportRequest
from lmopt.errors import (
    CorruptArtifactError,
    ExportError,
    UnsafeArtifactError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.signature import Signature, StateTensor
from lmopt.types import TensorSpec

FORMAT: Final = "torch.export"
PROGRAM: Final = "model.pt2"


def export_pt2(request: ExportRequest) -> Mapping[str, Any]:
    """Write `model.pt2` into the staging folder.

    Args:
        request: See `lmopt.contracts.ExportRequest`; there are no options.

    Raises:
        ExportError: torch cannot trace or save the module.
        UnsupportedError: torch fixes a size in the program, as it does for an LSTM.
        UnsupportedOptionError: An option was given.
    """
    if request.options:
        raise UnsupportedOptionError(f"exporter 'torch.export' has no option {sorted(request.options)[0]!r}")
    if request.facts.source is not None:
        raise UnsupportedError(
            "a torch.export program is one graph, and an encoder-decoder takes two; export it with "
            "lmopt.Exporter('onnx')"
        )
    decoder = as_decoder(request.module)
    program, _ = export_program(decoder, may_fix=False)
    try:
        torch.export.save(program, request.folder / PROGRAM)
    except Exception as error:
        raise ExportError(
            f"torch cannot save the program of {type(request.module).__name__}: {error}"
        ) from error
    signature = decoder.signature
    return {
        "files": [PROGRAM],
        "dtype": dtype_name(decoder),
        "has_mask": signature.has_mask,
        "has_positions": signature.has_positions,
        "state": [[one.past.name, one.past.dtype, list(one.past.shape)] for one in signature.state],
    }


class ProgramDecoder(Decoder):
    """A program read back from a file; its sizes are as free as they were at export."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__(module)
        self.signature = signature

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        state: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Read new tokens after `state`."""
        logits, after = self.module(input_ids, attention_mask, position_ids, list(state))
        return logits, list(after)


def read_program(
    artifact: ArtifactView, vocab_size: int, device: torch.device, *, trust: bool
) -> ProgramDecoder:
    """Read the program of an artefact.

    Args:
        artifact: Artefact that holds the format `torch.export`.
        vocab_size: Size of the logits' last axis.
        device: Where it is to compute; programs are written for the CPU and moved.
        trust: Whether the caller grants that the file may run code: torch reads parts of a .pt2
            with pickle.

    Raises:
        UnsafeArtifactError: Without the grant, before anything of the file is read.
        CorruptArtifactError: torch cannot read the file.
    """
    if not trust:
        raise UnsafeArtifactError(
            f"{artifact.path / PROGRAM} is a torch.export program, and reading one can run code that is in it. If "
            f"you trust where it comes from: lmopt.Runtime({str(artifact.path)!r}, backend='torch', trust=True)"
        )
    described = artifact.manifest["formats"][FORMAT]
    try:
        program = torch.export.load(artifact.file(PROGRAM))
    except Exception as error:
        raise CorruptArtifactError(f"{artifact.path / PROGRAM} cannot be read: {error}") from error
    state = tuple(
        StateTensor.of(TensorSpec(name, dtype, tuple(shape))) for name, dtype, shape in described["state"]
    )
    signature = Signature(state, described["has_mask"], described["has_positions"], vocab_size)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    # The trace assumes sizes above 1 and would refuse others; the parity gate has run it on them.
    return ProgramDecoder(program.module(check_guards=False), signature)

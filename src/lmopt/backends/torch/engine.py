"""Run any decoder in eager PyTorch."""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from lmopt.accelerators import require_cuda
from lmopt.backends.torch.casting import forget_casts
from lmopt.backends.torch.encoder_decoder import EncoderDecoder, trial_inputs
from lmopt.backends.torch.export_program import read_program
from lmopt.backends.torch.language_model import Decoder, as_decoder, dtype_name, stated_casts
from lmopt.backends.torch.spec import BACKEND
from lmopt.checking import check_sources, state_begins_with_source
from lmopt.contracts import EngineReport, EngineRequest, PaddingSide
from lmopt.errors import (
    ClosedError,
    InputError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.platform import usable_cpus
from lmopt.signature import (
    ATTENTION_MASK,
    INPUT_IDS,
    POSITION_IDS,
    SOURCE_MASK,
    ArrayState,
    bytes_per_token,
    joined_sources,
    number_sources,
)
from lmopt.types import AnyArray, FloatArray, IntArray, ModelFacts

if TYPE_CHECKING:
    from lmopt.backends.torch.tensor_parallel import TensorParallelEngine

CACHE_DTYPES: Final = ("auto", "int8")

# What torch chose at its import; torch keeps one number for the whole process.
_DEFAULT_THREADS = torch.get_num_threads()


def open_engine(request: EngineRequest) -> "TorchEngine | TensorParallelEngine":
    """Open a live module, or a trusted torch.export program; see `lmopt.contracts.EngineFactory`.

    Options: `allow_tf32` (default `False`) lets float32 products and recurrent layers on a GPU round to TF32;
    `trust` (default `False`) lets a torch.export program be read; `kv_cache_dtype` (default `"auto"`, the
    model's own) `"int8"` keeps keys and values of transformers models in 8 bits, see `int8_cache`;
    `tensor_parallel_size` (default 1) splits the model over so many processes, own modules by
    `tensor_parallel_plan`, see `tensor_parallel`.
    """
    BACKEND.require(device=request.device, dtype=request.dtype)
    options = dict(request.options)
    trust = options.pop("trust", False)
    kv_cache_dtype = options.pop("kv_cache_dtype", "auto")
    allow_tf32 = options.pop("allow_tf32", False)
    ranks, plan = options.pop("tensor_parallel_size", 1), options.pop("tensor_parallel_plan", None)
    if options:
        raise UnsupportedOptionError(
            f"backend 'torch' has no option {sorted(options)[0]!r}; it has trust, kv_cache_dtype, allow_tf32, "
            "tensor_parallel_size and tensor_parallel_plan, beside device, dtype and threads"
        )
    if kv_cache_dtype not in CACHE_DTYPES:
        raise UnsupportedOptionError(
            f"kv_cache_dtype is {kv_cache_dtype!r}; expected one of {', '.join(CACHE_DTYPES)}"
        )
    if request.threads is not None and request.threads < 1:
        raise UnsupportedOptionError(f"threads is {request.threads}; expected at least 1")
    device = torch.device(request.device)
    if not isinstance(allow_tf32, bool) or (allow_tf32 and device.type != "cuda"):
        raise UnsupportedOptionError(
            f"allow_tf32={allow_tf32!r} on {request.device} is not possible; expected True or False, and True on "
            "cuda only"
        )
    if device.type == "cuda":
        _check_cuda(request.device)
        device = torch.device("cuda", device.index or 0)
    if request.facts.source is not None and (ranks != 1 or plan is not None or kv_cache_dtype != "auto"):
        raise UnsupportedOptionError(
            "tensor_parallel_size and kv_cache_dtype are for models without an encoder so far; leave them out"
        )
    if ranks != 1 or plan is not None:
        if kv_cache_dtype != "auto":
            raise UnsupportedOptionError("tensor_parallel_size goes with kv_cache_dtype='auto' only")
        # Torch's parts for many processes take a while to import.
        from lmopt.backends.torch.tensor_parallel import open_parallel

        return open_parallel(request, ranks, plan)
    decoder = _decoder(request, device, trust=trust)
    if kv_cache_dtype == "int8":
        # Any model may be none of transformers', which takes seconds to import.
        from lmopt.backends.torch.int8_cache import Int8CacheDecoder

        decoder = Int8CacheDecoder(decoder)
    threads = request.threads or min(_DEFAULT_THREADS, usable_cpus())
    return TorchEngine(decoder, request.facts, device, threads, allow_tf32=allow_tf32)


def _decoder(request: EngineRequest, device: torch.device, *, trust: bool) -> Decoder:
    """Wrap the live module, or read the program of the artefact."""
    if request.module is None and request.artifact is None:
        raise UnsupportedOptionError("backend 'torch' was given neither a module nor an artefact")
    if request.module is None:
        assert request.artifact is not None
        program = read_program(request.artifact, request.facts.vocab_size, device, trust=trust)
        has = dtype_name(program)
        if request.dtype not in {"auto", has}:
            raise UnsupportedError(
                f"a torch.export program computes in what it was exported in, {has}; asked for {request.dtype}. Run "
                "the original model in it, or export that"
            )
        return program
    module: nn.Module = request.module
    parameter = next(module.parameters(), torch.zeros(()))
    dtype = parameter.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    mixed = request.dtype != "auto" and stated_casts(module)
    if parameter.dtype != dtype or parameter.device != device or mixed:
        # The caller's module stays as it is.
        module = copy.deepcopy(module)
        if request.dtype != "auto":
            # All of it is to compute in this type.
            forget_casts(module)
            module.to(dtype=dtype)
        module = module.to(device=device)
    return as_decoder(module.eval(), request.facts.source)


class TorchEngine:
    """One module on one device; its state is a list of tensors."""

    def __init__(
        self,
        decoder: Decoder,
        facts: ModelFacts,
        device: torch.device,
        threads: int,
        *,
        allow_tf32: bool = False,
    ) -> None:
        self.facts = facts
        self._allow_tf32 = allow_tf32
        self._threads = threads
        self._device = device
        self._signature = decoder.signature
        self._names = [one.past.name for one in decoder.signature.state]
        self._changing = [one.past.name for one in decoder.signature.changing]
        self._decoder: Decoder | None = decoder

    @property
    def ragged(self) -> bool:
        """Whether rows may be unequal: whether the module honours a mask, and one of their sources."""
        return self._signature.has_mask and (self.facts.source is None or self.ragged_sources)

    @property
    def ragged_sources(self) -> bool:
        """Whether sources may be unequal: whether the encoder honours a mask, or takes one length only."""
        source = self.facts.source
        return source is not None and (source.fixed or self._signature.has_source_mask)

    def begin(
        self, batch: int, *, capacity: int | None = None, padding_side: PaddingSide = "right"
    ) -> ArrayState:
        """Make the empty state of `batch` rows; the cache grows, so `capacity` has no use here."""
        decoder = self._open()
        if self.facts.source is not None:
            raise state_begins_with_source()
        initial = decoder.zero_state(batch, self._device)
        tensors = dict(zip(self._names, initial, strict=True))
        return ArrayState(tensors, np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64), padding_side)

    def encode(
        self,
        inputs: AnyArray,
        lengths: IntArray,
        *,
        capacity: int | None = None,
        padding_side: PaddingSide = "right",
    ) -> ArrayState:
        """Read the sources of some rows; see `lmopt.contracts.SupportsEncoder.encode`."""
        decoder = self._open()
        inputs, mask = check_sources(inputs, lengths, self.facts.source, ragged=self.ragged_sources)
        assert isinstance(decoder, EncoderDecoder)
        self._settle()
        given = torch.from_numpy(inputs).to(self._device)
        if given.is_floating_point():
            given = given.to(getattr(torch, dtype_name(decoder.module)))
        with torch.inference_mode():
            state = decoder.encode(given, torch.from_numpy(mask).to(self._device))
        batch = len(inputs)
        tensors = dict(zip(self._names, state, strict=True))
        empty, none = np.zeros((batch, 0), np.int64), np.zeros(batch, np.int64)
        return ArrayState(tensors, empty, none, padding_side, number_sources(batch))

    def encoded(self, state: ArrayState) -> Mapping[str, AnyArray]:
        """Show what rows hold of their sources."""
        self._open()
        return {
            one.past.name: state.tensors[one.past.name].float().cpu().numpy()
            for one in self._signature.state
            if not one.present and one.past.name != SOURCE_MASK
        }

    def forward(
        self, input_ids: IntArray, lengths: IntArray, state: ArrayState, *, last_only: bool = False
    ) -> tuple[FloatArray, ArrayState]:
        """Read new tokens; see `lmopt.contracts.Engine.forward`."""
        decoder = self._open()
        self._settle()
        step = self._signature.step(input_ids, lengths, state)
        ids, mask, positions = (
            torch.from_numpy(step.feeds[name]).to(self._device) if name in step.feeds else None
            for name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
        )
        assert ids is not None
        with torch.inference_mode():
            logits, present = decoder(ids, mask, positions, [state.tensors[name] for name in self._names])
            aligned = step.align(logits.float().cpu().numpy(), last_only=last_only)
        tensors = state.tensors | dict(zip(self._changing, present, strict=True))
        return aligned, replace(state, tensors=tensors, mask=step.mask, lengths=step.lengths)

    def select(self, state: ArrayState, rows: IntArray) -> ArrayState:
        """Keep, drop, reorder or repeat rows."""
        self._open()

        def taking(rows: IntArray) -> Callable[[Tensor, int], Tensor]:
            index = torch.from_numpy(rows).to(self._device)
            return lambda value, axis: value.index_select(axis, index)

        return self._signature.select(state, rows, taking)

    def join(self, states: Sequence[ArrayState]) -> ArrayState:
        """Put the rows of several states into one batch, padding shorter pasts at the left."""
        self._open()
        pads = self._signature.pads(states)
        tensors = {}
        for one in self._signature.state:
            parts = [state.tensors[one.past.name] for state in states]
            if one.past_axis is not None:
                parts = [_pad_left(part, one.past_axis, pad) for part, pad in zip(parts, pads, strict=True)]
            elif one.source_axis is not None:
                longest = max(part.shape[one.source_axis] for part in parts)
                parts = [_pad_right(part, one.source_axis, longest) for part in parts]
            tensors[one.past.name] = torch.cat(parts, dim=one.batch_axis)
        masks = [np.pad(one.mask, ((0, 0), (pad, 0))) for one, pad in zip(states, pads, strict=True)]
        lengths = np.concatenate([one.lengths for one in states])
        return ArrayState(
            tensors, np.concatenate(masks), lengths, states[0].padding_side, joined_sources(states)
        )

    @property
    def rewinds(self) -> bool:
        """Whether rows can forget their last tokens: whether the state is a cache and nothing else."""
        return self._signature.rewinds

    def rewind(self, state: ArrayState, lengths: IntArray) -> ArrayState:
        """Let each row forget all but its first tokens."""
        self._open()
        kept, mask, slots = self._signature.forget(state, lengths)
        tensors = dict(state.tensors)
        for one in self._signature.changing:
            assert one.past_axis is not None
            tensors[one.past.name] = state.tensors[one.past.name].narrow(one.past_axis, 0, slots)
        return replace(state, tensors=tensors, mask=mask, lengths=kept)

    def copy(self, state: ArrayState, *, capacity: int | None = None) -> ArrayState:
        """Make an independent copy; the cache grows, so `capacity` has no use here."""
        self._open()
        # A module may write into the state that it is given.
        tensors = {name: tensor.clone() for name, tensor in state.tensors.items()}
        return replace(state, tensors=tensors, mask=state.mask.copy(), lengths=state.lengths.copy())

    def report(self) -> EngineReport:
        """Say where the module's weights are and what computes."""
        module = self._open().module
        weight = next(module.parameters(), torch.zeros(()))
        return EngineReport(
            backend="torch",
            device=str(weight.device),
            dtype=dtype_name(module),
            threads=self._threads,
            # The wheel's own number: what torch calls itself may have a build behind it, as +cu130.
            versions={"torch": version("torch")},
            details={
                "module": type(module).__name__,
                "ragged": self.ragged,
                **({"allow_tf32": self._allow_tf32} if self._device.type == "cuda" else {}),
                "kv_cache_dtype": self._signature.state[0].past.dtype if self._signature.state else "none",
                "kv_cache_bytes_per_token": bytes_per_token(self._signature.state),
            },
        )

    def close(self) -> None:
        """Let go of the module."""
        self._decoder = None

    def tap_names(self) -> list[str]:
        """Paths of the modules that give a tensor, in the order in which they finish."""
        module = self._open().module
        inputs = trial_inputs(module, self.facts.source, 1)
        if inputs is not None and inputs.is_floating_point():
            inputs = inputs.float()  # NumPy has no bfloat16
        source = None if inputs is None else inputs.cpu().numpy()
        names = [name for name, _ in module.named_modules() if name]
        return list(self.taps(np.zeros((1, 2), np.int64), names, source))

    def taps(
        self, input_ids: IntArray, names: Sequence[str], source: AnyArray | None = None
    ) -> dict[str, AnyArray]:
        """Run ids from an empty state, after a source where there is an encoder, and keep the named modules' outputs.

        What a decoder computes of a source alone is kept of the reading of the source, all else of that of the ids.
        """
        decoder = self._open()
        shown: dict[str, AnyArray] = {}
        modules = dict(decoder.module.named_modules())
        if unknown := [name for name in names if name not in modules]:
            raise InputError(f"the module has no part {unknown[0]!r}; tap_names() lists what can be shown")
        hooks = [modules[name].register_forward_hook(_keep(shown, name)) for name in names]
        try:
            ids = np.asarray(input_ids, np.int64)
            rows = len(ids)
            before = (
                self.begin(rows) if source is None else self.encode(source, np.full(rows, source.shape[-1]))
            )
            self.forward(ids, np.full(rows, ids.shape[1]), before)
        finally:
            for hook in hooks:
                hook.remove()
        return shown

    def _settle(self) -> None:
        """Set what torch keeps once for the whole process."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        if self._device.type == "cuda":
            _set_precision(allow_tf32=self._allow_tf32)

    def _open(self) -> Decoder:
        if self._decoder is None:
            raise ClosedError("this engine is closed; open a new lmopt.Runtime")
        return self._decoder


def _keep(shown: dict[str, AnyArray], name: str) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        first = next(iter(output.values())) if isinstance(output, dict) else output
        tensors = [
            one for one in (first if isinstance(first, tuple) else (first,)) if isinstance(one, Tensor)
        ]
        # Of several side by side (cosine and sine) a graph cannot tell which is meant.
        if len(tensors) == 1:
            shown[name] = tensors[0].detach().float().cpu().numpy().copy()

    return hook


def _pad_left(tensor: Tensor, axis: int, pad: int) -> Tensor:
    if not pad:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = pad
    return torch.cat([tensor.new_zeros(shape), tensor], dim=axis)


def _pad_right(tensor: Tensor, axis: int, length: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = length - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis) if shape[axis] else tensor


def _check_cuda(device: str) -> None:
    """Refuse a device that is not there, with torch's reason and the machine's."""
    also = ""
    if torch.version.cuda is None:
        also = f"torch {torch.__version__} is a build for CPUs"
    elif not torch.cuda.is_available():
        also = f"torch {torch.__version__} finds no usable CUDA device"
    require_cuda(device, also=also)


def _set_precision(*, allow_tf32: bool) -> None:
    """Let, or forbid, float32 be rounded to TF32; torch keeps one answer for the whole process.

    torch itself forbids it for products and allows it for convolutions and recurrent layers.
    """
    wanted = "tf32" if allow_tf32 else "ieee"
    cudnn: Any = torch.backends.cudnn  # its parts are set at run time, which its types do not know
    parts: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    # Asked before every forward: nothing is written while it holds. The older switches do not answer where they differ.
    with contextlib.suppress(RuntimeError):
        older = torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32
        if older == (allow_tf32, allow_tf32) and all(part.fp32_precision == wanted for part in parts):
            return
    # The older switches as well, and first: torch's tracer reads them, which is an error where they and the newer ones
    # disagree, so that no model could be exported in this process any more.
    torch.backends.cuda.matmul.allow_tf32 = cudnn.allow_tf32 = allow_tf32
    for part in parts:
        part.fp32_precision = wanted

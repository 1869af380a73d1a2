"""What to try first with a model on this machine, and why: from headers, a probe of the machine, and cited figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lmopt.compression import Cast, Quantize
from lmopt.compression.step import Step
from lmopt.errors import UnsupportedOptionError
from lmopt.platform import machine, memory_available_bytes
from lmopt.registry import backends, pip_line
from lmopt.tuning.probe import Probe, measure_machine
from lmopt.tuning.weights import ModelShape, read_shape, require_weights

_GENERATION: Final = "docs/results/2026-11-24-generation.md"
_COMPRESSION: Final = "docs/results/2026-11-24-compression.md"
_PROBE: Final = "the probe of this machine"
_HEADERS: Final = "the headers of the model's files"
_SCALING_LAWS: Final = "Dettmers & Zettlemoyer 2022, The case for 4-bit precision, arXiv:2212.09720"
_GPTQ: Final = "Frantar et al. 2022, GPTQ, arXiv:2210.17323"

# Most memory while generating, less what the imports take, over the files: _GENERATION, "Start, memory and size".
_PEAK_FLOAT: Final = 1.29
_PEAK_QUANTIZED: Final = 2.29
_PEAK_TORCH: Final = 1.92
_IMPORTS_BYTES: Final = 47_000_000
# Below this, 4 bits by rounding cost SmolLM2-135M 29 % to 38 % of perplexity, beyond it papers find little loss.
_SMALL: Final = 1_000_000_000
_CACHE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is said.

    Attributes:
        text: The reason.
        source: Where it can be checked.
    """

    text: str
    source: str


@dataclass(frozen=True, slots=True)
class Need:
    """What one precision needs.

    Attributes:
        precision: Name.
        weight_bytes: All weights.
        cache_bytes: Keys and values of one row of the stated context, in float32.
        peak_bytes: Estimated most memory of a process that runs it.
        fits: Whether that is free now; `None` where the system does not say.
        tokens_per_s: Bound from above: what memory and arithmetic allow at the stated context.
        bound: `"memory"` or `"arithmetic"`, whichever limits.
    """

    precision: str
    weight_bytes: int
    cache_bytes: int
    peak_bytes: int
    fits: bool | None
    tokens_per_s: float
    bound: str


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Something to try.

    Attributes:
        what: In words.
        command: The line that does it.
        reasons: Why.
    """

    what: str
    command: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What a model needs here, and what to try first.

    Attributes:
        source: The model.
        architecture: Its name.
        parameters: Numbers of all weights.
        stored_as: Types in which they are stored.
        context: Tokens that the cache is reckoned for.
        needs: By precision.
        suggestions: In the order in which to try them.
        probe: The machine's rates.
        machine: From `lmopt.platform.machine`.
        free_bytes: Memory that is free now.
    """

    source: str
    architecture: str
    parameters: int
    stored_as: tuple[str, ...]
    context: int
    needs: tuple[Need, ...]
    suggestions: tuple[Suggestion, ...]
    probe: Probe
    machine: dict[str, Any]
    free_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """Say what to try first, and why."""
        lines = []
        for place, one in enumerate(self.suggestions, 1):
            lines += [f"{place}. {one.what}", f"   {one.command}"]
            lines += [f"   - {why.text} [{why.source}]" for why in one.reasons]
        return "\n".join(lines)


def recommend(
    source: str | Path, *, context: int = 2048, probe: Probe | None = None, free_bytes: int | None = None
) -> Recommendation:
    """Say what a model needs on this machine and what to try first; no model is run and no weight is loaded.

    Args:
        source: A Hugging Face folder with safetensors weights, a `.gguf` file, or an artefact with weights.
        context: Tokens of a row that the cache is reckoned for, cut down to the model's context.
        probe: Rates of the machine, where they are known; `None` measures them, which takes a second or two.
        free_bytes: Memory to reckon with; `None` takes what is free now.

    Raises:
        UnsupportedOptionError: `context` is below 1.
        ArtifactNotFoundError: There is no such model.
        CorruptArtifactError: A file is damaged.
        UnsupportedError: No weight has a name that lmopt knows.
    """
    if type(context) is not int or context < 1:
        raise UnsupportedOptionError(f"context is {context!r}; expected a whole number from 1")
    shape = read_shape(source)
    require_weights(shape, str(source))
    probe = probe or measure_machine()
    free = memory_available_bytes() if free_bytes is None else free_bytes
    tokens = min(context, shape.context_length or context)
    needs = tuple(_need(shape, name, steps, tokens, probe, free) for name, steps in _precisions(shape))
    return Recommendation(
        source=str(source),
        architecture=shape.architecture,
        parameters=shape.parameters,
        stored_as=shape.stored_as,
        context=tokens,
        needs=needs,
        suggestions=tuple(_suggest(str(source), shape, needs, probe, free)),
        probe=probe,
        machine=machine(),
        free_bytes=free,
    )


def _precisions(shape: ModelShape) -> list[tuple[str, Sequence[Step] | None]]:
    """Name the precisions and their recipes; `None` stands for the weights as they are stored."""
    if shape.quantized:
        dequantized: list[tuple[str, Sequence[Step] | None]] = [("as stored", None)]
        # Codes of a folder are not the weights' shapes: nothing else can be reckoned of them.
        return dequantized + ([("float32", ())] if shape.stored_as[0].startswith("GGUF") else [])
    return [
        ("float32", ()),
        ("bfloat16 or float16", (Cast(dtype="bfloat16"),)),
        ("8-bit, groups of 32", (Quantize(bits=8, group_size=32),)),
        ("4-bit, groups of 32, asymmetric, head 8-bit", (Quantize(bits=4, group_size=32, symmetric=False),)),
        ("4-bit, groups of 64, head 4-bit", (Quantize(bits=4, group_size=64, embedding=4, head=4),)),
    ]


def _need(
    shape: ModelShape, name: str, steps: Sequence[Step] | None, tokens: int, probe: Probe, free: int | None
) -> Need:
    weights = shape.stored_bytes if steps is None else shape.bytes_after(steps)
    read = shape.stored_bytes if steps is None else shape.read_per_token(steps)
    assert weights is not None
    assert read is not None
    cache = shape.cache_values * tokens * _CACHE_BYTES
    quantized = steps is None or any(isinstance(one, Quantize) for one in steps)
    peak = int((_PEAK_QUANTIZED if quantized else _PEAK_FLOAT) * weights) + cache + _IMPORTS_BYTES
    by_memory = probe.bandwidth_bytes_per_s.most / max(1, read + cache)
    by_arithmetic = probe.flops_per_s.most / (2 * shape.parameters)
    return Need(
        precision=name,
        weight_bytes=weights,
        cache_bytes=cache,
        peak_bytes=peak,
        fits=None if free is None else peak <= free,
        tokens_per_s=min(by_memory, by_arithmetic),
        bound="memory" if by_memory <= by_arithmetic else "arithmetic",
    )


def _suggest(
    source: str, shape: ModelShape, needs: Sequence[Need], probe: Probe, free: int | None
) -> list[Suggestion]:
    found = [_engine(source, needs[0], probe)]
    found += _methods(source, shape, needs, free)
    found.append(
        Suggestion(
            "let lmopt measure these and others under your limits",
            f"lmopt tune {source} --text YOUR-TEXT --max-perplexity-ratio 1.05 --output tuned",
            (Reason("what is said here is reckoned; only a measurement on this machine decides", _PROBE),),
        )
    )
    return found


def _engine(source: str, first: Need, probe: Probe) -> Suggestion:
    rate = probe.bandwidth_bytes_per_s.most / 1e9
    roof = Reason(
        f"memory gives {rate:.1f} GB/s to {probe.threads} threads, so no engine decodes more than "
        f"{first.tokens_per_s:.0f} tokens/s in {first.precision} with a full cache: the {first.bound} is the limit",
        _PROBE,
    )
    status = {one.name: one for one in backends.status()}
    there = "onnxruntime" in status and not status["onnxruntime"].problem
    reasons = (
        roof,
        Reason(
            "its own operators decoded SmolLM2-135M in float32 at 51.3 tokens/s beside 15.4 of eager torch, on 2 "
            "cores, with the same tokens",
            f"{_GENERATION}, float32, prompt 128, 128 new tokens",
        ),
    )
    what = "run it on ONNX Runtime, in the dialect of its own operators"
    command = f"lmopt export {source} out --target onnxruntime && lmopt bench out"
    if there:
        return Suggestion(what, command, reasons)
    install = pip_line('"lmopt[onnx,onnxruntime]"')
    return Suggestion(f"{what}; it is not installed yet", f"{install} && {command}", reasons)


def _methods(source: str, shape: ModelShape, needs: Sequence[Need], free: int | None) -> list[Suggestion]:
    if shape.quantized:
        gguf = shape.stored_as[0].startswith("GGUF")
        return [
            Suggestion(
                "keep the codes that the file has; do not compress again",
                f"lmopt tune {source} --text YOUR-TEXT --output tuned"
                if gguf
                else f"lmopt export {source} out --target onnxruntime --option accuracy_level=4",
                (
                    Reason(
                        f"its weights are quantized already ({', '.join(shape.stored_as[:3])}): carried over bit by "
                        "bit they lose nothing more",
                        _HEADERS,
                    ),
                ),
            )
        ]
    small = shape.parameters < _SMALL
    by_name = {one.precision: one for one in needs}
    eight, four, tight = (by_name[name] for name in list(by_name)[2:5])
    room = [_room(one, free) for one in (eight, four, tight)]
    try_8 = Suggestion(
        "8 bits by rounding to nearest: no calibration, hardly a loss",
        f"lmopt compress {source} int8 --recipe rtn --set bits=8 --set group_size=32 --text YOUR-TEXT",
        (
            Reason(
                f"{needs[0].weight_bytes / eight.weight_bytes:.1f}x fewer bytes to read for a token: at most "
                f"{eight.tokens_per_s:.0f} tokens/s instead of {needs[0].tokens_per_s:.0f}",
                f"{_HEADERS} and {_PROBE}",
            ),
            Reason(
                "cost SmolLM2-135M a mean KL of 0.0022 nats and a perplexity ratio of 0.9987 +- 0.0011",
                f"{_COMPRESSION}, 8 bits, groups of 64",
            ),
            room[0],
        ),
    )
    try_4 = Suggestion(
        "4 bits in groups of 32 with whole zero points, products with 8-bit activations",
        f"lmopt compress {source} int4 --recipe rtn --set bits=4 --set group_size=32 --set symmetric=false "
        "--text YOUR-TEXT && lmopt export int4 out --target onnxruntime --option accuracy_level=4",
        (
            Reason(
                f"{needs[0].weight_bytes / four.weight_bytes:.1f}x fewer bytes: at most "
                f"{four.tokens_per_s:.0f} tokens/s",
                f"{_HEADERS} and {_PROBE}",
            ),
            Reason(
                "zero points follow groups that do not lie around zero, and smaller groups lose less; how much "
                "depends on the model, so look at the loss that the command prints",
                "lmopt.compression.layout; " + _SCALING_LAWS + ", section on block sizes",
            ),
            room[1],
        ),
    )
    gptq = Suggestion(
        "4 bits calibrated by GPTQ, where rounding loses too much",
        f"lmopt compress {source} gptq4 --recipe gptq --set bits=4 --set group_size=64 --calibration CALIBRATION-TEXT "
        "--text YOUR-TEXT",
        (
            Reason(
                "in groups of 64 it took SmolLM2-135M's KL from 0.4035 to 0.1733 and the perplexity ratio from 1.29 "
                "to 1.15",
                f"{_COMPRESSION}, 4 bits, groups of 64, symmetric",
            ),
            Reason("the method, and its losses on models from 125M to 175B", _GPTQ),
            room[2],
        ),
    )
    if small:
        why = Reason(
            f"{shape.parameters / 1e6:.0f}M weights are few: 4 bits by rounding cost SmolLM2-135M 29 % of perplexity "
            "(groups of 64, symmetric), 8 bits nothing, so 8 bits come first",
            f"{_COMPRESSION}, 4 bits, groups of 64, and 8 bits",
        )
        return [Suggestion(try_8.what, try_8.command, (*try_8.reasons, why)), try_4, gptq]
    why = Reason(
        f"{shape.parameters / 1e9:.1f}B weights: at a given size of file, more weights in 4 bits did better "
        "than fewer in 8",
        _SCALING_LAWS,
    )
    return [Suggestion(try_4.what, try_4.command, (*try_4.reasons, why)), gptq, try_8]


def _room(need: Need, free: int | None) -> Reason:
    """Say whether a precision fits into memory."""
    said = f"about {need.peak_bytes / 1e9:.2f} GB at its peak"
    if free is not None:
        said += f", of {free / 1e9:.1f} GB that are free: it {'fits' if need.fits else 'does NOT fit'}"
    return Reason(said, f"{_HEADERS}; peaks over files of {_GENERATION}, start, memory and size")

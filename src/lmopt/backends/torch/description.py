"""A model in memory and what is to be known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from lmopt.backends.torch.encoder_decoder import run_after_source
from lmopt.backends.torch.language_model import device_of, is_transformers
from lmopt.backends.torch.quantized import quantized_parts
from lmopt.errors import UnsupportedError
from lmopt.tokenizer import Tokenizer
from lmopt.types import ModelFacts, SourceFacts

_CONTEXT_NAMES: Final = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "context_length",
    "model_max_length",
    "max_target_positions",
)
# Who wrote the file and how the model returns things; not choices of how to generate.
_NOT_GENERATION: Final = ("transformers_version", "_from_model_config", "use_cache")


@dataclass(slots=True)
class Loaded:
    """A model in memory.

    Attributes:
        module: In evaluation mode.
        facts: Vocabulary size and the like.
        tokenizer: `None` where the source has none.
        config: Content of `config.json`, empty for custom modules.
        generation_config: Settings of `generation_config.json` that differ from the defaults.
    """

    module: nn.Module
    facts: ModelFacts
    tokenizer: Tokenizer | None = None
    config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)


def from_transformers(module: nn.Module, tokenizer: Tokenizer | None) -> Loaded:
    """Describe a transformers model that is in memory."""
    module.eval()
    config: Any = module.config
    source = None
    if getattr(config, "is_encoder_decoder", False):
        from lmopt.backends.torch.huggingface_seq2seq import source_facts

        source = source_facts(module)
    settings = getattr(module, "generation_config", None)
    generation = settings.to_diff_dict() if settings is not None else {}
    return Loaded(
        module=module,
        facts=ModelFacts(
            vocab_size=find_vocab_size(module, source),
            context_length=context_length(config.get_text_config(decoder=True)),
            parameters=count_parameters(module),
            architecture=type(module).__name__,
            source=source,
        ),
        tokenizer=tokenizer,
        config=config.to_dict(),
        generation_config={
            key: value
            for key, value in generation.items()
            if key not in _NOT_GENERATION
            and value is not None
            and not (key.startswith("output_") and not value)
        },
    )


def describe_again(loaded: Loaded, module: nn.Module) -> Loaded:
    """Describe another module that reads and answers as a model's own does.

    Args:
        loaded: The model.
        module: The module; a transformers model brings its own configuration.
    """
    stated: Any = module
    config = stated.config.to_dict() if is_transformers(module) else loaded.config
    facts = replace(loaded.facts, parameters=count_parameters(module))
    return replace(loaded, module=module, facts=facts, config=config)


def context_length(config: Any) -> int | None:
    """Read how many positions a model was built for, by whichever of the usual names it uses.

    Args:
        config: A transformers configuration, or any object or mapping with such fields.
    """

    def found(name: str) -> Any:
        return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)

    if found("is_encoder_decoder") and found("relative_attention_num_buckets"):
        return None  # positions that are told by their distance have no end
    for name in _CONTEXT_NAMES:
        value = found(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def count_parameters(module: nn.Module) -> int:
    """Count weights, shared ones once; a quantized weight is one, whatever its bits."""
    quantized = {part.codes.data_ptr(): part.weight_count for part in quantized_parts(module).values()}
    return sum(parameter.numel() for parameter in module.parameters()) + sum(quantized.values())


def find_vocab_size(module: nn.Module, source: SourceFacts | None = None) -> int:
    """Run a module on two short rows: measure its logits and see that it does not look ahead.

    Args:
        module: The module.
        source: What its encoder reads; `None` for a module without one.

    Raises:
        UnsupportedError: It does not map ids to logits, is not causal, or answers with NaN.
    """
    device = device_of(module)
    first = _logits(module, torch.zeros(1, 1, dtype=torch.int64, device=device), source)
    vocab_size = first.shape[-1]
    if vocab_size > 1:
        rows = _logits(module, torch.tensor([[0, 0], [0, 1]], device=device), source)[:, 0].float()
        if bool(rows.isnan().any()):
            raise UnsupportedError(_why_nan(module))
        slack = (2e-2 if first.dtype in (torch.float16, torch.bfloat16) else 1e-4) * float(rows.abs().max())
        if not torch.allclose(rows[0], rows[1], rtol=0, atol=slack):
            raise UnsupportedError(
                f"{type(module).__name__} is not causal: its logits after the first token change with the "
                "second. "
                "lmopt runs models that predict the next token from those before it."
            )
    for part in quantized_parts(module).values():
        # A model that is only passed on to an engine would carry its float weights along.
        part.forget()
    return vocab_size


def _logits(module: nn.Module, ids: Tensor, source: SourceFacts | None) -> Tensor:
    with torch.no_grad():
        result = module(ids) if source is None else run_after_source(module, source, ids)
    logits = getattr(result, "logits", result[0] if isinstance(result, tuple) else result)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UnsupportedError(
            f"{type(module).__name__} returned {found} for input ids of shape {tuple(ids.shape)}; expected "
            "logits of "
            f"shape {(*ids.shape, 'vocab_size')}: see lmopt.backends.torch.language_model.LanguageModel"
        )
    return logits


def _why_nan(module: nn.Module) -> str:
    """Say which weights are to blame for NaN logits."""
    weights = [*module.named_parameters(), *module.named_buffers()]
    bad = [name for name, one in weights if one.is_floating_point() and bool(one.isnan().any())]
    told = f"the logits of {type(module).__name__} are NaN"
    if not bad:
        return (
            f"{told}, although none of its weights is: a value overflows on the way. Try it in float32 "
            "(dtype='float32', or module.float())."
        )
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"{told}, since these weights hold NaN: {', '.join(bad[:3])}{more}. Training may have diverged, or a file be "
        "damaged: take an earlier checkpoint, or a fresh copy."
    )

"""Turn a Hugging Face folder into a module, a tokenizer and facts, without running its code."""

import os

# Latched when huggingface_hub is first imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
)
from transformers.utils import logging

from lmopt.backends.torch.casting import apply_casts
from lmopt.backends.torch.description import Loaded, from_transformers
from lmopt.backends.torch.foreign import METHODS, load_foreign
from lmopt.backends.torch.language_model import CASTS
from lmopt.backends.torch.quantized_files import load_state
from lmopt.backends.torch.quantizing import METHOD, VERSION
from lmopt.backends.torch.resizing import WIDTHS, apply_widths
from lmopt.backends.torch.tokenizer import load_tokenizer
from lmopt.backends.torch.trust import INDEX, WEIGHTS, check_folder
from lmopt.errors import (
    CorruptArtifactError,
    LmoptError,
    UnsupportedError,
    UnsupportedOptionError,
)
from lmopt.safefiles import check_shard_index, contained, hub_blobs

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")


def load_folder(folder: Path, *, dtype: str = "auto", trust: bool = False, progress: bool = False) -> Loaded:
    """Load a language model in Hugging Face layout: a causal one, or an encoder-decoder.

    Args:
        folder: Folder with `config.json` and weights.
        dtype: One of `DTYPES`; `"auto"` keeps that of the weights.
        trust: Whether code and pickled weights of the folder may run.
        progress: Whether to show progress bars.

    Raises:
        UnsafeArtifactError: It needs a grant of trust, or a name or link leaves the folder.
        ArtifactNotFoundError: It has no config or no weights.
        CorruptArtifactError: A file is damaged, or weights are missing, left over or misshapen.
        UnsupportedError: The model is neither a causal language model nor an encoder-decoder, or is quantized in
            a way that lmopt does not know.
    """
    check_dtype(dtype)
    raw = check_folder(folder, trust=trust)
    quantized = raw.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if isinstance(quantized, dict) and method in (METHOD, *METHODS):
        return _load_quantized(folder, raw, quantized, dtype=dtype, progress=progress)
    if quantized is not None:
        raise UnsupportedError(
            f"{folder / 'config.json'} says that the weights are quantized ({method}). lmopt loads float weights and "
            f"those quantized by {', '.join((METHOD, *METHODS))}: use the original model, or dequantize it with the "
            "library that wrote it."
        )
    if WIDTHS in raw or CASTS in raw:
        unquantized = {"quant_method": METHOD, "version": VERSION, "parts": {}}
        return _load_quantized(folder, raw, unquantized, dtype=dtype, progress=progress)
    with quiet(progress):
        config = read_config(folder, raw, trust)
        if not (trust and "auto_map" in raw):
            require_language_model(config, str(folder))
        try:
            module, report = _auto_class(config).from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                # None lets transformers fall back to pickles, which only a grant of trust allows.
                use_safetensors=None if trust else True,
                trust_remote_code=trust,
                local_files_only=True,
                # Otherwise they are only named in a log; `require_complete` raises on them.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except (LmoptError, MemoryError):
            raise
        except Exception as error:
            raise CorruptArtifactError(
                f"{folder} cannot be loaded: {type(error).__name__}: {error}. If the files are whole, this "
                f"transformers ({transformers.__version__}) may be too old for the model."
            ) from error
        require_complete(report, str(folder))
        tokenizer = load_tokenizer(folder, trust=trust)
    return from_transformers(module, tokenizer)


def _load_quantized(
    folder: Path, raw: Mapping[str, Any], quantized: Mapping[str, Any], *, dtype: str, progress: bool
) -> Loaded:
    """Load a model saved quantized, or by lmopt with layers of unequal width: build it, then put the parts in."""
    blobs = hub_blobs(folder)
    if (folder / WEIGHTS).exists():
        paths: tuple[Path, ...] = (contained(folder, WEIGHTS, allow_symlinks_into=blobs),)
    else:
        paths = check_shard_index(folder / INDEX, allow_symlinks_into=blobs)
    with quiet(progress):
        config = read_config(folder, raw, trust=False)
        require_language_model(config, str(folder))
        # What it says is for lmopt; transformers knows no such method, or would want the library.
        if "quantization_config" in raw:
            del config.quantization_config
        if CASTS in raw:
            delattr(config, CASTS)
        kind = _mapping(config)[type(config)]
        stated = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
        if mixed := CASTS in raw and dtype == "auto":
            stated = torch.float32
        with no_init_weights():
            module = kind._from_config(config, dtype=stated)
        # Some classes (GPT-2's) skip this together with the drawing of weights.
        module.tie_weights()
        apply_widths(module, raw.get(WIDTHS, {}), str(folder))
        if mixed:
            apply_casts(module, raw[CASTS], str(folder))
        load = load_state if quantized["quant_method"] == METHOD else load_foreign
        load(module, quantized, paths, str(folder))
        if (folder / "generation_config.json").exists():
            module.generation_config = transformers.GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
        tokenizer = load_tokenizer(folder, trust=False)
    return from_transformers(module, tokenizer)


def read_config(folder: Path, raw: Mapping[str, Any], trust: bool) -> Any:
    """Let transformers read `config.json`, whose content was checked before."""
    model_type = raw.get("model_type")
    if not (trust and "auto_map" in raw) and model_type not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"{folder / 'config.json'} names the model type {model_type!r}, which transformers "
            f"{transformers.__version__} does not know. Update it: pip install --upgrade transformers"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
    except Exception as error:
        raise CorruptArtifactError(
            f"{folder / 'config.json'} is not a valid configuration: {type(error).__name__}: {error}"
        ) from error


def require_language_model(config: Any, name: str) -> None:
    """Refuse models that do not predict the next token.

    Raises:
        UnsupportedError: The message says what the model is and what lmopt runs.
    """
    supported = (
        "lmopt runs causal (decoder-only) language models and encoder-decoders; other modules can be wrapped to meet "
        "lmopt.backends.torch.language_model.LanguageModel and given to lmopt.Model.from_module."
    )
    mapping = _mapping(config)
    if type(config) not in mapping:
        form = "generating" if getattr(config, "is_encoder_decoder", False) else "causal"
        raise UnsupportedError(
            f"{name} is a {config.model_type} model, which has no {form} form. {supported}"
        )
    found = mapping[type(config)]
    fitting = {one.__name__ for one in (found if isinstance(found, list | tuple) else (found,))}
    stated = set(config.architectures or fitting)
    own = mapping is MODEL_FOR_CAUSAL_LM_MAPPING
    if not stated & fitting and not any(own and ("CausalLM" in one or "LMHead" in one) for one in stated):
        raise UnsupportedError(
            f"{name} holds a {', '.join(sorted(stated))}, not a {' or '.join(sorted(fitting))}. {supported}"
        )


def _mapping(config: Any) -> Any:
    """Give transformers' table of the classes that generate, from kinds of configuration."""
    if not getattr(config, "is_encoder_decoder", False):
        return MODEL_FOR_CAUSAL_LM_MAPPING
    speech = type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    return MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING if speech else MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING


def _auto_class(config: Any) -> Any:
    """Give transformers' class that loads a model of this configuration for generating."""
    mapping = _mapping(config)
    if mapping is MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    if mapping is MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING:
        return transformers.AutoModelForSpeechSeq2Seq
    return transformers.AutoModelForSeq2SeqLM


def require_complete(report: Mapping[str, Any], name: str) -> None:
    """Turn transformers' warnings about weights into an error: it would fill them with noise.

    Raises:
        CorruptArtifactError: The weights concerned are named.
    """
    kinds = {
        "missing": "missing_keys",
        "not part of the model": "unexpected_keys",
        "misshapen": "mismatched_keys",
    }
    faults = {kind: sorted(_weight(one) for one in report.get(key) or ()) for kind, key in kinds.items()}
    if told := [f"{kind}: {_shortened(names)}" for kind, names in faults.items() if names]:
        raise CorruptArtifactError(
            f"the weights of {name} do not fit its config.json; {'; '.join(told)}. Get a complete copy of "
            "the model."
        )
    if report.get("error_msgs"):
        raise CorruptArtifactError(f"{name}: {report['error_msgs'][0]}")


def _weight(entry: str | tuple[str, Sequence[int], Sequence[int]]) -> str:
    """Name a weight, with its stored and its expected shape where transformers tells them."""
    if isinstance(entry, str):
        return entry
    name, stored, expected = entry
    return f"{name} (stored {tuple(stored)}, expected {tuple(expected)})"


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that models are not loaded in.

    Raises:
        UnsupportedOptionError: The message lists the possible ones.
    """
    if dtype not in DTYPES:
        raise UnsupportedOptionError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")


@contextmanager
def quiet(progress: bool = False) -> Iterator[None]:
    """Keep transformers from writing to the terminal: what matters is raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()

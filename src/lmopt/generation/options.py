"""Fields of Hugging Face's `GenerationConfig` that lmopt does not implement, and what to say then."""

import difflib
from collections.abc import Iterable
from typing import Any, Final, NoReturn

from lmopt.errors import UnsupportedOptionError

# Bookkeeping, cache layout, names of tokens and extra outputs: none of them changes which tokens come out.
HARMLESS: Final = frozenset(
    {
        "_commit_hash",
        "_from_model_config",
        "_name_or_path",
        "alignment_heads",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "is_multilingual",
        "lang_to_id",
        "max_cache_len",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "prev_sot_token_id",
        "return_dict_in_generate",
        "return_legacy_cache",
        "task_to_id",
        "transformers_version",
        "trust_remote_code",
        "use_cache",
    }
)

# Fields that would change the tokens, and the values with which they do not.
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "assistant_confidence_threshold": (0.4, 0.0),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "assistant_lookbehind": (10,),
    "constraints": (),
    "diversity_penalty": (0.0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "guidance_scale": (1.0,),
    "is_assistant": (False,),
    "low_memory": (False,),
    "num_assistant_tokens": (20, 5),
    "num_assistant_tokens_schedule": ("constant", "heuristic"),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "speculation_type": (),
    "target_lookbehind": (10,),
    "token_healing": (False,),
    "top_h": (),
    "use_mtp": (False,),
    "watermarking_config": (),
}

# Names of other libraries, and ours for the same thing.
_OURS: Final = {
    "max_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "stop": "stop_strings",
    "stop_token_ids": "eos_token_id",
    "output_scores": "logprobs",
    "output_logits": "logprobs",
    "random_seed": "seed",
    "generator": "seed",
}


def check_file_value(name: str, value: Any) -> bool:
    """Check a field of a `generation_config.json` that lmopt does not implement.

    Returns:
        Whether the name is known to transformers; an unknown one has no effect there either.

    Raises:
        UnsupportedOptionError: The value would change the result.
    """
    if name in HARMLESS:
        return True
    if name not in NEUTRAL:
        return False
    if value is not None and value not in NEUTRAL[name]:
        raise UnsupportedOptionError(
            f"the model's generation_config.json sets {name}={value!r}, which lmopt does not implement. "
            f"Pass {name}=None to generate without it."
        )
    return True


def reject_option(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse an option that lmopt does not implement, unless its value means "off".

    Raises:
        UnsupportedOptionError: It is unknown, or not implemented; the nearest name is given.
    """
    if name in NEUTRAL or name in HARMLESS:
        if value is None or value in NEUTRAL.get(name, ()) or (name == "use_cache" and value is True):
            return
        instead = f" Use {_OURS[name]} instead." if name in _OURS else " Leave it out."
        raise UnsupportedOptionError(f"{name}={value!r}: lmopt does not implement this option.{instead}")
    _reject_unknown(name, list(known))


def _reject_unknown(name: str, known: list[str]) -> NoReturn:
    near = [_OURS[name]] if name in _OURS else difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UnsupportedOptionError(
        f"{name!r} is not an option of generation.{hint} See lmopt.GenerationConfig for all options."
    )

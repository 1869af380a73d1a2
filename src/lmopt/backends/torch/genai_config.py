"""Describe an exported decoder to onnxruntime-genai."""

from collections.abc import Mapping
from typing import Any

from lmopt.signature import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS, Signature
from lmopt.types import ModelFacts


def genai_config(
    config: Mapping[str, Any], facts: ModelFacts, signature: Signature, *, shares_buffer: bool = False
) -> dict[str, Any]:
    """Write the contents of `genai_config.json`.

    Args:
        config: The model's `config.json`.
        facts: Facts of the model.
        signature: Names and axes of the exported graph.
        shares_buffer: Whether past and present are one buffer, written in place.
    """
    keys = [one for one in signature.state if one.past.name.endswith(".key")]
    head_size = keys[0].past.shape[-1] if keys else 0
    inputs = {"input_ids": INPUT_IDS}
    if signature.has_mask:
        inputs["attention_mask"] = ATTENTION_MASK
    if signature.has_positions:
        inputs["position_ids"] = POSITION_IDS
    inputs |= {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    context = facts.context_length or 2048
    eos = config.get("eos_token_id")
    pad = config.get("pad_token_id")
    return {
        "model": {
            "bos_token_id": config.get("bos_token_id"),
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head_size,
                "hidden_size": config.get("hidden_size", config.get("n_embd", 0)),
                "inputs": inputs,
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.get("num_attention_heads", config.get("n_head", 0)),
                "num_hidden_layers": len(keys),
                "num_key_value_heads": keys[0].past.shape[1] if keys else 0,
            },
            "eos_token_id": eos,
            "pad_token_id": pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
            # genai chooses its pipeline by this word; any decoder with a cache runs as one of these.
            "type": config.get("model_type", "llama"),
            "vocab_size": facts.vocab_size,
        },
        "search": {
            "diversity_penalty": 0.0,
            "do_sample": False,
            "early_stopping": True,
            "length_penalty": 1.0,
            "max_length": context,
            "min_length": 0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": shares_buffer,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }

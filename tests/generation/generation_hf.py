"""Tiny random transformers models, and an engine around them that recomputes everything each step."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lmopt.contracts import EngineReport
from lmopt.types import ModelFacts

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

VOCAB = 61
PROMPTS = [[5, 9, 9, 13, 5, 9], [7], [20, 21, 22, 23, 20, 21, 22, 8, 30, 31, 20], [40, 41, 2, 40]]


@functools.cache
def tiny_model(family: str):
    torch.manual_seed(5)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.4,
        )
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(
            vocab_size=VOCAB, n_positions=256, n_embd=32, n_layer=2, n_head=4, initializer_range=0.4
        )
        model = GPT2LMHeadModel(config)
    model = model.eval()
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, None)
        setattr(model.config, name, None)
    return model


@dataclass
class TextState:
    rows: list[list[int]]
    consumed: bool = False

    @property
    def lengths(self):
        return np.array([len(row) for row in self.rows], np.int64)


class HfEngine:
    """Left-padded batches, no cache: slow, and with nothing in it to get wrong."""

    ragged = True

    def __init__(self, model):
        self.model = model
        self.facts = ModelFacts(model.config.vocab_size, model.config.max_position_embeddings)

    def begin(self, batch, *, capacity=None, padding_side="right"):
        return TextState([[] for _ in range(batch)])

    @torch.inference_mode()
    def forward(self, input_ids, lengths, state, *, last_only=False):
        rows = self._consume(state)
        rows = [
            row + new[:length].tolist() for row, new, length in zip(rows, input_ids, lengths, strict=True)
        ]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, width - len(row) :] = torch.tensor(row)
            mask[number, width - len(row) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        full = self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float().numpy()
        out = np.zeros((*input_ids.shape, full.shape[-1]), np.float32)
        for number, length in enumerate(lengths):
            out[number, :length] = full[number, width - length :]
        if last_only:
            out = full[:, -1:].copy()
        return out, TextState(rows)

    def select(self, state, rows):
        old = self._consume(state)
        return TextState([list(old[row]) for row in rows])

    def join(self, states):
        return TextState([row for state in states for row in self._consume(state)])

    @staticmethod
    def _consume(state):
        assert not state.consumed, "a consumed state was used again"
        state.consumed = True
        return state.rows

    def report(self):
        return EngineReport("hf", "cpu", "float32", 1)

    def close(self):
        pass


def hf_tokens(model, prompt, **options):
    """New tokens of transformers' `generate` from one prompt."""
    return hf_generate(model, prompt, **options)[0][0]


def hf_generate(model, prompt, **options):
    """New tokens of each sequence, and the scores of beams."""
    ids = torch.tensor([prompt])
    defaults = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        return_dict_in_generate=True,
        output_scores=True,
        **{**defaults, **options},
    )
    sequences = [row[len(prompt) :].tolist() for row in out.sequences]
    scores = getattr(out, "sequences_scores", None)
    return sequences, None if scores is None else scores.tolist()


def trim(tokens, eos):
    """Cut after the first end-of-sequence id: what follows in transformers' tensors is padding."""
    for place, token in enumerate(tokens):
        if token in eos:
            return tokens[: place + 1]
    return tokens


def byte_level_tokenizer():
    """A small byte-level BPE of `VOCAB` entries, once for transformers and once for lmopt."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    letters = [*"abcdefghijklmnopqrstuvwxyz.,!?", "Ġ", "Ċ"]
    euro = ["â", "Ĥ", "¬"]  # the three bytes of U+20AC
    words = ["ab", "abc", "Ġd", "Ġde", "fg", "efg", "ghi", "hi", "âĤ", "xâ", "¬y"]
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", *letters, *euro, *words])}
    while len(vocab) < VOCAB:
        vocab[f"w{len(vocab)}"] = len(vocab)
    assert set(euro) <= set(alphabet)
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False), Plain(
        backend
    )


class Plain:
    """The part of lmopt's tokenizer that generation needs, around a `tokenizers.Tokenizer`."""

    def __init__(self, backend):
        self.backend = backend

    def decode(self, ids, skip_special_tokens=True):
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def id_to_token(self, number):
        return self.backend.id_to_token(number)

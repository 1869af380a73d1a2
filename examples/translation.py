# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A translator of your own module
#
# Marian's small translation models, which browsers run, have no class in transformers: six Transformer blocks read the
# text, and two simple recurrent ones (SSRU, Kim and others, WNGT 2019) write. Eighty lines of PyTorch are enough:
# lmopt asks of an encoder-decoder for `encode`, which reads the text once, and for `forward`, which writes after it.
#
#     python examples/translation.py FOLDER
#
# `FOLDER` holds a model's `model.*.intgemm*.bin` and its `tokenizer.json`. Without it, random weights of the same
# shape show the way, and say nothing.

# %%
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers import processors
from torch import nn
from torch.nn import functional

import lmopt
from lmopt.types import SourceFacts

END = 0  # ends both texts, and stands where the decoder begins

# %% [markdown]
# ## The module
#
# What depends on the source alone, the keys and values of attention over it, is made in `encode`. The recurrence
# $c_t = f_t c_{t-1} + (1 - f_t) w_t$ is written as a sum over what went before, so that a trace of it holds for any
# length.


# %%
class Marian(nn.Module):
    def __init__(self, weights: dict[str, torch.Tensor], heads: int = 8) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(one) for name, one in weights.items()})
        self.heads = heads
        self.blocks = {
            part: sum(name.startswith(part) and name.endswith("_ffn_W1") for name in weights)
            for part in ("encoder", "decoder")
        }

    def linear(self, x, weight, bias=None):
        product = x @ self.weights[weight]
        return product if bias is None else product + self.weights[bias]

    def norm(self, x, name):
        scale, shift = self.weights[f"{name}_ln_scale"][0], self.weights[f"{name}_ln_bias"][0]
        return functional.layer_norm(x, (x.shape[-1],), scale, shift, 1e-6)

    def split(self, x):
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def attention(self, x, keys, values, name, mask=None):
        seen = None if mask is None else mask[:, None, None, :].bool()
        query = self.split(self.linear(x, f"{name}_Wq", f"{name}_bq"))
        found = functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
        found = found.transpose(1, 2).reshape(x.shape)
        return self.norm(x + self.linear(found, f"{name}_Wo", f"{name}_bo"), f"{name}_Wo")

    def keys_and_values(self, x, name):
        return [self.split(self.linear(x, f"{name}_W{one}", f"{name}_b{one}")) for one in "kv"]

    def feed_forward(self, x, name):
        hidden = functional.relu(self.linear(x, f"{name}_W1", f"{name}_b1"))
        return self.norm(x + self.linear(hidden, f"{name}_W2", f"{name}_b2"), f"{name}_ffn")

    def embed(self, ids, positions):
        table = self.weights["Wemb"]
        half = table.shape[1] // 2
        steps = torch.exp(torch.arange(half, device=ids.device) * -(math.log(10000.0) / (half - 1)))
        angles = positions[..., None] * steps
        return table[ids] * math.sqrt(table.shape[1]), torch.cat([angles.sin(), angles.cos()], -1)

    def encode(self, inputs, encoder_attention_mask=None):
        table, places = self.embed(inputs, torch.arange(inputs.shape[1], device=inputs.device)[None])
        x = table + places
        for block in range(1, self.blocks["encoder"] + 1):
            keys, values = self.keys_and_values(x, name := f"encoder_l{block}_self")
            x = self.attention(x, keys, values, name, encoder_attention_mask)
            x = self.feed_forward(x, f"encoder_l{block}_ffn")
        blocks = range(1, self.blocks["decoder"] + 1)
        cells = [x.new_zeros(x.shape[0], x.shape[2]) for _ in blocks]
        memory = [self.keys_and_values(x, f"decoder_l{block}_context") for block in blocks]
        return x.new_zeros(x.shape[0], 1), cells, memory

    def forward(self, input_ids, state, encoder_attention_mask=None):
        read, cells, memory = state
        count = torch.arange(input_ids.shape[1], device=input_ids.device)
        table, places = self.embed(input_ids, read + count[None])
        x = table * (input_ids != END)[..., None] + places
        before = (count[:, None] >= count[None])[None, :, :, None]
        after = []
        for block, (cell, (keys, values)) in enumerate(zip(cells, memory, strict=True), 1):
            name = f"decoder_l{block}"
            gate = self.linear(x, f"{name}_rnn_Wf", f"{name}_rnn_bf")
            # Not logsigmoid: as ONNX torch writes Log(Sigmoid), which is -inf far below 0. The parity gate refused it.
            kept = -functional.softplus(-gate).cumsum(1)
            share = torch.exp((kept[:, :, None] - kept[:, None]).clamp(max=0.0)) * before
            new = torch.sigmoid(-gate) * self.linear(x, f"{name}_rnn_W")
            cell = torch.exp(kept) * cell[:, None] + (share * new[:, None]).sum(2)
            after.append(cell[:, -1])
            x = self.norm(x + functional.relu(cell), f"{name}_rnn_ffn")
            x = self.attention(x, keys, values, f"{name}_context", encoder_attention_mask)
            x = self.feed_forward(x, f"{name}_ffn")
        logits = x @ self.weights["Wemb"].T + self.weights["decoder_ff_logit_out_b"]
        return logits, (read + input_ids.shape[1], after, memory)


# %% [markdown]
# ## The weights
#
# Marian's file: a table of names, types and shapes, then the numbers, 8-bit ones with one scale each.


# %%
def read_marian(path: Path) -> dict[str, torch.Tensor]:
    data = path.read_bytes()
    _, count = struct.unpack_from("<QQ", data)
    headers = [struct.unpack_from("<QQQQ", data, 16 + 32 * n) for n in range(count)]
    place, names, shapes = 16 + 32 * count, [], []
    for length, *_ in headers:
        names.append(data[place : place + length - 1].decode())
        place += length
    for _, _, axes, _ in headers:
        shapes.append(struct.unpack_from(f"<{axes}i", data, place))
        place += 4 * axes
    place += 8 + struct.unpack_from("<Q", data, place)[0]
    found = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, headers, strict=True):
        numbers = math.prod(shape)
        if kind == 0x4101:  # 8 bits, the scale behind them, turned but for the embedding
            values = np.frombuffer(data, np.int8, numbers, place).astype(np.float32)
            values /= struct.unpack_from("<f", data, place + numbers)[0]
            turned = values.reshape(shape) if name == "Wemb" else values.reshape(shape[::-1]).T
            found[name] = torch.from_numpy(np.ascontiguousarray(turned))
        elif kind == 0x404 and "QuantMult" not in name:
            found[name] = torch.from_numpy(
                np.frombuffer(data, np.float32, numbers, place).reshape(shape).copy()
            )
        place += size
    return found


def random_weights(
    vocabulary: int = 60, width: int = 32, encoder: int = 2, decoder: int = 2
) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.4

    found = {"Wemb": normal(vocabulary, width), "decoder_ff_logit_out_b": normal(1, vocabulary)}
    for part, blocks, own in (("encoder", encoder, "self"), ("decoder", decoder, "context")):
        for block in range(1, blocks + 1):
            name = f"{part}_l{block}"
            for one in "qkvo":
                found[f"{name}_{own}_W{one}"], found[f"{name}_{own}_b{one}"] = (
                    normal(width, width),
                    normal(1, width),
                )
            found[f"{name}_ffn_W1"], found[f"{name}_ffn_b1"] = normal(width, 2 * width), normal(1, 2 * width)
            found[f"{name}_ffn_W2"], found[f"{name}_ffn_b2"] = normal(2 * width, width), normal(1, width)
            norms = [f"{name}_{own}_Wo", f"{name}_ffn_ffn"]
            if part == "decoder":
                found[f"{name}_rnn_W"], found[f"{name}_rnn_Wf"] = normal(width, width), normal(width, width)
                found[f"{name}_rnn_bf"] = normal(1, width)
                norms.append(f"{name}_rnn_ffn")
            for norm in norms:
                found[f"{norm}_ln_scale"], found[f"{norm}_ln_bias"] = 1 + normal(1, width), normal(1, width)
    return found


# %% [markdown]
# ## Load, export, translate
#
# The gate runs both graphs on sources of unequal lengths, with rows reordered and repeated as beams are.


# %%
def load(folder: Path) -> lmopt.Model:
    pieces = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces.add_special_tokens(["</s>"])
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    weights = read_marian(next(folder.glob("model.*.bin")))
    return as_model(Marian(weights), pieces)


def as_model(module: Marian, tokenizer: tokenizers.Tokenizer | None = None) -> lmopt.Model:
    size = len(module.weights["Wemb"])
    return lmopt.Model.from_module(
        module.eval(),
        tokenizer,
        source=SourceFacts("ids", start_token_id=END, size=size),
        generation_config={"eos_token_id": END},
    )


def main() -> None:
    # In a notebook the first argument belongs to Jupyter.
    given = (
        sys.argv[1]
        if len(sys.argv) == 2 and not sys.argv[1].startswith("-")
        else os.environ.get("LMOPT_EXAMPLE_MARIAN")
    )
    if given:
        model, sources = (
            load(Path(given)),
            ["How are you today?", "The children were playing happily in the garden."],
        )
    else:
        model, sources = as_model(Marian(random_weights())), [[5, 9, 31, 7, END], [12, END]]
    lmopt.Exporter("onnx").export(model, "translator", overwrite=True)
    found = {}
    for backend, place in (("torch", model), ("onnxruntime", "translator")):
        with lmopt.Runtime(place, backend=backend) as runtime:
            found[backend] = runtime.generate(sources, max_new_tokens=40)
            beams = runtime.generate(sources, max_new_tokens=40, num_beams=4)
            assert [one.token_ids for one in found["torch"]] == [one.token_ids for one in found[backend]]
            found[f"{backend}, 4 beams"] = beams
    for name, texts in found.items():
        print(f"{name:22}", *texts, sep=" | ")
    assert [one.token_ids for one in beams] == [one.token_ids for one in found["torch, 4 beams"]]
    print("same tokens on both engines")


if __name__ == "__main__":
    main()

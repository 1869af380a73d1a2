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
# # An LSTM of your own, end to end
#
# Ten lines of PyTorch, trained by lmopt on the documentation that ships with Python, exported through the parity
# gate, and run on ONNX Runtime by the calls that run any other model. Nothing is downloaded.

# %%
import os
import pydoc_data.topics
import re

import matplotlib.pyplot as plt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import lmopt
from lmopt.training import TrainingConfig

QUICK = os.environ.get("LMOPT_EXAMPLE_QUICK") == "1"  # CI runs this in a small size
VOCABULARY, HIDDEN, STEPS = (400, 48, 40) if QUICK else (1000, 192, 400)
torch.manual_seed(0)

# %%
documents = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", documents)]
prose = [
    text for text in paragraphs if re.match(r"[A-Z][a-z]", text) and text.endswith(".") and len(text) > 60
]
cut = len(prose) * 9 // 10

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(prose[:cut], trainer)
print(f"{len(prose):,} paragraphs, {tokenizer.get_vocab_size()} pieces")


# %% [markdown]
# ## The module
#
# Ids and a state in, logits and the next state out: that is all that lmopt asks.


# %%
class Lstm(nn.Module):
    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids, state=None):
        hidden, state = self.lstm(self.embedding(input_ids), state)
        return self.head(hidden), state


model = lmopt.Model.from_module(Lstm(tokenizer.get_vocab_size(), HIDDEN), tokenizer)

# %% [markdown]
# ## Training

# %%
result = lmopt.train(
    model,
    prose[:cut],
    evaluation=prose[cut:],
    config=TrainingConfig(
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_steps=STEPS,
        per_device_train_batch_size=32,
        block_size=64,
        eval_steps=max(1, STEPS // 8),
        eval_tokens=2048,
        seed=0,
    ),
)
print(f"held-out perplexity {result.perplexity:.1f} after {result.steps} steps")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
left.plot(result.losses, linewidth=0.8)
left.set(xlabel="step", ylabel="training loss, nats a token")
right.plot(
    [one.step for one in result.evaluations], [one.perplexity.value for one in result.evaluations], marker="."
)
right.set(xlabel="step", ylabel="held-out perplexity", yscale="log")
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()

# %% [markdown]
# ## Export, and the same tokens on two engines
#
# The state has a fixed size, so the graph needs no mask and no positions.

# %%
artifact = lmopt.Exporter("onnx").export(result.model, "lstm-onnx", overwrite=True)
print(f"{len(artifact.manifest['parity']['onnx']['cases'])} cases passed the gate")

# %%
prompt = "The value of the"
found = {}
for backend, source in (("torch", result.model), ("onnxruntime", "lstm-onnx")):
    with lmopt.Runtime(source, backend=backend) as runtime:
        found[backend] = runtime.generate(prompt, max_new_tokens=40, temperature=0.6, seed=7)
    print(f"{backend:12} {prompt}{found[backend]}\n")
assert found["torch"].token_ids == found["onnxruntime"].token_ids

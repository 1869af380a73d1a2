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
# # Your own model, from training to a second engine
#
# The LSTM of every tutorial (`Embedding -> LSTM -> Linear`), trained for about a minute on the
# documentation that ships with Python, then exported and run on ONNX Runtime by the same calls as any
# large model. Nothing is downloaded. It needs `python -m pip install -e ".[cpu]"`.

# %%
import os
import pydoc_data.topics
import re
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import lmopt

# CI runs this file in a small size.
QUICK = os.environ.get("LMOPT_EXAMPLE_QUICK") == "1"
VOCABULARY, HIDDEN, STEPS = (400, 48, 60) if QUICK else (1000, 256, 240)
torch.manual_seed(0)

# %% [markdown]
# ## Text and tokenizer
# Paragraphs of prose are kept, tables and code are dropped. The last tenth is not trained on. A byte-level
# BPE tokenizer learns its pieces from the text.

# %%
documents = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", documents)]
prose = [
    text for text in paragraphs if re.match(r"[A-Z][a-z]", text) and text.endswith(".") and len(text) > 60
]
cut = len(prose) * 9 // 10
training_text, held_out = "\n".join(prose[:cut]), "\n".join(prose[cut:])

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
)
tokenizer.train_from_iterator([training_text], trainer)
tokens = torch.tensor(tokenizer.encode(training_text).ids)
print(f"{len(training_text):,} characters, {len(tokens):,} tokens, {tokenizer.get_vocab_size()} pieces")


# %% [markdown]
# ## Model
# This is all that lmopt asks of a module: ids and a state in, logits and the next state out.


# %%
class TutorialLstm(nn.Module):
    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids, state=None):
        hidden, state = self.lstm(self.embedding(input_ids), state)
        return self.head(hidden), state


lstm = TutorialLstm(tokenizer.get_vocab_size(), HIDDEN)
model = lmopt.Model.from_module(lstm, tokenizer)
with lmopt.Runtime(model, backend="torch") as runtime:
    before = runtime.perplexity(held_out, context=256, stride=256, tokens=2048)
print(f"perplexity before training: {before.value:.1f}")

# %% [markdown]
# ## Training
# A plain torch loop: random windows of the text, cross entropy of the next token, Adam.

# %%
ROWS, LENGTH = 32, 64
optimizer = torch.optim.Adam(lstm.parameters(), lr=4e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS)
began = time.perf_counter()
lstm.train()
for step in range(1, STEPS + 1):
    starts = torch.randint(len(tokens) - LENGTH - 1, (ROWS, 1))
    windows = tokens[starts + torch.arange(LENGTH + 1)]
    logits, _ = lstm(windows[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(lstm.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % (STEPS // 5) == 0:
        print(f"step {step}: loss {loss.item():.2f}, {time.perf_counter() - began:.0f} s")

# %%
# `from_module` puts the module back into evaluation mode.
model = lmopt.Model.from_module(lstm, tokenizer)
with lmopt.Runtime(model, backend="torch") as runtime:
    after = runtime.perplexity(held_out, context=256, stride=256, tokens=2048)
print(f"perplexity of held-out text: {before.value:.1f} before, {after.value:.1f} after training")
assert after.value < before.value / 2

# %% [markdown]
# ## Export
# `export` returns only after the parity gate: the graph on ONNX Runtime computes what the module computes,
# in one go, token by token, and in batches. A state of fixed size needs no attention mask.

# %%
artifact = lmopt.Exporter("onnx").export(model, "lstm-onnx", overwrite=True)
parity = artifact.manifest["parity"]["onnx"]
print(f"{len(parity['cases'])} cases passed the gate; files: {', '.join(sorted(artifact.manifest['files']))}")

# %% [markdown]
# ## The same tokens on two engines

# %%
PROMPT = "The value of the"
found = {}
for backend, source in (("torch", model), ("onnxruntime", "lstm-onnx")):
    with lmopt.Runtime(source, backend=backend) as runtime:
        found[backend] = runtime.generate(PROMPT, max_new_tokens=40)
    print(f"{backend:12} {PROMPT}{found[backend]}")
assert found["torch"].token_ids == found["onnxruntime"].token_ids

# %% [markdown]
# ## Text as it grows
# Sampling belongs to lmopt, not to the engine, so a seed gives the same text on every engine.

# %%
told = {}
for backend, source in (("torch", model), ("onnxruntime", "lstm-onnx")):
    with lmopt.Runtime(source, backend=backend) as runtime:
        told[backend] = PROMPT
        for piece in runtime.stream(PROMPT, max_new_tokens=80, temperature=0.6, seed=7):
            told[backend] += piece
    print(f"\n{backend}: {told[backend]}")
assert told["torch"] == told["onnxruntime"]

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
# # From raw text to a service
#
# An LSTM language model is trained on text, exported to ONNX, verified, and answers requests from ONNX Runtime:
# one script, nothing downloaded. It needs `python -m pip install -e ".[cpu,train]"`.

# %%
import os
import pydoc_data.topics
import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import lmopt
from lmopt.training import TrainingConfig, train

# CI runs this file in a small size.
QUICK = os.environ.get("LMOPT_EXAMPLE_QUICK") == "1"
VOCABULARY, HIDDEN, STEPS = (400, 48, 60) if QUICK else (1500, 320, 500)
torch.manual_seed(0)

# %% [markdown]
# ## Raw text
# The documentation that ships with Python, a paragraph a document. The last tenth is not trained on. Files of your
# own work as well: give `train` a list of `pathlib.Path`.

# %%
raw = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", raw)]
documents = [one for one in paragraphs if re.match(r"[A-Z][a-z]", one) and one.endswith(".")]
cut = len(documents) * 9 // 10

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    documents[:cut],
    trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ),
)


# %% [markdown]
# ## Model
# Any module that maps ids and a state to logits and the next state.


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


end = tokenizer.token_to_id("<|end|>")
model = lmopt.Model.from_module(
    Lstm(tokenizer.get_vocab_size(), HIDDEN), tokenizer, generation_config={"eos_token_id": end}
)

# %% [markdown]
# ## Training
# `carry_state` reads the text as contiguous streams and hands each row's state on from step to step. Killed at any
# moment, the script goes on from its last checkpoint when it is run again.

# %%
result = train(
    model,
    documents[:cut],
    evaluation=documents[cut:],
    output="lstm-run",
    config=TrainingConfig(
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        max_steps=STEPS,
        per_device_train_batch_size=32,
        block_size=64,
        carry_state=True,
        eval_steps=STEPS // 3,
        eval_tokens=4096,
        save_steps=STEPS // 3,
    ),
    progress=lambda now: (
        print(f"step {now.step}: loss {now.loss:.2f}") if now.step % (STEPS // 6) == 0 else None
    ),
)
told = result.corpus
print(f"{told['tokens']:,} tokens of {told['documents']:,} documents; {result.tokens_per_s:,.0f} tokens/s")
print(f"loss {result.losses[0]:.2f} -> {result.losses[-1]:.2f}; held-out perplexity {result.perplexity:.1f}")
assert result.evaluations[-1].perplexity.value < result.evaluations[0].perplexity.value

# %% [markdown]
# ## Export
# Only what passes the parity gate is written.

# %%
artifact = lmopt.Exporter("onnx").export(result.model, "lstm-service", overwrite=True)
print(f"exported and verified: {', '.join(sorted(artifact.manifest['parity']))}")

# %% [markdown]
# ## Service
# A function from a request to an answer, as a web framework would call it. The process that runs it needs neither
# torch nor this script: only the folder and `lmopt` with ONNX Runtime. It may be called from many threads at once.

# %%
runtime = lmopt.Runtime("lstm-service", backend="onnxruntime")


def complete(request: dict) -> dict:
    found = runtime.generate(
        request["prompt"],
        max_new_tokens=request.get("max_new_tokens", 24),
        temperature=0.7,
        seed=request.get("seed", 0),
    )
    return {"text": found.text, "finish_reason": found.finish_reason, "tokens": len(found.token_ids)}


for prompt in ("The value of the", "If the class"):
    answer = complete({"prompt": prompt})
    print(f"{prompt}{answer['text']}  [{answer['tokens']} tokens, {answer['finish_reason']}]")

# %% [markdown]
# The service says what the trained model says, token by token.

# %%
with lmopt.Runtime(result.model, backend="torch") as reference:
    expected = reference.generate("The value of the", max_new_tokens=24, temperature=0.7, seed=0)
assert complete({"prompt": "The value of the"})["text"] == expected.text
runtime.close()
print(f"same text on both engines; losses: {Path('lstm-run', 'loss.png')}")

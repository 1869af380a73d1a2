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
# # A shallower model, recovered by distillation
#
# A fifth of a model's blocks is removed, and what that costs is won back by learning from the model that it was:
# its own distribution of every next token, on a text that has nothing to do with the one it is measured on.
#
#     python examples/recover_pruned.py [MODEL] [LEARN.txt] [HELD_OUT.txt]
#
# `MODEL` is a Hugging Face folder or id, or an lmopt artefact, in float. Without it, or with
# `LMOPT_EXAMPLE_QUICK=1`, a small model is trained first, in a minute, on the documentation that ships with Python.
# SmolLM2-135M takes a few minutes at the size below on two cores; docs/results/2026-11-24-distillation.md has its
# figures. It needs `python -m pip install -e ".[cpu,train]"`.

# %%
import os
import pydoc_data.topics
import sys
import warnings
from pathlib import Path

import lmopt
from lmopt.compression import DropBlocks
from lmopt.compression.calibration import Calibration
from lmopt.compressor import LossWarning
from lmopt.training import Distill, TrainingConfig, train

QUICK = os.environ.get("LMOPT_EXAMPLE_QUICK") == "1"
given = [one for one in sys.argv[1:4] if not one.startswith("-")]
source = None if QUICK or not given else given[0]

# %% [markdown]
# ## Texts
# One to learn on and one to be measured on. Without files both come from Python's own documentation.

# %%
topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
cut = len(topics) * 9 // 10
learnt = Path(given[1]).read_text(encoding="utf-8") if len(given) > 1 else topics[:cut]
held_out = Path(given[2]).read_text(encoding="utf-8") if len(given) > 2 else topics[cut:]
print(f"{len(learnt):,} characters to learn on, {len(held_out):,} held out")


# %% [markdown]
# ## The model
# Without one of your own: five small blocks of the Llama kind that read single bytes.


# %%
def small_model() -> lmopt.Model:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: place for place, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    model = lmopt.Model.from_module(LlamaForCausalLM(config), tokenizer)
    settings = TrainingConfig(
        max_steps=150, learning_rate=4e-3, per_device_train_batch_size=16, block_size=64
    )
    return train(model, [learnt[:200_000]], config=settings).model


model = small_model() if source is None else lmopt.Model.from_pretrained(source, dtype="float32")
print(f"{model.source}: {model.facts.parameters:,} weights")

# %% [markdown]
# ## The recipe
# `DropBlocks` removes the blocks that change what runs through them the least; `Distill` recovers towards the model
# that the recipe began with. Both read the same calibration texts. What a recipe without a tolerance loses is told as
# a warning, which is expected of the first of the two.

# %%
if source is None:
    sizes = {"max_steps": 100, "learning_rate": 2e-3, "batch_size": 16, "block_size": 64}
    calibration = Calibration([learnt], rows=64, row_tokens=256)
else:
    sizes = {
        "max_steps": 100,
        "learning_rate": 5e-4,
        "batch_size": 4,
        "block_size": 256,
        "training": {"bf16": True},
    }
    calibration = Calibration([learnt], rows=256, row_tokens=256)
drop, recover = DropBlocks(share=0.2), Distill(**sizes)
texts = [held_out[: 6_000 if source is None else 20_000]]
with warnings.catch_warnings():
    warnings.simplefilter("ignore", LossWarning)
    pruned = lmopt.Compressor([drop]).compress(model, calibration=calibration, texts=texts)
    recovered = lmopt.Compressor([drop, recover]).compress(model, calibration=calibration, texts=texts)

# %% [markdown]
# ## What it was worth

# %%
before, after = pruned.report, recovered.report
print(f"perplexity of held-out text: {before.float_perplexity:.2f} whole, {before.perplexity:.2f} pruned, "
      f"{after.perplexity:.2f} recovered")  # fmt: skip
print(
    f"mean KL to the whole model: {before.difference.kl_mean:.3f} pruned, {after.difference.kl_mean:.3f} recovered"
)
print(f"{1 - after.difference.kl_mean / before.difference.kl_mean:.0%} of the divergence removed")
assert after.difference.kl_mean < before.difference.kl_mean / 2

# %% [markdown]
# The result is a plain, smaller model: it is saved, exported and run like any other, and its recipe is with it.

# %%
artifact = recovered.save_pretrained("recovered", overwrite=True)
print(f"saved: {artifact.path}, steps: {', '.join(step['step'] for step in recovered.recipe)}")

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
# # The best deployment of a model on this machine
#
# Which compression, which engine, how many threads? `lmopt.recommend` says in two seconds what to try first;
# `lmopt.tune` measures, under your limits, and shows what it found.
#
# `LMOPT_EXAMPLE_MODEL` is the folder of a Hugging Face model, `LMOPT_EXAMPLE_TEXTS` one with `wiki.txt`
# (`python scripts/fetch_test_assets.py` makes both). A search takes half an hour; with `LMOPT_EXAMPLE_TUNED`, the
# folder of an earlier one is shown.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt

import lmopt
from lmopt.compression import Quantize
from lmopt.tuning import Workload

QUICK = os.environ.get("LMOPT_EXAMPLE_QUICK") == "1"  # CI runs this in a small size
MODEL = os.environ["LMOPT_EXAMPLE_MODEL"]
TEXT = Path(os.environ["LMOPT_EXAMPLE_TEXTS"]) / "wiki.txt"
TUNED = os.environ.get("LMOPT_EXAMPLE_TUNED")

# %% [markdown]
# ## Before anything runs
#
# From the headers of the files and a short probe of memory and arithmetic.

# %%
print(lmopt.recommend(MODEL))

# %% [markdown]
# ## The search

# %%
small = {
    "backends": ["onnxruntime"],
    "threads": [1],
    "recipes": {"eight": Quantize(bits=8, group_size=32)},
    "only_recipes": True,
    "workload": Workload(
        prompt_tokens=8, new_tokens=4, rounds=1, starts=1, score_tokens=128, quick_tokens=64
    ),
}
if TUNED:
    result = lmopt.TuneResult.from_file(TUNED)
else:
    result = lmopt.tune(
        MODEL,
        output="tuned",
        text=TEXT,
        constraints={"perplexity_ratio": 1.05},
        budget=120 if QUICK else 1680,
        **(small if QUICK else {}),
    )
result

# %% [markdown]
# ## What was put aside, and by what
#
# A cheap look only rules out, and says with which figure.

# %%
for one in result.trials:
    if one.state != "measured":
        print(f"{one.state:10} {one.name}: {one.reason.splitlines()[0][:110] if one.reason else ''}")

# %% [markdown]
# ## Where the time of a token goes
#
# Every measured deployment, by what it loses and how long a token takes.

# %%
measured = [one for one in result.trials if one.state == "measured" and one.loss]
figure, axis = plt.subplots(figsize=(7, 3.5))
for backend in sorted({one.backend for one in measured}):
    of_it = [one for one in measured if one.backend == backend]
    axis.plot(
        [one.figures["token_p50_ms"] for one in of_it],
        [one.figures["perplexity_ratio"] for one in of_it],
        "o",
        label=backend,
        alpha=0.7,
    )
axis.axhline(1.05, color="grey", linewidth=0.8, linestyle=":")
axis.set(xlabel="time of a token, ms", ylabel="perplexity over the float model's", xscale="log")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## Use it

# %%
best = result.best
with lmopt.Runtime(result.artifact, backend=best.backend, threads=best.threads) as runtime:
    print(runtime.generate("The old house by the sea", max_new_tokens=8 if QUICK else 40))

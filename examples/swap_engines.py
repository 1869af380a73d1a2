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
# # One model, every engine
#
# SmolLM2-135M on each engine that this Python has, by the same six lines. An engine that runs exported
# files gets an export, which has to pass the parity gate and is kept in lmopt's cache: the second run of
# this file does not export again.
#
#     python examples/swap_engines.py [MODEL]
#
# `MODEL` is a Hugging Face folder or id, a `.gguf` file or an lmopt artefact. Without it, or
# `LMOPT_EXAMPLE_MODEL`, SmolLM2 is fetched as `lmopt demo` fetches it (93 MB, hash-checked).

# %%
import os
import sys

import lmopt
from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.registry import backends

# In a notebook the first argument belongs to Jupyter.
given = sys.argv[1] if len(sys.argv) == 2 and not sys.argv[1].startswith("-") else None
source = given or os.environ.get("LMOPT_EXAMPLE_MODEL") or fetch_smollm2(cache_folder())
new_tokens = 8 if os.environ.get("LMOPT_EXAMPLE_QUICK") == "1" else 32
model = lmopt.Model.from_pretrained(source)

# %% [markdown]
# ## The six lines

# %%
found, reports = {}, {}
for backend in (name for name in backends.ready() if "cpu" in backends.spec(name).can.devices):
    with lmopt.Runtime(model, backend=backend) as runtime:
        found[backend] = runtime.generate("The capital of France is", max_new_tokens=new_tokens)
        reports[backend] = runtime.report()
        print(f"{backend:12} {found[backend].text!r}")

# %% [markdown]
# ## The same tokens
# Not similar text: each token is equal. Greedy decoding, sampling by a seed and beams all live in lmopt,
# so an engine has nothing to disagree about but the logits, and those passed the gate.

# %%
assert len({tuple(one.token_ids) for one in found.values()}) == 1, found
print(f"{len(found)} engines, {new_tokens} identical tokens")

# %% [markdown]
# ## What each engine really does
# The device, type and threads in use, as the engine found out after loading: nothing is replaced silently.

# %%
for backend, report in reports.items():
    actual = report.actual
    print(f"{backend}: {actual.device}, {actual.dtype}, {actual.threads} threads, {dict(actual.versions)}")
    print(f"  asked for {dict(report.requested)}; {dict(actual.details)}")

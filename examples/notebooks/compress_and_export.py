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
# # Smaller, and what it cost
#
# Three recipes on one model: what each weighs and what each loses, on text that none of them was calibrated on. Then
# the best of the small ones goes through the parity gate to ONNX Runtime, and gives the tokens that it gives in
# PyTorch.
#
# `LMOPT_EXAMPLE_MODEL` is the folder of a Hugging Face model, `LMOPT_EXAMPLE_TEXTS` one with `botchan.txt` (a novel,
# for calibration) and `wiki.txt` (for measuring). `python scripts/fetch_test_assets.py` makes both.

# %%
import os
from pathlib import Path

import matplotlib.pyplot as plt

import lmopt
from lmopt.compression import GPTQ, Calibration, Quantize

QUICK = os.environ.get("LMOPT_EXAMPLE_QUICK") == "1"  # CI runs this in a small size
ROWS, CHARACTERS, TOKENS = (4, 2_000, 8) if QUICK else (16, 12_000, 64)
TEXTS = Path(os.environ["LMOPT_EXAMPLE_TEXTS"])
model = lmopt.Model.from_pretrained(os.environ["LMOPT_EXAMPLE_MODEL"], dtype="float32")
print(f"{model.facts.architecture}, {model.facts.parameters:,} parameters")

# %% [markdown]
# ## Three recipes
#
# Rounding to 8 and to 4 bits needs no text. GPTQ reads a novel and lets later columns make up for what the rounding of
# earlier ones cost.

# %%
calibration = Calibration([(TEXTS / "botchan.txt").read_text(encoding="utf-8")], rows=ROWS)
held_out = (TEXTS / "wiki.txt").read_text(encoding="utf-8")[:CHARACTERS]
recipes = {
    "8 bits, rounded": Quantize(bits=8, group_size=64),
    "4 bits, rounded": Quantize(bits=4, group_size=64),
    "4 bits, GPTQ": GPTQ(bits=4, group_size=64),
}
small = {
    name: lmopt.Compressor([step]).compress(model, calibration=calibration, texts=[held_out])
    for name, step in recipes.items()
}
reports = {name: one.report for name, one in small.items()}
for name, report in reports.items():
    print(f"{name:16} {report.bytes / 1e6:6.1f} of {report.float_bytes / 1e6:.1f} MB", end="  ")
    print(f"KL {report.difference.kl_mean:.4f}  perplexity x {report.perplexity_ratio:.3f}", end=" ")
    print(f"+- {report.perplexity_ratio_stderr:.3f}")

# %% [markdown]
# The KL divergence of the next token's distribution settles with far fewer tokens than perplexity does, so it is the
# one to compare recipes by. The weights whose outputs are furthest off are the ones to give more bits
# (`overrides={"*.down_proj": {"bits": 8}}`, or `Mixed`, which finds them).

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
for name, report in reports.items():
    left.plot(report.bytes / 1e6, report.difference.kl_mean, "o")
    left.annotate(
        name, (report.bytes / 1e6, report.difference.kl_mean), xytext=(6, 4), textcoords="offset points"
    )
left.set(xlabel="weights, MB", ylabel="mean KL, nats a token", yscale="log")
left.margins(x=0.3, y=0.2)
rounded, calibrated = (reports[name].layer_errors for name in ("4 bits, rounded", "4 bits, GPTQ"))
shared = sorted(set(rounded) & set(calibrated), key=lambda path: rounded[path])
right.plot([100 * rounded[path] for path in shared], label="rounded", linewidth=0.9)
right.plot([100 * calibrated[path] for path in shared], label="GPTQ", linewidth=0.9)
right.set(xlabel="weight, best rounded first", ylabel="error of its output, %")
right.legend(frameon=False)
for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
figure.tight_layout()

# %% [markdown]
# ## Export
#
# The codes and scales go into the graph as they are, so the export is held against the *compressed* model, as tightly
# as a float model is held against its own: compression may cost quality, an export may not.

# %%
chosen = small["4 bits, GPTQ"]
artifact = lmopt.Exporter("onnx", target="onnxruntime").export(chosen, "small-onnx", overwrite=True)
parity = artifact.manifest["parity"]["onnx"]
megabytes = sum(path.stat().st_size for path in Path("small-onnx").rglob("*.onnx*")) / 1e6
print(
    f"{len(parity['cases'])} cases passed the gate on {parity['backend']}; {megabytes:.0f} MB of graph and weights"
)

# %% [markdown]
# ## The same tokens

# %%
prompt = "The old house by the sea"
eager = lmopt.Runtime(chosen, backend="torch")
fast = lmopt.Runtime("small-onnx", backend="onnxruntime")
found = {
    name: one.generate(prompt, max_new_tokens=TOKENS)
    for name, one in (("torch", eager), ("onnxruntime", fast))
}
print(prompt + str(found["onnxruntime"]))
assert found["torch"].token_ids == found["onnxruntime"].token_ids
for one in (eager, fast):
    one.close()

# %% [markdown]
# How fast it is depends on the machine: `lmopt bench small-onnx`, or `lmopt tune`, measure that.

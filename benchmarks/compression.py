"""What each recipe costs: size, KL divergence, perplexity and top-1, side by side, scored by one path.

    python benchmarks/compression.py [MODEL] --calibration FILE --text FILE [--tokens 8192] [--rows 128]
        [--recipes FILE] [--json FILE]

MODEL is whatever `lmopt.Model.from_pretrained` opens (default: SmolLM2-135M, fetched as by `lmopt demo`). FILE of
`--recipes` holds a JSON object of names and lists of steps; without it, the sets below. KL is compared with that of
round-to-nearest of the same form, which is the first of its set.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any, Final

from lmopt import Compressor, Model
from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.compression import Calibration
from lmopt.compression.recipe import step_from_dict
from lmopt.evaluation.tolerances import Tolerance
from lmopt.platform import machine

_ANY: Final = Tolerance("any", kl_mean=float("inf"), top1=0.0, perplexity_ratio=float("inf"))


def _forms() -> dict[str, list[list[dict[str, Any]]]]:
    """Sets of recipes; the first of each is what the others are compared with."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for group_size in (64, 128):
        for symmetric in (True, False):
            form = {"group_size": group_size, "symmetric": symmetric, "embedding": None, "head": None}
            # HQQ is about the zero, which a symmetric group does not have.
            names = ("rtn", "awq", "gptq") if symmetric else ("rtn", "hqq", "awq", "gptq")
            fold = {"step": "awq", "bits": 4, **form, "fold_only": True}
            found[f"4 bits, groups of {group_size}, {'symmetric' if symmetric else 'asymmetric'}"] = [
                *([{"step": name, "bits": 4, **form}] for name in names),
                [fold, {"step": "gptq", "bits": 4, **form}],
            ]
    form = {"group_size": 64, "embedding": 8, "head": 8}
    found["8 bits, groups of 64"] = [[{"step": "rtn", "bits": 8, **form}]]
    plain = {"embedding": None, "head": None}
    found["4.5 bits a weight"] = [
        [{"step": "gptq", "bits": 4, "group_size": 32, **plain}],
        [{"step": "mixed", "quantizer": {"step": "gptq", "group_size": 64, **plain}, "average_bits": 4.5}],
    ]
    found["5 bits a weight"] = [
        [{"step": "gptq", "bits": 4, "group_size": 16, **plain}],
        [{"step": "mixed", "quantizer": {"step": "gptq", "group_size": 64, **plain}, "average_bits": 5.0}],
    ]
    found["half of the weights zero"] = [
        [{"step": name, "sparsity": 0.5}] for name in ("magnitude", "wanda", "sparsegpt")
    ]
    found["fewer blocks and channels"] = [
        [{"step": "drop_blocks", "share": 0.1}],
        [{"step": "prune_channels", "share": 0.1}],
        [{"step": "prune_channels", "share": 0.25}],
    ]
    return found


def score(model: Model, steps: list[dict[str, Any]], calibration: Calibration, text: str) -> dict[str, Any]:
    """Compress by a recipe and measure.

    Args:
        model: The float model.
        steps: Steps as plain data.
        calibration: What is read meanwhile.
        text: What is scored.

    Returns:
        The report's figures and the seconds of it all.
    """
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = Compressor([step_from_dict(one) for one in steps], tolerance=_ANY).compress(
            model, calibration=calibration, texts=[text]
        )
    assert small.report is not None
    found = small.report.to_dict()
    del found["layer_errors"]
    return {"steps": steps, "seconds": time.perf_counter() - began, **found}


def main() -> None:
    """Measure, and print tables in Markdown as they come."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--recipes", type=Path)
    parser.add_argument("--only", default="", help="sets whose name holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = Model.from_pretrained(options.model or fetch_smollm2(cache_folder()))
    assert model.tokenizer is not None
    words = options.text.read_text(encoding="utf-8")[: 16 * options.tokens]
    text = model.tokenizer.decode(model.tokenizer.encode(words)[: options.tokens])
    calibration = Calibration(
        (options.calibration.read_text(encoding="utf-8"),), rows=options.rows, row_tokens=options.row_tokens
    )
    sets = json.loads(options.recipes.read_text(encoding="utf-8")) if options.recipes else _forms()
    results: dict[str, list[dict[str, Any]]] = {}
    print(
        f"{model.source} on {machine()}: calibrated on {options.rows} x {options.row_tokens} tokens of ",
        end="",
    )
    print(f"{options.calibration.name}, scored on {options.tokens} tokens of {options.text.name}", flush=True)
    for name, recipes in sets.items():
        if options.only not in name:
            continue
        print(f"\n### {name}\n\n| recipe | MB | KL | to the first | perplexity | top-1 | seconds |")
        print("|---|---|---|---|---|---|---|")
        results[name] = []
        for steps in recipes:
            one = score(model, steps, calibration, text)
            results[name].append(one)
            first = results[name][0]["difference"]["kl_mean"]
            kl = one["difference"]["kl_mean"]
            names = " + ".join(step["step"] for step in steps)
            print(
                f"| {names} | {one['bytes'] / 1e6:.1f} | {kl:.4f} | {kl / first:.2f}x | "
                f"x {one['perplexity_ratio']:.4f} +- {one['perplexity_ratio_stderr']:.4f} | "
                f"{one['difference']['top1']:.1%} | {one['seconds']:.0f} |",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

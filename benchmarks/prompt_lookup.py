"""What prompt lookup decoding gains where the output repeats the prompt, and costs where it does not.

    python benchmarks/prompt_lookup.py [MODEL] [--backend NAME] [--tokens 10] [--rounds 3] [--json FILE]

MODEL is whatever `lmopt.Runtime` opens (default: SmolLM2-135M, fetched as by `lmopt demo`). Each prompt is
continued with and without `prompt_lookup_num_tokens`, in turn, on one runtime:

- *quote and edit*: the model is asked to give back a passage with one word replaced;
- *free text, greedy*: it continues a piece of text; small models fall into loops, which lookup likes;
- *free text, sampled*: the same at temperature 1, where hardly anything repeats.

The tokens must be the same with and without, or nothing is reported. The figure is the time between the
first and the last token.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from harness.requests import request_lap

import lmopt
from lmopt.artifact import cache_folder
from lmopt.cli.assets import fetch_smollm2
from lmopt.cli.trial import sample_text
from lmopt.evaluation import Figure, Lap, Speed
from lmopt.generation import GenerationConfig
from lmopt.platform import machine

FREE_TOKENS = 96
_ASK = (
    "Give back the following text word for word, but write {new!r} wherever it says {old!r}. Give nothing "
    "else.\n\n{passage}"
)


def workloads(
    runtime: lmopt.Runtime, text: str, rounds: int, passage_tokens: int
) -> dict[str, tuple[list[list[int]], dict[str, Any]]]:
    """Make the prompts of each workload, one a round, and its options.

    Args:
        runtime: For its tokenizer.
        text: Where passages come from.
        rounds: How many.
        passage_tokens: Tokens of a passage to quote.
    """
    tokenizer = runtime.tokenizer
    if tokenizer is None:
        raise SystemExit("the model has no tokenizer, so nothing can be quoted")
    ids = tokenizer.encode(text[:200_000], add_special_tokens=False)
    quotes, free = [], []
    for number in range(rounds):
        place = 400 * number
        passage = tokenizer.decode(ids[place : place + passage_tokens]).strip()
        old = max(passage.split(), key=len).strip(".,;:()")
        message = {"role": "user", "content": _ASK.format(old=old, new="something", passage=passage)}
        # The answer's first words are given, so that a small model quotes and does not chat.
        start = " ".join(passage.split()[:6])
        if tokenizer.chat_template:
            quotes.append([*runtime.chat_ids([message]), *tokenizer.encode(start, add_special_tokens=False)])
        else:
            quotes.append(tokenizer.encode(f"{message['content']}\n\n{start}"))
        free.append(ids[place + 200 : place + 200 + FREE_TOKENS])
    return {
        "quote and edit": (quotes, {}),
        "free text, greedy": (free, {}),
        "free text, sampled": (free, {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": 7}),
    }


def run(
    runtime: lmopt.Runtime, text: str, *, tokens: int, new_tokens: int, rounds: int, passage_tokens: int = 140
) -> dict[str, Any]:
    """Measure every workload with and without lookup.

    Args:
        runtime: Open runtime.
        text: Where passages come from.
        tokens: `prompt_lookup_num_tokens`.
        new_tokens: To generate.
        rounds: Prompts of each workload; one more warms up.
        passage_tokens: Tokens of a passage to quote.

    Returns:
        By workload `without`, `with` (`Speed` as plain values) and `ratio`, a `Figure` over rounds.
    """
    found: dict[str, Any] = {}
    for name, (prompts, options) in workloads(runtime, text, rounds + 1, passage_tokens).items():
        plain = GenerationConfig(max_new_tokens=new_tokens, **options)
        lookup = plain.with_options(prompt_lookup_num_tokens=tokens)
        laps: dict[str, list[Lap]] = {"without": [], "with": []}
        for number, prompt in enumerate(prompts):
            ways = [("without", plain), ("with", lookup)]
            for way, config in ways if number % 2 else ways[::-1]:
                laps[way].append(request_lap(runtime, [prompt], config))
            if not np.array_equal(laps["without"][-1].tokens, laps["with"][-1].tokens):
                raise SystemExit(
                    f"{name}, prompt {number}: lookup changed the tokens, so there is nothing to report"
                )
        ratios = [a.decode_s / b.decode_s for a, b in zip(laps["without"][1:], laps["with"][1:], strict=True)]
        found[name] = {
            **{way: Speed.of(all_laps[1:]).to_dict() for way, all_laps in laps.items()},
            "ratio": asdict(Figure.of(ratios)),
        }
    return found


def main() -> None:
    """Measure, and print a table or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M, fetched as by `lmopt demo`")
    parser.add_argument("--backend", help="default: as `lmopt.Runtime` chooses")
    parser.add_argument("--tokens", type=int, default=10, help="prompt_lookup_num_tokens")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--passage", type=int, default=140, help="tokens of a passage to quote")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, help="text file that passages come from")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    asked = parser.parse_args()
    text = asked.text.read_text(encoding="utf-8") if asked.text else sample_text()
    with lmopt.Runtime(asked.model or fetch_smollm2(cache_folder()), backend=asked.backend) as runtime:
        sizes = {
            "tokens": asked.tokens,
            "new_tokens": asked.new_tokens,
            "rounds": asked.rounds,
            "passage_tokens": asked.passage,
        }
        found = run(runtime, text, **sizes)
        report = runtime.report().actual
    print(f"{'':20} {'without, tokens/s':>24} {'with, tokens/s':>24} {'gain':>20}")
    for name, one in found.items():
        cells = [Figure(**one[way]["decode_tokens_per_s"]) for way in ("without", "with")]
        print(f"{name:20} {cells[0]!s:>24} {cells[1]!s:>24} {Figure(**one['ratio'])!s:>20}")
    print(f"median (least .. most) of {asked.rounds} prompts; the tokens are the same with and without")
    print(f"{report.backend}, {report.dtype}, {report.threads} threads; {machine()}", file=sys.stderr)
    if asked.json:
        result = {
            "machine": machine(),
            "backend": report.backend,
            "dtype": report.dtype,
            **sizes,
            "found": found,
        }
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

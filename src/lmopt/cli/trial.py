"""Run one model on several engines and hold the results against each other."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lmopt.cli.footprint import footprint
from lmopt.cli.output import Output

if TYPE_CHECKING:
    from lmopt.evaluation import Perplexity, Speed
    from lmopt.runtime import Runtime

SAMPLE: Final = f"Python {platform.python_version()}'s own reference (pydoc_data.topics)"
"""Where the text comes from that perplexity is measured on: every Python has it."""

_TEXT_TOKENS: Final = 1024
_PROMPT_TOKENS: Final = 128
_NEW_TOKENS: Final = 32
_ROUNDS: Final = 3
_PATIENCE_S: Final = 60.0  # for all figures of one engine
_PROOF_S: Final = 20.0  # for the tokens that it is judged by


@dataclass(slots=True)
class Trial:
    """What one engine did.

    Attributes:
        name: Backend.
        token_ids: Tokens that it generated.
        text: The same as text.
        same: Whether they are those of the first engine.
        disk_bytes: Size of the files that it read.
        speed: `None` where the engine is too slow for it.
        perplexity: Likewise.
        memory: From `footprint`.
        notes: What should be known beside the figures.
    """

    name: str
    token_ids: list[int]
    text: str
    same: bool
    disk_bytes: int
    speed: "Speed | None" = None
    perplexity: "Perplexity | None" = None
    memory: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def sample_text() -> str:
    """Give the text that perplexity is measured on: about 400,000 characters of English about Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def run_trials(
    out: Output,
    runtimes: "Mapping[str, Runtime]",
    places: Mapping[str, str],
    ids: Sequence[int],
    new_tokens: int,
    text: str,
    *,
    trust: bool = False,
) -> list[Trial]:
    """Generate and measure on every engine; the first one is the reference.

    Args:
        out: For progress.
        runtimes: Open runtimes by backend.
        places: Where a fresh process finds the model for each backend.
        ids: Prompt that every engine continues.
        new_tokens: Tokens to generate.
        text: Text for perplexity.
        trust: As for `lmopt.Runtime`.
    """
    from lmopt.evaluation import compare_speed, folder_size_bytes

    limit = min((one.facts.context_length or math.inf for one in runtimes.values()), default=math.inf)
    sizes = {
        "prompt_tokens": int(min(_PROMPT_TOKENS, limit // 2)),
        "new_tokens": int(min(_NEW_TOKENS, limit // 2)),
    }
    trials: list[Trial] = []
    quick: list[Trial] = []
    with out.progress() as tell:
        for place, (name, runtime) in enumerate(runtimes.items()):
            tell("generate", place, len(runtimes))
            seconds = _estimate(runtime, **sizes)
            # A slow engine proves itself on fewer tokens, and is not timed for minutes. The first one is
            # what the others are held against, so it is never cut short.
            quick_enough = not trials or seconds["measure"] <= _PATIENCE_S
            fitting = int(_PROOF_S / max(seconds["token"], 1e-9)) if trials else new_tokens
            one = _generate(name, runtime, ids, max(2, min(new_tokens, fitting)), trials)
            one.disk_bytes = folder_size_bytes(Path(places[name])) if Path(places[name]).exists() else 0
            trials.append(one)
            if quick_enough:
                quick.append(one)
            else:
                one.notes.append(
                    f"speed and perplexity left out: they would take about {seconds['measure']:.0f} s"
                )
        tell("generate", len(runtimes), len(runtimes))
        speeds = compare_speed(
            {one.name: runtimes[one.name].engine for one in quick},
            rounds=_ROUNDS,
            progress=lambda done, total: tell("measure speed", done, total),
            **sizes,
        ) if quick else {}  # fmt: skip
        for place, one in enumerate(quick):
            tell("perplexity", place, len(quick))
            one.speed = speeds[one.name]
            one.perplexity = runtimes[one.name].perplexity(text, tokens=_TEXT_TOKENS)
        tell("perplexity", len(quick), len(quick))
        for place, one in enumerate(trials):
            tell("measure memory", place, len(trials))
            one.memory = footprint(places[one.name], backend=one.name, trust=trust)
            if "problem" in one.memory:
                one.notes.append(f"no memory figure: {one.memory['problem']}")
        tell("measure memory", len(trials), len(trials))
    return trials


def _estimate(runtime: "Runtime", prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Seconds that generating and measuring will take, from a small probe."""
    first = _probe(runtime, prompt_tokens, new_tokens)
    if first["measure"] <= _PATIENCE_S:
        return first
    # An engine makes its kernels when it is first called (OpenVINO does): five times the time of the next call.
    return min(first, _probe(runtime, prompt_tokens, new_tokens), key=lambda one: one["measure"])


def _probe(runtime: "Runtime", prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    from lmopt.evaluation import measure_speed

    found = measure_speed(
        runtime.engine, prompt_tokens=min(16, prompt_tokens), new_tokens=2, rounds=1, warm_up=0
    )
    a_token = found.token_p50_ms.median / 1e3
    # A prompt of 16 tokens tells little of the rate at long prompts; it errs on the slow side.
    reading = 1 / found.prefill_tokens_per_s.median
    lap = prompt_tokens * reading + new_tokens * a_token
    return {"token": a_token, "measure": (_ROUNDS + 1) * lap + _TEXT_TOKENS * reading}


def _generate(name: str, runtime: "Runtime", ids: Sequence[int], count: int, before: list[Trial]) -> Trial:
    found = runtime.generate(ids, max_new_tokens=count, do_sample=False, num_beams=1)
    trial = Trial(name, found.token_ids, found.text or "", True, 0)
    if before:
        expected = before[0].token_ids[:count]
        trial.same = trial.token_ids == expected
        if not trial.same:
            pairs = zip(trial.token_ids, expected, strict=False)
            first = next(
                (n for n, (a, b) in enumerate(pairs) if a != b), min(len(trial.token_ids), len(expected))
            )
            trial.notes.append(f"differs from {before[0].name} at new token {first + 1}")
        elif len(expected) < len(before[0].token_ids):
            trial.notes.append(f"slow, so compared on {len(expected)} tokens only")
    return trial

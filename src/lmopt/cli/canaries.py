"""`lmopt eval --canaries`: how much easier a model finds secrets than others of their form."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmopt.cli.output import Output
from lmopt.errors import InputError, TokenizerError

if TYPE_CHECKING:
    from lmopt.runtime import Runtime

_FIELDS = {"template", "secret", "alphabet"}


def exposures(out: Output, runtime: "Runtime", path: Path) -> None:
    """Measure the exposure of each secret of a file and show them.

    Args:
        out: Takes the table.
        runtime: The model.
        path: JSON lines with `template` and `secret`, and `alphabet` where it is not the digits.

    Raises:
        InputError: A line is no canary.
        TokenizerError: The model has no tokenizer.
    """
    from lmopt.evaluation.exposure import canary_exposure

    if runtime.tokenizer is None:
        raise TokenizerError("canaries are texts, but the model has no tokenizer")
    canaries = [
        _canary(line, number)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if line.strip()
    ]
    found = []
    with out.progress() as tell:
        for place, canary in enumerate(canaries):
            tell("measure exposure", place, len(canaries))
            found.append(canary_exposure(runtime.engine, runtime.tokenizer, **canary))
        engine = runtime.report().actual
    # Not the secrets: what is on the screen ends up in logs.
    rows = [
        [
            str(number),
            f"{one.bits:.1f}",
            f"{one.rank:,} of {one.candidates + 1:,}",
            f"{one.space:,}",
            one.method,
        ]
        for number, one in enumerate(found, 1)
    ]
    out.table(["canary", "exposure, bits", "rank", "possible secrets", "method"], rows)
    out.result({"exposures": found, "engine": engine})


def _canary(line: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"line {number} of the canaries is no JSON: {error}") from error
    if not isinstance(found, dict) or not {"template", "secret"} <= found.keys() <= _FIELDS:
        raise InputError(f"line {number} of the canaries needs template and secret, and may have alphabet")
    return found

"""The README.md that an artefact carries."""

from collections.abc import Mapping
from typing import Any

from lmopt.evaluation import ParityReport
from lmopt.model import Model


def model_card(
    model: Model, formats: Mapping[str, Mapping[str, Any]], reports: Mapping[str, ParityReport | None]
) -> str:
    """Describe an exported model for the people who find its folder.

    Args:
        model: The model that was exported.
        formats: Format to what its exporter said of it, as the manifest has it.
        reports: Format to what the parity gate measured, `None` where weights were compared bit by
            bit.
    """
    facts = model.facts
    lines = [
        f"# {model.source}",
        "",
        f"Exported by lmopt in the format {' and '.join(f'`{name}`' for name in reports)}.",
        "",
        f"- Architecture: {facts.architecture}",
        f"- Parameters: {facts.parameters:,}",
        f"- Vocabulary: {facts.vocab_size:,}",
        f"- Context: {facts.context_length or 'no limit'}",
        *(f"- {line}" for name, said in formats.items() if (line := _dialect(name, said))),
        "",
        "## Parity with the original",
        "",
    ]
    for name, report in reports.items():
        if report is None:
            lines += [f"`{name}`: every weight was read back and equals the original's, bit by bit.", ""]
        else:
            lines += [
                f"`{name}`, measured on {report.candidate}, limits of {report.tolerance.name}:",
                "",
                "```",
                *report.lines(),
                "```",
                "",
            ]
    lines += [
        "## Use",
        "",
        "```python",
        "import lmopt",
        "",
        'with lmopt.Runtime("THIS FOLDER") as rt:',
        '    print(rt.generate("Once upon a time", max_new_tokens=32))',
        "```",
        "",
        "`lmopt.json` holds the hash of every file, versions, and all parity numbers.",
    ]
    return "\n".join(lines) + "\n"


def _dialect(name: str, said: Mapping[str, Any]) -> str:
    """Name the dialect of a format that has several, and why it is not the one asked for."""
    if "target" not in said:
        return ""
    opset = f", opset {said['opset']}" if "opset" in said else ""
    why = f". It is not the one that was asked for, because {said['fallback']}" if "fallback" in said else ""
    return f"Dialect of `{name}`: `{said['target']}`{opset}{why}"

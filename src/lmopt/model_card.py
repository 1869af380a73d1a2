"""The README.md that an artefact carries."""

from collections.abc import Mapping

from lmopt.evaluation import ParityReport
from lmopt.model import Model


def model_card(model: Model, reports: Mapping[str, ParityReport | None]) -> str:
    """Describe an exported model for the people who find its folder.

    Args:
        model: The model that was exported.
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

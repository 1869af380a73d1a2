"""The README.md that an artefact carries."""

from lmopt.evaluation import ParityReport
from lmopt.model import Model
from lmopt.spec import ExporterSpec


def model_card(model: Model, spec: ExporterSpec, target: str, report: ParityReport | None) -> str:
    """Describe an exported model for the people who find its folder.

    Args:
        model: The model that was exported.
        spec: Exporter that wrote it.
        target: Dialect.
        report: What the parity gate measured, `None` where weights were compared bit by bit.
    """
    facts = model.facts
    lines = [
        f"# {model.source}",
        "",
        f"Exported by lmopt in the format `{spec.format}` (target `{target}`).",
        "",
        f"- Architecture: {facts.architecture}",
        f"- Parameters: {facts.parameters:,}",
        f"- Vocabulary: {facts.vocab_size:,}",
        f"- Context: {facts.context_length or 'no limit'}",
        "",
        "## Parity with the original",
        "",
    ]
    if report is None:
        lines.append("Every weight was read back and is equal to the original's, bit by bit.")
    else:
        lines += [f"Measured on {report.candidate}, limits of {report.tolerance.name}:", "", "```"]
        lines += [*report.lines(), "```"]
    lines += [
        "",
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

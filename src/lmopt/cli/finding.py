"""What `lmopt doctor` finds."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

State: TypeAlias = Literal["ok", "missing", "warning", "broken"]
"""`missing` is something optional that is not installed; only `broken` makes `doctor` fail."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: Part of the report: `"engines"`, `"machine"`.
        name: What was looked at.
        state: Verdict.
        text: What was found, in a sentence.
        repair: Exact command or step that mends it, `""` where nothing is to be done.
    """

    area: str
    name: str
    state: State
    text: str
    repair: str = ""

"""The rules of `lmopt.contracts`, one function each; its docstring is the rule."""

from collections.abc import Callable
from typing import Final

from lmopt.testing.case import Case
from lmopt.testing.checks.inputs import INPUT_CHECKS
from lmopt.testing.checks.life import LIFE_CHECKS
from lmopt.testing.checks.numbers import NUMBER_CHECKS
from lmopt.testing.checks.plugin import SPEC_CHECKS as SPEC_CHECKS
from lmopt.testing.checks.sources import SOURCE_CHECKS
from lmopt.testing.checks.states import STATE_CHECKS

ENGINE_CHECKS: Final[tuple[Callable[[Case], None], ...]] = (
    *NUMBER_CHECKS,
    *STATE_CHECKS,
    *INPUT_CHECKS,
    *LIFE_CHECKS,
)

# What an engine does with tokens and states does not depend on whether a source came before them.
ENCODER_CHECKS: Final[tuple[Callable[[Case], None], ...]] = (*SOURCE_CHECKS, *NUMBER_CHECKS, *STATE_CHECKS)


def check_name(check: Callable[..., None]) -> str:
    """Name of a check as reports and `expected_failures` write it, without `check_`."""
    return check.__name__.removeprefix("check_")

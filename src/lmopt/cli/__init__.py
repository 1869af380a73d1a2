"""Command line of lmopt: `main` is what the shell's `lmopt` calls; each verb is a file of this folder.

Only this package knows typer and rich, and they are imported when a command runs.
"""

import sys

from lmopt.registry import pip_line
from lmopt.spec import Requirement


def main() -> None:
    """Run the command line; never returns.

    The exit status is 0 if all is well, 1 if a check failed (parity, tokens, `doctor`), 2 if the command
    is wrong or lmopt cannot do it, 70 for a defect of lmopt, and 130 after Ctrl-C.
    """
    needs = [Requirement(name, "lmopt[cli]") for name in ("typer", "rich")]
    if missing := [need.module for need in needs if not need.is_met()]:
        line = pip_line('"lmopt[cli]"')
        sys.stderr.write(
            f"the command line needs {' and '.join(missing)}, which this Python lacks. Install it:\n  {line}\n"
        )
        raise SystemExit(2)
    try:
        from lmopt.cli.app import app

        app(prog_name="lmopt")
    except KeyboardInterrupt:
        raise SystemExit(130) from None

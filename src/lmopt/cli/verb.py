"""What all verbs share: `--json` and `--debug`, errors without a traceback, exit statuses."""

import contextlib
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

from lmopt.cli.output import Output
from lmopt.errors import LmoptError, ParityError

CHECK_FAILED: Final = 1
CANNOT: Final = 2
DEFECT: Final = 70
INTERRUPTED: Final = 130

AsJson = Annotated[
    bool, typer.Option("--json", help="Write one JSON object to stdout and nothing else; notes go to stderr.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(verb: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command of a verb.

    Args:
        verb: Its first argument is the `Output`; the others are its options, annotated for typer.

    Returns:
        A function with the verb's options, `--json` and `--debug`. What libraries print to stdout while
        it runs goes to stderr, so that stdout holds results only.
    """

    def run(*, as_json: bool, debug: bool, **options: Any) -> None:
        out = Output(sys.stdout, sys.stderr, as_json=as_json)
        with contextlib.redirect_stdout(sys.stderr):
            status = _guarded(verb, out, options, debug)
        if status:
            raise typer.Exit(status)

    signature = inspect.signature(verb)
    by_name = inspect.Parameter.KEYWORD_ONLY
    parameters = [one.replace(kind=by_name) for name, one in signature.parameters.items() if name != "out"]
    parameters += [
        inspect.Parameter(name, by_name, default=False, annotation=kind)
        for name, kind in (("as_json", AsJson), ("debug", Debug))
    ]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__doc__ = inspect.getdoc(verb)
    return run


def _guarded(verb: Callable[..., None], out: Output, options: dict[str, Any], debug: bool) -> int:
    """Run a verb and turn what it raises into an exit status."""
    try:
        verb(out, **options)
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        out.note("interrupted")
        return INTERRUPTED
    except ParityError as error:
        out.error(error)
        return CHECK_FAILED
    except LmoptError as error:
        if debug:
            traceback.print_exception(error, file=out.stderr)
        out.error(error)
        return CANNOT
    except Exception as error:
        # A defect: the traceback is what its report needs.
        traceback.print_exception(error, file=out.stderr)
        out.error(error)
        return DEFECT
    return 0 if out.ok else CHECK_FAILED

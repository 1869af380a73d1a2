"""`python -m lmopt.interop.harness`: lm-evaluation-harness's own command line, with `--model lmopt`."""

import lmopt.interop.lm_eval  # noqa: F401  (registers the model)


def main() -> None:
    """Run it on the process's own arguments."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

"""`python -m lmopt.testing BACKEND [MODEL ...]`: run the conformance kit and print the table."""

import sys

from lmopt.errors import LmoptError
from lmopt.testing.run import check_backend
from lmopt.testing.workshop import MODELS


def main(arguments: list[str]) -> int:
    """Run the kit on the backend named first, on the models named after it (all where none is)."""
    if not arguments or arguments[0].startswith("-"):
        sys.stderr.write(f"usage: python -m lmopt.testing BACKEND [{' | '.join(MODELS)} ...]\n")
        return 2
    try:
        report = check_backend(arguments[0], models=arguments[1:] or tuple(MODELS))
    except LmoptError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{report}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Time and memory that one rendering of a chat template may spend.

Jinja's sandbox stops a template from reaching Python's internals, not from costing: `'a' * 10**9`
or five nested loops are harmless to it. What could take long or grow large is therefore measured
here before it is done. Loops are stopped by a trace function, which Python calls on every line of
the compiled template; single operations inside the C runtime, which it cannot interrupt, are held
small enough by charging their result in advance.
"""

import re
import sys
import threading
import time
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from lmopt.errors import TemplateError

DEADLINE_S: Final = 2.0
"""Seconds that compiling and rendering a template may take together."""

MEMORY_BYTES: Final = 32 * 1024 * 1024
"""Bytes that all results of a rendering may take, summed up and never given back."""

INPUT_FACTOR: Final = 64
"""Bytes granted on top for each character of the messages, so that a long conversation can be rendered."""

_LARGEST_NUMBER_BITS: Final = 4096
_ITEM_BYTES: Final = 8
_OBJECT_BYTES: Final = 64
_FORMAT_WIDTH: Final = re.compile(r"\d{5,}|\*|:[^{}]*\{")

_active = threading.local()


class Budget:
    """What is left of the budget of one rendering.

    Args:
        input_size: Characters and values that the caller gave.
    """

    def __init__(self, input_size: int) -> None:
        self.end = time.monotonic() + DEADLINE_S
        self.left = MEMORY_BYTES + INPUT_FACTOR * input_size

    def tick(self) -> None:
        """Stop the rendering when its time is over."""
        if time.monotonic() > self.end:
            raise TemplateError(
                f"the chat template ran for more than {DEADLINE_S:g} s and was stopped; real ones take "
                f"milliseconds. Do not trust this model's template; give another with chat_template=..."
            )

    def charge(self, size: int) -> None:
        """Account for a result before it is made."""
        self.left -= size
        if self.left < 0:
            raise TemplateError(
                "the chat template asked for too much memory and was stopped. Do not trust this model's "
                "template; give another with chat_template=..."
            )

    def charge_result(self, value: Any) -> None:
        """Account for a text or collection that was just made."""
        if isinstance(value, str):
            self.charge(sys.getsizeof(value))
        elif isinstance(value, list | tuple | dict | set):
            self.charge(_OBJECT_BYTES + _ITEM_BYTES * len(value))

    def weigh(self, value: Any, *, per_level: int = 0) -> int:
        """Count what writing or comparing a value costs, nested values as often as they occur.

        `[a, a]`, thirty times in a row, is a small object whose text has 2**30 parts.

        Args:
            value: Anything; lazy iterators count as one.
            per_level: Characters that each value costs for each level it is nested at.
        """
        total = 0
        waiting: list[Iterator[Any]] = [iter((value,))]
        while waiting:
            for one in waiting[-1]:
                total += (len(one) if isinstance(one, str) else 1) + per_level * len(waiting)
                if total > self.left:
                    self.charge(total)
                if isinstance(one, Mapping):
                    self.tick()
                    total += sum(len(key) if isinstance(key, str) else 1 for key in one)
                    waiting.append(iter(one.values()))
                    break
                if isinstance(one, list | tuple | set | frozenset | ItemsView | ValuesView):
                    self.tick()
                    waiting.append(iter(one))
                    break
            else:
                waiting.pop()
        return total

    def multiply(self, left: Any, right: Any) -> None:
        """Check `left * right`."""
        for one, times in ((left, right), (right, left)):
            if isinstance(one, str | list | tuple | bytes) and isinstance(times, int):
                self.charge(_OBJECT_BYTES + _ITEM_BYTES * len(one) * max(0, times))
        if isinstance(left, int) and isinstance(right, int):
            self.number(left.bit_length() + right.bit_length())

    def power(self, left: Any, right: Any) -> None:
        """Check `left ** right`."""
        if isinstance(left, int) and isinstance(right, int):
            self.number(max(1, left.bit_length()) * abs(right) if abs(left) > 1 else 1)

    def add(self, left: Any, right: Any) -> None:
        """Check `left + right`."""
        if isinstance(left, str) and isinstance(right, str):
            self.charge(sys.getsizeof(left) + sys.getsizeof(right))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self.charge(_OBJECT_BYTES + _ITEM_BYTES * (len(left) + len(right)))

    def formatting(self, text: Any, values: Iterable[Any]) -> None:
        """Check `text % values` and `text.format(*values)`."""
        if isinstance(text, str):
            if _FORMAT_WIDTH.search(text):
                raise TemplateError(
                    "the chat template asks for a very wide number format, which real ones never do."
                )
            places = 1 + text.count("%") + text.count("{")
            self.charge(sys.getsizeof(text) + 4 * places * self.weigh(list(values)))

    def number(self, bits: int) -> None:
        """Refuse integers of thousands of digits."""
        if bits > _LARGEST_NUMBER_BITS:
            raise TemplateError("the chat template computes a number of thousands of digits and was stopped.")


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Make `budget` that of everything this thread renders, and watch the clock line by line."""

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        budget.tick()
        return watch if frame.f_code.co_filename == "<template>" else None

    outer, tracing = getattr(_active, "budget", None), sys.gettrace()
    _active.budget = budget
    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(tracing)
        _active.budget = outer


def current() -> Budget:
    """Budget of this thread's rendering."""
    budget: Budget = _active.budget
    return budget

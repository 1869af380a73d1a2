"""Take the fields of a request one by one, each checked; what nobody took is refused by name."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lmopt.serving.refusals import RefusedError


class Body:
    """The JSON object that a client sent.

    `null` means what leaving a field out means, as in OpenAI's API.

    Args:
        fields: The parsed object.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def parse(cls, data: bytes) -> "Body":
        """Read a request's body.

        Raises:
            RefusedError: It is no JSON object.
        """
        try:
            fields = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise RefusedError(f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(fields, dict):
            raise RefusedError(f"the body must be a JSON object, not {_kind(fields)}", code="invalid_json")
        return cls(fields)

    def any(self, name: str) -> Any:
        """Take a field as it is; `None` where it is not given."""
        return self._fields.pop(name, None)

    def text(self, name: str) -> str | None:
        """Take a text."""
        value = self.any(name)
        if value is not None and not isinstance(value, str):
            refuse(name, f"must be a string, not {_kind(value)}")
        return value

    def flag(self, name: str) -> bool:
        """Take a truth value; `False` where it is not given."""
        value = self.any(name)
        if value is not None and not isinstance(value, bool):
            refuse(name, f"must be true or false, not {_kind(value)}")
        return bool(value)

    def integer(self, name: str, low: int, high: float = math.inf) -> int | None:
        """Take a whole number of a range, both ends included."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            refuse(name, f"must be an integer, not {_kind(value)}")
        if not low <= value <= high:
            refuse(name, f"={value} is out of range; expected {_range(low, high)}")
        return value

    def number(self, name: str, low: float, high: float = math.inf) -> float | None:
        """Take a number of a range, both ends included."""
        value = self.any(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse(name, f"must be a number, not {_kind(value)}")
        if not low <= value <= high:
            refuse(name, f"={value} is out of range; expected {_range(low, high)}")
        return float(value)

    def texts(self, name: str, most: int) -> list[str]:
        """Take a text or a list of texts, none of them empty; `[]` where it is not given."""
        value = self.any(name)
        if value is None:
            return []
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
            refuse(name, "must be a string or a list of strings, none of them empty")
        if len(found) > most:
            refuse(name, f"holds {len(found)} strings; at most {most} are possible")
        return found

    def only(self, name: str, values: Sequence[Any], why: str) -> None:
        """Take a field that may say nothing but what this server does anyway.

        Args:
            name: The field.
            values: What it may be.
            why: Why it may not be anything else.
        """
        value = self.any(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            expected = " or ".join(json.dumps(one) for one in values) or "nothing"
            raise RefusedError(
                f"{name} is not supported: {why}. Leave it out (possible: {expected}).",
                code="unsupported_parameter",
                param=name,
            )

    def ignore(self, *names: str) -> None:
        """Take fields that label a request and change nothing of its answer."""
        for name in names:
            self.any(name)

    def finish(self) -> None:
        """Refuse what is left.

        Raises:
            RefusedError: A field is not known; the first is named.
        """
        for name in self._fields:
            raise RefusedError(
                f"{name[:100]!r} is not a field that this server knows. Leave it out.",
                code="unknown_parameter",
                param=name[:100],
            )


def refuse(name: str, why: str) -> NoReturn:
    """Refuse the value of a field."""
    raise RefusedError(f"{name}{'' if why.startswith('=') else ' '}{why}.", code="invalid_value", param=name)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _range(low: float, high: float) -> str:
    return f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"

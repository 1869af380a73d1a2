"""Jinja's sandbox as transformers sets it up, with every costly operation checked first."""

import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lmopt.errors import TemplateError
from lmopt.tokenizer.budget import Budget, current

_WIDEST: Final = 10_000
_TEXT_FACTOR: Final = 8
"""Characters at most that Python, JSON or HTML write for one character or one plain value."""
_CHARACTER_BYTES: Final = 80
_LONGEST_JSON_PART: Final = 16

_WIDENING_METHODS: Final = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_SPLITTING_METHODS: Final = frozenset({"split", "rsplit", "splitlines"})
# Filters that neither write nor compare what they are given, and are used inside loops.
_CHEAP_FILTERS: Final = frozenset(
    (
        "length",
        "count",
        "first",
        "last",
        "default",
        "d",
        "items",
        "lower",
        "upper",
        "trim",
        "capitalize",
        "abs",
        "int",
        "float",
        "round",
        "map",
        "select",
        "reject",
        "selectattr",
        "rejectattr",
        "attr",
        "reverse",
        "random",
    )
)
_WEIGHED_FILTERS: Final = frozenset(
    (
        "list",
        "string",
        "safe",
        "unique",
        "sort",
        "dictsort",
        "groupby",
        "batch",
        "slice",
        "min",
        "max",
        "sum",
    )
)
_WIDE_FILTERS: Final = frozenset(
    (
        "center",
        "indent",
        "batch",
        "slice",
        "wordwrap",
        "round",
    )
)
_COMPARING_TESTS: Final = frozenset(
    (
        "eq",
        "==",
        "equalto",
        "ne",
        "!=",
        "gt",
        ">",
        "greaterthan",
        "ge",
        ">=",
        "lt",
        "<",
        "lessthan",
        "le",
        "<=",
        "in",
    )
)


class _Code(CodeGenerator):
    """Compile `~`, comparisons, collections and subscripts into calls that check first."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        escapes = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        if frame.eval_ctx.volatile:
            escapes = "(markup_join if context.eval_ctx.autoescape else str_join)"
        self.write(f"{escapes}(environment.joinable((")
        for one in node.nodes:
            self.visit(one, frame)
            self.write(", ")
        self.write(")))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        # As Python does, `a < b < c` reads b once; a comparison that fails ends the chain.
        self.write("(environment.comparable(")
        self.visit(node.expr, frame)
        self.write(")")
        for operand in node.ops:
            self.write(f" {_OPERATORS[operand.op]} environment.comparable(")
            self.visit(operand.expr, frame)
            self.write(")")
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802
        self.write("environment.made(")
        super().visit_List(node, frame)
        self.write(")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802
        self.write("environment.made({")
        for pair in node.items:
            self.write("environment.comparable(")
            self.visit(pair.key, frame)
            self.write("): ")
            self.visit(pair.value, frame)
            self.write(", ")
        self.write("})")

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802
        checked = node.ctx == "load"
        self.write("environment.made(" if checked else "")
        super().visit_Tuple(node, frame)
        self.write(")" if checked else "")


_OPERATORS: Final = {
    "eq": "==",
    "ne": "!=",
    "gt": ">",
    "gteq": ">=",
    "lt": "<",
    "lteq": "<=",
    "in": "in",
    "notin": "not in",
}


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks the model's own words; the text is unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_words"), [], [], body).set_lineno(line)

    def _words(self, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox of transformers with each costly operation checked against the budget."""

    code_generator_class = _Code
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.finalize = _writable
        self.filters["tojson"] = _to_json
        self.filters = {name: _checked_filter(name, one) for name, one in self.filters.items()}
        self.tests = {
            name: _checked_test(one) if name in _COMPARING_TESTS else one for name, one in self.tests.items()
        }
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        # Random Latin words: no template needs them, and their number is an argument.
        self.globals.pop("lipsum", None)

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Join what a block or macro wrote."""
        texts = list(pieces)
        current().charge(sum(map(sys.getsizeof, texts)))
        return "".join(texts)

    def joinable(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Account for `a ~ b`."""
        current().charge(_TEXT_FACTOR * current().weigh(values))
        return values

    def comparable(self, value: Any) -> Any:
        """Check that comparing or hashing a value is quick."""
        if not isinstance(value, str | int | float | None):
            current().weigh(value)
        return value

    def made(self, value: Any) -> Any:
        """Account for a collection."""
        current().charge_result(value)
        return value

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Read `obj[argument]`."""
        value = super().getitem(obj, self.comparable(argument))
        if isinstance(argument, slice):
            current().charge_result(value)
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `*`, `**`, `+` and `%`."""
        budget = current()
        budget.tick()
        if operator == "*":
            budget.multiply(left, right)
        elif operator == "**":
            budget.power(left, right)
        elif operator == "+":
            budget.add(left, right)
        else:
            budget.formatting(left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: PYI063, N805
        """Call a method, global or macro."""
        budget = current()
        budget.tick()
        # The sandbox wraps str.format and keeps the method as __wrapped__.
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            _check_text_method(budget, owner, name, args, kwargs)
        elif isinstance(owner, list | tuple | dict):
            budget.weigh((owner if name in {"index", "count"} else (), args))
        result = super().call(__context, __obj, *args, **kwargs)
        budget.charge_result(result)
        return result


def _check_text_method(
    budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Charge a method of a string whose result can be much larger than the string."""
    values = [*args, *kwargs.values()]
    if name in _WIDENING_METHODS:
        _check_width(values)
        budget.charge(sys.getsizeof(text) * (1 + (_WIDEST if name == "expandtabs" and values else 1)))
    elif name == "replace" and len(args) > 1 and all(isinstance(one, str) for one in args[:2]):
        budget.charge(sys.getsizeof(text) + text.count(args[0]) * sys.getsizeof(args[1]))
    elif name == "join" and args:
        budget.charge(_TEXT_FACTOR * budget.weigh(args[0]) + sys.getsizeof(text) * _length(args[0]))
    elif name in {"format", "format_map"}:
        budget.formatting(text, values)
    elif name in _SPLITTING_METHODS:
        separator = args[0] if args and isinstance(args[0], str) else None
        parts = text.count(separator) if separator else len(text.split(None, 100_000))
        budget.charge(64 * (parts + 1) + (32 * len(text) if parts > 50_000 and not separator else 0))
    elif name == "translate":
        budget.charge(sys.getsizeof(text) * (1 + budget.weigh(values)))


def _check_width(values: Iterable[Any]) -> None:
    if any(isinstance(one, int) and abs(one) > _WIDEST for one in values):
        raise TemplateError(f"the chat template asks for a width above {_WIDEST}, which real ones never do.")


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _checked_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that its inputs are weighed and its result charged."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.tick()
        first = isinstance(args[0], jinja2.Environment | Context | nodes.EvalContext)
        subject, beside = args[first], [*args[first + 1 :], *kwargs.values()]
        if name in _WIDE_FILTERS:
            _check_width(beside)
        if name == "format":
            budget.formatting(subject, beside)
        if name not in _CHEAP_FILTERS:
            if isinstance(subject, Iterator):
                # What a lazy filter passes on by reference can only be weighed once it is there.
                subject = list(subject)
                budget.charge_result(subject)
                args = (*args[:first], subject, *args[first + 1 :])
            indent = kwargs.get("indent", 0)
            weight = budget.weigh([subject, *beside], per_level=indent if isinstance(indent, int) else 0)
            if name not in _WEIGHED_FILTERS:
                longest = max((len(one) for one in beside if isinstance(one, str)), default=0)
                budget.charge(_TEXT_FACTOR * weight + longest * _length(subject))
            elif name == "list" and isinstance(subject, str):
                budget.charge(_CHARACTER_BYTES * len(subject))
        result = function(*args, **kwargs)
        budget.charge_result(result)
        return result

    return checked


def _checked_test(function: Any) -> Any:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        current().weigh([one for one in args if not isinstance(one, str)])
        return function(*args, **kwargs)

    return checked


def _writable(value: Any) -> Any:
    """Check what `{{ value }}` is about to turn into text."""
    if not isinstance(value, str):
        current().charge(_TEXT_FACTOR * current().weigh(value))
    return value


# What transformers adds to Jinja ----------------------------------------------------------------


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without escaping HTML, which Jinja's own filter does."""
    parts = [*(separators or ()), " " * min(indent, 1000) if isinstance(indent, int) else indent or ""]
    if any(len(part) > _LONGEST_JSON_PART for part in parts):
        raise TemplateError("the chat template asks for JSON with a very wide indent or separator.")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise TemplateError(f"the chat template refuses this conversation: {message}")


class _Dict:
    """`dict(...)` without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that takes no names beginning with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not use the name {name!r}")

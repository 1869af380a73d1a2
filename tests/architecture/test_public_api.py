"""Everything public says what it does, and what each of its arguments is."""

import importlib
import inspect
import re
from collections.abc import Iterator

import pytest

import lmopt

PUBLIC = [name for name in lmopt.__all__ if name != "__version__"]


def _methods(cls: object) -> Iterator[tuple[str, object]]:
    """Public functions that a class of ours defines, unwrapped from decorators."""
    for owner in getattr(cls, "__mro__", ()):
        if not owner.__module__.startswith("lmopt"):
            continue
        for name, value in vars(owner).items():
            if not name.startswith("_"):
                yield (
                    f"{owner.__qualname__}.{name}",
                    getattr(value, "__func__", getattr(value, "fget", value)),
                )


def test_the_list_of_public_names_is_true() -> None:
    for name in lmopt.__all__:
        assert getattr(lmopt, name) is not None
    assert sorted(lmopt.__all__) == sorted(set(lmopt.__all__))
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        _ = lmopt.Modle


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name: str) -> None:
    cls = getattr(lmopt, name)
    assert inspect.isclass(cls) or inspect.isfunction(cls)
    # A dataclass without a docstring is given its signature as one.
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")
    for label, method in _methods(cls):
        if callable(method) and not inspect.isclass(method):
            assert inspect.getdoc(method), f"{label} has no docstring"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_of_a_public_method_is_explained(name: str) -> None:
    cls = getattr(lmopt, name)
    for label, method in [*_methods(cls), (cls.__qualname__, cls)]:
        if not callable(method):
            continue
        words = inspect.getdoc(method) or ""
        if (
            method is cls
            and inspect.isclass(cls)
            and (issubclass(cls, BaseException) or "Make one with" in words)
        ):
            continue  # nobody calls it by hand
        arguments = [name for name in inspect.signature(method).parameters if name not in {"self", "cls"}]
        if len(arguments) == 1:
            continue  # the first line says it
        for argument in arguments:
            assert re.search(rf"\b{argument}\b", words), f"{label} does not say what {argument!r} is"


def test_every_error_can_be_caught_without_knowing_lmopt() -> None:
    errors = importlib.import_module("lmopt.errors")
    tree = [value for value in vars(errors).values() if inspect.isclass(value)]
    assert len(tree) > 10
    for cls in tree:
        assert issubclass(cls, errors.LmoptError)
        builtin = [base for base in cls.__mro__ if base.__module__ == "builtins"]
        if cls not in (errors.LmoptError, errors.PluginError):
            assert builtin[0] is not Exception, f"{cls.__name__} is only an Exception"
        assert cls.__doc__

"""Recipes as files: a list of steps in JSON, by which a compressed model can be made again."""

import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from lmopt.compression.step import Step
from lmopt.errors import InputError, UnsupportedOptionError
from lmopt.registry import steps as known_steps

_VERSION: Final = 1


def save_recipe(steps: Iterable[Step], path: str | os.PathLike[str]) -> None:
    """Write steps to a JSON file.

    Args:
        steps: The steps, in order.
        path: File; one that is there is replaced.
    """
    content = {"lmopt_recipe": _VERSION, "steps": [step.to_dict() for step in steps]}
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_recipe(path: str | os.PathLike[str]) -> list[Step]:
    """Read steps from a JSON file that `save_recipe` wrote, or from an artefact's `lmopt.json`.

    Raises:
        InputError: It is no such file.
        UnknownPluginError: A step's name is not known.
        UnsupportedOptionError: A step's fields are wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)} is no recipe: {error}") from None
    if isinstance(content, Mapping) and "recipe" in content:
        content = {"lmopt_recipe": _VERSION, **content["recipe"]}
    if not isinstance(content, Mapping) or content.get("lmopt_recipe") != _VERSION:
        raise InputError(
            f'{os.fspath(path)} is no recipe of this version; expected {{"lmopt_recipe": {_VERSION}, "steps": '
            '[{"step": "gptq", "bits": 4}]}'
        )
    steps = content.get("steps")
    if not isinstance(steps, list) or not steps:
        raise InputError(f"{os.fspath(path)} holds no list of steps")
    return [step_from_dict(one) for one in steps]


def step_from_dict(content: Any) -> Step:
    """Make a step of plain data.

    Args:
        content: `{"step": name, field: value, ...}`; fields that are left out have their defaults.

    Raises:
        InputError: It is no such mapping.
        UnknownPluginError: The name is not known; a near one is suggested.
        UnsupportedOptionError: A field is unknown or its value impossible.
    """
    if not isinstance(content, Mapping) or not isinstance(content.get("step"), str):
        raise InputError(f'a step is written as {{"step": name, field: value}}; given: {content!r}')
    given = {key: _step_or_value(value) for key, value in content.items() if key != "step"}
    kind = known_steps.load(content["step"])
    possible = inspect.signature(kind).parameters
    if unknown := sorted(given.keys() - possible.keys()):
        raise UnsupportedOptionError(
            f"step {content['step']!r} has no field {unknown[0]!r}; it has {', '.join(possible)}"
        )
    made: Step = kind(**given)
    return made


def _step_or_value(value: Any) -> Any:
    if isinstance(value, Mapping) and isinstance(value.get("step"), str):
        return step_from_dict(value)
    return tuple(value) if isinstance(value, list) else value

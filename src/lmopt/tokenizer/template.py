"""Render a chat template as transformers does, but within a budget of time and memory."""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2
import numpy as np

from lmopt.errors import TemplateError, UnsupportedOptionError
from lmopt.tokenizer.budget import Budget, spending
from lmopt.tokenizer.sandbox import Sandbox

LONGEST_TEMPLATE: Final = 256 * 1024
"""Characters of a template's source at most; the longest known ones have about 30 000."""

_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
# Arguments of transformers' apply_chat_template that would otherwise be taken for template variables.
_NOT_OFFERED: Final = frozenset(
    (
        "continue_final_message",
        "return_assistant_tokens_mask",
        "sanitize_control_tokens",
        "tokenize",
        "return_dict",
        "return_tensors",
        "padding",
        "truncation",
        "max_length",
        "tokenizer_kwargs",
    )
)


def render(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """Render a chat template.

    Args:
        source: Jinja source, not trusted.
        messages: The conversation, at least one message.
        variables: What the template sees besides `messages`.

    Raises:
        TemplateError: The template is malformed, unsafe or refuses the messages, or exceeds its
            budget; or there is no message.
        UnsupportedOptionError: A variable is an option of transformers that lmopt does not have.
    """
    if strange := sorted(_NOT_OFFERED & variables.keys()):
        raise UnsupportedOptionError(
            f"apply_chat_template has no option {strange[0]!r}; it returns the text."
        )
    if isinstance(messages, str | Mapping) or not messages:
        raise TemplateError(
            'give a list of at least one message, such as [{"role": "user", "content": "Hello"}].'
        )
    if not isinstance(source, str) or len(source) > LONGEST_TEMPLATE:
        raise TemplateError(f"a chat template must be text of at most {LONGEST_TEMPLATE} characters.")
    try:
        plain = [_message(one) for one in messages]
        others = {name: _plain(value) for name, value in variables.items()}
        budget = Budget(Budget(sys.maxsize).weigh([plain, others]))
        with spending(budget):
            pieces = []
            for piece in _compiled(source).generate(messages=plain, **others):
                budget.charge(sys.getsizeof(piece))
                pieces.append(piece)
            return "".join(pieces)
    except TemplateError:
        raise
    except (RecursionError, MemoryError) as error:
        raise TemplateError(f"the chat template exhausted Python ({type(error).__name__}).") from error
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(
            f"the chat template is malformed: line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:
        raise TemplateError(f"the chat template failed: {type(error).__name__}: {error}") from error


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a message as transformers hands it to templates."""
    if not isinstance(message, Mapping):
        raise TemplateError(f"a message must be a dictionary, not a {type(message).__name__}.")
    plain: dict[str, Any] = _plain({key: value for key, value in message.items() if value is not None})
    reasoning = next((plain[key] for key in _REASONING if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """Rebuild a value from JSON types: methods of richer objects are unknown to the sandbox."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, np.generic):
        return _plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    return Sandbox().from_string(source)

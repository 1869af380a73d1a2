"""From the messages of a chat to the ids that the model reads."""

from typing import TYPE_CHECKING, Any, Final

from lmopt.errors import LmoptError
from lmopt.serving.body import refuse
from lmopt.serving.refusals import RefusedError, refusal

if TYPE_CHECKING:
    from lmopt.tokenizer import Tokenizer

# "developer" is what OpenAI's newer models call "system"; templates know the older word.
_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_KNOWN: Final = {"role", "content", "name", "tool_call_id", "refusal"}
_RESERVED: Final = {
    "messages", "chat_template", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token",
}  # fmt: skip


def read_messages(messages: Any, variables: Any, tokenizer: "Tokenizer") -> list[int]:
    """Write a conversation by the model's own chat template.

    Args:
        messages: `messages` of the request.
        variables: `chat_template_kwargs`: what the template may be told besides, such as `enable_thinking`.
        tokenizer: Has the template.

    Returns:
        Ids, up to where the answer begins.

    Raises:
        RefusedError: They are malformed, or the template refuses them; the place is named.
    """
    if not isinstance(messages, list) or not messages:
        refuse("messages", "must be a list of at least one message")
    given = variables if variables is not None else {}
    if not isinstance(given, dict):
        refuse("chat_template_kwargs", "must be an object")
    if reserved := _RESERVED & set(given):
        refuse("chat_template_kwargs", f"may not hold {min(reserved)!r}: the server sets it")
    read = [_message(one, f"messages[{number}]") for number, one in enumerate(messages)]
    try:
        # The template writes special tokens itself.
        return tokenizer.encode(tokenizer.apply_chat_template(read, **given), add_special_tokens=False)
    except (LmoptError, TypeError) as error:
        raise (
            refusal(error, "messages")
            if isinstance(error, LmoptError)
            else RefusedError(
                f"the chat template cannot be told this: {error}",
                param="chat_template_kwargs",
                code="invalid_value",
            )
        ) from error


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        refuse(where, "must be an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        refuse(f"{where}.role", f"must be one of {', '.join(_ROLES)}")
    for name, value in message.items():
        if name not in _KNOWN and value is not None:
            refuse(f"{where}.{name[:100]}", "is not supported: messages are text")
    found = {"role": _ROLES[role], "content": _text(message.get("content"), f"{where}.content")}
    for name in ("name", "tool_call_id"):
        if (value := message.get(name)) is not None:
            if not isinstance(value, str):
                refuse(f"{where}.{name}", "must be a string")
            found[name] = value
    return found


def _text(content: Any, where: str) -> str:
    """Read a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        refuse(where, "must be a string, or a list of parts of the type text")
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            refuse(f"{where}[{number}].type", "must be text: the model reads nothing else")
        if not isinstance(part.get("text"), str) or len(part) > 2:
            refuse(f"{where}[{number}].text", "must be a string, with nothing beside it")
        texts.append(part["text"])
    return "".join(texts)

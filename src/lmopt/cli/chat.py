"""`lmopt chat`: talk to a model."""

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from lmopt.cli.opening import open_runtime, room
from lmopt.cli.options import Backend, Device, Dtype, Source, Threads, Trust, assignments
from lmopt.cli.output import Output
from lmopt.cli.run import show
from lmopt.errors import LmoptError, UnsupportedOptionError

if TYPE_CHECKING:
    from lmopt.generation import Generation
    from lmopt.runtime import Runtime

NEW_TOKENS: Final = 256
_KEPT_TOKENS: Final = 32_768
_HELP: Final = (
    "/reset forgets the conversation, /system TEXT sets the system prompt, /exit ends (so does Ctrl-D)"
)


def chat(
    out: Output,
    source: Source,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    backend: Backend = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of an answer.")] = NEW_TOKENS,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any field of GenerationConfig; repeatable."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Talk to a model that has a chat template.

    Reads a line, answers, and goes on; /help lists the commands. Works on a pipe as well, one message
    a line. With --json each answer is one line of JSON.
    """
    options = assignments(set_)
    how = {"backend": backend, "device": device, "dtype": dtype, "threads": threads, "trust": trust}
    with _open(out, source, how) as runtime:
        talk = _Talk(out, runtime, system, options, max_new_tokens)
        talk.ids("")  # a model that has no chat template is refused before anything is typed
        asks = sys.stdin.isatty()
        if asks:
            out.note(_HELP)
        while True:
            line = _read_line(out, asks)
            if line is None or not talk.take(line.strip(), go_on=asks):
                return


def _open(out: Output, source: str, how: dict[str, Any]) -> "Runtime":
    """Open a runtime that reads only what is new of a growing conversation, if its engine can."""
    try:
        return open_runtime(out, source, prefix_cache_tokens=_KEPT_TOKENS, **how)
    except UnsupportedOptionError:
        return open_runtime(out, source, **how)


class _Talk:
    """A conversation: what was said, and how to answer."""

    def __init__(
        self, out: Output, runtime: "Runtime", system: str | None, options: dict[str, Any], most: int
    ) -> None:
        self.out = out
        self.runtime = runtime
        self.options = options
        self.most = most
        self.system = system
        self.said: list[dict[str, str]] = []

    def take(self, line: str, *, go_on: bool) -> bool:
        """Take a line; say whether the conversation goes on.

        Args:
            line: A message or a command.
            go_on: Whether an error is shown and the message forgotten, instead of raised.
        """
        word, _, rest = line.partition(" ")
        if word in {"/exit", "/quit"}:
            return False
        if word == "/reset":
            self.said.clear()
            self.out.note("the conversation starts anew")
        elif word == "/system":
            self.system = rest.strip() or None
            self.said.clear()
            self.out.note("the conversation starts anew with this system prompt")
        elif word.startswith("/"):
            self.out.note(_HELP)
        elif line:
            try:
                self.answer(line)
            except LmoptError as error:
                if not go_on:
                    raise
                self.out.warn(f"{type(error).__name__}: {error}\n/reset makes room for a new conversation")
        return True

    def ids(self, line: str) -> list[int]:
        """Ids of the conversation with one more message."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return self.runtime.chat_ids([*first, *self.said, {"role": "user", "content": line}])

    def answer(self, line: str) -> None:
        ids = self.ids(line)
        options = {"max_new_tokens": room(self.runtime, len(ids), self.most), **self.options}
        if self.out.as_json:
            answer: Generation = self.runtime.generate(ids, **options)
        else:
            answer = show(self.out, self.runtime.stream(ids, **options))
        self.said += [{"role": "user", "content": line}, {"role": "assistant", "content": answer.text or ""}]
        self.out.result({"role": "assistant", "content": answer.text, "generation": answer})


def _read_line(out: Output, asks: bool) -> str | None:
    """Read a line of the user, `None` at the end of the input."""
    if not asks:
        line = sys.stdin.readline()
        return line or None
    with contextlib.suppress(ImportError):
        # Imported for its effect: `input` gets line editing and a history by it.
        import readline  # noqa: F401
    try:
        return input("> ")
    except EOFError:
        return None

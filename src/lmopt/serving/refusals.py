"""What a client is told when its request is not answered, in the shape of OpenAI's API."""

from typing import Any, Final

from lmopt.errors import (
    ClosedError,
    ContextLengthError,
    InputError,
    InsufficientMemoryError,
    LmoptError,
    TemplateError,
    TokenizerError,
    UnsupportedOptionError,
)

INVALID: Final = "invalid_request_error"


class RefusedError(LmoptError):
    """A request is answered with an error.

    Args:
        message: What was given, what was expected, what to do.
        status: HTTP status.
        kind: OpenAI's `type`.
        code: OpenAI's `code`.
        param: Field of the request that is at fault.
        retry_after_s: Seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that OpenAI's clients understand."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that go with it."""
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def unavailable(message: str, *, code: str, retry_after_s: int | None = None) -> RefusedError:
    """Say that the server cannot take a request now."""
    return RefusedError(message, status=503, kind="server_error", code=code, retry_after_s=retry_after_s)


def refusal(error: BaseException, param: str | None = None) -> RefusedError:
    """Turn any error into what the client is told.

    Args:
        error: Of a request, of a row, or of the engine.
        param: The field that was being looked at.
    """
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, ContextLengthError):
        return RefusedError(str(error), code="context_length_exceeded", param=param)
    if isinstance(error, InputError | TokenizerError | TemplateError | UnsupportedOptionError):
        return RefusedError(str(error), code="invalid_value", param=param)
    if isinstance(error, InsufficientMemoryError):
        return unavailable(str(error), code="insufficient_memory", retry_after_s=1)
    if isinstance(error, ClosedError):
        return unavailable(str(error), code="closed")
    if isinstance(error, LmoptError):
        return RefusedError(str(error), status=500, kind="server_error", code=type(error).__name__)
    # Not its words: they were written for nobody outside.
    return RefusedError(
        f"the server failed ({type(error).__name__}); its log says more",
        status=500,
        kind="server_error",
        code="internal_error",
    )

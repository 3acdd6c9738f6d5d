"""What a client is told when something is refused or fails: OpenAI's error object, with no traceback and no path."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ServeError(Exception):
    """A refusal or a failure that the client is told.

    Args:
        status: of HTTP.
        message: what was found, what is needed.
        code: one word for programs.
        param: the field of the request that is meant.
        retry_after_s: when it is worth another try; None: no use of trying the same again.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients read it."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """When to come again; OpenAI's clients read `x-should-retry`, and would else repeat 409 and every 5xx."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(self.retry_after_s), "x-should-retry": "true"}
        bearer = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return bearer | {"x-should-retry": "false"}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, headers=self.headers())


def invalid(param: str | None, message: str, *, code: str = "invalid_value") -> ServeError:
    """A field of the request that cannot be used: 422."""
    return ServeError(422, f"{param}: {message}" if param else message, code=code, param=param)


def unavailable(message: str, *, code: str, retry_after_s: int = 1) -> ServeError:
    """Nothing wrong with the request, but no picture now: 503."""
    return ServeError(503, message, code=code, retry_after_s=retry_after_s)

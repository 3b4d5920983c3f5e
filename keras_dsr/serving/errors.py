"""What went wrong with a request: gRPC's status codes, and how HTTP says the same."""

from __future__ import annotations

import enum
from urllib.parse import quote

_LONGEST = 6000  # bytes of a message as gRPC sends it, percent-encoded in a header; clients take 8 KiB of headers
_LONGEST_NAME = 60  # characters


class Code(enum.IntEnum):
    """gRPC's canonical status codes, by number; `http` is the HTTP status that TensorFlow Serving answers for each."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @property
    def http(self) -> int:
        """The HTTP status of an answer with this code."""
        return _HTTP.get(self, 500)

    @classmethod
    def from_http(cls, status: int) -> Code:
        """The code behind an HTTP status; of several the most usual one."""
        return _FROM_HTTP.get(status, cls.UNKNOWN)


_HTTP = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.UNAUTHENTICATED: 401,
}
_FROM_HTTP = {
    200: Code.OK,
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    409: Code.ABORTED,
    413: Code.RESOURCE_EXHAUSTED,
    429: Code.RESOURCE_EXHAUSTED,
    499: Code.CANCELLED,
    500: Code.INTERNAL,
    501: Code.UNIMPLEMENTED,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}


class ServingError(Exception):
    """A request that was not answered, on the server's side or the client's.

    Args:
        code: Its status code.
        message: What was expected, what came, what to do. Cut where it is too long to send.
    """

    def __init__(self, code: Code, message: str):
        message = _sendable(message)
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"


def _sendable(message: str) -> str:
    """The message, or as much of its beginning as can be sent."""
    cut = message[:_LONGEST]
    while len(quote(cut, errors="replace")) > _LONGEST:
        cut = cut[: len(cut) * 9 // 10]
    return message if len(cut) == len(message) else f"{cut}..."


def short(sent: object) -> str:
    """What a client sent, such as a name, cut so that there is room in a message for what should have been sent."""
    text = str(sent)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."


def needs_extra(error: ImportError) -> ImportError:
    """What to raise where a package of the extra `serve` is not installed."""
    return ImportError(
        f"Serving needs packages that are not installed ({error}). Install them with: pip install 'keras-dsr[serve]'."
    )

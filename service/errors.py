"""The failures that the service means, each with its status and its sentence.

    Problem
    ├── BadRequest            400  the body is not JSON, or not the form that it says it is
    ├── UnknownModel          404
    ├── UnknownBatch          404
    ├── NotAcceptable         406  a picture was asked for, but the answer is several
    ├── Conflict              409  not what can be done with a batch in its state
    ├── TooLarge              413  more bytes or more work than one request may bring
    ├── UnknownFormat         415  not a body, an image or an array that can be read
    ├── BadInput              422  a field with a value that it cannot have
    ├── Overloaded            429  the queue is full; Retry-After says when it will not be
    ├── Failed                500  a fault of ours
    ├── NotReady              503  starting, or shutting down
    ├── Expired               504  the time that the request had has passed
    └── Full                  507  no more room for batches

All of them, and the framework's own, leave as RFC 9457 problem documents: `type` is stable,
`errors` lists the fields with what was expected and what came.
"""

from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

__all__ = [
    "MEDIA_TYPE",
    "BadInput",
    "BadRequest",
    "Conflict",
    "Expired",
    "Failed",
    "FieldError",
    "Full",
    "NotAcceptable",
    "NotReady",
    "Overloaded",
    "Problem",
    "TooLarge",
    "UnknownBatch",
    "UnknownFormat",
    "UnknownModel",
    "problem_document",
]

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True)
class FieldError:
    """A field of the request, what it should have held, and what it held."""

    field: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}; got {self.got}."


class Problem(Exception):
    """A failure with a status, a stable name and a sentence."""

    status = 500
    slug = "failed"

    def __init__(
        self, detail: str, *errors: FieldError, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.errors = errors
        self.headers = headers or {}

    @classmethod
    def of(cls, field: str, expected: str, got: str) -> "Problem":
        """The failure of one field."""
        error = FieldError(field, expected, got)
        return cls(str(error), error)

    def document(self) -> dict[str, Any]:
        """The problem document."""
        return problem_document(self.status, self.slug, self.detail, *self.errors)


class BadRequest(Problem):
    """The body is not JSON, or not the form that it says it is."""

    status, slug = 400, "bad-request"


class UnknownModel(Problem):
    """There is no model of this name."""

    status, slug = 404, "unknown-model"


class UnknownBatch(Problem):
    """There is no batch of this id."""

    status, slug = 404, "unknown-batch"


class NotAcceptable(Problem):
    """A picture was asked for, but the answer is several."""

    status, slug = 406, "not-acceptable"


class Conflict(Problem):
    """Not what can be done with a batch in its state."""

    status, slug = 409, "conflict"


class TooLarge(Problem):
    """More bytes or more work than one request may bring."""

    status, slug = 413, "too-large"


class UnknownFormat(Problem):
    """Not a body, an image or an array that can be read."""

    status, slug = 415, "unknown-format"


class BadInput(Problem):
    """A field with a value that it cannot have."""

    status, slug = 422, "bad-input"


class Overloaded(Problem):
    """The queue is full."""

    status, slug = 429, "overloaded"

    def __init__(self, *, waiting: int, limit: int, seconds: int) -> None:
        super().__init__(
            f"Expected at most {limit} waiting particles; got one more request to {waiting}. "
            f"Try again in {seconds} s.",
            headers={"Retry-After": str(seconds)},
        )


class Failed(Problem):
    """A fault of ours."""


class NotReady(Problem):
    """The service is starting or shutting down."""

    status, slug = 503, "not-ready"

    def __init__(self, detail: str) -> None:
        super().__init__(detail, headers={"Retry-After": "1"})


class Expired(Problem):
    """The time that the request had has passed."""

    status, slug = 504, "deadline"

    def __init__(self, *, begun: bool) -> None:
        when = "while it was worked on" if begun else "before it was begun"
        super().__init__(
            f"The time for this request passed {when}. Try fewer particles or images, or later."
        )


class Full(Problem):
    """No more room for batches."""

    status, slug = 507, "full"


def problem_document(status: int, slug: str, detail: str, *errors: FieldError) -> dict[str, Any]:
    """An RFC 9457 document."""
    return {
        "type": f"urn:miss-iwem:problem:{slug}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "errors": [vars(error) for error in errors],
    }

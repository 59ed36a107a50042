"""Errors as the OpenAI API writes them: what went wrong, in which field."""

from typing import Any

from openmythos.config import ConfigError, unknown_name

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}

CLIENT_GONE = 499  # the status that nginx counts for it; nobody reads the answer
_SCALARS = {"str", "int", "float", "bool"}


class ApiError(Exception):
    """An answer that is an error: HTTP status, message, and the field (`param`) that caused it.

    `retry_after` seconds go into the header of that name.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        found = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": found}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


def unsupported(param: str, message: str) -> ApiError:
    """An error for a field of the OpenAI API that this server does not have."""
    return ApiError(400, f"{param}: {message}", param=param, code="unsupported_parameter")


def of_config(error: ConfigError | ValueError) -> ApiError:
    """A one-line error of the package, "field = value: must be ...", as an answer."""
    text = str(error)
    head = text.partition(":")[0].partition(" = ")[0]
    param = head if head.replace("_", "").replace(".", "").isalnum() else None
    return ApiError(400, text, param=param, code="invalid_value")


def of_validation(errors: list[Any], known: dict[str, list[str]]) -> ApiError:
    """The first error of pydantic as an answer; `known`: field names, for a hint at typos.

    `known` has the names of the request under "" and of nested objects under their field.
    """
    first = errors[0]
    param = _field(first)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        parent, _, name = param.rpartition(".")
        names = known.get(parent, known[""])
        message = unknown_name(f"field {name[:100]!r}", name[:100], names)
        return ApiError(400, message, param=param[:200], code="unknown_parameter")
    # A field of several types has an error for each.
    messages = dict.fromkeys(str(error["msg"]) for error in errors if _field(error) == param)
    text = " or ".join(list(messages)[:3])
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {text}" if param else text, param=param or None, code=code)


def _field(error: Any) -> str:
    """The dotted path of the field of an error of pydantic."""
    path = [str(part) for part in error["loc"] if part != "body"]
    if error["type"] == "extra_forbidden":
        return ".".join(path)
    # The types of a union stand in the path behind its field.
    fields = (part for part in path if part.isidentifier() or part.isdigit())
    return ".".join(part for part in fields if part not in _SCALARS)

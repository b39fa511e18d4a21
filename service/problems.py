"""Every error as ``application/problem+json`` (RFC 9457), with the request's ID."""

import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from d2lora.errors import (
    D2LoraError,
    InternalError,
    Problem,
    ProblemItem,
    RequestInvalid,
    StoreUnavailable,
    Unauthorized,
)
from d2lora.methods import NAMES

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def install(app: FastAPI) -> None:
    """Let the app answer every error as a problem, and give every request an ID."""
    _describe(app)

    @app.middleware("http")
    async def identify(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if _SANE_REQUEST_ID.fullmatch(given) else secrets.token_hex(12)
        try:
            response = await call_next(request)
        except Exception:
            # The traceback may show what is nobody else's business; it stays in the log.
            log.exception("request_failed id=%s path=%s", request.state.request_id, request.url.path)
            response = answer(
                request, InternalError("an internal error; quote the request ID to your operator").problem()
            )
        response.headers["x-request-id"] = request.state.request_id
        return response

    @app.exception_handler(D2LoraError)
    async def domain(request: Request, error: D2LoraError) -> Response:
        return answer(request, error.problem())

    @app.exception_handler(RequestValidationError)
    async def validation(request: Request, error: RequestValidationError) -> Response:
        items = [_item(fault) for fault in error.errors()]
        detail = "; ".join(
            item.detail if _NAMED_FIELD.match(item.detail) else f"{item.pointer}: {item.detail}" for item in items
        )
        return answer(request, RequestInvalid(detail, errors=items).problem())

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's answer to a body that its JSON parser gives up on
            return answer(request, RequestInvalid("#: the body is not JSON in UTF-8").problem())
        code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(
            error.status_code, "http_error"
        )
        problem = Problem(
            title=str(error.detail), status=error.status_code, detail=f"{request.method} {request.url.path}", code=code
        )
        return answer(request, problem, dict(error.headers or {}))


def _describe(app: FastAPI) -> None:
    """Let the app's description have the schema of errors at their media type; FastAPI has it at the answer's."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        operations = [operation for path in document["paths"].values() for operation in path.values()]
        for response in (one for operation in operations for one in operation["responses"].values()):
            content = response.get("content", {})
            for media in content.keys() - {MEDIA_TYPE} if MEDIA_TYPE in content else ():
                content[MEDIA_TYPE] = content.pop(media) | content[MEDIA_TYPE]
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change it


def answer(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """Return a problem as a response."""
    identified = problem.model_copy(update={"request_id": getattr(request.state, "request_id", None)})
    headers = dict(headers or {})
    if problem.code == Unauthorized.code:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(
        identified.model_dump(mode="json"), status_code=problem.status, media_type=MEDIA_TYPE, headers=headers
    )


def _item(fault: dict[str, Any]) -> ProblemItem:
    match fault["type"]:
        case "json_invalid":  # its location is a character's number, which points nowhere
            position = fault["loc"][-1]
            return ProblemItem(detail=f"{fault['msg']} at character {position}: {fault['ctx']['error']}", pointer="#")
        case "value_error":  # ours; what concerns several fields begins with the first of them
            detail, place = str(fault["ctx"]["error"]), pointer(fault["loc"])
            named = _NAMED_FIELD.match(detail)
            return ProblemItem(detail=detail, pointer=field_pointer(named[1], place) if named else place)
        case _:
            return ProblemItem(detail=fault["msg"], pointer=pointer(fault["loc"]))


_NAMED_FIELD = re.compile(r"([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+)*)(?:, [a-z_, .]+)?: ")


def field_pointer(field: str, below: str = "#") -> str:
    """Return the JSON pointer to a field such as ``datasets[1].dataset_id``."""
    return f"{below}/" + field.replace("[", "/").replace("]", "").replace(".", "/")


def pointer(location: tuple[int | str, ...]) -> str:
    """Return where a fault is: a JSON pointer into the body, or the parameter's place and name."""
    place, *path = location
    # A discriminated union puts the chosen member's tag into the location; the body has no such step.
    steps = [str(step) for step in path if step not in _UNION_TAGS]
    return "/".join(["#" if place == "body" else str(place), *steps])


_OWN_TAGS = {"sft", "dpo", "orpo", "kto", "mgda", "upgrad", "imtl_g", "mean", "fixed", "str", "list[constrained-str]"}
_UNION_TAGS = _OWN_TAGS | set(NAMES)


def responses(*errors: type[D2LoraError], keyed: bool = True) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of an operation's errors, ``keyed`` if it needs an API key."""
    by_status: dict[int | str, list[type[D2LoraError]]] = {}
    everywhere: list[type[D2LoraError]] = [
        *([RequestInvalid, Unauthorized] if keyed else []),
        InternalError,
        StoreUnavailable,
    ]
    for error in dict.fromkeys([*errors, *everywhere]):
        by_status.setdefault(error.status, []).append(error)
    return {
        status: {
            "model": Problem,
            "description": "; ".join(f"`{error.code}`: {error.title}" for error in group),
            "content": {
                MEDIA_TYPE: {
                    "example": group[0]("what is wrong, and what to do about it").problem().model_dump(mode="json")
                }
            },
        }
        for status, group in by_status.items()
    }

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
        items = [ProblemItem(detail=fault["msg"], pointer=_place(fault)) for fault in error.errors()]
        detail = "; ".join(f"{item.pointer}: {item.detail}" for item in items)
        return answer(request, RequestInvalid(detail, errors=items).problem())

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(
            error.status_code, "http_error"
        )
        problem = Problem(
            title=str(error.detail), status=error.status_code, detail=f"{request.method} {request.url.path}", code=code
        )
        return answer(request, problem, dict(error.headers or {}))


def answer(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """Return a problem as a response."""
    identified = problem.model_copy(update={"request_id": getattr(request.state, "request_id", None)})
    headers = dict(headers or {})
    if problem.code == Unauthorized.code:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(
        identified.model_dump(mode="json"), status_code=problem.status, media_type=MEDIA_TYPE, headers=headers
    )


def _place(fault: dict[str, Any]) -> str:
    # For a body that is no JSON the location is a character's number, which points nowhere.
    return "#" if fault["type"] == "json_invalid" else pointer(fault["loc"])


def pointer(location: tuple[int | str, ...]) -> str:
    """Return where a fault is: a JSON pointer into the body, or the parameter's place and name."""
    place, *path = location
    # A discriminated union puts the chosen member's tag into the location; the body has no such step.
    steps = [str(step) for step in path if step not in _UNION_TAGS]
    return "#/" + "/".join(steps) if place == "body" else "/".join([str(place), *steps])


_OWN_TAGS = {"sft", "dpo", "orpo", "kto", "mgda", "upgrad", "imtl_g", "mean", "fixed", "str", "list[constrained-str]"}
_UNION_TAGS = _OWN_TAGS | set(NAMES)


def responses(*errors: type[D2LoraError]) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the errors that an operation may answer with."""
    by_status: dict[int | str, list[type[D2LoraError]]] = {}
    everywhere: list[type[D2LoraError]] = [RequestInvalid, Unauthorized, InternalError, StoreUnavailable]
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

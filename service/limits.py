"""Bodies over the limit are refused while they arrive; datasets have a larger limit of their own."""

from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from d2lora.errors import RequestTooLarge
from service.problems import answer


class BodyLimit:
    """Refuses request bodies over ``limit`` bytes, declared or not, outside ``/v1/datasets``."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] == "/v1/datasets":
            await self._app(scope, receive, send)
            return
        # These bodies are small: read whole, they can still be refused with a clean answer.
        messages: list[Message] = []
        size = 0
        while not messages or messages[-1].get("more_body", False):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > self._limit:
                error = RequestTooLarge(f"the body is over {self._limit} bytes")
                await answer(Request(scope), error.problem())(scope, receive, send)
                return

        async def replayed() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replayed, send)


def install(app: FastAPI, limit: int) -> None:
    """Let the app refuse bodies over ``limit`` bytes."""
    app.add_middleware(BodyLimit, limit=limit)

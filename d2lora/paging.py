"""Pages of a table by an opaque cursor on (created_at, id), which stay whole while rows are added."""

import base64
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import tuple_
from sqlalchemy.orm import Session

from d2lora.errors import RequestInvalid


def page(session: Session, query: Any, table: Any, limit: int, cursor: str | None) -> tuple[list[Any], str | None]:
    """Return the rows of one page, newest first, and the cursor of the next one.

    Raises:
        RequestInvalid: the cursor is not one of ours.
    """
    if cursor is not None:
        query = query.where(tuple_(table.created_at, table.id) < tuple_(*_decode_cursor(cursor)))
    rows = list(session.scalars(query.order_by(table.created_at.desc(), table.id.desc()).limit(limit + 1)))
    more = len(rows) > limit
    return rows[:limit], _encode_cursor(rows[limit - 1]) if more else None


def _encode_cursor(row: Any) -> str:
    return base64.urlsafe_b64encode(f"{row.created_at.isoformat()} {row.id}".encode()).decode()


def _decode_cursor(cursor: str) -> tuple[datetime, str]:
    try:
        written, identifier = base64.urlsafe_b64decode(cursor.encode()).decode().split(" ")
        moment = datetime.fromisoformat(written)
        if moment.tzinfo is None or "\0" in identifier:  # which databases cannot compare with
            raise RequestInvalid(_FOREIGN)
        return moment.astimezone(UTC), identifier
    except (ValueError, OverflowError) as error:  # the latter where UTC's year would be none
        raise RequestInvalid(_FOREIGN) from error


_FOREIGN = "cursor: it is not one that this service gave out"

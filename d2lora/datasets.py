"""Datasets: files of rows in JSONL, JSON, CSV or Parquet, read as a stream and checked row by row.

Rows are numbered from 1; in JSONL the number is that of the line. No message ever quotes what a row says.
"""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field

from d2lora.errors import DatasetEmpty, DatasetEncodingInvalid, DatasetInvalid, DatasetSyntaxInvalid
from d2lora.initializations import Frozen
from d2lora.rows import Row, RowSchema, columns_known, normalize, parse_row, schema_of

_JSON_ARRAY_BYTES = 64 * 2**20
"""A JSON array is parsed in one piece, unlike the other formats."""


class Format(StrEnum):
    """How rows are written in a file."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"

    @staticmethod
    def of(path: Path) -> "Format":
        """Return the format that a file's suffix names.

        Raises:
            DatasetSyntaxInvalid: the suffix names none.
        """
        suffix = path.suffix.lower().removeprefix(".")
        if suffix == "ndjson":
            return Format.JSONL
        if suffix not in set(Format):
            raise DatasetSyntaxInvalid(
                f"the suffix of {path.name!r} names no format; known are {', '.join(Format)}, or name the format"
            )
        return Format(suffix)


@dataclass(frozen=True)
class DatasetFile:
    """A file of rows on disk."""

    path: Path
    format: Format
    columns: Mapping[str, str] = field(default_factory=dict)
    """Our column name -> the file's."""


@dataclass(frozen=True)
class DatasetLimits:
    """What a dataset may hold."""

    max_rows: int = 1_000_000
    max_row_bytes: int = 2**20


class DatasetSummary(Frozen):
    """What reading a whole dataset tells."""

    row_schema: RowSchema
    rows: int
    size: int
    """Bytes of the file."""
    sha256: str
    objectives: list[str]
    """Types of the objectives that the rows allow."""


class Dataset(DatasetSummary):
    """The resource that ``/v1/datasets`` serves."""

    id: str
    object: Literal["dataset"] = "dataset"
    created_at: datetime
    format: Format
    columns: dict[str, str] = Field(default={})


def read_rows(file: DatasetFile, limits: DatasetLimits | None = None) -> Iterator[Row]:
    """Yield the rows of a file, in order, without holding them.

    Raises:
        DatasetInvalid: at the first row at fault, which is named with the field.
    """
    limits = limits or DatasetLimits()
    columns_known(file.columns)
    schema: RowSchema | None = None
    count = 0
    with file.path.open("rb") as stream:
        for number, record in _records(stream, file.format, limits):
            count += 1
            if count > limits.max_rows:
                raise DatasetInvalid(f"more than {limits.max_rows} rows", row=number)
            if not isinstance(record, dict):
                raise DatasetSyntaxInvalid("is not an object", row=number)
            normalized = normalize(record, file.columns, number)
            yield parse_row(normalized, schema, number)
            schema = schema or schema_of(normalized)
    if count == 0:
        raise DatasetEmpty("there is no row in the file")


def inspect(file: DatasetFile, limits: DatasetLimits | None = None) -> DatasetSummary:
    """Read a whole file and return what is in it.

    Raises:
        DatasetInvalid: as `read_rows`.
    """
    rows, kind = 0, RowSchema.TEXT
    for row in read_rows(file, limits):
        rows += 1
        if rows == 1:
            kind = _kind(row)
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return DatasetSummary(
        row_schema=kind, rows=rows, size=file.path.stat().st_size, sha256=digest, objectives=kind.objectives
    )


def _kind(row: Row) -> RowSchema:
    names = {"TextRow": RowSchema.TEXT, "MessagesRow": RowSchema.MESSAGES, "PreferenceRow": RowSchema.PREFERENCE}
    return names.get(type(row).__name__, RowSchema.PROMPT_COMPLETION)


def _records(stream: BinaryIO, format_: Format, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    match format_:
        case Format.JSONL:
            return _jsonl(stream, limits)
        case Format.JSON:
            return _json_array(stream, limits)
        case Format.CSV:
            return _csv(stream, limits)
        case Format.PARQUET:
            return _parquet(stream, limits)


def _jsonl(stream: BinaryIO, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    number = 0
    while line := stream.readline(limits.max_row_bytes + 1):
        number += 1
        if len(line) > limits.max_row_bytes:
            raise DatasetInvalid(f"is longer than {limits.max_row_bytes} bytes", row=number)
        text = _decode(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number)
        if text.strip():
            yield number, _parse_json(text, number)


def _json_array(stream: BinaryIO, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    content = stream.read(_JSON_ARRAY_BYTES + 1)
    if len(content) > _JSON_ARRAY_BYTES:
        raise DatasetInvalid(f"a JSON array over {_JSON_ARRAY_BYTES} bytes; write one row per line (jsonl) instead")
    text = _decode(content.removeprefix(b"\xef\xbb\xbf"), None)
    if not text.strip():
        return
    rows = _parse_json(text, None)
    if not isinstance(rows, list):
        raise DatasetSyntaxInvalid("must be an array of objects")
    for number, row in enumerate(rows, start=1):
        if len(json.dumps(row)) > limits.max_row_bytes:
            raise DatasetInvalid(f"is longer than {limits.max_row_bytes} bytes", row=number)
        yield number, row


def _csv(stream: BinaryIO, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(limits.max_row_bytes)
    number = 0
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, strict=True)
        try:
            for number, row in enumerate(reader, start=1):  # the errors below name it
                if None in row or None in row.values():
                    raise DatasetSyntaxInvalid("has not as many cells as the header", row=number)
                yield number, dict(row)
        except csv.Error as error:
            raise DatasetSyntaxInvalid(f"is not CSV: {error}", row=number + 1) from error
        except UnicodeDecodeError as error:
            raise DatasetEncodingInvalid("is not UTF-8", row=number + 1) from error


def _parquet(stream: BinaryIO, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa  # noqa: PLC0415  # a large import that only this format needs
    import pyarrow.parquet as pq  # noqa: PLC0415

    number = 0
    try:
        file = pq.ParquetFile(stream)
        if file.metadata.num_rows > limits.max_rows:
            raise DatasetInvalid(f"more than {limits.max_rows} rows", row=limits.max_rows + 1)
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                if len(str(row)) > limits.max_row_bytes:
                    raise DatasetInvalid(f"is longer than {limits.max_row_bytes} bytes", row=number)
                yield number, row
    except (pa.ArrowException, OSError) as error:
        raise DatasetSyntaxInvalid("is not a Parquet file that can be read", row=number + 1) from error


def _decode(content: bytes, number: int | None) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetEncodingInvalid(f"is not UTF-8 at byte {error.start + 1}", row=number) from error


def _parse_json(text: str, number: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetSyntaxInvalid(f"is not JSON: {error.msg} at character {error.pos + 1}", row=number) from error
    except (ValueError, RecursionError) as error:  # numbers of absurd length, nesting without end
        raise DatasetSyntaxInvalid("is JSON of absurd depth or number length", row=number) from error

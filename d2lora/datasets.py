"""Datasets: files of rows in JSONL, JSON, CSV or Parquet, read as a stream and checked row by row.

Rows are numbered from 1: in JSONL the number is that of the line, blank ones counted; in CSV the header is not
counted. No message ever quotes what a row says.
"""

import codecs
import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Literal, assert_never

from pydantic import Field

from d2lora.errors import DatasetEmpty, DatasetEncodingInvalid, DatasetInvalid, DatasetSyntaxInvalid
from d2lora.initializations import Frozen
from d2lora.rows import (
    READ_COLUMNS,
    MessagesRow,
    PreferenceRow,
    PromptCompletionRow,
    Row,
    RowSchema,
    TextRow,
    UnpairedPreferenceRow,
    columns_known,
    labels_complete,
    nested_too_deeply,
    normalize,
    parse_row,
    schema_of,
)

_JSON_ARRAY_BYTES = 64 * 2**20
"""The text of a JSON array is held in one piece, unlike the other formats."""
_ARRAY = "is an array and not an object; a file that is one array of rows has the format json"
_BLANK = re.compile(r"[ \t\r\n]*")


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
    max_group_bytes: int = 2**30
    """Decompressed bytes of what is read of a Parquet row group; a small file can hold any number."""


_UNLIMITED = DatasetLimits(max_rows=sys.maxsize, max_row_bytes=2**31 - 3, max_group_bytes=sys.maxsize)
"""For files that were let in already, under whatever limits the service has."""


class DatasetSummary(Frozen):
    """What reading a whole dataset tells."""

    row_schema: RowSchema
    """What kind all rows are of."""
    rows: int
    """Number of rows."""
    size: int
    """Bytes of the file."""
    sha256: str
    """Of the file as it was uploaded."""
    objectives: list[str]
    """Types of the objectives that the rows allow."""


class Dataset(DatasetSummary):
    """The resource that ``/v1/datasets`` serves."""

    id: str
    """What a request names it by."""
    object: Literal["dataset"] = "dataset"
    created_at: datetime
    """When it was uploaded."""
    format: Format
    """How the file is written."""
    columns: dict[str, str] = Field(default={}, description="our column name -> the file's, as given with the upload")


def read_rows(file: DatasetFile, limits: DatasetLimits | None = None) -> Iterator[Row]:
    """Yield the rows of a file, in order, without holding them; no limits means none.

    Raises:
        DatasetInvalid: at the first row at fault, which is named with the field; after the last row if all have the
            same label.
    """
    limits = limits or _UNLIMITED
    columns_known(file.columns)
    schema: RowSchema | None = None
    count, labels = 0, set[bool]()
    with file.path.open("rb") as stream:
        for number, record in _records(stream, file, limits):
            count += 1
            if count > limits.max_rows:
                raise DatasetInvalid(f"more than {limits.max_rows} rows", row=number)
            if not isinstance(record, dict):
                in_array = file.format is Format.JSONL and isinstance(record, list)
                raise DatasetSyntaxInvalid(_ARRAY if in_array else "is not an object", row=number)
            if nested_too_deeply(record):
                raise DatasetSyntaxInvalid("is nested too deeply", row=number)
            normalized, spelled = normalize(record, file.columns, number)
            try:
                row = parse_row(normalized, schema, number)
            except DatasetInvalid as error:
                fault = error.errors[0]
                if fault.field not in spelled:
                    raise
                # The file's author knows the column by the file's name.
                raise type(error)(fault.detail, row=number, field=spelled[fault.field]) from error
            if isinstance(row, UnpairedPreferenceRow):
                labels.add(row.label)
            yield row
            schema = schema or schema_of(normalized)
    if count == 0:
        raise DatasetEmpty("there is no row in the file")
    labels_complete(labels, file.columns.get("label", "label"))


def inspect(file: DatasetFile, limits: DatasetLimits | None = None) -> DatasetSummary:
    """Read a whole file and return what is in it.

    Raises:
        DatasetInvalid: as `read_rows`.
    """
    rows, kind = 0, RowSchema.TEXT
    for row in read_rows(file, limits or DatasetLimits()):
        rows += 1
        if rows == 1:
            kind = _kind(row)
    with file.path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return DatasetSummary(
        row_schema=kind, rows=rows, size=file.path.stat().st_size, sha256=digest, objectives=kind.supervision.objectives
    )


def _kind(row: Row) -> RowSchema:
    match row:
        case TextRow():
            return RowSchema.TEXT
        case PromptCompletionRow():
            return RowSchema.PROMPT_COMPLETION
        case MessagesRow():
            return RowSchema.MESSAGES
        case PreferenceRow():
            return RowSchema.PREFERENCE
        case UnpairedPreferenceRow():
            return RowSchema.UNPAIRED_PREFERENCE
        case _:
            assert_never(row)


def _records(stream: BinaryIO, file: DatasetFile, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    match file.format:
        case Format.JSONL:
            return _jsonl(stream, limits)
        case Format.JSON:
            return _json_array(stream, limits)
        case Format.CSV:
            return _csv(stream, limits, READ_COLUMNS.union(file.columns.values()))
        case Format.PARQUET:
            return _parquet(stream, limits, READ_COLUMNS.union(file.columns.values()))


def _jsonl(stream: BinaryIO, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    number = 0
    # Two more than a row may have: its line break, or proof that it is longer.
    while line := stream.readline(limits.max_row_bytes + 2):
        number += 1
        _check_size(len(line.rstrip(b"\r\n")), limits, number)
        text = _decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number)
        if text.strip() == "[":  # of an array that goes on in the next lines
            raise DatasetSyntaxInvalid(_ARRAY, row=number)
        if text.strip():
            with _json_faults(number):
                record = json.loads(text)
            yield number, record


def _json_array(stream: BinaryIO, limits: DatasetLimits) -> Iterator[tuple[int, Any]]:
    content = stream.read(_JSON_ARRAY_BYTES + 1)
    if len(content) > _JSON_ARRAY_BYTES:
        raise DatasetInvalid(f"a JSON array over {_JSON_ARRAY_BYTES} bytes; write one row per line (jsonl) instead")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DatasetEncodingInvalid("is UTF-16 and not UTF-8")
    # What is not UTF-8 becomes a surrogate, which only it can be, and is found again in the row that holds it.
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    position = _skip_blank(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise DatasetSyntaxInvalid(
            "must be an array of objects; a file with an object in every line has the format jsonl"
        )
    decoder = json.JSONDecoder()
    position, number = _skip_blank(text, position + 1), 0
    while number or text[position : position + 1] != "]":
        number += 1
        with _json_faults(number):
            row, end = decoder.raw_decode(text, position)
        try:
            _check_size(len(text[position:end].encode("utf-8")), limits, number)
        except UnicodeEncodeError as error:
            raise DatasetEncodingInvalid("is not UTF-8", row=number) from error
        yield number, row
        position = _skip_blank(text, end)
        if text[position : position + 1] == "]":
            break
        if text[position : position + 1] != ",":
            raise DatasetSyntaxInvalid(f"is not followed by a comma at character {position + 1}", row=number)
        position = _skip_blank(text, position + 1)
    if _skip_blank(text, position + 1) != len(text):
        raise DatasetSyntaxInvalid(f"text after the array at character {position + 2}")


def _csv(stream: BinaryIO, limits: DatasetLimits, wanted: frozenset[str]) -> Iterator[tuple[int, Any]]:
    # The limit is the whole process's, so it is raised and never lowered; rows are measured below.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_row_bytes))
    number, size = 0, 0

    def lines() -> Iterator[str]:
        nonlocal size
        first = True
        while line := stream.readline(limits.max_row_bytes + 2):
            _check_size(size + len(line.rstrip(b"\r\n")), limits, number + 1)
            size += len(line)  # a quoted cell may hold line breaks, so a row has several lines
            yield _decode(line.removeprefix(codecs.BOM_UTF8) if first else line, number + 1)
            first = False

    reader = csv.DictReader(lines(), strict=True)
    try:
        _check_header(reader.fieldnames or [], wanted)
        size = 0
        for row in reader:
            number, size = number + 1, 0
            if None in row or None in row.values():
                raise DatasetSyntaxInvalid("has not as many cells as the header", row=number)
            yield number, dict(row)
    except csv.Error as error:
        why = "a line ends in CR alone; write LF or CRLF" if "new-line character" in str(error) else error
        raise DatasetSyntaxInvalid(f"is not CSV: {why}", row=number + 1) from error


def _check_header(names: Sequence[str], wanted: frozenset[str]) -> None:
    """Refuse headers of which a row would be read otherwise than meant."""
    for name in sorted(wanted):
        if names.count(name) > 1:
            raise DatasetSyntaxInvalid("is in the header more than once", field=name)
    separated = [mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]]
    if separated and names[0] not in wanted:
        raise DatasetSyntaxInvalid(f"the header is one column with {separated[0]!r} in it; separate cells by commas")


def _parquet(stream: BinaryIO, limits: DatasetLimits, wanted: frozenset[str]) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa  # noqa: PLC0415  # a large import that only this format needs
    import pyarrow.parquet as pq  # noqa: PLC0415  # likewise

    number = 0
    try:
        file = pq.ParquetFile(stream)
        if file.metadata.num_rows > limits.max_rows:
            raise DatasetInvalid(f"more than {limits.max_rows} rows", row=limits.max_rows + 1)
        names = file.schema_arrow.names
        _check_header(names, wanted)
        read = [name for name in names if name in wanted]
        _check_groups(file.metadata, read, limits)
        absent = dict.fromkeys(names)
        for batch in file.iter_batches(batch_size=64, columns=read):
            for index in range(batch.num_rows):
                number += 1
                row = batch.slice(index, 1).to_pylist()[0]
                _check_size(len(str(row).encode("utf-8", "surrogatepass")), limits, number)
                yield number, absent | row
    except UnicodeDecodeError as error:  # Arrow does not look into its strings
        raise DatasetEncodingInvalid("is not UTF-8", row=number) from error
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DatasetSyntaxInvalid("is not a Parquet file that can be read", row=number + 1) from error


def _check_groups(metadata: Any, names: list[str], limits: DatasetLimits) -> None:
    """Refuse row groups that would fill memory, by what the footer says of the columns that are read."""
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(index) for index in range(group.num_columns)]
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] in names)
        if size > limits.max_group_bytes:
            raise DatasetInvalid(f"a row group is over {limits.max_group_bytes} bytes; write smaller ones")


def _check_size(size: int, limits: DatasetLimits, number: int) -> None:
    if size > limits.max_row_bytes:
        raise DatasetInvalid(f"is longer than {limits.max_row_bytes} bytes", row=number)


def _decode(content: bytes, number: int) -> str:
    if number == 1 and content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DatasetEncodingInvalid("is UTF-16 and not UTF-8", row=number)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetEncodingInvalid(f"is not UTF-8 at byte {error.start + 1}", row=number) from error


def _skip_blank(text: str, position: int) -> int:
    match = _BLANK.match(text, position)
    return match.end() if match else position


@contextmanager
def _json_faults(number: int) -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as error:
        raise DatasetSyntaxInvalid(f"is not JSON: {error.msg} at character {error.pos + 1}", row=number) from error
    except (ValueError, RecursionError) as error:  # numbers of absurd length, nesting without end
        raise DatasetSyntaxInvalid("is JSON of absurd depth or number length", row=number) from error

import csv
import json

import pytest

from d2lora.datasets import DatasetFile, DatasetLimits, Format, inspect, read_rows
from d2lora.errors import (
    ChosenEqualsRejected,
    CompletionEmpty,
    DatasetEmpty,
    DatasetEncodingInvalid,
    DatasetInvalid,
    DatasetSyntaxInvalid,
    SchemaMixed,
    SchemaUnknown,
)
from d2lora.rows import MessagesRow, PreferenceRow, PromptCompletionRow, TextRow

USER = {"role": "user", "content": "hello"}
REPLY = {"role": "assistant", "content": "hi"}
PAIR = {"prompt": "2+2=", "completion": " 4"}
PREFERENCE = {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}
SECRET = "a row that no message may quote"


@pytest.fixture
def write(tmp_path):
    def write(rows, *, format=Format.JSONL, columns=None):
        path = tmp_path / f"rows.{format}"
        match format:
            case Format.JSONL:
                path.write_bytes(
                    rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
                )
            case Format.JSON:
                path.write_bytes(rows if isinstance(rows, bytes) else json.dumps(rows).encode())
            case Format.CSV:
                if isinstance(rows, bytes):
                    path.write_bytes(rows)
                else:
                    with path.open("w", newline="") as file:
                        writer = csv.DictWriter(file, list(rows[0]))
                        writer.writeheader()
                        writer.writerows(rows)
            case Format.PARQUET:
                import pyarrow as pa
                import pyarrow.parquet as pq

                pq.write_table(pa.Table.from_pylist(rows), path)
        return DatasetFile(path, format, columns or {})

    return write


@pytest.mark.parametrize("format", list(Format))
def test_every_format_gives_the_same_rows(write, format):
    file = write([PREFERENCE, {**PREFERENCE, "chosen": " four"}], format=format)

    rows = list(read_rows(file))

    assert rows == [PreferenceRow("2+2=", " 4", " 5"), PreferenceRow("2+2=", " four", " 5")]


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"text": "hello"}, TextRow("hello")),
        (PAIR, PromptCompletionRow("2+2=", " 4")),
        ({"prompt": [USER], "completion": [REPLY]}, PromptCompletionRow([USER], [REPLY])),
        ({"messages": [USER, REPLY]}, MessagesRow([USER, REPLY])),
        (PREFERENCE, PreferenceRow("2+2=", " 4", " 5")),
        ({"chosen": "a b", "rejected": "a c"}, PreferenceRow(None, "a b", "a c")),
        ({"chosen": [USER, REPLY], "rejected": [USER, USER]}, PreferenceRow(None, [USER, REPLY], [USER, USER])),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, PromptCompletionRow("Add.\n2+2", "4")),
        ({"instruction": "Say 4.", "input": "", "output": "4"}, PromptCompletionRow("Say 4.", "4")),
        (
            {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
            MessagesRow([USER, REPLY]),
        ),
        ({**PAIR, "tools": '[{"name": "f"}]'}, PromptCompletionRow("2+2=", " 4", tools=[{"name": "f"}])),
        ({**PAIR, "chat_template_kwargs": {"a": 1}}, PromptCompletionRow("2+2=", " 4", chat_template_kwargs={"a": 1})),
        ({**PAIR, "id": 7, "source": "somewhere"}, PromptCompletionRow("2+2=", " 4")),
    ],
)
def test_every_kind_of_row_is_recognized(write, record, row):
    assert list(read_rows(write([record]))) == [row]


def test_a_mapping_names_other_columns(write):
    file = write([{"question": "2+2=", "answer": " 4"}], columns={"prompt": "question", "completion": "answer"})

    assert list(read_rows(file)) == [PromptCompletionRow("2+2=", " 4")]


def test_a_mapping_wins_over_a_column_of_our_name(write):
    file = write([{"prompt": "2+2=", "completion": "wrong", "best": " 4"}], columns={"completion": "best"})

    assert list(read_rows(file)) == [PromptCompletionRow("2+2=", " 4")]


def test_a_byte_order_mark_and_blank_lines_are_no_rows(write):
    file = write(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\n\n  \n" + json.dumps(PAIR).encode())

    assert len(list(read_rows(file))) == 2


def test_what_is_in_a_dataset_is_said(write):
    file = write([PREFERENCE] * 3)

    summary = inspect(file)

    assert (summary.row_schema, summary.rows, summary.objectives) == ("preference", 3, ["sft", "dpo", "orpo"])
    assert summary.size == file.path.stat().st_size
    assert inspect(write([PAIR])).objectives == ["sft"]


@pytest.mark.parametrize(
    ("rows", "error", "row", "field"),
    [
        (b"", DatasetEmpty, None, None),
        (b"\n \n", DatasetEmpty, None, None),
        ([PAIR, {"question": SECRET}], SchemaUnknown, 2, None),
        ([PAIR, {"text": SECRET}], SchemaMixed, 2, None),
        ([PAIR, PREFERENCE], SchemaMixed, 2, None),
        ([PREFERENCE, {**PREFERENCE, "chosen": SECRET, "rejected": SECRET}], ChosenEqualsRejected, 2, "rejected"),
        ([PAIR, {**PAIR, "completion": ""}], CompletionEmpty, 2, "completion"),
        ([{**PREFERENCE, "rejected": " \n"}], CompletionEmpty, 1, "rejected"),
        ([{"text": "  "}], CompletionEmpty, 1, "text"),
        ([{"messages": [USER]}], CompletionEmpty, 1, "messages"),
        ([{"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}], CompletionEmpty, 1, "completion"),
        ([PAIR, {**PAIR, "completion": None}], DatasetInvalid, 2, "completion"),
        ([{**PAIR, "completion": 4}], DatasetInvalid, 1, "completion"),
        ([{**PAIR, "prompt": [USER]}], DatasetInvalid, 1, "completion"),
        ([{"messages": [{"content": SECRET}]}], DatasetInvalid, 1, "messages"),
        ([{"messages": [{"role": "user"}]}], DatasetInvalid, 1, "messages"),
        ([{"messages": []}], DatasetInvalid, 1, "messages"),
        ([{**PAIR, "tools": "{"}], DatasetInvalid, 1, "tools"),
        ([{**PAIR, "tools": {"a": 1}}], DatasetInvalid, 1, "tools"),
        ([{"conversations": [{"from": "nobody", "value": SECRET}]}], DatasetInvalid, 1, "conversations"),
        ([PAIR, [1, 2]], DatasetSyntaxInvalid, 2, None),
        (b'{"text": "a"}\n{"text": \n', DatasetSyntaxInvalid, 2, None),
        (b'{"text": "a"}\n{"text": "\xff"}\n', DatasetEncodingInvalid, 2, None),
        (b'{"text": "\\ud800"}\n', DatasetInvalid, 1, "text"),
        (b'{"text": "a"}\n' + b'{"a":' * 100_000 + b"\n", DatasetSyntaxInvalid, 2, None),
    ],
)
def test_a_row_at_fault_is_named_and_never_quoted(write, rows, error, row, field):
    with pytest.raises(DatasetInvalid) as caught:
        inspect(write(rows))

    assert type(caught.value) is error
    assert SECRET not in str(caught.value)
    if row is not None:
        assert (caught.value.errors[0].row, caught.value.errors[0].field) == (row, field)


@pytest.mark.parametrize(
    ("format", "content", "error", "row"),
    [
        (Format.JSON, b"", DatasetEmpty, None),
        (Format.JSON, b"[]", DatasetEmpty, None),
        (Format.JSON, b'{"text": "a"}', DatasetSyntaxInvalid, None),
        (Format.JSON, b"[", DatasetSyntaxInvalid, None),
        (Format.CSV, b"", DatasetEmpty, None),
        (Format.CSV, b"prompt,completion\n", DatasetEmpty, None),
        (Format.CSV, b"prompt,completion\na,b\na,b,c\n", DatasetSyntaxInvalid, 2),
        (Format.CSV, b"prompt,completion\na,b\na\n", DatasetSyntaxInvalid, 2),
        (Format.CSV, b"prompt,completion\na,b\n\xff,b\n", DatasetEncodingInvalid, None),
        (Format.PARQUET, b"PAR1 no PAR1", DatasetSyntaxInvalid, None),
    ],
)
def test_a_file_that_is_not_of_its_format_is_said_to_be(tmp_path, format, content, error, row):
    path = tmp_path / "rows"
    path.write_bytes(content)

    with pytest.raises(error) as caught:
        inspect(DatasetFile(path, format))

    assert row is None or caught.value.errors[0].row == row


@pytest.mark.parametrize("format", list(Format))
def test_too_many_rows_and_too_long_rows_are_refused(write, format):
    file = write([PAIR] * 4, format=format)

    with pytest.raises(DatasetInvalid, match="more than 3 rows"):
        inspect(file, DatasetLimits(max_rows=3))
    with pytest.raises(DatasetInvalid):
        inspect(file, DatasetLimits(max_row_bytes=3))


def test_a_mapping_is_checked_on_both_sides(write):
    with pytest.raises(DatasetInvalid, match="unknown column"):
        inspect(write([PAIR], columns={"promt": "prompt"}))
    with pytest.raises(SchemaUnknown) as caught:
        inspect(write([PAIR], columns={"prompt": "question"}))
    assert caught.value.errors[0].field == "question"


def test_the_format_follows_from_the_suffix(tmp_path):
    assert Format.of(tmp_path / "a.ndjson") is Format.JSONL
    assert Format.of(tmp_path / "a.CSV") is Format.CSV
    with pytest.raises(DatasetSyntaxInvalid, match="known are jsonl"):
        Format.of(tmp_path / "a.txt")

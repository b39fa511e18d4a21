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
from d2lora.rows import MessagesRow, PreferenceRow, PromptCompletionRow, TextRow, UnpairedPreferenceRow

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
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, PromptCompletionRow("Add.\n2+2\n", "4")),
        ({"instruction": "Say 4.", "input": "", "output": "4"}, PromptCompletionRow("Say 4.\n", "4")),
        (
            {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
            MessagesRow([USER, REPLY]),
        ),
        ({"conversations": [USER, REPLY]}, MessagesRow([USER, REPLY])),
        ({**PAIR, "tools": '[{"name": "f"}]'}, PromptCompletionRow("2+2=", " 4", tools=[{"name": "f"}])),
        ({**PAIR, "chat_template_kwargs": {"a": 1}}, PromptCompletionRow("2+2=", " 4", chat_template_kwargs={"a": 1})),
        ({**PAIR, "id": 7, "source": "somewhere"}, PromptCompletionRow("2+2=", " 4")),
        ({**PAIR, "score": float("nan")}, PromptCompletionRow("2+2=", " 4")),
    ],
)
def test_every_kind_of_row_is_recognized(write, record, row):
    assert list(read_rows(write([record]))) == [row]


LABELED = [{**PAIR, "label": True}, {**PAIR, "completion": " 5", "label": False}]


@pytest.mark.parametrize("format", list(Format))
def test_every_format_gives_the_same_labels(write, format):
    summary = inspect(write(LABELED, format=format))

    assert list(read_rows(write(LABELED, format=format))) == [
        UnpairedPreferenceRow("2+2=", " 4", True),
        UnpairedPreferenceRow("2+2=", " 5", False),
    ]
    assert (summary.row_schema, summary.objectives) == ("unpaired_preference", ["sft", "kto"])


def test_labeled_rows_may_be_conversations_and_have_mapped_columns(write):
    rows = [{"prompt": [USER], "answer": [REPLY], "good": good, "tools": [{"name": "f"}]} for good in (True, False)]

    read = list(read_rows(write(rows, columns={"completion": "answer", "label": "good"})))

    assert read == [UnpairedPreferenceRow([USER], [REPLY], good, tools=[{"name": "f"}]) for good in (True, False)]


@pytest.mark.parametrize("only", [True, False])
def test_rows_that_all_have_the_same_label_are_refused_with_the_way_out(write, only):
    with pytest.raises(DatasetInvalid, match=f"is {str(only).lower()} in every row.*without the column") as caught:
        inspect(write([{**PAIR, "good": only}] * 2, columns={"label": "good"}))

    assert caught.value.errors[0].field == "good"


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
    ("record", "schema"),
    [
        ({"text": "a"}, "text"),
        (PAIR, "prompt_completion"),
        ({"messages": [USER, REPLY]}, "messages"),
        (PREFERENCE, "preference"),
    ],
)
def test_the_kind_of_a_datasets_rows_is_said(write, record, schema):
    assert inspect(write([record])).row_schema == schema


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
        ([{"conversations": [{"from": [SECRET], "value": SECRET}]}], DatasetInvalid, 1, "conversations"),
        ([{"instruction": SECRET, "input": [SECRET], "output": "a"}], DatasetInvalid, 1, "input"),
        ([{"instruction": SECRET, "output": " "}], CompletionEmpty, 1, "output"),
        ([{**PAIR, "completion": None}], DatasetInvalid, 1, "completion"),
        ([{"messages": [{"role": "user", "content": None}, REPLY]}], DatasetInvalid, 1, "messages"),
        ([{"messages": [{"role": "user", "content": 4}, REPLY]}], DatasetInvalid, 1, "messages"),
        ([{"messages": [{"role": "user", "content": [SECRET]}, REPLY]}], DatasetInvalid, 1, "messages"),
        ([{"chosen": [USER, REPLY], "rejected": [REPLY, USER]}], DatasetInvalid, 1, "rejected"),
        ([{"chosen": [USER, REPLY], "rejected": [USER]}], DatasetInvalid, 1, "rejected"),
        ([{**PAIR, "tools": [float("nan")]}], DatasetInvalid, 1, "tools"),
        ([{**PAIR, "tools": "[" * 70 + "]" * 70}], DatasetInvalid, 1, "tools"),
        ([{**PAIR, "chat_template_kwargs": 4}], DatasetInvalid, 1, "chat_template_kwargs"),
        ([{**PAIR, "chat_template_kwargs": {"chat_template": SECRET}}], DatasetInvalid, 1, "chat_template_kwargs"),
        ([LABELED[0], PAIR], DatasetInvalid, 2, "label"),
        ([LABELED[0], {**PAIR, "label": None}], DatasetInvalid, 2, "label"),
        ([{**PAIR, "label": 1}], DatasetInvalid, 1, "label"),
        ([{**PAIR, "label": SECRET}], DatasetInvalid, 1, "label"),
        ([{**PAIR, "label": ""}], DatasetInvalid, 1, "label"),
        ([PAIR, LABELED[0]], SchemaMixed, 2, None),
        ([{**LABELED[0], "completion": " "}], CompletionEmpty, 1, "completion"),
        ([{"text": "a"}, {SECRET: 1}], SchemaUnknown, 2, None),
        (b'{"text": NaN}\n', DatasetInvalid, 1, "text"),
        (b'{"prompt": "a", "completion": "b", "tools": ["\\ud800"]}\n', DatasetInvalid, 1, "tools"),
        (b'{"\\ud800": "a"}\n', SchemaUnknown, 1, None),
        (b'{"text": "a", "x": ' + b"[" * 70 + b"]" * 70 + b"}\n", DatasetSyntaxInvalid, 1, None),
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
    assert caught.value.problem().model_dump_json()  # what a caller is sent can be written
    if row is not None:
        assert (caught.value.errors[0].row, caught.value.errors[0].field) == (row, field)


@pytest.mark.parametrize(
    ("format", "content", "error", "row"),
    [
        (Format.JSON, b"", DatasetEmpty, None),
        (Format.JSON, b"[]", DatasetEmpty, None),
        (Format.JSON, b'{"text": "a"}', DatasetSyntaxInvalid, None),
        (Format.JSON, b"[", DatasetSyntaxInvalid, 1),
        (Format.JSON, b'[{"text": "a"}, {"text": }]', DatasetSyntaxInvalid, 2),
        (Format.JSON, b'[{"text": "a"} {"text": "b"}]', DatasetSyntaxInvalid, 1),
        (Format.JSON, b'[{"text": "a"}, ]', DatasetSyntaxInvalid, 2),
        (Format.JSON, b'[{"text": "a"}', DatasetSyntaxInvalid, 1),
        (Format.JSON, b'[{"text": "a"}] and more', DatasetSyntaxInvalid, None),
        (Format.JSON, b'[{"text": "a"}, {"text": "\xff"}]', DatasetEncodingInvalid, 2),
        (Format.JSON, '[{"text": "a"}]'.encode("utf-16"), DatasetEncodingInvalid, None),
        (Format.JSONL, '{"text": "a"}'.encode("utf-16"), DatasetEncodingInvalid, 1),
        (Format.CSV, b"", DatasetEmpty, None),
        (Format.CSV, b"prompt,completion\n", DatasetEmpty, None),
        (Format.CSV, b"prompt,completion\na,b\na,b,c\n", DatasetSyntaxInvalid, 2),
        (Format.CSV, b"prompt,completion\na,b\na\n", DatasetSyntaxInvalid, 2),
        (Format.CSV, b"prompt,completion\na,b\n\xff,b\n", DatasetEncodingInvalid, 2),
        (Format.CSV, b'prompt,completion\na,"b\n\n', DatasetSyntaxInvalid, 1),
        (Format.CSV, f"{SECRET},b\na,b\n".encode(), SchemaUnknown, 1),
        (Format.PARQUET, b"PAR1 no PAR1", DatasetSyntaxInvalid, None),
    ],
)
def test_a_file_that_is_not_of_its_format_is_said_to_be(tmp_path, format, content, error, row):
    path = tmp_path / "rows"
    path.write_bytes(content)

    with pytest.raises(error) as caught:
        inspect(DatasetFile(path, format))

    assert SECRET not in str(caught.value)
    assert row is None or caught.value.errors[0].row == row


def test_a_row_is_measured_in_bytes_and_without_its_line_break(tmp_path):
    row = '{"text": "\u4e2d\u4e2d"}'.encode()
    limits = DatasetLimits(max_row_bytes=len(row))
    path = tmp_path / "rows"

    for form, content in ((Format.JSONL, row + b"\r\n" + row), (Format.JSON, b"[" + row + b" , " + row + b"]")):
        path.write_bytes(content)
        assert inspect(DatasetFile(path, form), limits).rows == 2
        with pytest.raises(DatasetInvalid, match="row 1: is longer"):
            inspect(DatasetFile(path, form), DatasetLimits(max_row_bytes=len(row) - 1))


def test_a_line_break_of_two_bytes_at_the_limit_is_one_line(write):
    row = b'{"text": "a"}'

    with pytest.raises(DatasetSyntaxInvalid, match="row 2"):
        inspect(write(row + b"\r\n{"), DatasetLimits(max_row_bytes=len(row)))


@pytest.mark.parametrize(
    "content",
    [
        b"text,a,b\n" + b",".join([b"y" * 90] * 3) + b"\n",  # no cell is too long
        b"text\n" + b"y" * 300,
        b'text\n"' + b"y\n" * 150 + b'"\n',
        b"text" * 300,
    ],
)
def test_a_long_row_of_csv_is_refused_however_it_is_made(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)

    with pytest.raises(DatasetInvalid, match="row 1: is longer than 200 bytes"):
        inspect(DatasetFile(path, Format.CSV), DatasetLimits(max_row_bytes=200))


def test_many_short_rows_of_csv_are_no_long_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text\n" + b'"a\nb"\n' * 100)

    assert inspect(DatasetFile(path, Format.CSV), DatasetLimits(max_row_bytes=6)).rows == 100


def test_a_limit_on_rows_of_csv_is_no_limit_for_others(write):
    file = write([PAIR], format=Format.CSV)
    before = csv.field_size_limit()

    inspect(file, DatasetLimits(max_row_bytes=100))

    assert csv.field_size_limit() >= before


def test_what_was_let_in_is_read_again_whatever_the_limits_were(write):
    file = write([{"text": "a" * 2**21}])

    assert len(list(read_rows(file))) == 1
    with pytest.raises(DatasetInvalid, match="is longer"):
        inspect(file)


@pytest.mark.parametrize("columns", [{"completion": "answer"}, {}])
def test_a_column_at_fault_is_named_as_the_file_names_it(write, columns):
    theirs = "answer" if columns else "completion"
    file = write([{"prompt": "2+2=", theirs: " 4"}, {"prompt": "2+2=", theirs: ""}], columns=columns)

    with pytest.raises(CompletionEmpty) as caught:
        inspect(file)

    assert (caught.value.errors[0].row, caught.value.errors[0].field) == (2, theirs)


def test_a_null_key_of_a_message_is_an_absent_one(write):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    file = write([{"messages": [USER, call]}], format=Format.PARQUET)

    assert list(read_rows(file)) == [MessagesRow([USER, call])]


def test_other_columns_of_parquet_are_not_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    beyond_time = pa.array([2**62], pa.timestamp("us"))  # no Python date
    pq.write_table(pa.table({"text": ["a"], "image": [b"z" * 1000], "when": beyond_time}), path)

    assert inspect(DatasetFile(path, Format.PARQUET), DatasetLimits(max_row_bytes=100)).rows == 1


def test_parquet_without_a_column_of_ours_is_of_unknown_schema(write):
    file = write([{"question": "2+2="}, {"question": SECRET}], format=Format.PARQUET)

    with pytest.raises(SchemaUnknown, match="question"):
        inspect(file)


def test_text_of_parquet_that_is_not_utf8_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 1, 2))
    texts = pa.StringArray.from_buffers(2, pa.py_buffer(offsets), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": texts}), path)

    with pytest.raises(DatasetEncodingInvalid) as caught:
        inspect(DatasetFile(path, Format.PARQUET))

    assert caught.value.errors[0].row == 2


def test_a_row_group_that_would_fill_memory_is_refused_before_it_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    texts = ["a" * 1000 + str(i) for i in range(100)]
    pq.write_table(pa.table({"text": texts, "image": texts}), path, use_dictionary=False, compression="zstd")
    one_column = 150_000  # with room for the encoding; both are over 200,000

    assert path.stat().st_size < 10_000
    assert inspect(DatasetFile(path, Format.PARQUET), DatasetLimits(max_group_bytes=one_column)).rows == 100
    with pytest.raises(DatasetInvalid, match="row group"):
        inspect(DatasetFile(path, Format.PARQUET), DatasetLimits(max_group_bytes=50_000))


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


@pytest.mark.parametrize(
    ("format", "content", "said"),
    [
        (Format.JSONL, b'[{"text": "a"}]', "row 1: is an array and not an object; .* has the format json"),
        (Format.JSONL, b'[\n  {"text": "a"}\n]\n', "row 1: is an array and not an object"),
        (Format.JSON, b'{"text": "a"}\n{"text": "b"}\n', "an object in every line has the format jsonl"),
        (Format.JSONL, '{"text": "a"}\n'.encode("utf-16"), "row 1: is UTF-16"),
        (Format.CSV, "text\na\n".encode("utf-16"), "row 1: is UTF-16"),
        (Format.CSV, b"prompt;completion\na;b\n", "one column with ';' in it; separate cells by commas"),
        (Format.CSV, b"prompt\tcompletion\na\tb\n", r"one column with '\\t' in it"),
        (Format.CSV, b"prompt,completion\ra,b\r", "a line ends in CR alone"),
        (Format.CSV, b"prompt,prompt,completion\na,x,b\n", "field 'prompt': is in the header more than once"),
    ],
)
def test_what_is_commonly_taken_for_a_format_is_named(tmp_path, format, content, said):
    path = tmp_path / "rows"
    path.write_bytes(content)

    with pytest.raises(DatasetInvalid, match=said):
        inspect(DatasetFile(path, format))


def test_a_header_may_repeat_what_is_not_read_and_hold_what_is_mapped(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,id,prompt,completion\n1,2,a,b\n")
    assert inspect(DatasetFile(path, Format.CSV)).rows == 1

    path.write_text("a;b\nsome text\n")
    assert inspect(DatasetFile(path, Format.CSV, {"text": "a;b"})).rows == 1


def test_a_column_that_parquet_has_twice_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["prompt", "prompt", "completion"]), tmp_path / "rows.parquet")

    with pytest.raises(DatasetSyntaxInvalid, match="field 'prompt': is in the header more than once"):
        inspect(DatasetFile(tmp_path / "rows.parquet", Format.PARQUET))

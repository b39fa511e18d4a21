"""One row of a dataset: what kinds there are, and how a record's columns say which kind it is.

The kinds are TRL's, plus two widespread spellings that are rewritten on the way in: Alpaca (instruction, input,
output) becomes prompt and completion, ShareGPT (conversations of from and value) becomes messages. A message names
the row, counted from 1, and the column as the file spells it; it never quotes what the row says.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from d2lora.errors import ChosenEqualsRejected, CompletionEmpty, DatasetInvalid, SchemaMixed, SchemaUnknown
from d2lora.supervision import Supervision

Message = dict[str, Any]
"""``role`` and ``content``, and whatever else the model's chat template understands."""
Text = str | list[Message]


class RowSchema(StrEnum):
    """The kinds of rows; a dataset has one."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt_completion"
    MESSAGES = "messages"
    PREFERENCE = "preference"
    UNPAIRED_PREFERENCE = "unpaired_preference"

    @property
    def supervision(self) -> Supervision:
        """What rows of this kind say of their completions."""
        match self:
            case RowSchema.PREFERENCE:
                return Supervision.PREFERENCE
            case RowSchema.UNPAIRED_PREFERENCE:
                return Supervision.LABEL
            case _:
                return Supervision.COMPLETION


@dataclass(frozen=True, slots=True)
class TextRow:
    """Plain text; every token but the first is learned."""

    text: str


@dataclass(frozen=True, slots=True)
class PromptCompletionRow:
    """A prompt and what should follow it: strings, or lists of messages."""

    prompt: Text
    completion: Text
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class MessagesRow:
    """A conversation; the assistant's turns are learned."""

    messages: list[Message]
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two continuations, one preferred. Without a prompt, it is what the two begin with."""

    prompt: Text | None
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class UnpairedPreferenceRow:
    """A prompt, a completion, and whether that is desirable."""

    prompt: Text
    completion: Text
    label: bool
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Row = TextRow | PromptCompletionRow | MessagesRow | PreferenceRow | UnpairedPreferenceRow

_COLUMNS: dict[RowSchema, tuple[str, ...]] = {
    RowSchema.PREFERENCE: ("chosen", "rejected"),
    RowSchema.UNPAIRED_PREFERENCE: ("prompt", "completion", "label"),
    RowSchema.PROMPT_COMPLETION: ("prompt", "completion"),
    RowSchema.MESSAGES: ("messages",),
    RowSchema.TEXT: ("text",),
}
_OPTIONAL = ("prompt", "tools", "chat_template_kwargs")
COLUMNS = frozenset(name for names in (*_COLUMNS.values(), _OPTIONAL) for name in names)
"""Our names of columns: what a mapping may map."""

_ALPACA = {"prompt": "instruction", "completion": "output"}
_SHAREGPT = {"messages": "conversations"}
READ_COLUMNS = COLUMNS | {*_ALPACA.values(), "input", *_SHAREGPT.values()}
"""What is looked at in a file without a mapping; every other column is ignored."""

_TEMPLATE_ARGUMENTS = frozenset(
    {
        "conversation",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "add_generation_prompt",
        "continue_final_message",
        "tools",
    }
)
"""What says how a conversation is tokenized, and is not the rows' to say."""

_MAX_NESTING = 64
"""Levels of lists and objects in a row; far above any real one and far below what exhausts the stack."""

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def schema_of(record: Mapping[str, Any]) -> RowSchema | None:
    """Return the kind of a record by its columns, after `normalize`; None if they fit no kind."""
    return next((schema for schema, names in _COLUMNS.items() if all(_filled(record, name) for name in names)), None)


def normalize(
    record: Mapping[str, Any], columns: Mapping[str, str], number: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the record under our column names, and the file's name for each of ours that it spells otherwise.

    Raises:
        SchemaUnknown: a mapped column is missing.
        DatasetInvalid: an Alpaca column or a ShareGPT turn is malformed.
    """
    for theirs in columns.values():
        if theirs not in record:
            raise SchemaUnknown("the mapped column is missing", row=number, field=theirs)
    mapped = {name: value for name, value in record.items() if name not in columns.values()}
    mapped |= {ours: record[theirs] for ours, theirs in columns.items()}
    if schema_of(mapped) is not None:
        return mapped, dict(columns)
    if _filled(mapped, "conversations"):
        turns = _list(mapped["conversations"], "conversations", number)
        mapped["messages"] = [_from_sharegpt(turn, number) for turn in turns]
        return mapped, {**columns, **_SHAREGPT}
    if _filled(mapped, "instruction") and "output" in mapped:
        mapped["prompt"] = _alpaca_prompt(mapped, number)
        mapped["completion"] = mapped["output"]
        return mapped, {**columns, **_ALPACA}
    return mapped, dict(columns)


def parse_row(record: Mapping[str, Any], schema: RowSchema | None, number: int) -> Row:
    """Return the row that a normalized record holds; ``schema`` is that of the rows before it, if there are any.

    Raises:
        SchemaUnknown, SchemaMixed, CompletionEmpty, ChosenEqualsRejected, DatasetInvalid: naming row and field.
    """
    own = schema_of(record)
    if own is None:
        raise _no_schema(record, schema, number)
    if schema is not None and own is not schema:
        raise _mixed(own, schema, number)
    extras: dict[str, Any] = {
        "tools": _tools(record.get("tools"), number),
        "chat_template_kwargs": _template_arguments(record.get("chat_template_kwargs"), number),
    }
    match own:
        case RowSchema.TEXT:
            text = _completion(record["text"], "text", number)
            if not isinstance(text, str):
                raise DatasetInvalid("must be a string", row=number, field="text")
            return TextRow(text)
        case RowSchema.MESSAGES:
            messages = _messages(record["messages"], "messages", number)
            if not any(message["role"] == "assistant" and _has_content(message) for message in messages):
                raise CompletionEmpty("no assistant turn to learn from", row=number, field="messages")
            return MessagesRow(messages, **extras)
        case RowSchema.PROMPT_COMPLETION | RowSchema.UNPAIRED_PREFERENCE:
            prompt = _text(record["prompt"], "prompt", number)
            completion = _completion(record["completion"], "completion", number)
            _same_form(prompt, completion, "completion", number)
            if own is RowSchema.PROMPT_COMPLETION:
                return PromptCompletionRow(prompt, completion, **extras)
            return UnpairedPreferenceRow(prompt, completion, _label(record["label"], number), **extras)
        case RowSchema.PREFERENCE:
            return _preference(record, extras, number)


def _mixed(own: RowSchema, schema: RowSchema, number: int) -> DatasetInvalid:
    """Return what is wrong with a record of another kind than the rows before it."""
    if schema is RowSchema.UNPAIRED_PREFERENCE and own is RowSchema.PROMPT_COMPLETION:
        return DatasetInvalid("is missing, and the rows before have it", row=number, field="label")
    return SchemaMixed(f"this row is {own}, the rows before it are {schema}", row=number)


def _no_schema(record: Mapping[str, Any], schema: RowSchema | None, number: int) -> DatasetInvalid:
    """Return what is wrong with a record that fits no kind of row."""
    # A row with all columns of a kind, one of them null, is told about that column and not about its kind.
    for kind in _COLUMNS if schema is None else [schema]:
        if all(name in record for name in _COLUMNS[kind]):
            null = next(name for name in _COLUMNS[kind] if record[name] is None)
            return DatasetInvalid("is null", row=number, field=null)
    wanted = "; ".join(" and ".join(names) for names in _COLUMNS.values())
    # In a CSV file without a header the names are the first row's text, which is not ours to repeat.
    names = sorted(name for name in map(str, record) if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}", name))
    shown = [*names[:8], *([f"{len(record) - len(names[:8])} more"] if len(record) > len(names[:8]) else [])]
    return SchemaUnknown(
        f"the columns ({', '.join(shown) or 'none'}) fit no kind of row ({wanted}); give a column mapping", row=number
    )


def _preference(record: Mapping[str, Any], extras: dict[str, Any], number: int) -> PreferenceRow:
    prompt = _text(record["prompt"], "prompt", number) if record.get("prompt") is not None else None
    chosen = _completion(record["chosen"], "chosen", number)
    rejected = _completion(record["rejected"], "rejected", number)
    _same_form(chosen, rejected, "rejected", number)
    if prompt is not None:
        _same_form(prompt, chosen, "chosen", number)
    if chosen == rejected:
        raise ChosenEqualsRejected("chosen and rejected are equal", row=number, field="rejected")
    alone = isinstance(chosen, list) and (chosen[0] != rejected[0] or min(len(chosen), len(rejected)) == 1)
    if prompt is None and alone:
        # No chat template takes a conversation of no messages, which is what the shared prompt would be.
        raise DatasetInvalid("shares no prompt with chosen; give one", row=number, field="rejected")
    return PreferenceRow(prompt, chosen, rejected, **extras)


def labels_complete(labels: Iterable[bool], field: str) -> None:
    """Raise `DatasetInvalid`, naming the column, if there is one label and not the other."""
    if len(distinct := set(labels)) == 1:
        detail = f"is {str(*distinct).lower()} in every row, and rows of both labels are needed"
        raise DatasetInvalid(f"{detail}; without the column all rows are learned from", field=field)


def _label(value: Any, number: int) -> bool:
    if isinstance(value, str) and value.strip().lower() in {"true", "false"}:  # a CSV cell
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        detail = "must be true or false; rename the column if it does not say whether the completion is desirable"
        raise DatasetInvalid(detail, row=number, field="label")
    return value


def _filled(record: Mapping[str, Any], name: str) -> bool:
    # CSV and Parquet files have every column in every row; an absent value counts as an absent column.
    return record.get(name) is not None


def _text(value: Any, field: str, number: int) -> Text:
    if isinstance(value, str):
        _encodable(value, field, number)
        return value
    if isinstance(value, list):
        return _messages(value, field, number)
    raise DatasetInvalid("must be a string or a list of messages", row=number, field=field)


def _completion(value: Any, field: str, number: int) -> Text:
    text = _text(value, field, number)
    if isinstance(text, str) and not text.strip():
        raise CompletionEmpty("is empty", row=number, field=field)
    if isinstance(text, list) and not any(_has_content(message) for message in text):
        raise CompletionEmpty("holds no message with content", row=number, field=field)
    return text


def _messages(value: Any, field: str, number: int) -> list[Message]:
    messages = []
    for message in _list(value, field, number):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"]:
            raise DatasetInvalid("every message needs a role", row=number, field=field)
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise DatasetInvalid("every message needs content", row=number, field=field)
        parts = content if isinstance(content, list) else []
        if not (content is None or isinstance(content, str | list)) or not all(
            isinstance(part, dict) for part in parts
        ):
            raise DatasetInvalid("content must be a string, or a list of objects", row=number, field=field)
        _encodable(message, field, number)
        # Parquet gives every message every key; a template may ask whether a key is there at all.
        messages.append({key: item for key, item in message.items() if item is not None or key == "content"})
    return messages


def _list(value: Any, field: str, number: int) -> list[Any]:
    if isinstance(value, str):  # a CSV cell
        value = _json(value, field, number)
    if not isinstance(value, list) or not value:
        raise DatasetInvalid("must be a list that is not empty", row=number, field=field)
    return value


def _from_sharegpt(turn: Any, number: int) -> Message:
    if isinstance(turn, dict) and "from" not in turn and "role" in turn:
        return turn  # a conversation of messages under ShareGPT's name
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES or turn.get("value") is None:
        raise DatasetInvalid(
            f"every turn needs a value and a from of {', '.join(_SHAREGPT_ROLES)}", row=number, field="conversations"
        )
    return {"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]}


def _alpaca_prompt(record: Mapping[str, Any], number: int) -> str:
    parts = []
    for name in ("instruction", "input"):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise DatasetInvalid("must be a string", row=number, field=name)
        parts += [value] if value else []
    # A line break parts the prompt from the answer too, or the two would run into one word.
    return "".join(f"{part}\n" for part in parts)


def _has_content(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _same_form(left: Text, right: Text, field: str, number: int) -> None:
    if isinstance(left, str) is not isinstance(right, str):
        raise DatasetInvalid("strings and messages are mixed in one row", row=number, field=field)


def _tools(value: Any, number: int) -> list[Any] | None:
    if isinstance(value, str):
        value = _json(value, "tools", number) if value.strip() else None
    if value is not None and not isinstance(value, list):
        raise DatasetInvalid("must be a list", row=number, field="tools")
    _encodable(value, "tools", number)
    return value or None


def _template_arguments(value: Any, number: int) -> dict[str, Any] | None:
    field = "chat_template_kwargs"
    if isinstance(value, str):
        value = _json(value, field, number) if value.strip() else None
    if value is not None and not isinstance(value, dict):
        raise DatasetInvalid("must be an object", row=number, field=field)
    taken = sorted(_TEMPLATE_ARGUMENTS.intersection(value or ()))
    if taken:
        raise DatasetInvalid(f"{taken[0]} is not a row's to set", row=number, field=field)
    _encodable(value, field, number)
    return value or None


def _json(value: str, field: str, number: int) -> Any:
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DatasetInvalid("is not JSON", row=number, field=field) from error
    if nested_too_deeply(parsed):
        raise DatasetInvalid("is nested too deeply", row=number, field=field)
    return parsed


def _encodable(value: Any, field: str, number: int) -> None:
    """Refuse what no tokenizer takes and what JSON has no way to write."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False, default=str)
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DatasetInvalid("holds half of a surrogate pair, which is no text", row=number, field=field) from error
    except ValueError as error:
        raise DatasetInvalid("holds NaN or an infinity, which is no JSON", row=number, field=field) from error
    except TypeError as error:
        raise DatasetInvalid("holds a key that is no string", row=number, field=field) from error


def nested_too_deeply(value: Any) -> bool:
    """Return whether lists and objects are nested deeper than a row may be."""
    level = [value]
    for _ in range(_MAX_NESTING):
        inner = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [child for children in inner for child in children]
        if not level:
            return False
    return True


def columns_known(columns: Iterable[str]) -> None:
    """Raise `DatasetInvalid` if a mapping names a column of ours that does not exist."""
    unknown = sorted(set(columns) - COLUMNS)
    if unknown:
        raise DatasetInvalid(f"unknown column in the mapping; known are {', '.join(sorted(COLUMNS))}", field=unknown[0])

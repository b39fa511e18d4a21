"""One row of a dataset: what kinds there are, and how a record's columns say which kind it is.

The kinds are TRL's, plus two widespread spellings that are rewritten on the way in: Alpaca (instruction, input,
output) becomes prompt and completion, ShareGPT (conversations of from and value) becomes messages.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from d2lora.errors import ChosenEqualsRejected, CompletionEmpty, DatasetInvalid, SchemaMixed, SchemaUnknown

Message = dict[str, Any]
"""``role`` and ``content``, and whatever else the model's chat template understands."""
Text = str | list[Message]


class RowSchema(StrEnum):
    """The kinds of rows; a dataset has one."""

    TEXT = "text"
    PROMPT_COMPLETION = "prompt_completion"
    MESSAGES = "messages"
    PREFERENCE = "preference"

    @property
    def objectives(self) -> list[str]:
        """Types of the objectives that rows of this kind allow."""
        return ["sft", "dpo", "orpo"] if self is RowSchema.PREFERENCE else ["sft"]


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


Row = TextRow | PromptCompletionRow | MessagesRow | PreferenceRow

_COLUMNS: dict[RowSchema, tuple[str, ...]] = {
    RowSchema.PREFERENCE: ("chosen", "rejected"),
    RowSchema.PROMPT_COMPLETION: ("prompt", "completion"),
    RowSchema.MESSAGES: ("messages",),
    RowSchema.TEXT: ("text",),
}
_OPTIONAL = ("prompt", "tools", "chat_template_kwargs")
COLUMNS = frozenset(name for names in (*_COLUMNS.values(), _OPTIONAL) for name in names)
"""Our names of columns: what a mapping may map."""

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def schema_of(record: Mapping[str, Any]) -> RowSchema | None:
    """Return the kind of a record by its columns, after `normalize`; None if they fit no kind."""
    return next((schema for schema, names in _COLUMNS.items() if all(_filled(record, name) for name in names)), None)


def normalize(record: Mapping[str, Any], columns: Mapping[str, str], number: int) -> dict[str, Any]:
    """Return the record under our column names.

    Raises:
        SchemaUnknown: a mapped column is missing.
        DatasetInvalid: a ShareGPT turn is malformed.
    """
    for theirs in columns.values():
        if theirs not in record:
            raise SchemaUnknown("the mapped column is missing", row=number, field=theirs)
    mapped = {name: value for name, value in record.items() if name not in columns.values()}
    mapped |= {ours: record[theirs] for ours, theirs in columns.items()}
    if schema_of(mapped) is not None:
        return mapped
    if _filled(mapped, "conversations"):
        mapped["messages"] = [
            _from_sharegpt(turn, number) for turn in _list(mapped["conversations"], "conversations", number)
        ]
    elif _filled(mapped, "instruction") and "output" in mapped:
        extra = mapped.get("input") or ""
        mapped["prompt"] = f"{mapped['instruction']}\n{extra}" if extra else mapped["instruction"]
        mapped["completion"] = mapped["output"]
    return mapped


def parse_row(record: Mapping[str, Any], schema: RowSchema | None, number: int) -> Row:
    """Return the row that a normalized record holds; ``schema`` is that of the rows before it, if there are any.

    Raises:
        SchemaUnknown, SchemaMixed, CompletionEmpty, ChosenEqualsRejected, DatasetInvalid: naming row and field.
    """
    own = schema_of(record)
    if own is None:
        raise _no_schema(record, schema, number)
    if schema is not None and own is not schema:
        raise SchemaMixed(f"this row is {own}, the rows before it are {schema}", row=number)
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
        case RowSchema.PROMPT_COMPLETION:
            prompt = _text(record["prompt"], "prompt", number)
            completion = _completion(record["completion"], "completion", number)
            _same_form(prompt, completion, "completion", number)
            return PromptCompletionRow(prompt, completion, **extras)
        case RowSchema.PREFERENCE:
            return _preference(record, extras, number)


def _no_schema(record: Mapping[str, Any], schema: RowSchema | None, number: int) -> DatasetInvalid:
    """Return what is wrong with a record that fits no kind of row."""
    if schema is not None:
        # A row of the dataset's kind with one column empty is told about that column, not about its kind.
        for name in _COLUMNS[schema]:
            if name in record and record[name] is None:
                return DatasetInvalid("is null", row=number, field=name)
    wanted = "; ".join(" and ".join(names) for names in _COLUMNS.values())
    names = ", ".join(sorted(map(str, record))) or "none"
    return SchemaUnknown(f"columns {names[:200]} fit no kind of row ({wanted}); give a column mapping", row=number)


def _preference(record: Mapping[str, Any], extras: dict[str, Any], number: int) -> PreferenceRow:
    prompt = _text(record["prompt"], "prompt", number) if record.get("prompt") is not None else None
    chosen = _completion(record["chosen"], "chosen", number)
    rejected = _completion(record["rejected"], "rejected", number)
    _same_form(chosen, rejected, "rejected", number)
    if prompt is not None:
        _same_form(prompt, chosen, "chosen", number)
    if chosen == rejected:
        raise ChosenEqualsRejected("chosen and rejected are equal", row=number, field="rejected")
    return PreferenceRow(prompt, chosen, rejected, **extras)


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
    messages = _list(value, field, number)
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DatasetInvalid("every message needs a role", row=number, field=field)
        if "content" not in message and "tool_calls" not in message:
            raise DatasetInvalid("every message needs content", row=number, field=field)
        _encodable(json.dumps(message, ensure_ascii=False, default=str), field, number)
    return messages


def _list(value: Any, field: str, number: int) -> list[Any]:
    if isinstance(value, str):  # a CSV cell
        value = _json(value, field, number)
    if not isinstance(value, list) or not value:
        raise DatasetInvalid("must be a list that is not empty", row=number, field=field)
    return value


def _from_sharegpt(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or "value" not in turn or turn.get("from") not in _SHAREGPT_ROLES:
        raise DatasetInvalid(
            f"every turn needs a value and a from of {', '.join(_SHAREGPT_ROLES)}", row=number, field="conversations"
        )
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}


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
    return value or None


def _template_arguments(value: Any, number: int) -> dict[str, Any] | None:
    if isinstance(value, str):
        value = _json(value, "chat_template_kwargs", number) if value.strip() else None
    if value is not None and not isinstance(value, dict):
        raise DatasetInvalid("must be an object", row=number, field="chat_template_kwargs")
    return value or None


def _json(value: str, field: str, number: int) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DatasetInvalid("is not JSON", row=number, field=field) from error


def _encodable(value: str, field: str, number: int) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise DatasetInvalid("holds half of a surrogate pair, which is no text", row=number, field=field) from error


def columns_known(columns: Iterable[str]) -> None:
    """Raise `DatasetInvalid` if a mapping names a column of ours that does not exist."""
    unknown = sorted(set(columns) - COLUMNS)
    if unknown:
        raise DatasetInvalid(f"unknown column in the mapping; known are {', '.join(sorted(COLUMNS))}", field=unknown[0])

"""From rows to tokens, once for all objectives as TRL's DPO and SFT trainers do.

The prompt is tokenized alone and together with each completion; the completion begins where the token sequences
part. Plain strings end with the end-of-sequence token, conversations go through the model's own chat template.

Truncation: a sequence longer than ``max_length`` loses tokens at its end (TRL's ``keep_start``). A row is dropped when
its prompt alone fills ``max_length`` in either sequence, when the chat template does not show which tokens are the
completion's, or when chosen and rejected are equal as tokens, before truncation or after; each reason is counted,
nothing is silent.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

from transformers import PreTrainedTokenizerBase

from d2lora.errors import RequestInvalid, RowsTooLong
from d2lora.initializations import Objective, Sft
from d2lora.rows import (
    Message,
    MessagesRow,
    PreferenceRow,
    PromptCompletionRow,
    Row,
    Text,
    TextRow,
    UnpairedPreferenceRow,
)
from d2lora.supervision import Supervision, supervision_of


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and a completion as one sequence."""

    input_ids: list[int]
    completion_mask: list[bool]
    """True where a token is learned; never at the first position, which nothing predicts."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row, ready for the model."""

    digest: str
    """sha256 over the tokens and masks, and the label; equal rows have equal digests."""
    chosen: TokenSequence
    rejected: TokenSequence | None
    desirable: bool | None = None
    """The label, of rows that have one; their completion is then ``chosen``, whatever it says."""

    @property
    def supervision(self) -> Supervision:
        """What the row says of its completions."""
        return supervision_of(paired=self.rejected is not None, labeled=self.desirable is not None)

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return max(len(self.chosen.input_ids), len(self.rejected.input_ids) if self.rejected else 0)


@dataclass(frozen=True)
class Encoded:
    """All rows of a dataset, and what became of those that are not among them."""

    examples: list[Example]
    rows_read: int
    truncated: int
    dropped: dict[str, int]
    """Reason -> number of rows."""


def encode_rows(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> Encoded:
    """Return the rows as tokens.

    Raises:
        RequestInvalid: conversations, but the model has no chat template or its template refuses them.
        RowsTooLong: no row is left, or none of a label.
        DatasetInvalid: from the iterator itself.
    """
    examples, truncated, read = [], 0, 0
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows, start=1):
        read = number
        sequences = _sequences(row, tokenizer, number)
        cut = [_cut(sequence, max_length) for sequence in sequences]
        reason = _why_drop(sequences, cut)
        if reason is not None:
            dropped[reason] += 1
            continue
        truncated += any(len(sequence.input_ids) > max_length for sequence in sequences)
        rejected = cut[1] if len(cut) == 2 else None
        desirable = row.label if isinstance(row, UnpairedPreferenceRow) else None
        examples.append(Example(digest_of(cut, desirable), cut[0], rejected, desirable))
    missing = [label for label in (True, False) if {one.desirable for one in examples} == {not label}]
    if not examples or missing:
        what = f"row with label {str(missing[0]).lower()}" if missing else "row"
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise RowsTooLong(f"no {what} of {read} is left at max_length {max_length} ({reasons}); raise max_length")
    return Encoded(examples, read, truncated, dict(dropped))


def needed(examples: Sequence[Example], objectives: Sequence[Objective]) -> Sequence[Example]:
    """Return the examples without the sequences that no objective looks at: SFT alone needs no rejected ones.

    Digests are those of what is left, so that rows which now are equal count as one.
    """
    if not all(isinstance(objective, Sft) for objective in objectives):
        return examples
    return [
        replace(one, digest=digest_of([one.chosen], None), rejected=None) if one.rejected else one for one in examples
    ]


def _sequences(row: Row, tokenizer: PreTrainedTokenizerBase, number: int) -> list[TokenSequence]:
    """Return the chosen sequence and, for preferences, the rejected one, at full length."""
    match row:
        case TextRow(text=text):
            ids = _tokenize(tokenizer, _with_end(text, tokenizer))
            return [_masked(ids, 1)]
        case (
            PromptCompletionRow(prompt=prompt, completion=completion)
            | UnpairedPreferenceRow(prompt=prompt, completion=completion)
        ):
            return _after_prompt(prompt, [completion], tokenizer, _template(row), number)
        case PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected):
            if prompt is None:
                prompt, chosen, rejected = _implicit_prompt(chosen, rejected)
            return _after_prompt(prompt, [chosen, rejected], tokenizer, _template(row), number)
        case MessagesRow(messages=messages):
            return [_conversation(messages, tokenizer, _template(row), number)]
        case _:
            assert_never(row)


def _template(row: PromptCompletionRow | PreferenceRow | MessagesRow | UnpairedPreferenceRow) -> dict[str, Any]:
    return {"tools": row.tools, **(row.chat_template_kwargs or {})}


def _after_prompt(
    prompt: Text, completions: list[Text], tokenizer: PreTrainedTokenizerBase, template: dict[str, Any], number: int
) -> list[TokenSequence]:
    if isinstance(prompt, str):
        prompt_ids = _tokenize(tokenizer, prompt)
        wholes = [_tokenize(tokenizer, prompt + _with_end(str(text), tokenizer)) for text in completions]
    else:
        prompt_ids = _apply_template(tokenizer, prompt, template, number, add_generation_prompt=True)
        wholes = [_apply_template(tokenizer, [*prompt, *text], template, number) for text in completions]
    start = min(_common_prefix(prompt_ids, whole) for whole in wholes)
    return [_masked(whole, start) for whole in wholes]


def _implicit_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Return what two completions begin with, and the rest of each; a space goes to the completions."""
    shared = _common_prefix(chosen, rejected)
    shorter = min(len(chosen), len(rejected))
    # If one is the other's beginning, something has to remain of it.
    if shared == shorter or (shared and chosen[shared - 1] == " "):
        shared -= 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _conversation(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, template: dict[str, Any], number: int
) -> TokenSequence:
    """Return a conversation whose assistant turns are learned.

    A template with generation blocks marks them itself. Otherwise the conversation is rendered up to each turn: the
    turn begins where the conversation before it, with the prompt for a reply, parts from the whole one, and ends as
    `_turn_end` says. If a turn is not found, no token is learned, and the row is dropped and counted.
    """
    if _marks_turns(tokenizer, template):
        encoded = _apply_template(tokenizer, messages, template, number, with_mask=True)
        ids, mask = list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]
        return TokenSequence(ids, [False, *mask[1:]])
    ids = _apply_template(tokenizer, messages, template, number)
    mask = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = (
            _apply_template(tokenizer, messages[:turn], template, number, add_generation_prompt=True) if turn else []
        )
        after = _apply_template(tokenizer, messages[: turn + 1], template, number)
        start = _common_prefix(before, ids)
        end = _turn_end(after, ids, start, message, tokenizer)
        if end is None:
            return TokenSequence(ids, [False] * len(ids))
        mask[start:end] = [True] * (end - start)
    return TokenSequence(ids, [False, *mask[1:]])


def _marks_turns(tokenizer: PreTrainedTokenizerBase, template: dict[str, Any]) -> bool:
    try:
        # A tokenizer may have several templates, one of them for conversations with tools.
        text = tokenizer.get_chat_template(tools=template.get("tools"))
    except ValueError:  # there is none, which applying it will tell
        return False
    return re.search(r"\{%-?\s*generation", text) is not None


def _turn_end(
    after: list[int], ids: list[int], start: int, message: Message, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Return where a turn that begins at ``start`` ends in the whole conversation ``ids``.

    ``after`` is the conversation that ends with the turn. Most often the whole one begins with it. But a template may
    write a turn otherwise once others follow: without its thoughts, so that only the turn's last tokens are the same,
    or with another end, so that all but its last tokens are. None if what the turn says is in neither.
    """
    shared = _common_prefix(after, ids)
    if shared == len(after):
        return shared
    longest = min(len(after), len(ids) - start)
    tail = next((length for length in range(longest, 0, -1) if after[-length:] == ids[start : start + length]), 0)
    end = max(shared, start + tail)
    said = message.get("content")
    # No more than the last word's end: what comes before may be thoughts, and spaces are not kept by every tokenizer.
    ending = said.split()[-1][-4:] if isinstance(said, str) and said.strip() else ""
    return end if ending in str(tokenizer.decode(ids[start:end])) else None


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    template: dict[str, Any],
    number: int,
    *,
    add_generation_prompt: bool = False,
    with_mask: bool = False,
) -> Any:
    """Return token ids, or the whole encoding with assistant masks."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestInvalid("base_model: it has no chat template, and the rows are conversations; use plain strings")
    try:
        encoded = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=with_mask,
            **template,
        )
    except Exception as error:  # templates raise whatever their author chose
        raise RequestInvalid(f"row {number}: the model's chat template refuses the conversation") from error
    return encoded if with_mask else list(encoded["input_ids"])


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, verbose=False)["input_ids"])


def _with_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    end = tokenizer.eos_token
    return text if not isinstance(end, str) or text.endswith(end) else text + end


def _masked(ids: list[int], start: int) -> TokenSequence:
    start = max(start, 1)
    return TokenSequence(ids, [False] * min(start, len(ids)) + [True] * max(0, len(ids) - start))


def _cut(sequence: TokenSequence, max_length: int) -> TokenSequence:
    return TokenSequence(sequence.input_ids[:max_length], sequence.completion_mask[:max_length])


def _why_drop(sequences: list[TokenSequence], cut: list[TokenSequence]) -> str | None:
    """Return why a row is of no use, from its sequences at full length and cut to ``max_length``."""
    if not all(any(sequence.completion_mask) for sequence in sequences):
        return "completion_not_found"
    if not all(any(sequence.completion_mask) for sequence in cut):
        return "prompt_fills_max_length"
    if len(cut) == 2 and cut[0].input_ids == cut[1].input_ids:
        return "chosen_equals_rejected_as_tokens"
    return None


def digest_of(sequences: Sequence[TokenSequence], desirable: bool | None) -> str:  # noqa: FBT001  # a row's label
    """Return the sha256 over a row's tokens and masks, and its label."""
    content: list[Any] = [(sequence.input_ids, sequence.completion_mask) for sequence in sequences]
    return hashlib.sha256(repr([*content, *([] if desirable is None else [desirable])]).encode()).hexdigest()


def _common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    length = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        length += 1
    return length

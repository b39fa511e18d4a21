import copy
import random
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2lora.errors import RequestInvalid, RowsTooLong
from d2lora.rows import MessagesRow, PreferenceRow, PromptCompletionRow, TextRow, UnpairedPreferenceRow
from tests.support.reference import ReferenceRow
from tests.support.tokenizers import CHATML, CHATML_WITH_GENERATION, bpe_tokenizer
from tests.unit.worker.conftest import as_examples, labeled_rows, reference_rows
from worker.batches import assign_folds, distinct_rows, make_batches
from worker.data import encode_rows

USER = {"role": "user", "content": "what color is the sky?"}
BLUE = {"role": "assistant", "content": "it is blue."}
FOUR = {"role": "assistant", "content": "four."}

PROMPT_COMPLETION = [
    {"prompt": "what is two plus two? ", "completion": "four."},
    {"prompt": "the quick brown", "completion": " fox jumps"},
    {"prompt": "the quick bro", "completion": "wn fox"},  # tokens merge across the boundary
]
CONVERSATIONS = [{"prompt": [USER], "completion": [BLUE]}, {"prompt": [USER, FOUR, USER], "completion": [BLUE]}]
PREFERENCES = [
    {"prompt": "what is two plus two? ", "chosen": "four.", "rejected": "blue is the sky"},
    {"prompt": "the quick bro", "chosen": "wn fox", "rejected": "ther dog"},
]
CHAT_PREFERENCES = [{"prompt": [USER], "chosen": [BLUE], "rejected": [FOUR]}]
IMPLICIT = [
    {"chosen": "the sky is blue", "rejected": "the sky is lazy"},
    {"chosen": "the sky is", "rejected": "the sky is blue"},
    {"chosen": "the sky is blue", "rejected": "the sky "},
    {"chosen": "fox jumps", "rejected": "dog jumps"},
]
CHAT_IMPLICIT = [{"chosen": [USER, BLUE], "rejected": [USER, FOUR]}]
MESSAGES = [{"messages": [USER, BLUE, USER, FOUR]}]


def encode(rows, tokenizer, *, max_length=1000):
    kinds = {"messages": MessagesRow, "text": TextRow, "completion": PromptCompletionRow}
    kinds = {"label": UnpairedPreferenceRow, **kinds}
    kind = next((kinds[name] for name in kinds if name in rows[0]), PreferenceRow)
    return encode_rows(
        [kind(**{"prompt": None, **row} if kind is PreferenceRow else row) for row in rows],
        tokenizer,
        max_length=max_length,
    )


LABELED = [
    {"prompt": "the quick bro", "completion": "wn fox", "label": True},
    {"prompt": "the quick bro", "completion": "ther dog", "label": False},
    {"prompt": "what is two plus two? ", "completion": "blue is the sky", "label": False},
]
CHAT_LABELED = [{"prompt": [USER], "completion": [reply], "label": reply is BLUE} for reply in (BLUE, FOUR)]


def learned(sequence):
    return sequence.completion_mask[1:]


def learned_by_trl(row):
    """Nothing predicts the first token, so what its label says is of no consequence."""
    return [label != -100 for label in row["labels"]][1:]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """TRL's own preparation of datasets: functions from (rows, tokenizer) to tokenized rows."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from tests.support.models import tiny_llama

    model = tiny_llama(layers=1).requires_grad_(True)
    model.resize_token_embeddings(400)
    out = str(tmp_path_factory.mktemp("trl"))
    plain = {"output_dir": out, "report_to": [], "use_cpu": True}

    def sft(rows, tokenizer, *, max_length=1000, **arguments):
        tokenizer.pad_token = tokenizer.eos_token
        config = SFTConfig(**plain, max_length=max_length, **arguments)
        return list(
            SFTTrainer(
                model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
            ).train_dataset
        )

    def dpo(rows, tokenizer, *, max_length=1000):
        tokenizer.pad_token = tokenizer.eos_token
        config = DPOConfig(**plain, max_length=max_length)
        return list(
            DPOTrainer(
                model,
                ref_model=copy.deepcopy(model),
                args=config,
                train_dataset=Dataset.from_list(rows),
                processing_class=tokenizer,
            ).train_dataset
        )

    return sft, dpo


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("rows", [PROMPT_COMPLETION, CONVERSATIONS], ids=["strings", "conversations"])
def test_prompts_and_completions_are_tokenized_as_trl_does(trainers, rows, begins):
    tokenizer = bpe_tokenizer(chat_template=CHATML, begins=begins)

    ours = encode(rows, tokenizer).examples

    for example, theirs in zip(ours, trainers[0](rows, tokenizer), strict=True):
        assert example.chosen.input_ids == theirs["input_ids"]
        assert learned(example.chosen) == learned_by_trl(theirs)


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize(
    "rows",
    [PREFERENCES, CHAT_PREFERENCES, IMPLICIT, CHAT_IMPLICIT],
    ids=["strings", "chat", "implicit", "chat-implicit"],
)
def test_preferences_are_tokenized_as_trl_does(trainers, rows, begins):
    tokenizer = bpe_tokenizer(chat_template=CHATML, begins=begins)

    ours = encode(rows, tokenizer).examples

    for example, theirs in zip(ours, trainers[1](rows, tokenizer), strict=True):
        prompt = theirs["prompt_ids"]
        for sequence, completion in ((example.chosen, "chosen_ids"), (example.rejected, "rejected_ids")):
            assert sequence.input_ids == prompt + theirs[completion]
            learned = [False] * len(prompt) + [True] * len(theirs[completion])
            assert sequence.completion_mask == [False, *learned[1:]]  # nothing predicts the first token


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
@pytest.mark.parametrize("rows", [LABELED, CHAT_LABELED], ids=["strings", "conversations"])
def test_labeled_rows_are_tokenized_as_trl_does(rows, tmp_path):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from tests.support.models import tiny_llama

    tokenizer = bpe_tokenizer(chat_template=CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    model = tiny_llama(layers=1)
    model.resize_token_embeddings(400)
    config = KTOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    dataset = Dataset.from_list(rows)
    theirs = KTOTrainer(
        model, ref_model=copy.deepcopy(model), args=config, train_dataset=dataset, processing_class=tokenizer
    ).train_dataset

    ours = encode(rows, tokenizer).examples

    for example, row in zip(ours, theirs, strict=True):
        assert example.chosen.input_ids == row["prompt_ids"] + row["completion_ids"]
        assert example.chosen.completion_mask == [False] * len(row["prompt_ids"]) + [True] * len(row["completion_ids"])
        assert example.desirable is row["label"]


def test_a_label_of_which_no_row_is_left_is_named():
    rows = [LABELED[0], {**LABELED[2], "prompt": "the quick brown fox jumps over the lazy dog " * 3}]

    with pytest.raises(RowsTooLong, match="no row with label false of 2 is left at max_length 20"):
        encode(rows, bpe_tokenizer(), max_length=20)


@given(seed=st.integers(0, 99), size=st.integers(2, 40))
@settings(max_examples=30)
def test_every_fold_has_both_labels_while_there_are_enough_rows_of_each(seed, size):
    examples = as_examples(labeled_rows(size, seed=seed))
    count = min(4, distinct_rows(examples))

    folds = assign_folds(examples, folds=count, seed=seed)

    assert distinct_rows(examples) <= sum(example.desirable for example in examples)
    for label in (True, False):
        assert {fold for fold, one in zip(folds, examples, strict=True) if one.desirable is label} == set(range(count))


def test_labels_follow_their_rows_into_batches_and_halves():
    examples = as_examples(labeled_rows(9))
    for batch in make_batches(examples, [0] * 9, max_tokens=100, pad_token_id=0):
        parts = [batch, *(batch.halves() if len(batch.rows) > 1 else [])]
        for part in parts:
            assert part.desirable.tolist() == [examples[row].desirable for row in part.rows]
            assert part.supervision == "label"


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
def test_assistant_turns_are_masked_as_the_template_says(trainers):
    tokenizer = bpe_tokenizer(chat_template=CHATML_WITH_GENERATION)

    (ours,) = encode(MESSAGES, tokenizer).examples

    (theirs,) = trainers[0](MESSAGES, tokenizer, assistant_only_loss=True)
    assert ours.chosen.input_ids == theirs["input_ids"]
    assert learned(ours.chosen) == learned_by_trl(theirs)


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
def test_plain_text_is_tokenized_as_trl_does(trainers):
    rows, tokenizer = [{"text": "the lazy dog"}, {"text": "four.</s>"}], bpe_tokenizer(begins=True)

    ours = encode(rows, tokenizer).examples

    for example, theirs in zip(ours, trainers[0](rows, tokenizer), strict=True):
        assert example.chosen.input_ids == theirs["input_ids"]
        assert learned(example.chosen) == learned_by_trl(theirs)


LONG = [
    {"prompt": "the", "completion": " dog"},
    {"prompt": "the", "completion": " quick brown fox jumps over the lazy dog" * 3},
    {"prompt": "the quick brown fox jumps over the lazy dog", "completion": " yes"},
]


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
@pytest.mark.parametrize("max_length", [4, 8, 9, 10, 30])
def test_long_rows_are_cut_and_dropped_as_trl_does(trainers, max_length):
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": "? no"} for r in LONG
    ]  # differs from its first token
    tokenizer = bpe_tokenizer()

    ours = encode(LONG, tokenizer, max_length=max_length).examples
    our_pairs = encode(pairs, tokenizer, max_length=max_length).examples

    theirs = trainers[0](LONG, tokenizer, max_length=max_length)
    their_pairs = trainers[1](pairs, tokenizer, max_length=max_length)
    assert [example.chosen.input_ids for example in ours] == [row["input_ids"] for row in theirs]
    assert [learned(example.chosen) for example in ours] == [learned_by_trl(row) for row in theirs]
    assert [example.chosen.input_ids for example in our_pairs] == [
        (row["prompt_ids"] + row["chosen_ids"])[:max_length] for row in their_pairs
    ]


@pytest.mark.filterwarnings("ignore")  # TRL's and datasets' own
def test_tools_and_template_arguments_are_passed_on_as_trl_does(trainers):
    template = "{{ style }}{% for tool in tools or [] %}{{ tool.name }}{% endfor %}" + CHATML
    extras = {"tools": [{"name": "question"}], "chat_template_kwargs": {"style": "brown"}}
    tokenizer = bpe_tokenizer(chat_template=template)

    (ours,) = encode([{**CONVERSATIONS[0], **extras}], tokenizer).examples

    (theirs,) = trainers[0]([{**CONVERSATIONS[0], **extras}], tokenizer)
    assert tokenizer.decode(ours.chosen.input_ids).startswith("brownquestion<|im_start|>")
    assert ours.chosen.input_ids == theirs["input_ids"]
    assert learned(ours.chosen) == learned_by_trl(theirs)


SKY, PLUS = USER, {"role": "user", "content": "what is two plus two?"}
CONVERSATION = [SKY, BLUE, PLUS, FOUR]


def trl_template(name):
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


def learned_text(example, tokenizer):
    sequence = example.chosen
    kept = zip(sequence.input_ids, sequence.completion_mask, strict=True)
    return tokenizer.decode([token for token, is_learned in kept if is_learned])


@pytest.mark.parametrize(
    "name", ["cohere2", "gemma", "gemma3", "idefics3", "llama3", "phi3", "phi3_5", "qwen2_5_vl", "qwen3_instruct_2507"]
)
def test_assistant_turns_are_found_where_trls_marked_templates_have_them(name):
    plain = bpe_tokenizer(chat_template=trl_template(name))
    marked = bpe_tokenizer(chat_template=trl_template(f"{name}_training"))

    (ours,) = encode([{"messages": CONVERSATION}], plain, max_length=10_000).examples

    theirs = marked.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    assert ours.chosen.input_ids == theirs["input_ids"]
    assert learned(ours.chosen) == [bool(flag) for flag in theirs["assistant_masks"]][1:]


def test_a_turn_that_loses_its_thoughts_once_others_follow_is_learned_without_them():
    thoughts = {"role": "assistant", "content": "<think>\nlazy\n</think>\n\nit is blue."}
    tokenizer = bpe_tokenizer(chat_template=trl_template("qwen3"))

    bare, thinking = encode([{"messages": [SKY, turn, PLUS, FOUR]} for turn in (BLUE, thoughts)], tokenizer).examples

    expected = "it is blue.<|im_end|>\n<think>\n\n</think>\n\nfour.<|im_end|>\n"
    assert learned_text(bare, tokenizer) == learned_text(thinking, tokenizer) == expected


def test_a_turn_that_the_template_leaves_out_makes_the_row_dropped_and_counted():
    only_the_last = (
        "{% for message in messages %}{{ message.role }}: "
        "{{ message.content if loop.last or message.role == 'user' else '-' }}\n{% endfor %}"
    )
    rows = [{"messages": CONVERSATION}, {"messages": [SKY, BLUE]}]

    encoded = encode(rows, bpe_tokenizer(chat_template=only_the_last))

    assert len(encoded.examples) == 1
    assert encoded.dropped == {"completion_not_found": 1}


def test_marks_are_looked_for_in_the_template_that_tools_choose():
    content_only = CHATML_WITH_GENERATION.replace("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n")
    tokenizer = bpe_tokenizer(chat_template={"default": CHATML, "tool_use": content_only})

    (example,) = encode([{**MESSAGES[0], "tools": [{"name": "f"}]}], tokenizer).examples

    assert tokenizer.decode(example.chosen.input_ids).startswith("tools: 1")
    assert learned_text(example, tokenizer) == "it is blue.four."


def test_a_conversation_that_the_template_refuses_is_named_and_not_quoted():
    template = "{{ raise_exception('no: ' ~ messages[0].content) }}"
    rows = [{"messages": [{"role": "user", "content": "a secret"}, BLUE]}]

    with pytest.raises(RequestInvalid, match="row 1: the model's chat template refuses") as caught:
        encode(rows, bpe_tokenizer(chat_template=template))

    assert "a secret" not in str(caught.value)


def test_without_generation_blocks_each_assistant_turn_is_what_it_adds_to_the_conversation():
    tokenizer = bpe_tokenizer(chat_template=CHATML)

    (example,) = encode(MESSAGES, tokenizer).examples

    ids = [i for i, learned in zip(example.chosen.input_ids, example.chosen.completion_mask, strict=True) if learned]
    assert tokenizer.decode(ids) == "it is blue.<|im_end|>\nfour.<|im_end|>\n"


def test_tools_reach_the_template():
    tokenizer = bpe_tokenizer(chat_template=CHATML_WITH_GENERATION)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}

    (example,) = encode([{**MESSAGES[0], "tools": [tool, tool]}], tokenizer).examples

    assert tokenizer.decode(example.chosen.input_ids).startswith("tools: 2")


def test_plain_text_is_learned_from_its_second_token_and_ends():
    tokenizer = bpe_tokenizer(begins=True)

    (example,) = encode([{"text": "the lazy dog"}], tokenizer).examples

    assert example.chosen.input_ids[-1] == tokenizer.eos_token_id
    assert example.chosen.completion_mask == [False] + [True] * (len(example.chosen.input_ids) - 1)


def test_conversations_without_a_chat_template_are_refused():
    with pytest.raises(RequestInvalid, match="chat template"):
        encode(CONVERSATIONS, bpe_tokenizer())


def test_long_rows_lose_their_end_and_are_counted():
    tokenizer = bpe_tokenizer()
    rows = [
        {"prompt": "the", "completion": " quick brown fox jumps over the lazy dog" * 3},
        {"prompt": "the", "completion": " dog"},
    ]

    encoded = encode(rows, tokenizer, max_length=10)

    assert [len(example.chosen.input_ids) for example in encoded.examples] == [10, 3]
    assert (encoded.rows_read, encoded.truncated, encoded.dropped) == (2, 1, {})


def test_rows_whose_prompt_fills_the_length_are_dropped_and_counted():
    tokenizer = bpe_tokenizer()
    rows = [
        {"prompt": "the quick brown fox jumps over the lazy dog", "completion": " yes"},
        {"prompt": "the", "completion": " dog"},
    ]

    encoded = encode(rows, tokenizer, max_length=5)

    assert len(encoded.examples) == 1
    assert encoded.dropped == {"prompt_fills_max_length": 1}


def test_pairs_that_become_equal_by_truncation_are_dropped_and_counted():
    tokenizer = bpe_tokenizer()
    same = "x" * 30
    rows = [
        {"prompt": "the", "chosen": same + "a", "rejected": same + "b"},
        {"prompt": "the", "chosen": "a", "rejected": "b"},
    ]

    encoded = encode(rows, tokenizer, max_length=10)

    assert encoded.dropped == {"chosen_equals_rejected_as_tokens": 1}


def test_text_of_one_token_has_nothing_that_is_predicted_and_is_counted():
    tokenizer = bpe_tokenizer()
    tokenizer.eos_token = None

    encoded = encode([{"text": "x"}, {"text": "the lazy dog"}], tokenizer)

    assert encoded.dropped == {"completion_not_found": 1}


def test_no_row_left_is_an_error_with_a_remedy():
    with pytest.raises(RowsTooLong, match="max_length 2"):
        encode(PROMPT_COMPLETION, bpe_tokenizer(), max_length=2)


rows_strategy = st.builds(
    reference_rows, st.integers(1, 20), paired=st.booleans(), seed=st.integers(0, 99), longest=st.integers(1, 12)
)


@settings(max_examples=40)
@given(
    rows=rows_strategy,
    copies=st.integers(1, 3),
    folds=st.integers(1, 5),
    seed=st.integers(0, 9),
    shuffle=st.integers(0, 99),
)
def test_folds_do_not_depend_on_order_and_keep_duplicates_together(rows, copies, folds, seed, shuffle):
    examples = as_examples(rows * copies)
    shuffled = random.Random(shuffle).sample(examples, len(examples))

    first = dict(zip((e.digest for e in examples), assign_folds(examples, folds=folds, seed=seed), strict=True))
    second = dict(zip((e.digest for e in shuffled), assign_folds(shuffled, folds=folds, seed=seed), strict=True))

    assert first == second
    sizes = [list(first.values()).count(fold) for fold in range(folds)]
    assert max(sizes) - min(sizes) <= 1


def test_rows_that_share_a_completion_are_not_held_out_from_each_other():
    alike = [
        ReferenceRow([5], [10], [20]),
        ReferenceRow([5], [10], [21]),  # the chosen one of the first
        ReferenceRow([5], [22], [21]),  # the rejected one of the second
        ReferenceRow([5], [30], [22]),  # what the third chooses
    ]
    others = [ReferenceRow([6 + n], [10], [20]) for n in range(3)]  # the same completions of other prompts
    examples = as_examples([*others, *alike])

    assert distinct_rows(examples) == 4
    for seed in range(9):
        folds = assign_folds(examples, folds=4, seed=seed)
        assert len(set(folds[3:])) == 1
        assert sorted({*folds}) == [0, 1, 2, 3]
        assert assign_folds(examples[::-1], folds=4, seed=seed) == folds[::-1]


def test_another_seed_makes_other_folds():
    examples = as_examples(reference_rows(20, paired=False))

    first, second = (assign_folds(examples, folds=4, seed=seed) for seed in (0, 1))

    assert first != second


@settings(max_examples=40)
@given(rows=rows_strategy, max_tokens=st.integers(1, 300), shuffle=st.integers(0, 99))
def test_batches_hold_every_row_once_within_the_limit_and_do_not_depend_on_order(rows, max_tokens, shuffle):
    examples = as_examples(rows)
    folds = assign_folds(examples, folds=3, seed=0)
    order = random.Random(shuffle).sample(range(len(rows)), len(rows))

    batches = make_batches(examples, folds, max_tokens=max_tokens, pad_token_id=0)
    again = make_batches([examples[i] for i in order], [folds[i] for i in order], max_tokens=max_tokens, pad_token_id=0)

    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(rows)))
    assert all(batch.input_ids.numel() <= max_tokens or len(batch.rows) == 1 for batch in batches)
    assert all({folds[row] for row in batch.rows} == {batch.fold} for batch in batches)
    assert all(torch.equal(one.input_ids, two.input_ids) for one, two in zip(batches, again, strict=True))
    assert all(torch.equal(one.completion_mask, two.completion_mask) for one, two in zip(batches, again, strict=True))


@settings(max_examples=40)
@given(rows=st.builds(reference_rows, st.integers(1, 8), paired=st.booleans(), seed=st.integers(0, 99)))
@pytest.mark.parametrize("max_tokens", [1, 40, 96])
def test_no_other_batches_have_fewer_padded_tokens_and_a_sixteenth_of_the_limit_each(rows, max_tokens):
    examples = as_examples(rows)

    batches = make_batches(examples, [0] * len(rows), max_tokens=max_tokens, pad_token_id=0)

    padded = sum(batch.input_ids.numel() for batch in batches)
    sizes = sorted(example.length * (2 if example.rejected else 1) for example in examples)
    assert padded + max_tokens // 16 * len(batches) == fewest_tokens(sizes, max_tokens)


def fewest_tokens(sizes, max_tokens):
    """Try every place where the first batch may end."""
    if not sizes:
        return 0
    ends = range(1, len(sizes) + 1)
    return min(
        end * sizes[end - 1] + max_tokens // 16 + fewest_tokens(sizes[end:], max_tokens)
        for end in ends
        if end == 1 or end * sizes[end - 1] <= max_tokens
    )


def test_labeled_rows_share_as_few_batches_as_hold_them():
    """So that KTO finds completions of other rows in the same batch."""
    examples = as_examples(labeled_rows(4))
    longest = max(example.length for example in examples)

    batches = make_batches(examples, [0] * 4, max_tokens=4 * longest, pad_token_id=0)

    assert len(batches) == 1


@pytest.mark.parametrize("paired", [True, False])
def test_halves_part_the_rows_and_never_a_pair(paired):
    rows = reference_rows(5, paired=paired)
    (batch,) = make_batches(as_examples(rows), [0] * 5, max_tokens=10_000, pad_token_id=0)

    left, right = batch.halves()

    assert left.rows + right.rows == batch.rows
    for half in (left, right):
        for position, row in enumerate(half.rows):
            chosen = half.input_ids[position][half.attention_mask[position].bool()].tolist()
            assert chosen == rows[row].prompt + rows[row].chosen
            if paired:
                other = position + len(half.rows)
                rejected = half.input_ids[other][half.attention_mask[other].bool()].tolist()
                assert rejected == rows[row].prompt + rows[row].rejected

import dataclasses

import pytest
import torch

from d2lora.initializations import Kto, Sft
from tests.support.models import as_base, tiny_gpt2, tiny_llama
from tests.support.reference import token_logps
from tests.unit.worker.conftest import labeled_rows, one_fold
from worker.mismatches import mismatched, score_for


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_mismatch_is_the_completion_of_the_row_before_it_after_the_rows_own_prompt(make):
    model = make()
    rows = [dataclasses.replace(row, prompt=row.prompt[:1] * (1 + index)) for index, row in enumerate(labeled_rows(6))]
    (batch,) = one_fold(rows)
    rows, width = [rows[index] for index in batch.rows], batch.input_ids.shape[1]

    scores = score_for([Kto()], as_base(model), batch)

    model = model.double()
    for index, row in enumerate(rows):
        completion = rows[index - 1].chosen[: width - len(row.prompt)]
        expected = token_logps(model, row.prompt, completion).sum().item()
        assert scores.mismatched_logps[index].item() == pytest.approx(expected, rel=1e-5)


def test_mismatches_are_no_wider_than_their_batch_and_keep_labels_and_places():
    (batch,) = one_fold(labeled_rows(9))

    other = mismatched(batch)

    assert other.input_ids.shape == batch.input_ids.shape
    assert (other.rows, other.fold) == (batch.rows, batch.fold)
    assert torch.equal(other.desirable, batch.desirable)
    assert other.completion_mask.any(1).all()
    assert not (other.completion_mask & ~other.attention_mask.bool()).any()


def test_a_row_that_is_alone_has_no_mismatch():
    (batch,) = one_fold(labeled_rows(1))

    assert score_for([Kto()], as_base(tiny_llama()), batch).mismatched_logps.tolist() == [0.0]


def test_only_kto_pays_for_mismatches():
    (batch,) = one_fold(labeled_rows(3))

    assert score_for([Sft()], as_base(tiny_llama()), batch).mismatched_logps is None

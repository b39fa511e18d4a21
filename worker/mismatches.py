"""Scores as the objectives need them, for KTO with completions after other rows' prompts.

Those tell how far a step moves what nothing in the data asks for; KTO measures a row's gain from that point
(arXiv:2402.01306, section 4.1). As in TRL's KTOTrainer, completions are rotated by one row within a batch: the last one
follows the first prompt, the first one the second prompt, and so on. Nothing is differentiated.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from d2lora.initializations import Objective
from worker.batches import Batch
from worker.models import BaseModel
from worker.objectives import Scores, needs_mismatches, needs_prompt
from worker.statistics import score


def score_for(objectives: Sequence[Objective], base: BaseModel, batch: Batch) -> Scores:
    """Return the rows' log-probabilities with all that the objectives' losses look at.

    A row that is alone in its batch has no other's completion; its mismatch is 0 under every model.

    Raises:
        NumericalFailure: a log-probability is not finite.
        OutOfMemory: a single row does not fit.
    """
    scores = score(base, batch, with_prompt=needs_prompt(objectives))
    if not needs_mismatches(objectives):
        return scores
    if len(batch.rows) == 1:
        return replace(scores, mismatched_logps=torch.zeros_like(scores.chosen_logps))
    return replace(scores, mismatched_logps=score(base, mismatched(batch)).chosen_logps)


def mismatched(batch: Batch) -> Batch:
    """Return every prompt with the completion of the row before it, the first with the last's.

    A sequence that becomes longer than the batch is wide loses tokens at its end.
    """
    input_ids, attention_mask = torch.full_like(batch.input_ids, 0), torch.zeros_like(batch.attention_mask)
    completion_mask = torch.zeros_like(batch.completion_mask)
    width = batch.input_ids.shape[1]
    for row in range(len(batch.rows)):
        own = batch.attention_mask[row].bool() & ~batch.completion_mask[row]
        prompt, completion = batch.input_ids[row][own], batch.input_ids[row - 1][batch.completion_mask[row - 1]]
        sequence = torch.cat([prompt, completion])[:width]
        input_ids[row, : len(sequence)] = sequence
        attention_mask[row, : len(sequence)] = 1
        completion_mask[row, len(prompt) : len(sequence)] = True
    return replace(batch, input_ids=input_ids, attention_mask=attention_mask, completion_mask=completion_mask)

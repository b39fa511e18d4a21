"""Our losses and gradients against TRL's own trainers, on the same rows and the same model."""

import copy
import types

import pytest
import torch

from d2lora.initializations import Dpo, Orpo
from tests.support.models import as_base, tiny_llama, tiny_tokenizer
from tests.unit.worker.conftest import one_fold, reference_rows
from worker.objectives import log_odds_ratio, row_losses
from worker.statistics import score

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its dependencies' own


@pytest.fixture(scope="module")
def model():
    return tiny_llama().double()


def trl_batch(rows):
    """The rows as TRL's preference collator lays them out."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    features = [{"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected} for row in rows]
    return DataCollatorForPreference(pad_token_id=0)(features)


def test_dpo_is_trls_whole_loss_away_from_the_reference(model, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = reference_rows(6, paired=True)
    moved = copy.deepcopy(model)
    for parameter in moved.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    config = DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False, max_length=64)
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = tiny_tokenizer()
    trainer = DPOTrainer(moved, ref_model=model, args=config, train_dataset=dataset, processing_class=tokenizer)

    theirs = trainer.compute_loss(moved, trl_batch(rows)).item()

    (batch,) = one_fold(rows)
    ours = row_losses(Dpo(beta=0.3), score(as_base(moved), batch), score(as_base(model), batch)).mean().item()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert abs(ours - torch.log(torch.tensor(2.0)).item()) > 1e-3  # not merely the start


def test_orpos_odds_ratio_term_is_trls(model, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    rows = reference_rows(6, paired=True)
    (batch,) = one_fold(rows)
    scores = score(as_base(model), batch)
    stand_in = types.SimpleNamespace(beta=0.7, accelerator=types.SimpleNamespace(device="cpu"))
    means = (scores.chosen_logps / scores.chosen_tokens, scores.rejected_logps / scores.rejected_tokens)

    theirs = ORPOTrainer.odds_ratio_loss(stand_in, *means)[0]

    ours = 0.7 * torch.nn.functional.logsigmoid(log_odds_ratio(scores))
    torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-5, atol=1e-8)


def test_orpos_whole_loss_is_trls_when_the_likelihood_covers_the_sequence(model, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    rows = reference_rows(6, paired=True)
    (batch,) = one_fold(rows)
    count, pad = len(rows), -100
    ids, mask = batch.input_ids, batch.attention_mask
    labels = ids.masked_fill(~batch.completion_mask, pad)
    laid_out = {
        "chosen_input_ids": ids[:count],
        "chosen_attention_mask": mask[:count],
        "chosen_labels": labels[:count],
        "rejected_input_ids": ids[count:],
        "rejected_attention_mask": mask[count:],
        "rejected_labels": labels[count:],
        "prompt_input_ids": ids[:count],
        "prompt_attention_mask": mask[:count],
    }
    stand_in = types.SimpleNamespace(
        beta=0.7,
        is_encoder_decoder=False,
        label_pad_token_id=pad,
        pad_token_id=0,
        padding_value=0,
        aux_loss_enabled=False,
        accelerator=types.SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
        concatenated_inputs=ORPOTrainer.concatenated_inputs,
        get_batch_logps=ORPOTrainer.get_batch_logps,
    )
    for name in ("concatenated_forward", "odds_ratio_loss"):
        setattr(stand_in, name, types.MethodType(getattr(ORPOTrainer, name), stand_in))

    theirs, _ = ORPOTrainer.get_batch_loss_metrics(stand_in, model, laid_out)

    scores = score(as_base(model), batch, with_prompt=True)
    ours = row_losses(Orpo(beta=0.7, nll="full_sequence"), scores, scores).mean().item()
    assert ours == pytest.approx(theirs.item(), rel=1e-5)

"""Our losses and gradients against TRL's own trainers, on the same rows and the same model."""

import copy
import dataclasses
import types

import pytest
import torch

from d2lora.initializations import Kto, Orpo
from tests.support.models import as_base, tiny_llama, tiny_tokenizer
from tests.support.reference import kto_loss, sft_loss
from tests.unit.worker.conftest import all_dpo_losses, labeled_rows, one_fold, reference_rows
from worker.gradients import DenseGradient
from worker.matrices import Shape, TestMatrices
from worker.mismatches import score_for
from worker.models import layer_sizes
from worker.objectives import bases_of, log_odds_ratio, objective_coefficients, row_losses
from worker.statistics import gather, score

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its dependencies' own


@pytest.fixture
def model():
    """A model of one's own: trainers replace its forward, and a copy would keep the replaced one."""
    return tiny_llama().double()


def trl_batch(rows):
    """The rows as TRL's preference collator lays them out."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    features = [{"prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected} for row in rows]
    return DataCollatorForPreference(pad_token_id=0)(features)


def dpo_trainer(policy, reference, tmp_path, **arguments):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_length=64,
        gradient_checkpointing=False,
        **arguments,
    )
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = tiny_tokenizer()
    return DPOTrainer(policy, ref_model=reference, args=config, train_dataset=dataset, processing_class=tokenizer)


def moved_from(model):
    moved = copy.deepcopy(model)
    for parameter in moved.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return moved


def trls_arguments(objective):
    return {
        "beta": objective.beta,
        "loss_type": [objective.loss_type],
        "label_smoothing": objective.label_smoothing or 0.0,
    }


@pytest.mark.parametrize("objective", all_dpo_losses(beta=0.3), ids=lambda objective: objective.loss_type)
def test_every_dpo_loss_is_trls_whole_loss_away_from_the_reference(model, tmp_path, objective):
    rows = reference_rows(6, paired=True)
    moved = moved_from(model)
    trainer = dpo_trainer(moved, model, tmp_path, **trls_arguments(objective))

    theirs = trainer.compute_loss(moved, trl_batch(rows)).item()

    (batch,) = one_fold(rows)
    base = score(as_base(model), batch)
    ours = row_losses(objective, score(as_base(moved), batch), base).mean().item()
    start = row_losses(objective, base, base).mean().item()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert abs(ours - start) > 1e-4 * start  # not merely the start


def trls_gradient(model, tmp_path, rows, **arguments):
    """Of TRL's loss by the projections' weights, at policy == reference, in one vector."""
    policy = copy.deepcopy(model)
    modules = {name: module for name, module in policy.named_modules() if name.endswith("_proj")}
    for module in modules.values():
        module.weight.requires_grad_()
    dpo_trainer(policy, model, tmp_path, **arguments).compute_loss(policy, trl_batch(rows)).backward()
    return {name: module.weight.grad for name, module in modules.items()}


@pytest.mark.parametrize("objective", all_dpo_losses(beta=0.3), ids=lambda objective: objective.loss_type)
def test_the_pass_gives_the_gradient_of_trls_dpo_loss_at_the_start(model, tmp_path, objective):
    rows, bases = reference_rows(6, paired=True), bases_of([objective])

    theirs = trls_gradient(model, tmp_path, rows, **trls_arguments(objective))

    matrices, base = TestMatrices(0, torch.device("cpu")), as_base(model)
    targets = {name: model.get_submodule(name) for name in theirs}
    layers = {
        name: DenseGradient.empty(Shape(*layer_sizes(module), 2), len(bases), matrices)
        for name, module in targets.items()
    }
    counts = gather(base, targets, layers, one_fold(rows), bases, on_batch=lambda *_: None)
    (coefficients,) = objective_coefficients([objective], bases, counts)
    for name, layer in layers.items():
        ours = torch.einsum("k,koi->oi", coefficients, layer.gradients.double())
        assert (ours - theirs[name]).norm() < 1e-4 * theirs[name].norm(), name


def test_trls_discopop_points_away_from_the_preference_at_the_start(model, tmp_path):
    rows = reference_rows(6, paired=True)
    sigmoid = trls_gradient(model, tmp_path, rows, beta=0.3)

    discopop = trls_gradient(model, tmp_path, rows, beta=0.3, loss_type=["discopop"])

    for name, gradient in discopop.items():
        cosine = torch.cosine_similarity(gradient.flatten(), sigmoid[name].flatten(), dim=0)
        assert cosine.item() == pytest.approx(-1.0, abs=1e-6)


def kto_trainer(policy, reference, tmp_path, **arguments):
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    config = KTOConfig(
        output_dir=str(tmp_path),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=8,
        **arguments,
    )
    dataset = Dataset.from_list([{"prompt": "a", "completion": "b", "label": bool(i % 2)} for i in range(4)])
    tokenizer = tiny_tokenizer()
    return KTOTrainer(policy, ref_model=reference, args=config, train_dataset=dataset, processing_class=tokenizer)


def trl_unpaired_batch(rows):
    """The rows as TRL's collator lays them out, with completions rotated as its preparation of datasets does."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    features = [
        {
            "prompt_ids": row.prompt,
            "completion_ids": row.chosen,
            "KL_completion_ids": rows[index - 1].chosen,
            "label": row.desirable,
        }
        for index, row in enumerate(rows)
    ]
    return DataCollatorForUnpairedPreference(pad_token_id=0)(features)


@pytest.mark.parametrize("scale", [0.02, -1.0], ids=["below zero", "above zero"])
def test_kto_is_trls_whole_loss_away_from_the_reference(model, tmp_path, scale):
    objective = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    # Of equal lengths, so that rows keep their order in our batch and no mismatched sequence is cut.
    rows = [dataclasses.replace(row, prompt=row.prompt[:1] * 4, chosen=(row.chosen * 5)[:5]) for row in labeled_rows(6)]
    (batch,) = one_fold(rows)
    rows = [rows[index] for index in batch.rows]
    moved = moved_from(model) if scale > 0 else copy.deepcopy(model)
    if scale < 0:  # a step towards all completions, so that the reference point is above 0
        for parameter in moved.parameters():
            parameter.requires_grad_()
        sft_loss(moved, rows).backward()
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter.requires_grad_(False).add_(parameter.grad, alpha=0.3 * scale)
                parameter.grad = None
    arguments = objective.model_dump(exclude={"type"})
    trainer = kto_trainer(moved, model, tmp_path, **arguments)

    theirs = trainer.compute_loss(moved, trl_unpaired_batch(rows)).item()

    base, stepped = (score_for([objective], as_base(one), batch) for one in (model, moved))
    ours = row_losses(objective, stepped, base).mean().item()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours == pytest.approx(kto_loss(moved, model, rows, **arguments).item(), rel=1e-6)
    point = (stepped.mismatched_logps - base.mismatched_logps).mean().item()
    assert point > 0.1 if scale < 0 else point < 0


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

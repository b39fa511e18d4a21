import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from d2lora.errors import NumericalFailure, OutOfMemory
from d2lora.initializations import Dpo, Kto, LoraSpec, Orpo, Sft
from tests.support.models import as_base, tiny_gpt2, tiny_llama
from tests.support.reference import dpo_loss, kto_loss, orpo_loss, sft_loss, weight_gradients
from tests.unit.worker.conftest import all_dpo_losses, labeled_rows, one_fold, reference_rows
from worker.checkpointing import activation_checkpointing
from worker.gradients import DenseGradient
from worker.matrices import Shape, TestMatrices
from worker.models import layer_sizes
from worker.objectives import bases_of, objective_coefficients
from worker.sketching import Sketch
from worker.statistics import Statistics, gather, score
from worker.targets import lora_config, resolve_targets

OBJECTIVES = [Sft(), Dpo(beta=0.3), Orpo(beta=0.7)]


def targets_of(model):
    config = lora_config(model, LoraSpec(r=2), base_model="tiny", revision=None)
    return resolve_targets(model, config)


def empty(targets, kind, *, bases=3, width=2):
    matrices = TestMatrices(0, torch.device("cpu"))
    return {name: kind.empty(Shape(*layer_sizes(module), width), bases, matrices) for name, module in targets.items()}


def gathered(model, rows, *, kind=DenseGradient, objectives=OBJECTIVES, max_tokens=10_000):
    base, targets = as_base(model), targets_of(model)
    bases = bases_of(objectives)
    layers = empty(targets, kind, bases=len(bases))
    batches = one_fold(rows, max_tokens=max_tokens)
    statistics = Statistics(layers, gather(base, targets, layers, batches, bases, on_batch=lambda *_: None))
    return statistics, objective_coefficients(objectives, bases, statistics.counts)


def assert_same_sums(left, right, tolerance=1e-4):
    for name in left.layers:
        for part, tensor in left.layers[name].tensors().items():
            other = right.layers[name].tensors()[part]
            torch.testing.assert_close(other, tensor, rtol=tolerance, atol=tolerance * tensor.abs().max().item())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("full_sequence", [False, True])
def test_one_pass_gives_autograds_gradients_of_all_objectives(make, full_sequence):
    model, rows = make(), reference_rows(7, paired=True)
    objectives = [Sft(), Dpo(beta=0.3), Orpo(beta=0.7, nll="full_sequence" if full_sequence else "completion")]

    statistics, coefficients = gathered(model, rows, objectives=objectives, max_tokens=60)

    losses = [
        lambda twin: sft_loss(twin, rows),
        lambda twin: dpo_loss(twin, model.double(), rows, beta=0.3),
        lambda twin: orpo_loss(twin, rows, beta=0.7, full_sequence=full_sequence),
    ]
    for row, loss in zip(coefficients, losses, strict=True):
        expected = weight_gradients(model, statistics.layers, loss)
        for name, layer in statistics.layers.items():
            ours = torch.einsum("k,koi->oi", row, layer.gradients.double())
            assert (ours - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_one_pass_gives_autograds_gradients_of_all_dpo_losses(make):
    model, rows, objectives = make(), reference_rows(7, paired=True), all_dpo_losses(beta=0.3)

    statistics, coefficients = gathered(model, rows, objectives=objectives, max_tokens=60)

    reference = model.double()
    for row, objective in zip(coefficients, objectives, strict=True):
        chosen = objective.model_dump(exclude={"type"})
        expected = weight_gradients(
            model, statistics.layers, lambda twin, chosen=chosen: dpo_loss(twin, reference, rows, **chosen)
        )
        for name, layer in statistics.layers.items():
            ours = torch.einsum("k,koi->oi", row, layer.gradients.double())
            assert (ours - expected[name]).norm() < 1e-5 * expected[name].norm(), (objective.loss_type, name)


def test_rows_without_rejected_give_the_gradient_of_sft():
    model, rows = tiny_llama(), reference_rows(5, paired=False)

    statistics, coefficients = gathered(model, rows, objectives=[Sft()])

    expected = weight_gradients(model, statistics.layers, lambda twin: sft_loss(twin, rows))
    for name, layer in statistics.layers.items():
        ours = coefficients[0, 0] * layer.gradients[0].double()
        assert (ours - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_labeled_rows_give_autograds_gradients_of_kto_and_of_sft_on_the_desirable_ones(make):
    model, rows = make(), labeled_rows(8)
    weights = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7}

    statistics, coefficients = gathered(model, rows, objectives=[Sft(), Kto(**weights)], max_tokens=60)

    reference = model.double()
    losses = [
        lambda twin: sft_loss(twin, [row for row in rows if row.desirable]),
        lambda twin: kto_loss(twin, reference, rows, **weights),
    ]
    for row, loss in zip(coefficients, losses, strict=True):
        expected = weight_gradients(model, statistics.layers, loss)
        for name, layer in statistics.layers.items():
            ours = torch.einsum("k,koi->oi", row, layer.gradients.double())
            assert (ours - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_the_cut_into_batches_changes_nothing_but_rounding():
    model, rows = tiny_llama(), reference_rows(9, paired=True)

    whole, _ = gathered(model, rows, kind=Sketch)
    parts, _ = gathered(model, rows, kind=Sketch, max_tokens=1)

    assert whole.counts == parts.counts
    assert_same_sums(whole, parts)


def test_activation_checkpointing_changes_nothing_but_rounding():
    model, rows = tiny_llama(), reference_rows(6, paired=True)

    plain, _ = gathered(model, rows, kind=Sketch)
    with activation_checkpointing(as_base(model), enabled=True):
        checkpointed, _ = gathered(model, rows, kind=Sketch)

    assert_same_sums(plain, checkpointed)
    assert not any(module.training for module in model.modules())


class FailsOnce(Sketch):
    """Runs out of memory in the middle of the backward of the first batch that holds more than one row."""

    spent = False

    def add(self, inputs, output_grads, weights, *, paired):
        if not FailsOnce.spent and len(inputs) > 2:
            FailsOnce.spent = True
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().add(inputs, output_grads, weights, paired=paired)


@pytest.mark.parametrize("failing", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
def test_a_batch_that_runs_out_of_memory_is_halved_and_counted_once(failing):
    model, rows = tiny_llama(), reference_rows(8, paired=True)
    base, targets, bases = as_base(model), targets_of(model), bases_of(OBJECTIVES)
    expected, _ = gathered(model, rows, kind=Sketch)
    layers = empty(targets, Sketch)
    layers[failing] = FailsOnce(**vars(layers[failing]))
    FailsOnce.spent = False
    told = []

    counts = gather(base, targets, layers, one_fold(rows), bases, on_batch=lambda batch, _: told.append(batch.rows))

    assert FailsOnce.spent
    assert sorted(row for rows in told for row in rows) == list(range(8))
    assert counts == expected.counts
    assert_same_sums(expected, Statistics(layers))


def test_a_single_row_that_does_not_fit_is_an_error_with_a_remedy():
    model, rows = tiny_llama(), reference_rows(1, paired=False)
    base, targets = as_base(model), targets_of(model)
    layers = empty(targets, Sketch, bases=1)

    def refuse(*_arguments):
        raise MemoryError

    handle = model.model.layers[0].register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory, match="max_length"):
        gather(base, targets, layers, one_fold(rows), bases_of([Sft()]), on_batch=lambda *_: None)
    handle.remove()


def test_hooks_come_off_when_the_pass_raises():
    model, rows = tiny_llama(), reference_rows(3, paired=False)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")

    with pytest.raises(NumericalFailure):
        gathered(model, rows, objectives=[Sft()])

    assert not any(module._forward_hooks for module in model.modules())


def test_a_nan_is_reported_with_the_first_layer_that_makes_it():
    model, rows = tiny_llama(), reference_rows(3, paired=False)
    model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")

    with pytest.raises(NumericalFailure, match=r"model\.layers\.1\.mlp\.up_proj"):
        gathered(model, rows, objectives=[Sft()])


def test_a_gradient_that_overflows_is_reported_with_its_layer():
    model, rows = tiny_llama(), reference_rows(3, paired=False)
    model.model.layers[0].self_attn.o_proj.register_full_backward_hook(
        lambda _module, grads, _outputs: (grads[0] * float("inf"),)
    )

    with pytest.raises(NumericalFailure, match=r"model\.layers\.0\.self_attn"):
        gathered(model, rows, objectives=[Sft()])


class LargestProducts(TorchDispatchMode):
    """Notes the shapes of all tensors that are made while it is on."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and function.overloadpacket not in {
                torch.ops.aten.t,
                torch.ops.aten.detach,
            }:
                self.shapes.add(tuple(tensor.shape))
        return result


def test_no_weight_gets_a_gradient_and_no_gradient_sized_tensor_is_made():
    model, rows = tiny_llama(hidden=40), reference_rows(6, paired=True)
    sizes = {layer_sizes(module) for module in targets_of(model).values()}

    def dense_tensors(kind):
        with LargestProducts() as seen:
            gathered(model, rows, kind=kind)
        # The weights themselves pass by as views; what is looked for is a batch of them, or one that is no view.
        return {shape for shape in seen.shapes if shape[-2:] in sizes and len(shape) > 2}

    assert dense_tensors(DenseGradient)
    assert not dense_tensors(Sketch)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_alone_scores_as_the_pass_does():
    model, rows = tiny_llama(), reference_rows(4, paired=True)
    (batch,) = one_fold(rows)
    told = []
    base, targets = as_base(model), targets_of(model)

    gather(base, targets, empty(targets, Sketch), [batch], bases_of(OBJECTIVES), on_batch=lambda _, s: told.append(s))
    scored = score(base, batch)

    torch.testing.assert_close(scored.chosen_logps, told[0].chosen_logps)
    torch.testing.assert_close(scored.rejected_logps, told[0].rejected_logps)


def test_scores_of_sides_that_differ_in_length_are_the_passs_and_cost_little_padding(monkeypatch):
    model, rows = tiny_llama(), reference_rows(6, paired=True, longest=40)
    (batch,) = one_fold(rows)
    told, run = [], []
    base, targets = as_base(model), targets_of(model)
    bases = bases_of([Orpo(nll="full_sequence")])
    layers = empty(targets, Sketch, bases=len(bases))
    gather(base, targets, layers, [batch], bases, on_batch=lambda _, s: told.append(s))
    hidden_states = type(base).hidden_states
    monkeypatch.setattr(
        type(base), "hidden_states", lambda self, ids, mask: run.append(ids.numel()) or hidden_states(self, ids, mask)
    )

    scored = score(base, batch, with_prompt=True)

    for name, tensor in scored.tensors().items():
        torch.testing.assert_close(tensor, told[0].tensors()[name], rtol=1e-5, atol=1e-5)
    assert batch.input_ids.numel() > batch.attention_mask.sum() / 0.7 > sum(run)


def test_scoring_takes_halves_when_memory_runs_out():
    model, rows = tiny_llama(), reference_rows(5, paired=True)
    (batch,) = one_fold(rows)
    expected = score(as_base(model), batch, with_prompt=True)

    def refuse_large(_module, arguments):
        if len(arguments[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.model.layers[0].register_forward_pre_hook(refuse_large)
    scored = score(as_base(model), batch, with_prompt=True)
    handle.remove()

    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(scored, name), values)

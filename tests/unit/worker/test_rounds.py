import copy
import itertools
import json

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from d2lora.initializations import Dpo, InitializationSpec, Kto, LoraSpec, Orpo, Phase, Result, Sft
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.reference import dpo_loss, kto_loss, orpo_loss, sft_loss, token_logps, weight_gradients
from tests.unit.worker.conftest import all_dpo_losses, as_examples, labeled_rows, one_fold, reference_rows
from tests.unit.worker.test_initialization import write_rows
from tests.unit.worker.test_pipeline import build, labels_of, learnable_rows, updates
from worker import rounds
from worker.gradients import DenseGradient
from worker.initialization import initialize
from worker.low_rank import LowRank
from worker.matrices import Shape, TestMatrices
from worker.models import layer_sizes
from worker.objectives import (
    Away,
    Scores,
    bases_of,
    count,
    objective_coefficients,
    sequence_weights,
)
from worker.pipeline import build_adapter
from worker.points import at, first_point, moved
from worker.sketching import Sketch
from worker.statistics import gather, score
from worker.targets import lora_config, resolve_targets


def targets_of(model):
    return resolve_targets(model, lora_config(model, LoraSpec(r=2), base_model="tiny", revision=None))


def low_rank(rows, columns, rank, generator):
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator)).Q.T
    values = torch.rand(rank, generator=generator).sort(descending=True).values
    return LowRank(left, values, right, energy=values.square().sum().item(), missed=0.01)


def some_point(targets, *, size=0.3):
    generator = torch.Generator().manual_seed(3)
    return first_point({name: low_rank(*layer_sizes(module), 2, generator) for name, module in targets.items()}, size)


def dense(layer):
    return (layer.left * layer.values) @ layer.right


def row_lengths(model, layers, rows):
    """Of an orthogonalized step of SFT and rank 4, by every row's own gradient; of norm 1 together."""
    tokens, squares = sum(len(row.chosen) for row in rows), dict.fromkeys(layers, 0.0)
    for row in rows:
        own = weight_gradients(model, layers, lambda twin, row=row: sft_loss(twin, [row]) * len(row.chosen) / tokens)
        squares = {name: squares[name] + gradient.square().sum() for name, gradient in own.items()}
    total = sum(4 / square for square in squares.values())
    return {name: (square * total).rsqrt() for name, square in squares.items()}


def moved_to(model, point):
    """A copy of the model in float64, whose weights hold the update."""
    twin = copy.deepcopy(model).double()
    for name, layer in point.items():
        weight = twin.get_submodule(name).weight
        update = -dense(layer).double()
        weight += update if isinstance(twin.get_submodule(name), torch.nn.Linear) else update.T
    return twin


def gathered_at(model, point, rows, objectives, *, kind=DenseGradient, width=2, max_tokens=60, shift=0.0):
    """The sums of one pass at the point, and what makes objectives' gradients of them."""
    base, targets, matrices = as_base(model), targets_of(model), TestMatrices(0, torch.device("cpu"))
    bases = bases_of(objectives, away=True)
    batches = one_fold(rows, max_tokens=max_tokens)
    reference = {
        row: own
        for batch in batches
        for row, own in zip(batch.rows, score(base, batch).split([1] * len(batch.rows)), strict=True)
    }

    def away(batch):
        return Away(objectives, Scores.concatenate([reference[row] for row in batch.rows]), shift)

    layers = {
        name: kind.empty(Shape(*layer_sizes(module), width), len(bases), matrices) for name, module in targets.items()
    }
    with at(targets, point):
        counts = gather(base, targets, layers, batches, bases, on_batch=lambda *_: None, away=away)
    return layers, objective_coefficients(objectives, bases, counts)


def assert_autograds(layers, row, expected, what=""):
    for name, layer in layers.items():
        ours = torch.einsum("k,koi->oi", row, layer.gradients.double())
        assert (ours - expected[name]).norm() < 1e-5 * expected[name].norm(), (what, name)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_pass_at_an_adapter_gives_autograds_gradients_of_every_objective_there(make):
    model, rows = make(), reference_rows(7, paired=True)
    point = some_point(targets_of(model))
    there, reference = moved_to(model, point), copy.deepcopy(model).double()
    objectives = [Sft(), Dpo(beta=0.3), Orpo(beta=0.7)]

    layers, coefficients = gathered_at(model, point, rows, objectives)

    losses = [
        lambda twin: sft_loss(twin, rows),
        lambda twin: dpo_loss(twin, reference, rows, beta=0.3),
        lambda twin: orpo_loss(twin, rows, beta=0.7),
    ]
    for row, loss, objective in zip(coefficients, losses, objectives, strict=True):
        assert_autograds(layers, row, weight_gradients(there, layers, loss), objective.type)


@pytest.mark.parametrize("objective", all_dpo_losses(beta=1.0), ids=lambda objective: objective.loss_type)
def test_a_pass_at_an_adapter_gives_autograds_gradient_of_every_dpo_loss_against_the_base(objective):
    model, rows = tiny_llama(), reference_rows(7, paired=True)
    point = some_point(targets_of(model), size=1.0)
    there, reference = moved_to(model, point), copy.deepcopy(model).double()

    layers, coefficients = gathered_at(model, point, rows, [objective])

    chosen = objective.model_dump(exclude={"type"})
    expected = weight_gradients(there, layers, lambda twin: dpo_loss(twin, reference, rows, **chosen))
    assert_autograds(layers, coefficients[0], expected)
    at_the_start = weight_gradients(there, layers, lambda twin: dpo_loss(twin, there, rows, **chosen))
    assert any((expected[name] - at_the_start[name]).norm() > 1e-3 * expected[name].norm() for name in expected)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_pass_at_an_adapter_gives_autograds_gradient_of_kto_with_its_shift(make):
    model, rows = make(), labeled_rows(8)
    objective = Kto(beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    (batch,) = one_fold(rows)
    in_order = [rows[row] for row in batch.rows]  # whose completions are rotated
    point = some_point(targets_of(model), size=0.3)
    there, base = moved_to(model, point), copy.deepcopy(model).double()
    pairs = [(row.prompt, in_order[index - 1].chosen) for index, row in enumerate(in_order)]
    shift = sum((token_logps(there, *pair) - token_logps(base, *pair)).sum().item() for pair in pairs) / len(pairs)
    assert shift > 0

    layers, coefficients = gathered_at(model, point, rows, [objective], shift=shift)

    weights = objective.model_dump(exclude={"type"})
    expected = weight_gradients(there, layers, lambda twin: kto_loss(twin, base, in_order, **weights))
    assert_autograds(layers, coefficients[0], expected)


def test_sketches_at_an_adapter_estimate_the_same_gradients():
    model, rows, objectives = tiny_llama(hidden=40), reference_rows(7, paired=True), [Sft(), Dpo(beta=0.3)]
    point = some_point(targets_of(model))

    exact, coefficients = gathered_at(model, point, rows, objectives)
    sketched, same = gathered_at(model, point, rows, objectives, kind=Sketch, width=16)

    assert torch.equal(coefficients, same)
    for row in coefficients:
        for name, layer in exact.items():
            best, ours = layer.factorize(row, 4), sketched[name].factorize(row, 4)
            assert (dense(ours) - dense(best)).norm() ** 2 < 4 * ours.missed + 2 * (best.energy - best.kept), name


@pytest.mark.parametrize("objective", all_dpo_losses(beta=0.3), ids=lambda objective: objective.loss_type)
def test_where_policy_and_reference_agree_the_weights_of_a_later_round_are_those_of_the_first(objective):
    rows = reference_rows(6, paired=True)
    (batch,) = one_fold(rows)
    scores = score(as_base(tiny_llama()), batch)

    def of_objective(bases, away=None):
        return objective_coefficients([objective], bases, count(scores)) @ sequence_weights(bases, scores, away)

    first = of_objective(bases_of([objective]))
    later = of_objective(bases_of([objective], away=True), Away([objective], scores))

    torch.testing.assert_close(later, first, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(9, 14), (14, 9), (5, 30)])
def test_a_further_step_is_the_best_rank_r_part_of_the_sum(rows, columns):
    generator = torch.Generator().manual_seed(1)
    point, step = ({"a": low_rank(rows, columns, 3, generator)} for _ in range(2))

    (after,) = moved(point, step, 0.7, rank=3).values()

    total = dense(point["a"]).double() + 0.7 * dense(step["a"]).double()
    u, values, v = torch.linalg.svd(total, full_matrices=False)
    torch.testing.assert_close(dense(after).double(), (u[:, :3] * values[:3]) @ v[:3], rtol=0, atol=1e-6)
    assert after.energy == pytest.approx(values.square().sum().item(), rel=1e-6)
    assert after.missed == pytest.approx((0.1 + 0.7 * 0.1) ** 2)
    assert bool((after.right.gather(1, after.right.abs().argmax(1, keepdim=True)) > 0).all())


def test_a_step_of_size_zero_stays_where_it_is():
    generator = torch.Generator().manual_seed(1)
    point, step = ({"a": low_rank(9, 14, 3, generator)} for _ in range(2))

    (after,) = moved(point, step, 0.0, rank=3).values()

    torch.testing.assert_close(dense(after), dense(point["a"]))


@pytest.fixture(scope="module")
def in_rounds(tmp_path_factory):
    """The adapters of a learnable task after at most so many rounds."""
    return {
        count: build(learnable_rows(24), tmp_path_factory.mktemp("rounds"), rounds=count, statistics="exact")
        for count in (1, 2, 4)
    }


def test_one_round_is_bit_for_bit_what_a_request_without_rounds_gets(in_rounds, tmp_path):
    plain = build(learnable_rows(24), tmp_path, statistics="exact")

    assert plain.further is None
    assert in_rounds[1].further is None
    for name, layer in plain.factors.items():
        assert torch.equal(layer.lora_A, in_rounds[1].factors[name].lora_A)
        assert torch.equal(layer.lora_B, in_rounds[1].factors[name].lora_B)


def test_further_rounds_of_a_learnable_task_lower_the_held_out_objectives_further(in_rounds):
    first, second, fourth = (in_rounds[count] for count in (1, 2, 4))

    assert len([one for one in fourth.further.rounds if one.calibration.accepted]) > 1
    for name in ("sft", "dpo", "orpo", "nll"):
        assert second.held_out[name].base == pytest.approx(first.held_out[name].base)
        assert second.held_out[name].adapter < first.held_out[name].adapter, name
        assert fourth.held_out[name].adapter < second.held_out[name].adapter, name


def test_a_round_of_a_longer_request_is_that_of_a_shorter_one(in_rounds):
    (own,), (same, *_) = in_rounds[2].further.rounds, in_rounds[4].further.rounds

    assert own.calibration == same.calibration
    assert own.held_out == same.held_out


@pytest.mark.parametrize("direction", ["gradient", "orthogonalized"])
def test_the_second_rounds_adapter_is_the_dense_one(tmp_path, direction):
    model, rows = tiny_llama(), learnable_rows(12, paired=False)
    first, second = (
        build(rows, tmp_path / str(count), model=model, rounds=count, statistics="exact", direction=direction)
        for count in (1, 2)
    )
    (only,) = second.further.rounds
    assert only.calibration.accepted
    # `updates` are s B A = -P, and `moved_to` takes P away.
    point = first_point(first.direction, first.eta)

    gradients = weight_gradients(moved_to(model, point), first.direction, lambda twin: sft_loss(twin, rows))

    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    assert only.mixture.norms.item() == pytest.approx(norm.item(), rel=1e-5)
    lengths = row_lengths(moved_to(model, point), first.direction, rows)
    before = updates(first)
    for name, update in updates(second).items():
        left, values, right = torch.linalg.svd(gradients[name] / norm, full_matrices=False)
        step = (left[:, :4] * (values[:4] if direction == "gradient" else lengths[name])) @ right[:4]
        left, values, right = torch.linalg.svd(
            before[name].double() - only.calibration.accepted.eta * step, full_matrices=False
        )
        expected = (left[:, :4] * values[:4]) @ right[:4]
        assert (update.double() - expected).norm() < 1e-4 * expected.norm(), name


def test_no_held_out_row_has_shaped_the_adapter_it_is_scored_under(tmp_path, monkeypatch):
    """Every fold's point, and the gradients there, come from the other folds in each round."""
    passes, scored = [], []
    real_gather, real_at, real_score = rounds.gather, rounds.at, rounds.score_step

    def watched_gather(base, targets, layers, batches, *arguments, **options):
        passes.append({batch.fold for batch in batches})
        return real_gather(base, targets, layers, batches, *arguments, **options)

    def watched_at(targets, point):
        points.append(point)
        return real_at(targets, point)

    def watched_score(base, targets, point, eta, batches, *arguments, **options):
        scored.append((point, {batch.fold for batch in batches}))
        return real_score(base, targets, point, eta, batches, *arguments, **options)

    points = []
    monkeypatch.setattr(rounds, "gather", watched_gather)
    monkeypatch.setattr(rounds, "at", watched_at)
    monkeypatch.setattr(rounds, "score_step", watched_score)

    built = build(learnable_rows(24), tmp_path, rounds=3)

    assert len(passes) == 2 * (1 + 4)
    every = {0, 1, 2, 3}
    assert passes[:5] == passes[5:] == [every] + [every - {fold} for fold in range(4)]
    assert all(len(folds) == 1 for _, folds in scored)
    # The first scores are under the points that round 2 gathers at, fold by fold.
    for fold in range(4):
        assert scored[fold][1] == {fold}
        assert scored[fold][0] is points[1 + fold]
    # Round 2 ended at points that were scored for these folds alone, and round 3 gathers there.
    accepted = built.further.rounds[0].calibration.accepted
    for fold in range(4):
        after = points[6 + fold]
        matching = [folds for point, folds in scored if all(torch.equal(point[n].left, after[n].left) for n in after)]
        assert accepted
        assert matching
        assert all(folds == {fold} for folds in matching)


@pytest.mark.parametrize(("rows", "folds"), [(1, 1), (6, 1), (7, 2), (12, 2), (13, 3), (24, 4), (25, 4)])
def test_as_few_folds_judge_as_have_rows_enough(tmp_path, monkeypatch, rows, folds):
    monkeypatch.setattr(rounds, "JUDGING_ROWS", rows)
    passes = []
    real = rounds.gather

    def watched(base, targets, layers, batches, *arguments, **options):
        passes.append({batch.fold for batch in batches})
        return real(base, targets, layers, batches, *arguments, **options)

    monkeypatch.setattr(rounds, "gather", watched)

    built = build(learnable_rows(24), tmp_path, rounds=2)

    every = {0, 1, 2, 3}
    assert passes == [every] + [every - {fold} for fold in range(folds)]
    (only,) = built.further.rounds
    assert built.further.folds == folds
    assert only.calibration.accepted
    assert only.held_out["sft"].rows == 6 * folds
    assert only.held_out["sft"].adapter < only.held_out["sft"].base


def test_copies_of_a_row_judge_as_one():
    def held(rows):
        (batch,) = one_fold(rows)
        scores = Scores(torch.zeros(len(rows)).double(), torch.ones(len(rows), dtype=torch.int64))
        return [[(batch, scores)]] * 4

    rows = reference_rows(34, paired=False)

    assert rounds.judging_folds(held(rows), [Sft()]) == 1
    assert rounds.judging_folds(held(rows[:1] * 34), [Sft()]) == 4
    assert rounds.judging_folds(held(rows[:17] * 2), [Sft()]) == 2


def test_a_round_is_judged_by_the_groups_of_its_rows(tmp_path, monkeypatch):
    judged = []

    def watched(*arguments, groups, **options):
        judged.append((len(groups), len(set(groups))))
        return trial(*arguments, groups=groups, **options)

    trial = rounds.trial
    monkeypatch.setattr(rounds, "trial", watched)

    build(learnable_rows(12) * 2, tmp_path, rounds=2)

    assert set(judged) == {(24, 12)}


def test_all_folds_judge_where_rows_have_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "JUDGING_ROWS", 1)

    built = build(labels_of(learnable_rows(16)), tmp_path, rounds=2)

    assert built.further.folds == 4


def test_the_delivered_point_is_the_same_whoever_judges_it_but_for_its_size(tmp_path, monkeypatch):
    """The direction at the delivered adapter is from all rows either way."""
    whole = build(learnable_rows(24), tmp_path / "all", rounds=2)
    monkeypatch.setattr(rounds, "JUDGING_ROWS", 1)

    judged = build(learnable_rows(24), tmp_path / "one", rounds=2)

    norms = [one.further.rounds[0].mixture.norms for one in (whole, judged)]
    assert torch.equal(*norms)


def test_a_round_that_held_out_rows_do_not_support_is_not_delivered(in_rounds, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "trial", lambda eta, objectives, *_, **__: rounds.failed_trial(eta, objectives))

    built = build(learnable_rows(24), tmp_path, rounds=4, statistics="exact")

    assert "round 2: no step lowers" in built.further.stopped
    (only,) = built.further.rounds
    assert only.held_out["sft"].adapter == pytest.approx(in_rounds[1].held_out["sft"].adapter)
    for name, layer in in_rounds[1].factors.items():
        assert torch.equal(layer.lora_A, built.factors[name].lora_A)
        assert torch.equal(layer.lora_B, built.factors[name].lora_B)


def test_rounds_end_when_nothing_more_is_learnt(tmp_path):
    """Preferences between random completions have a little in common, and soon nothing that holds out."""
    built = build(learnable_rows(8), tmp_path, rounds=16)

    accepted = [bool(one.calibration.accepted) for one in built.further.rounds]
    assert accepted == [True] * (len(accepted) - 1) + [False]
    assert built.further.stopped.startswith(f"round {len(accepted) + 1}: ")


def test_a_gradient_that_vanishes_ends_the_rounds_and_fails_nothing(tmp_path):
    built = build(
        learnable_rows(16), tmp_path, rounds=16, objectives=[{"type": "dpo", "loss_type": "hinge", "beta": 5.0}]
    )

    assert built.eta
    assert built.further.stopped.endswith("dpo is zero or not finite on these rows")


def test_rows_with_labels_take_rounds_too(tmp_path):
    first, second = (build(labels_of(learnable_rows(16)), tmp_path / str(count), rounds=count) for count in (1, 2))

    assert second.further.rounds[0].calibration.accepted
    assert second.held_out["kto"].adapter < first.held_out["kto"].adapter


def progress_of(rows, tmp_path, *, model=None, listener=lambda *_: None, **changes):
    told = []
    model = model or tiny_llama()

    def tell(*mark):
        told.append(mark)
        listener(*mark)

    spec = InitializationSpec(base_model="tiny", dataset_id="ds", lora=LoraSpec(r=4), **changes)
    build_adapter(
        as_base(model),
        resolve_targets(model, lora_config(model, spec.lora, base_model="tiny", revision=None)),
        spec,
        as_examples(rows),
        settings=WorkerSettings(),
        directory=tmp_path,
        on_progress=tell,
    )
    return told


def test_progress_over_rounds_is_one_phase_that_never_goes_back(tmp_path):
    told = progress_of(labels_of(learnable_rows(16)), tmp_path, rounds=3, max_tokens_per_batch=64)

    own = [(done, total) for phase, done, total in told if phase is Phase.ROUNDS]
    phases = [phase for phase, _ in itertools.groupby(phase for phase, _, _ in told)]
    assert phases == [Phase.STATISTICS, Phase.FACTORS, Phase.CALIBRATION, Phase.ROUNDS]
    assert len({total for _, total in own}) == 1
    assert all(later[0] >= earlier[0] for earlier, later in itertools.pairwise(own))
    assert own[-1][0] == own[-1][1]
    assert len(own) > 50


def test_a_zero_start_has_no_rounds():
    with pytest.raises(ValidationError, match="rounds: a zero start takes no step"):
        InitializationSpec(base_model="tiny", dataset_id="ds", start="zero", rounds=2)


def test_stock_peft_applies_an_adapter_of_rounds_and_the_report_tells_each(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = write_rows(tmp_path / "rows.jsonl", 16)

    spec = InitializationSpec(base_model=str(tmp_path / "model"), dataset_id="ds", lora=LoraSpec(r=4), rounds=3)
    (tmp_path / "out").mkdir()
    # More tokens than a shard has, but a job of rounds stays whole.
    result = initialize(
        spec,
        rows,
        {},
        out=tmp_path / "out",
        settings=WorkerSettings(device="cpu", shard_tokens=1),
        on_progress=lambda *_: None,
        may_split=True,
    )

    assert isinstance(result, Result)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = report["rounds"]
    accepted = [one for one in told["rounds"] if one["calibration"]["accepted_eta"]]
    assert accepted
    assert told["stopped"]
    assert result.summary.start_reason.startswith(f"{1 + len(accepted)} rounds lower")
    assert report["summary"]["held_out"] == accepted[-1]["held_out"]
    assert report["seconds"]["rounds"] > 0
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "out"))
    for name, layer in report["layers"].items():
        module = adapted.get_submodule(f"base_model.model.{name}")
        size = module.get_delta_weight("default").detach().norm() / module.base_layer.weight.detach().norm()
        assert layer["relative_magnitude"] == pytest.approx(size.item(), rel=1e-3)


def test_hooks_come_off_when_a_job_is_stopped_in_a_later_round(tmp_path):
    class StopIt(Exception):
        pass

    model = tiny_llama()

    def stop(phase, done, _total):
        if phase is Phase.ROUNDS and done > 40:
            raise StopIt

    with pytest.raises(StopIt):
        progress_of(learnable_rows(16), tmp_path, model=model, listener=stop, rounds=3)

    assert not any(module._forward_hooks for module in model.modules())

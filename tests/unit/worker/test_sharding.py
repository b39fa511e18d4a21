import dataclasses
import functools
import json
import math
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from d2lora.datasets import DatasetFile, Format
from d2lora.errors import ChecksumMismatch, FormatMismatch, ObjectiveUnavailable, TargetsMissing
from d2lora.initializations import InitializationSpec, LoraSpec, Orpo, Result, Sft
from d2lora.roles import Role
from d2lora.settings import WorkerSettings
from d2lora.shards import EvaluationTask
from tests.support import sharing
from tests.support.models import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.support.sharing import Alone
from worker import models
from worker.initialization import finish, initialize, run_shard
from worker.process import RealWork
from worker.shard_files import FORMAT
from worker.sharding import cut, read_plan
from worker.units import ShardFiles, Split

SETTINGS = WorkerSettings(device="cpu", max_tokens_per_batch=160)
RANK = LoraSpec(r=4)
load = functools.cache(models.load)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tiny_llama(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return saved(tiny_gpt2(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", some_rows(40))


def saved(model, directory):
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def some_rows(count, *, paired=True, seed=0):
    source = random.Random(seed)
    rows = []
    for number in range(count):
        prompt, good = f"item {number}{'.' * source.randrange(20)}:", " yes" * source.randint(1, 3)
        bad = " no" * source.randint(1, 3) + str(number)
        rows.append({"prompt": prompt, "chosen": good, "rejected": bad} if paired else {"text": prompt + good})
    return rows


def test_a_job_with_retain_rows_is_not_cut_and_reports_what_is_forgotten(llama, dataset, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [{"text": f"number {n} comes before {n + 1}"} for n in range(12)])
    spec = spec_for(llama, retain_dataset_id="ds_general", retain_tolerance=0.02)
    settings = settings_for(7, tokens_of(read_rows(dataset)))
    out = tmp_path / "out"
    out.mkdir()

    result = initialize(
        spec,
        dataset,
        {Role.RETAIN: text},
        out=out,
        settings=settings,
        on_progress=lambda *_: None,
        load=load,
        may_split=True,
    )

    assert isinstance(result, Result)
    retained = result.summary.retained
    assert retained.adapter <= retained.base + 0.02
    report = json.loads((out / "report.json").read_text())
    assert report["extra_dataset_sha256"].keys() == {"retain"}
    assert "| nll of retain rows |" in (out / "README.md").read_text()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetFile(path, Format.JSONL)


def read_rows(dataset):
    return [json.loads(line) for line in dataset.path.read_text().splitlines()]


def spec_for(base_model, **changes):
    plain = {"base_model": base_model, "dataset_id": "ds", "lora": RANK}
    return InitializationSpec(**plain | changes)


def settings_for(shards, tokens):
    return SETTINGS.model_copy(update={"shard_tokens": math.ceil(tokens / shards)})


def whole(spec, dataset, out, extras=None):
    out.mkdir()
    return initialize(
        spec, dataset, extras or {}, out=out, settings=SETTINGS, on_progress=lambda *_: None, load=load, may_split=True
    )


def tokens_of(rows):
    return sum(len(row["prompt"]) * 2 + len(row["chosen"]) + len(row["rejected"]) + 2 for row in rows)


def in_shards(spec, dataset, directory, *, shards=7, extras=None, order=lambda numbers: numbers):
    """Return the cut, the shards' files and the adapter's directory."""
    settings = settings_for(shards, tokens_of(read_rows(dataset)))
    split = sharing.cut(spec, dataset, extras or {}, directory / "cut", settings=settings, load=load)
    files = sharing.gather(spec, split, directory, settings=settings, load=load, order=order)
    sharing.build(spec, split, files, extras or {}, directory, settings=settings, load=load)
    return split, files, directory / "out"


def updates(directory):
    """B A of every layer."""
    tensors = load_file(directory / "adapter_model.safetensors")
    names = {name.rpartition(".lora_")[0] for name in tensors}
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def report_of(directory):
    report = json.loads((directory / "report.json").read_text())
    del report["seconds"]
    return report


def assert_alike(one, other, *, relative, at=""):
    """Equal but for floats, which may differ by float addition."""
    match one:
        case dict():
            assert one.keys() == other.keys(), at
            for key, value in one.items():
                assert_alike(value, other[key], relative=relative, at=f"{at}/{key}")
        case list():
            assert len(one) == len(other), at
            for index, (mine, yours) in enumerate(zip(one, other, strict=True)):
                assert_alike(mine, yours, relative=relative, at=f"{at}/{index}")
        case float():
            assert one == pytest.approx(other, rel=relative, abs=relative), at
        case _:
            assert one == other, at


FULL_SEQUENCE = [Sft(), {"type": "dpo"}, Orpo(nll="full_sequence")]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("llama", {}),
        ("llama", {"statistics": "exact"}),
        ("llama", {"objectives": FULL_SEQUENCE}),
        ("gpt2", {}),
        ("gpt2", {"objectives": FULL_SEQUENCE, "statistics": "exact"}),
        ("llama", {"whitening": {}}),
        ("gpt2", {"whitening": {"power": 1.0}, "statistics": "exact"}),
        ("llama", {"lora": LoraSpec(r=2, ranks="budget")}),
    ],
    ids=[
        "llama-sketch",
        "llama-exact",
        "llama-full-sequence",
        "gpt2-sketch",
        "gpt2-full-sequence-exact",
        "llama-whitened",
        "gpt2-whitened-exact",
        "llama-budget",
    ],
)
def test_the_adapter_of_seven_shards_is_the_unsharded_one_up_to_float_addition(
    model, changes, dataset, tmp_path, request
):
    spec = spec_for(request.getfixturevalue(model), **changes)
    extras = {Role.EVALUATION: write_rows(tmp_path / "eval.jsonl", some_rows(5, seed=1))}
    result = whole(spec, dataset, tmp_path / "whole", extras)

    split, _, out = in_shards(spec, dataset, tmp_path, extras=extras)

    assert len(split.shards) == 7
    assert isinstance(result, Result)
    assert result.summary.start == "calibrated"
    sharded = updates(out)
    for name, update in updates(tmp_path / "whole").items():
        assert (update - sharded[name]).norm() < 1e-4 * update.norm(), name
    expected = report_of(tmp_path / "whole")
    assert expected["shards"] == 1
    assert_alike(expected | {"shards": 7}, report_of(out), relative=1e-3)


def test_rows_without_rejected_are_sharded_too(llama, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", some_rows(30, paired=False))
    spec = spec_for(llama)
    whole(spec, rows, tmp_path / "whole")
    settings = SETTINGS.model_copy(update={"shard_tokens": 200})

    split = sharing.cut(spec, rows, {}, tmp_path / "cut", settings=settings, load=load)
    files = sharing.gather(spec, split, tmp_path, settings=settings, load=load)
    sharing.build(spec, split, files, {}, tmp_path, settings=settings, load=load)

    assert len(split.shards) > 3
    sharded = updates(tmp_path / "out")
    for name, update in updates(tmp_path / "whole").items():
        assert (update - sharded[name]).norm() < 1e-4 * update.norm(), name
    assert_alike(
        report_of(tmp_path / "whole") | {"shards": len(split.shards)}, report_of(tmp_path / "out"), relative=1e-3
    )


def test_labeled_rows_are_sharded_too_with_their_labels_and_mismatches(llama, tmp_path):
    pairs = some_rows(20)
    labeled = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in pairs]
    labeled += [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in pairs]
    rows, spec = write_rows(tmp_path / "rows.jsonl", labeled), spec_for(llama)
    result = whole(spec, rows, tmp_path / "whole", {Role.EVALUATION: rows})
    settings = SETTINGS.model_copy(update={"shard_tokens": 200})

    split = sharing.cut(spec, rows, {Role.EVALUATION: rows}, tmp_path / "cut", settings=settings, load=load)
    files = sharing.gather(spec, split, tmp_path, settings=settings, load=load)
    sharing.build(spec, split, files, {Role.EVALUATION: rows}, tmp_path, settings=settings, load=load)

    assert len(split.shards) > 3
    assert isinstance(result, Result)
    assert (result.summary.start, result.summary.objectives) == ("calibrated", ["sft", "kto"])
    assert result.summary.evaluation is not None
    assert {name: measured.rows for name, measured in result.summary.evaluation.items()} == {
        "nll": 20,
        "sft": 20,
        "kto": 40,
    }
    sharded = updates(tmp_path / "out")
    for name, update in updates(tmp_path / "whole").items():
        assert (update - sharded[name]).norm() < 1e-4 * update.norm(), name
    report = report_of(tmp_path / "whole")
    assert report["mean_tokens"].keys() == {"desirable", "undesirable"}
    assert_alike(report | {"shards": len(split.shards)}, report_of(tmp_path / "out"), relative=1e-3)


def test_one_shard_gives_the_unsharded_adapter_bit_for_bit(llama, dataset, tmp_path, monkeypatch):
    spec = spec_for(llama)
    whole(spec, dataset, tmp_path / "whole")
    monkeypatch.setattr("worker.sharding.cut", lambda costs, pieces: [range(len(costs))])

    split, _, out = in_shards(spec, dataset, tmp_path)

    assert len(split.shards) == 1
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert report_of(out) == report_of(tmp_path / "whole")


def test_neither_the_order_of_rows_nor_that_of_finished_shards_changes_a_bit(llama, dataset, tmp_path):
    spec = spec_for(llama)
    rows = read_rows(dataset)
    shuffled = write_rows(tmp_path / "rows.jsonl", random.Random(3).sample(rows, len(rows)))

    _, _, one = in_shards(spec, dataset, tmp_path / "one")
    _, _, other = in_shards(
        spec, shuffled, tmp_path / "other", order=lambda numbers: random.Random(1).sample(numbers, 7)
    )

    assert updates(one).keys() == updates(other).keys()
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope="module")
def job(llama, dataset, tmp_path_factory):
    """A job in seven shards, all of them gathered."""
    directory = tmp_path_factory.mktemp("job")
    spec = spec_for(llama)
    split, files, out = in_shards(spec, dataset, directory)
    return spec, split, files, out


def test_a_shard_that_is_worked_on_twice_gives_the_same_bytes(job, tmp_path):
    spec, split, files, _ = job

    again = sharing.gather(spec, split, tmp_path, settings=SETTINGS, load=load)

    for one, other in zip(files, again, strict=True):
        assert [path.name for path in one.sums] == [path.name for path in other.sums]
        for mine, yours in zip(one.sums, other.sums, strict=True):
            assert mine.read_bytes() == yours.read_bytes(), mine


def test_shards_are_equal_runs_of_batches_and_leave_files_for_the_folds_they_touch_alone(job, dataset):
    _, split, files, _ = job
    plan = read_plan(split.plan)

    tokens = [task.tokens for task, _ in split.shards]
    assert sum(tokens) == tokens_of(read_rows(dataset))
    assert sum(task.rows for task, _ in split.shards) == 40
    assert max(tokens) - min(tokens) <= 160
    order = [fold for shard in plan.shards for fold in shard.folds]
    assert order == sorted(order)
    for shard, output in zip(plan.shards, files, strict=True):
        expected = [*(f"fold-{fold}.safetensors" for fold in sorted(set(shard.folds))), "scores.safetensors"]
        assert [path.name for path in output.sums] == expected
    assert any(len(set(shard.folds)) == 1 for shard in plan.shards)
    assert any(len(set(shard.folds)) == 2 for shard in plan.shards)


def test_a_row_longer_than_a_shard_is_a_shard_of_its_own(llama, tmp_path):
    rows = [*some_rows(6), {"prompt": "long " * 12, "chosen": " yes" * 5, "rejected": " no" * 5}]
    dataset = write_rows(tmp_path / "rows.jsonl", rows)
    spec, settings = spec_for(llama, start="zero"), SETTINGS.model_copy(update={"shard_tokens": 1})
    whole(spec, dataset, tmp_path / "whole")

    split = sharing.cut(spec, dataset, {}, tmp_path / "cut", settings=settings, load=load)
    files = sharing.gather(spec, split, tmp_path, settings=settings, load=load)
    sharing.build(spec, split, files, {}, tmp_path, settings=settings, load=load)

    assert any(task.rows == 1 and task.tokens > 150 for task, _ in split.shards)
    assert len(split.shards) == sum(len(shard.sizes) for shard in read_plan(split.plan).shards)
    assert_alike(
        report_of(tmp_path / "whole") | {"shards": len(split.shards)}, report_of(tmp_path / "out"), relative=1e-3
    )


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=60), st.integers(1, 80))
def test_a_cut_covers_everything_once_in_runs_of_nearly_equal_cost(costs, pieces):
    runs = cut(costs, pieces)

    assert [index for run in runs for index in run] == list(range(len(costs)))
    assert len(runs) == min(pieces, len(costs))
    assert all(len(run) > 0 for run in runs)
    assert max(sum(costs[index] for index in run) for run in runs) <= sum(costs) / len(runs) + max(costs)


def test_equal_batches_are_cut_into_equal_shards():
    assert [len(run) for run in cut([10] * 100, 7)] in ([14, 15, 14, 14, 14, 15, 14], [14, 15, 14, 14, 15, 14, 14])


def test_init_on_one_machine_never_splits_and_a_worker_does(llama, dataset, tmp_path):
    spec, settings = spec_for(llama, start="zero"), SETTINGS.model_copy(update={"shard_tokens": 1})
    results = {}
    for may_split in (False, True):
        out = tmp_path / str(may_split)
        out.mkdir()
        work = RealWork(settings, may_split=may_split)
        results[may_split] = work.initialize(spec, dataset, {}, out, lambda *_: None)

    assert isinstance(results[False], Result)
    assert isinstance(results[True], Split)


def test_a_small_job_is_built_at_once(llama, dataset, tmp_path):
    assert isinstance(whole(spec_for(llama, start="zero"), dataset, tmp_path / "whole"), Result)


def test_cutting_runs_no_model_and_refuses_a_bad_request_first(llama, dataset, tmp_path):
    unpaired = write_rows(tmp_path / "rows.jsonl", some_rows(30, paired=False))
    settings = settings_for(7, 700)
    base = models.load(llama, revision=None, dtype="auto", device="cpu")

    def never(*_):
        raise AssertionError("the model runs")

    base.model.register_forward_pre_hook(never)
    base.model.base_model.register_forward_pre_hook(never)
    loaded = lambda *_, **__: base

    split = sharing.cut(spec_for(llama), dataset, {}, tmp_path / "good", settings=settings, load=loaded)

    assert isinstance(split, Split)
    for fault, error, rows in [
        ({"objectives": [{"type": "dpo"}]}, ObjectiveUnavailable, unpaired),
        ({"lora": LoraSpec(r=4, target_modules=["nothing"])}, TargetsMissing, dataset),
    ]:
        place = tmp_path / error.__name__
        with pytest.raises(error):
            sharing.cut(spec_for(llama, **fault), rows, {}, place, settings=settings, load=loaded)
        assert not any(place.iterdir())


def stop_at(call):
    class Stop(BaseException):
        pass

    def on_progress(phase, done, total):
        on_progress.calls.append((phase, done, total))
        if len(on_progress.calls) > call:
            raise Stop

    on_progress.calls = []
    return on_progress, Stop


def test_progress_is_told_at_every_batch_of_every_verb_and_may_stop_it(job, tmp_path):
    spec, split, files, _ = job
    plan = read_plan(split.plan)
    task, rows = split.shards[0]
    (tmp_path / "rows.safetensors").write_bytes(rows.read_bytes())
    listen, _ = stop_at(10**9)

    run_shard(spec, task, tmp_path, settings=SETTINGS, on_progress=listen, load=load)

    seen = [done for phase, done, _ in listen.calls if phase == "statistics"]
    assert len(seen) == 1 + len(plan.shards[0].sizes)
    assert seen[-1] == task.rows
    share = Alone(spec, tmp_path / "tasks", SETTINGS, load)
    for call in (0, 3, 6, 12, 17):
        listen, stop = stop_at(call)
        out = tmp_path / str(call)
        out.mkdir()
        with pytest.raises(stop):
            finish(spec, split.plan, files, {}, out=out, settings=SETTINGS, on_progress=listen, share=share, load=load)
        assert len(listen.calls) == call + 1
        assert not any(out.iterdir())


def test_a_step_that_overflows_is_an_answer_and_not_a_failure(job, tmp_path):
    spec, split, files, _ = job
    asked = {}

    def share(files, tasks):
        asked.update(files=dict(files), task=tasks[0])
        for name in tasks[0].files:
            (tmp_path / name).write_bytes(files[name].read_bytes())
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        finish(
            spec,
            split.plan,
            files,
            {},
            out=tmp_path / "out",
            settings=SETTINGS,
            on_progress=lambda *_: None,
            share=share,
            load=load,
        )
    task = asked["task"].model_copy(update={"eta": 1e38})

    output = run_shard(spec, task, tmp_path, settings=SETTINGS, on_progress=lambda *_: None, load=load)

    assert output.scores["finite"] is False
    assert json.loads(json.dumps(output.scores)) == output.scores


def test_a_task_survives_json_with_all_digits():
    task = EvaluationTask(eta=0.1 + 0.2, fold=1, files=["a", "b"], batches=[2, 0])

    assert EvaluationTask.model_validate_json(task.model_dump_json()) == task


@pytest.mark.parametrize("digest", ["weights_sha256", "configuration_sha256"])
def test_another_model_than_that_which_the_job_was_begun_with_is_refused(job, tmp_path, digest):
    spec, split, _, _ = job
    task, rows = split.shards[0]
    (tmp_path / "rows.safetensors").write_bytes(rows.read_bytes())
    other = lambda *arguments, **named: dataclasses.replace(load(*arguments, **named), **{digest: "1" * 64})

    with pytest.raises(ChecksumMismatch, match="weights"):
        run_shard(spec, task, tmp_path, settings=SETTINGS, on_progress=lambda *_: None, load=other)


def test_a_worker_that_would_choose_another_type_takes_the_first_workers(job, tmp_path):
    spec, split, files, _ = job
    task, rows = split.shards[0]
    (tmp_path / "rows.safetensors").write_bytes(rows.read_bytes())
    asked = []

    def on_a_gpu(*arguments, dtype, **named):
        asked.append(dtype)
        return load(*arguments, dtype="bfloat16" if dtype == "auto" else dtype, **named)

    output = run_shard(spec, task, tmp_path, settings=SETTINGS, on_progress=lambda *_: None, load=on_a_gpu)

    assert asked == ["auto", "float32"]
    assert [path.read_bytes() for path in output.files] == [path.read_bytes() for path in files[0].sums]


def test_memory_that_runs_out_in_a_shard_changes_its_cut_into_batches_alone(job, tmp_path, monkeypatch):
    from worker import statistics

    spec, split, files, _ = job
    task, rows = split.shards[1]
    (tmp_path / "rows.safetensors").write_bytes(rows.read_bytes())
    real = statistics._forward_and_backward

    def small_memory(base, targets, recorder, batch, *others, **options):
        if len(batch.rows) > 1:
            raise MemoryError
        return real(base, targets, recorder, batch, *others, **options)

    monkeypatch.setattr(statistics, "_forward_and_backward", small_memory)

    output = run_shard(spec, task, tmp_path, settings=SETTINGS, on_progress=lambda *_: None, load=load)

    for mine, yours in zip(output.files, files[1].sums, strict=True):
        with safe_open(mine, "pt") as one, safe_open(yours, "pt") as other:
            assert one.metadata() == other.metadata()
            for name in load_file(mine):
                torch.testing.assert_close(one.get_tensor(name), other.get_tensor(name), rtol=1e-4, atol=1e-4)


def finished(job, shards, tmp_path, *, plan=None, share=None):
    spec, split, _, _ = job
    out = tmp_path / "out"
    out.mkdir()
    return finish(
        spec,
        plan or split.plan,
        shards,
        {},
        out=out,
        settings=SETTINGS,
        on_progress=lambda *_: None,
        share=share or Alone(spec, tmp_path / "tasks", SETTINGS, load),
        load=load,
    )


@pytest.mark.parametrize(
    "mistake",
    [
        lambda files: files[:-1],
        lambda files: [*files[:2], *files[3:]],
        lambda files: [files[1], files[0], *files[2:]],
        lambda files: [*files[:2], files[1], *files[3:]],
        lambda files: [dataclasses.replace(files[0], sums=files[0].sums[1:]), *files[1:]],
        lambda files: [dataclasses.replace(files[0], sums=files[0].sums[:-1]), *files[1:]],
        lambda files: [dataclasses.replace(files[0], sums=files[1].sums), *files[1:]],
        lambda files: [dataclasses.replace(files[0], rows=files[1].rows), *files[1:]],
    ],
    ids=["last-missing", "one-missing", "swapped", "doubled", "no-sums", "no-scores", "anothers-sums", "anothers-rows"],
)
def test_shards_that_are_missing_doubled_or_swapped_are_noticed(job, tmp_path, mistake):
    with pytest.raises(ChecksumMismatch):
        finished(job, mistake(job[2]), tmp_path)

    assert not any((tmp_path / "out").iterdir())


def test_a_shards_files_are_not_needed_once_the_next_ones_are_asked_for(job, tmp_path):
    def one_by_one():
        for number, files in enumerate(job[2]):
            place = tmp_path / f"shard-{number}"
            shutil.copytree(files.rows.parent, place)
            yield ShardFiles(place / files.rows.name, [place / path.name for path in files.sums])
            shutil.rmtree(place)

    finished(job, one_by_one(), tmp_path)

    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (job[3] / name).read_bytes()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda plan: {**plan, "format": FORMAT + 1, "news": 1}, FormatMismatch),
        (lambda plan: {**plan, "news": 1}, ChecksumMismatch),
        (lambda plan: {name: value for name, value in plan.items() if name != "shards"}, ChecksumMismatch),
        (lambda plan: [], ChecksumMismatch),
    ],
    ids=["format", "unknown-field", "missing-field", "no-plan"],
)
def test_a_plan_of_another_format_or_damaged_is_refused(job, tmp_path, change, error):
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(change(json.loads(job[1].plan.read_text()))))

    with pytest.raises(error):
        finished(job, job[2], tmp_path, plan=plan)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda answer: {**answer, "format": FORMAT + 1}, FormatMismatch),
        (lambda answer: {}, FormatMismatch),
        (
            lambda answer: {**answer, "scores": {name: rows[1:] for name, rows in answer["scores"].items()}},
            ChecksumMismatch,
        ),
        (lambda answer: {**answer, "scores": {"chosen_logps": answer["scores"]["chosen_logps"]}}, ChecksumMismatch),
        (lambda answer: {"format": FORMAT}, ChecksumMismatch),
    ],
    ids=["format", "empty", "rows", "parts", "nothing"],
)
def test_answers_of_another_format_or_of_other_rows_are_refused(job, tmp_path, change, error):
    alone = Alone(job[0], tmp_path / "tasks", SETTINGS, load)

    def share(files, tasks):
        first, *others = alone(files, tasks)
        return [change(first), *others]

    with pytest.raises(error):
        finished(job, job[2], tmp_path, share=share)


def test_calibration_is_shared_in_pieces_that_cover_every_held_out_row_at_every_step(job, tmp_path):
    alone = Alone(job[0], tmp_path / "tasks", SETTINGS, load)

    finished(job, job[2], tmp_path, share=alone)

    report = report_of(tmp_path / "out")
    steps = [(part, trial["eta"]) for part in ("pilot", "trials") for trial in report["calibration"][part]]
    asked = [("pilot" if "held-out-0" in task.files[1] else "trials", task.eta) for task in alone.asked]
    assert list(dict.fromkeys(asked)) == steps
    assert {name.partition("-")[0] for name in alone.known} == {"direction", "held"}
    for step in steps:
        tasks = [task for task, own in zip(alone.asked, asked, strict=True) if own == step]
        assert len(tasks) == 8
        pieces = [(task.fold, index) for task in tasks for index in task.batches]
        assert len(set(pieces)) == len(pieces)
    assert report["calibration"]["rows"] == 40

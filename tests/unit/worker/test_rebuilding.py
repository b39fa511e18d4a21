"""An adapter from kept statistics against the one that a fresh job makes."""

import functools
import io
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from d2lora.datasets import DatasetFile, Format
from d2lora.errors import ChecksumMismatch, RequestInvalid, StatisticsTooNew
from d2lora.initializations import Dpo, Fixed, InitializationSpec, Kto, LoraSpec, Mean, Result, Sft, Whitening
from d2lora.roles import Role
from d2lora.settings import WorkerSettings
from tests.support import sharing
from tests.support.models import tiny_llama, tiny_tokenizer
from worker import gathering, models, rebuilding
from worker.__main__ import init as worker_init
from worker.data import Example, TokenSequence
from worker.initialization import initialize
from worker.rebuilding import deal
from worker.shard_files import FORMAT
from worker.units import BASE, KEPT, Split

SETTINGS = WorkerSettings(device="cpu", max_tokens_per_batch=64)
load = functools.cache(models.load)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    return saved(tiny_llama(), tmp_path_factory.mktemp("model"))


def saved(model, directory):
    directory.mkdir(exist_ok=True)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", range(12))


@pytest.fixture(scope="module")
def earlier(base_model, dataset, tmp_path_factory):
    """A job that has kept its statistics."""
    return build(base_model, dataset, tmp_path_factory.mktemp("earlier") / "out", keep_statistics=True)


def rows(path, numbers):
    lines = [{"prompt": f"item {n}:", "chosen": " yes yes", "rejected": f" no {n}"} for n in numbers]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DatasetFile(path, Format.JSONL)


def spec_for(base_model, **changes):
    # MGDA's ten thousand steps would take most of the time here.
    plain = {"base_model": base_model, "dataset_id": "ds", "lora": LoraSpec(r=4), "combination": Mean()}
    return InitializationSpec(**plain | changes)


def build(base_model, dataset, out, *, base=None, passes=None, extras=None, settings=SETTINGS, **changes):
    """Return the directory of an adapter; ``passes`` gets the phases that were run."""
    out.mkdir(parents=True)
    if base is not None:
        shutil.copytree(base / KEPT, out / BASE)
        changes["based_on"] = "init_1"
    seen = [] if passes is None else passes
    done = initialize(
        spec_for(base_model, **changes),
        dataset,
        extras or {},
        out=out,
        settings=settings,
        on_progress=lambda phase, *_: seen.append(phase),
        load=load,
        may_split=True,
    )
    assert isinstance(done, Result)
    return out


def report_of(out):
    return json.loads((out / "report.json").read_text())


def same_adapters(one, other, *, rtol=0.0):
    left, right = (updates(out) for out in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        scale = right[name].abs().max().item()
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=rtol * scale)


def updates(out):
    """B A of every layer, or A alone where B is zero."""
    tensors = load_file(out / "adapter_model.safetensors")
    names = {name.rpartition(".lora_")[0] for name in tensors}
    factors = {name: (tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]) for name in names}
    # Up to its rows' signs and their order, A is the span of its rows.
    return {name: b @ a if b.any() else torch.linalg.pinv(a) @ a for name, (a, b) in factors.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": LoraSpec(r=4, lora_alpha=3, use_rslora=True)},
        {"objectives": [Sft(), Dpo(beta=0.7)], "combination": Fixed(weights=[1, 3])},
        {"combination": {"type": "mgda"}},
        {"start": "zero"},
        {"lora": LoraSpec(r=4, ranks="budget")},
    ],
    ids=["same", "alpha", "beta-and-weights", "combination", "start", "ranks"],
)
def test_other_settings_give_a_fresh_jobs_adapter_without_a_pass(base_model, dataset, earlier, tmp_path, changes):
    phases = []
    rebuilt = build(base_model, dataset, tmp_path / "rebuilt", base=earlier, passes=phases, **changes)
    fresh = build(base_model, dataset, tmp_path / "fresh", **changes)

    assert "statistics" not in phases
    # Bit for bit, except where the earlier job had one basis more, so that its sums were made beside others.
    same_adapters(rebuilt, fresh, rtol=1e-5 if "objectives" in changes else 0)
    report, expected = report_of(rebuilt), report_of(fresh)
    if "objectives" not in changes:
        assert report["summary"] == expected["summary"]
        assert report["calibration"] == expected["calibration"]
    assert report["summary"]["fingerprint"] == expected["summary"]["fingerprint"]
    assert report["reuse"] == {"based_on": "init_1", "sketch_r": 4, "rows_reused": 12, "rows_passed": 0}
    assert expected["reuse"] is None
    assert "12 of them as passed by `init_1`" in (rebuilt / "README.md").read_text()


@pytest.mark.parametrize("loss", [Dpo(beta=0.3, loss_type="hinge"), Dpo(loss_type="robust", label_smoothing=0.2)])
def test_other_losses_with_the_same_bases_are_answered_too(base_model, dataset, earlier, tmp_path, loss):
    rebuilt = build(base_model, dataset, tmp_path / "rebuilt", base=earlier, objectives=[loss])
    fresh = build(base_model, dataset, tmp_path / "fresh", objectives=[loss])

    same_adapters(rebuilt, fresh, rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 7])
def test_exact_statistics_give_every_rank(base_model, dataset, tmp_path, rank):
    earlier = build(base_model, dataset, tmp_path / "earlier", statistics="exact", keep_statistics=True)
    changes = {"statistics": "exact", "lora": LoraSpec(r=rank)}

    rebuilt = build(base_model, dataset, tmp_path / "rebuilt", base=earlier, **changes)

    same_adapters(rebuilt, build(base_model, dataset, tmp_path / "fresh", **changes))


@pytest.mark.parametrize("rank", [2, 8])
def test_another_rank_is_a_fresh_jobs_whose_sketches_are_as_wide_as_the_kept_ones(
    base_model, dataset, earlier, tmp_path, monkeypatch, rank
):
    changes = {"lora": LoraSpec(r=rank)}
    rebuilt = build(base_model, dataset, tmp_path / "rebuilt", base=earlier, **changes)
    plain = build(base_model, dataset, tmp_path / "plain", **changes)
    monkeypatch.setattr(gathering, "OVERSAMPLING", gathering.OVERSAMPLING * 4 // rank)
    fresh = build(base_model, dataset, tmp_path / "fresh", **changes)

    same_adapters(rebuilt, fresh)
    assert report_of(rebuilt)["summary"]["fingerprint"] != report_of(plain)["summary"]["fingerprint"]


def test_whitened_statistics_serve_other_strengths(base_model, dataset, tmp_path):
    earlier = build(base_model, dataset, tmp_path / "earlier", whitening=Whitening(), keep_statistics=True)
    changes = {"whitening": Whitening(damping=0.5, power=1.0)}

    rebuilt = build(base_model, dataset, tmp_path / "rebuilt", base=earlier, **changes)

    same_adapters(rebuilt, build(base_model, dataset, tmp_path / "fresh", **changes))


def test_a_rebuilt_step_can_be_restrained_by_general_text(base_model, dataset, earlier, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {n} comes before {n + 1}"}) + "\n" for n in range(8)))
    changes = {"retain_dataset_id": "ds_text", "extras": {Role.RETAIN: DatasetFile(path, Format.JSONL)}}

    rebuilt = build(base_model, dataset, tmp_path / "rebuilt", base=earlier, **changes)

    fresh = build(base_model, dataset, tmp_path / "fresh", **changes)
    same_adapters(rebuilt, fresh)
    assert report_of(rebuilt)["summary"]["retained"] == report_of(fresh)["summary"]["retained"]


def test_added_rows_cost_their_own_pass_and_give_a_fresh_jobs_adapter_over_all(
    base_model, earlier, tmp_path, monkeypatch
):
    more = rows(tmp_path / "more.jsonl", [*range(9, 17), *range(9), 3])  # in another order, and 3 twice
    passed, dealt = [], {}

    def counted(*arguments, **named):
        passed.extend(row for batch in arguments[3] for row in batch.rows)
        return gather(*arguments, **named)

    def remembered(examples, known, **named):
        folds = deal(examples, known, **named)
        dealt.update(zip([one.digest for one in examples], folds, strict=True))
        return folds

    gather = rebuilding.gather_statistics
    with monkeypatch.context() as patched:
        patched.setattr(rebuilding, "gather_statistics", counted)
        patched.setattr(rebuilding, "deal", remembered)
        rebuilt = build(base_model, more, tmp_path / "rebuilt", base=earlier)
    plain = build(base_model, more, tmp_path / "plain")
    monkeypatch.setattr(gathering, "assign_folds", lambda examples, **_: [dealt[one.digest] for one in examples])
    fresh = build(base_model, more, tmp_path / "fresh")

    assert len(passed) == 6
    same_adapters(rebuilt, fresh, rtol=1e-4)
    report, expected = report_of(rebuilt), report_of(fresh)
    assert report["summary"]["held_out"]["dpo"] == pytest.approx(expected["summary"]["held_out"]["dpo"], rel=1e-4)
    assert report["reuse"] == {"based_on": "init_1", "sketch_r": 4, "rows_reused": 12, "rows_passed": 6}
    assert report["summary"]["rows_used"] == 18
    # Another deal of the folds leaves the direction as it is; only how far to step is measured on other rows.
    directions = [{name: step / step.norm() for name, step in updates(out).items()} for out in (rebuilt, plain)]
    for name, step in directions[0].items():
        torch.testing.assert_close(step, directions[1][name], rtol=0, atol=1e-3)
    assert report["summary"]["fingerprint"] != report_of(plain)["summary"]["fingerprint"]


def test_what_was_rebuilt_can_be_built_on(base_model, earlier, tmp_path):
    more = rows(tmp_path / "more.jsonl", range(17))
    once = build(base_model, more, tmp_path / "once", base=earlier, keep_statistics=True)

    twice = build(base_model, more, tmp_path / "twice", base=once)

    same_adapters(once, twice)
    assert report_of(twice)["reuse"]["rows_reused"] == 17
    assert report_of(twice)["summary"]["fingerprint"] == report_of(once)["summary"]["fingerprint"]


def test_a_job_in_shards_keeps_what_a_whole_one_keeps_and_what_is_based_on_it_is_not_cut(
    base_model, dataset, earlier, tmp_path
):
    spec = spec_for(base_model, keep_statistics=True)
    settings = SETTINGS.model_copy(update={"shard_tokens": 100})
    split = sharing.cut(spec, dataset, {}, tmp_path / "cut", settings=settings, load=load)
    assert isinstance(split, Split)
    assert len(split.shards) > 2
    files = sharing.gather(spec, split, tmp_path, settings=settings, load=load)
    sharing.build(spec, split, files, {}, tmp_path, settings=settings, load=load)
    more = rows(tmp_path / "more.jsonl", range(17))

    rebuilt = build(base_model, more, tmp_path / "rebuilt", base=tmp_path / "out", settings=settings)

    same_adapters(rebuilt, build(base_model, more, tmp_path / "whole", base=earlier), rtol=1e-4)
    assert report_of(rebuilt)["reuse"]["rows_reused"] == 12


def test_labeled_rows_can_be_added_and_their_rate_be_another(base_model, tmp_path):
    def labeled(name, numbers):
        lines = [{"prompt": f"item {n}:", "completion": f" yes {n}", "label": n % 3 > 0} for n in numbers]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return DatasetFile(tmp_path / name, Format.JSONL)

    few, more = labeled("few.jsonl", range(9)), labeled("more.jsonl", range(14))
    earlier = build(base_model, few, tmp_path / "earlier", keep_statistics=True)
    changes = {"objectives": [Sft(), Kto(beta=0.4)], "start": "zero"}

    rebuilt = build(base_model, more, tmp_path / "rebuilt", base=earlier, **changes)

    same_adapters(rebuilt, build(base_model, more, tmp_path / "fresh", **changes), rtol=1e-3)
    assert report_of(rebuilt)["reuse"]["rows_passed"] == 5


@pytest.mark.parametrize(
    ("changes", "field", "why"),
    [
        ({"objectives": [Dpo(loss_type="ipo")]}, "objectives", "mean_margin"),
        ({"lora": LoraSpec(r=9)}, "lora.r", "up to 8"),
        ({"lora": LoraSpec(r=5, ranks="budget")}, "lora.ranks", "up to lora.r 4"),
        ({"seed": 1}, "seed", "was made with 0"),
        ({"lora": LoraSpec(r=4, target_modules=["q_proj"])}, "lora.target_modules", "other layers"),
        ({"statistics": "exact"}, "statistics", "of kind sketch"),
        ({"whitening": Whitening()}, "statistics", "of kind sketch"),
    ],
)
def test_what_the_statistics_cannot_give_is_refused_by_its_field(
    base_model, dataset, earlier, tmp_path, changes, field, why
):
    with pytest.raises(RequestInvalid, match=why) as caught:
        build(base_model, dataset, tmp_path / "rebuilt", base=earlier, **changes)

    assert caught.value.detail.startswith(f"{field}: ")
    assert caught.value.errors[0].pointer == f"#/{field.replace('.', '/')}"
    assert not (tmp_path / "rebuilt" / "manifest.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "kaiming"},
        {"method": {"type": "warmup", "from": "gradient", "warmup_dataset_id": "ds_general"}},
        {"rounds": 2},
        {"second_pass_above": 0.1},
        {"dataset_id": None, "datasets": [{"dataset_id": "ds_1"}, {"dataset_id": "ds_2"}]},
    ],
    ids=["peft", "warmup", "rounds", "second-pass", "datasets"],
)
def test_what_needs_other_passes_cannot_be_based_on_statistics(changes):
    plain = {"base_model": "m", "dataset_id": "ds", **changes}
    InitializationSpec(**plain)

    with pytest.raises(ValueError, match="based_on"):
        InitializationSpec(**plain, based_on="init_1")


def test_rows_that_are_gone_cannot_be_taken_out_of_the_sums(base_model, earlier, tmp_path):
    fewer = rows(tmp_path / "fewer.jsonl", range(10))

    with pytest.raises(RequestInvalid, match="dataset_id: 2 of the 12 rows of init_1 are not in it"):
        build(base_model, fewer, tmp_path / "rebuilt", base=earlier)


def copied(earlier, directory):
    shutil.copytree(earlier / KEPT, directory / KEPT)
    return directory


@pytest.mark.parametrize("name", ["index.json", "kept-rows.safetensors", "fold-0.safetensors"])
def test_damaged_statistics_are_not_used(base_model, dataset, earlier, tmp_path, name):
    base = copied(earlier, tmp_path / "base")
    whole = (base / KEPT / name).read_bytes()
    (base / KEPT / name).write_bytes(whole[: len(whole) // 2])

    with pytest.raises(ChecksumMismatch):
        build(base_model, dataset, tmp_path / "rebuilt", base=base)


def test_statistics_of_an_older_version_are_refused_and_a_newer_ones_left_to_others(
    base_model, dataset, earlier, tmp_path
):
    base = copied(earlier, tmp_path / "base")
    index = json.loads((base / KEPT / "index.json").read_text())

    (base / KEPT / "index.json").write_text(json.dumps({**index, "format": FORMAT - 1}))
    with pytest.raises(RequestInvalid, match="based_on: the statistics of init_1 are of an older version"):
        build(base_model, dataset, tmp_path / "older", base=base)
    (base / KEPT / "index.json").write_text(json.dumps({**index, "format": FORMAT + 1, "unknown": 1}))
    with pytest.raises(StatisticsTooNew, match="based_on: the statistics of init_1 are of a newer version"):
        build(base_model, dataset, tmp_path / "newer", base=base)


def run_init(monkeypatch, request):
    """Return the exit code of ``python -m worker init``, and the last line that it says."""
    said = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr("sys.stdin", io.StringIO(json.dumps(request)))
        patched.setattr("sys.stdout", said)
        code = worker_init()
    return code, json.loads(said.getvalue().splitlines()[-1])


def test_one_adapter_alone_can_be_based_on_the_directory_of_another(base_model, dataset, tmp_path, monkeypatch):
    described = {"path": str(dataset.path), "format": "jsonl"}

    def make(name, based_on=None, **changes):
        spec = spec_for(base_model, based_on=based_on and "local", **changes).model_dump(mode="json")
        out = str(tmp_path / name)
        return run_init(monkeypatch, {"spec": spec, "dataset": described, "based_on": based_on, "out": out})

    assert make("first", keep_statistics=True)[0] == 0
    assert make("second", str(tmp_path / "first"), lora=LoraSpec(r=3), keep_statistics=True)[0] == 0
    assert make("third", str(tmp_path / "second"), lora=LoraSpec(r=3))[0] == 0
    code, answer = make("fourth", str(tmp_path / "third"))

    assert report_of(tmp_path / "second")["reuse"]["rows_passed"] == 0
    same_adapters(tmp_path / "second", tmp_path / "third")
    assert (tmp_path / "second" / KEPT).is_dir()
    assert not (tmp_path / "second" / BASE).exists()
    assert (code, answer["problem"]["detail"].startswith("based_on: ")) == (1, True)
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "third"}


def test_statistics_that_have_been_removed_are_said_to_be(base_model, dataset, tmp_path):
    with pytest.raises(RequestInvalid, match="based_on: the statistics of init_1 have been removed"):
        build(base_model, dataset, tmp_path / "rebuilt", based_on="init_1")


def test_other_weights_are_refused(dataset, earlier, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)

    with pytest.raises(
        RequestInvalid, match="base_model: its weights, configuration or tokenizer are not those that init_1"
    ):
        build(saved(model, tmp_path / "model"), dataset, tmp_path / "rebuilt", base=earlier)


def test_what_is_kept_holds_no_text(earlier):
    assert all(b"item" not in path.read_bytes() for path in (earlier / KEPT).iterdir())

    kept = load_file(earlier / KEPT / "kept-rows.safetensors")

    # A digest and a few numbers of every row; no tokens.
    assert kept.pop("digests_R").numel() == 12 * 32
    assert all(math.prod(tensor.shape) == 12 for tensor in kept.values())


def example(digest, label=None):
    return Example(digest, TokenSequence([ord(digest), 2], [False, True]), None, label)


def test_known_rows_keep_their_folds_and_new_ones_even_them_out():
    known = {"a": 0, "b": 1, "c": 1}

    folds = deal([example(digest) for digest in "abcdefgh"], known, seed=0)

    assert folds[:3] == [0, 1, 1]
    assert sorted(folds) == [0, 0, 1, 1, 2, 2, 3, 3]


def pair(digest, chosen, rejected):
    return Example(digest, TokenSequence([1, chosen], [False, True]), TokenSequence([1, rejected], [False, True]), None)


def test_an_added_row_goes_to_the_fold_of_a_known_one_with_its_completion():
    rows = [pair("a", 10, 20), pair("b", 11, 21), pair("c", 12, 22), pair("new", 11, 29)]

    assert deal(rows, {"a": 0, "b": 2, "c": 1}, seed=0) == [0, 2, 1, 2]


@pytest.mark.parametrize(
    "rows",
    [
        [pair("a", 10, 20), pair("b", 11, 20)],  # as earlier versions dealt them
        [pair("a", 10, 20), pair("b", 11, 21), pair("new", 10, 21)],
    ],
)
def test_known_rows_that_would_be_held_out_from_each_other_are_refused(rows):
    with pytest.raises(RequestInvalid, match="dataset_id: rows that share a completion"):
        deal(rows, {"a": 0, "b": 1}, seed=0)


def test_a_fold_is_begun_only_where_every_label_reaches_it():
    known = {"a": 0, "b": 1, "x": 0, "y": 1}

    folds = deal([example(one, True) for one in "abcde"] + [example(one, False) for one in "xy"], known, seed=0)

    assert set(folds) == {0, 1}

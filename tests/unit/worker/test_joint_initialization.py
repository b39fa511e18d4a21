"""Several datasets, from files to files."""

import hashlib
import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2lora.datasets import DatasetFile, Format
from d2lora.errors import DatasetSyntaxInvalid, ObjectiveUnavailable, RequestInvalid, RowsTooLong, SchemaUnknown
from d2lora.initializations import InitializationSpec, LoraSpec, Phase
from d2lora.settings import WorkerSettings
from tests.support.models import tiny_llama, tiny_tokenizer
from tests.unit.d2lora.test_cli import d2lora
from worker.joint_initialization import initialize_jointly
from worker.report import Report

SFT, DPO = {"type": "sft"}, {"type": "dpo"}


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DatasetFile(path, Format.JSONL)


@pytest.fixture
def plain(tmp_path):
    rows = [{"question": f"say {number}:", "completion": " yes yes"} for number in range(12)]
    file = write(tmp_path / "plain.jsonl", rows)
    return DatasetFile(file.path, file.format, {"prompt": "question"})


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"item {n}:", "chosen": " good good good", "rejected": f" bad {n}"} for n in range(16)]
    return write(tmp_path / "pairs.jsonl", rows)


def run(base_model, datasets, out, *, asked=((SFT,), (DPO,)), ids=("ds_1", "ds_2"), evaluations=None, **changes):
    named = [{"dataset_id": name, "objectives": one and list(one)} for name, one in zip(ids, asked, strict=True)]
    for index in evaluations or {}:
        named[index]["eval_dataset_id"] = f"eval_{index}"
    spec = InitializationSpec.model_validate(
        {"base_model": base_model, "datasets": named, "lora": LoraSpec(r=4), **changes}
    )
    out.mkdir()
    settings, seen = WorkerSettings(device="cpu"), []
    result = initialize_jointly(
        spec, datasets, evaluations or {}, out=out, settings=settings, on_progress=lambda *now: seen.append(now)
    )
    run.progress = seen
    return result


def logps(model, prompt, completion):
    """The completion's summed log-probability."""
    tokenizer = tiny_tokenizer()
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(f"{prompt}{completion}</s>")["input_ids"]])
    with torch.no_grad():
        every = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
    return every.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


def test_stock_peft_applies_the_one_adapter_which_serves_both_tasks_and_the_report_tells_them_apart(
    base_model, plain, pairs, tmp_path
):
    result = run(base_model, [plain, pairs], tmp_path / "out")

    base = AutoModelForCausalLM.from_pretrained(base_model)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    imitated = logps(model, "say 77:", " yes yes")
    margin = logps(model, "item 77:", " good good good") - logps(model, "item 77:", " bad 77")
    with model.disable_adapter():
        assert imitated > logps(model, "say 77:", " yes yes")
        assert margin > logps(model, "item 77:", " good good good") - logps(model, "item 77:", " bad 77")
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    summary, names = report.summary, ["datasets[0].sft", "datasets[1].dpo"]
    assert (summary.start, summary.objectives, summary.objectives_reason) == ("calibrated", names, "as requested")
    assert summary == result.summary
    assert list(summary.weights) == names
    assert list(summary.cosines) == ["datasets[0].sft,datasets[1].dpo"]
    assert {name: one.rows for name, one in summary.held_out.items()} == {
        "datasets[0].nll": 12,
        "datasets[0].sft": 12,
        "datasets[1].nll": 16,
        "datasets[1].dpo": 16,
    }
    assert all(summary.held_out[name].adapter < summary.held_out[name].base for name in names)
    assert [(one.dataset_id, one.type) for one in report.objectives] == [("ds_1", "sft"), ("ds_2", "dpo")]
    assert all(list(trial.changes) == names for trial in report.calibration.trials)
    assert all(list(layer.gradient_norms) == names for layer in report.layers.values())
    digests = [hashlib.sha256(file.path.read_bytes()).hexdigest() for file in (plain, pairs)]
    assert [(one.dataset_id, one.sha256) for one in report.datasets] == list(
        zip(("ds_1", "ds_2"), digests, strict=True)
    )
    assert report.dataset_sha256 == hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()
    assert [one.rows["used"] for one in report.datasets] == [12, 16]
    assert (summary.rows_used, report.rows["read"], report.shards) == (28, 28, 1)
    assert report.mean_tokens.keys() == {"datasets[0].chosen", "datasets[1].chosen", "datasets[1].rejected"}
    assert (
        "from gradient statistics of datasets[0].sft, datasets[1].dpo on 28 rows"
        in (tmp_path / "out" / "README.md").read_text()
    )
    assert not list((tmp_path / "out").glob(".statistics-*"))


def test_an_adapter_for_each_dataset_lies_in_a_folder_of_its_own_with_its_report(base_model, plain, pairs, tmp_path):
    out = tmp_path / "out"

    result = run(base_model, [plain, pairs], out, adapters="per_dataset")

    base, kinds = AutoModelForCausalLM.from_pretrained(base_model), ("sft", "dpo")
    before = logps(base, "say 77:", " yes yes")
    model = PeftModel.from_pretrained(base, str(out / "datasets-0"))
    assert logps(model, "say 77:", " yes yes") > before
    manifest = json.loads((out / "manifest.json").read_text())
    every = [path for path in out.rglob("*") if path.is_file() and path != out / "manifest.json"]
    assert {entry["name"] for entry in manifest["files"]} == {str(path.relative_to(out)) for path in every}
    for file in result.files:
        content = (out / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert result.files[-1].name == "manifest.json"
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.summary == result.summary
    assert report.folders == {"datasets-0": "ds_1", "datasets-1": "ds_2"}
    assert list(report.summary.cosines) == ["datasets[0].sft,datasets[1].dpo"]
    assert report.summary.weights == {"datasets[0].sft": 1.0, "datasets[1].dpo": 1.0}
    assert report.summary.rows_used == 28
    card = (out / "README.md").read_text()
    assert "- `datasets-1`: the adapter for dataset `ds_2`" in card
    assert "from_pretrained" not in card
    for index, kind in enumerate(kinds):
        own = Report.model_validate_json((out / f"datasets-{index}" / "report.json").read_text())
        name = f"datasets[{index}].{kind}"
        assert (own.summary.objectives, own.summary.rows_used) == ([name], (12, 16)[index])
        assert [one.dataset_id for one in own.datasets] == [f"ds_{index + 1}"]
        assert own.summary.held_out[name] == report.summary.held_out[name]
        assert own.layers
        assert f"datasets[{index}]: {own.summary.start_reason}" in report.summary.start_reason


@pytest.fixture
def unseen(tmp_path):
    """Rows like those of both datasets, that neither has."""
    plain = [{"question": f"say {number}:", "completion": " yes yes"} for number in range(70, 75)]
    pairs = [{"prompt": f"item {n}:", "chosen": " good good good", "rejected": f" bad {n}"} for n in range(70, 77)]
    first = write(tmp_path / "unseen-plain.jsonl", plain)
    return {
        0: DatasetFile(first.path, first.format, {"prompt": "question"}),
        1: write(tmp_path / "unseen-pairs.jsonl", pairs),
    }


def means_on_unseen(base_model, first, second):
    """The loss per token on the first kind of unseen rows by one adapter, and DPO's on the other by another."""

    def values(adapter, texts):
        model = AutoModelForCausalLM.from_pretrained(base_model)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        return torch.tensor([logps(model, *text) for text in texts])

    tokenizer, answers = tiny_tokenizer(), [(f"say {n}:", " yes yes") for n in range(70, 75)]
    tokens = sum(
        len(tokenizer(f"{prompt}{answer}</s>")["input_ids"]) - len(tokenizer(prompt)["input_ids"])
        for prompt, answer in answers
    )
    good, bad = ([(f"item {n}:", text.format(n)) for n in range(70, 77)] for text in (" good good good", " bad {}"))
    margins = [values(adapter, good) - values(adapter, bad) for adapter in (second, None)]
    dpo = -torch.nn.functional.logsigmoid(0.1 * (margins[0] - margins[1])).mean().item()
    return -values(first, answers).sum().item() / tokens, dpo


@pytest.mark.parametrize("adapters", [None, "per_dataset"])
def test_each_dataset_has_an_evaluation_of_the_adapter_that_serves_it(
    base_model, plain, pairs, unseen, tmp_path, adapters
):
    out = tmp_path / "out"

    result = run(base_model, [plain, pairs], out, evaluations=unseen, adapters=adapters)

    evaluation = result.summary.evaluation
    assert {name: one.rows for name, one in evaluation.items()} == {
        "datasets[0].nll": 5,
        "datasets[0].sft": 5,
        "datasets[1].nll": 7,
        "datasets[1].dpo": 7,
    }
    folders = [out, out] if adapters is None else [out / "datasets-0", out / "datasets-1"]
    nll, dpo = means_on_unseen(base_model, *folders)
    assert evaluation["datasets[0].nll"].adapter == pytest.approx(nll, rel=1e-4)
    assert evaluation["datasets[1].dpo"].adapter == pytest.approx(dpo, rel=1e-4)
    assert evaluation["datasets[1].dpo"].base == pytest.approx(math.log(2), rel=1e-6)
    told = [one for one in run.progress if one[0] is Phase.EVALUATION]
    assert told == sorted(told, key=lambda one: one[1])
    assert told[-1][1:] == (12, 12)
    digests = [hashlib.sha256(unseen[index].path.read_bytes()).hexdigest() for index in (0, 1)]
    together = hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()
    report = Report.model_validate_json((out / "report.json").read_text())
    assert report.extra_dataset_sha256 == {"evaluation": together}
    assert [one.evaluation_sha256 for one in report.datasets] == digests
    assert "| datasets[1].dpo (evaluation dataset) |" in (out / "README.md").read_text()
    for index in (0, 1) if adapters else ():
        own = Report.model_validate_json((folders[index] / "report.json").read_text())
        place = f"datasets[{index}]."
        assert own.summary.evaluation == {name: one for name, one in evaluation.items() if name.startswith(place)}
        assert own.extra_dataset_sha256 == {"evaluation": digests[index]}


def test_one_dataset_may_have_an_evaluation_alone_which_decides_nothing(base_model, plain, pairs, unseen, tmp_path):
    measured = run(base_model, [plain, pairs], tmp_path / "a", evaluations={1: unseen[1]}, start="zero")
    assert not any("eval_dataset_id" in warning for warning in measured.summary.warnings)
    without = run(base_model, [plain, pairs], tmp_path / "b", start="zero")

    assert measured.summary.evaluation.keys() == {"datasets[1].nll", "datasets[1].dpo"}
    assert without.summary.evaluation is None
    assert measured.summary.fingerprint == without.summary.fingerprint
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("adapters", "told"), [(None, True), ("per_dataset", False)])
def test_rows_that_another_datasets_adapter_has_learned_from_are_told_where_it_is_the_same(
    base_model, plain, pairs, tmp_path, adapters, told
):
    evaluations = {0: DatasetFile(pairs.path, pairs.format)}

    result = run(base_model, [plain, pairs], tmp_path / "a", evaluations=evaluations, adapters=adapters, start="zero")

    said = "datasets[0].eval_dataset_id: 16 of 16 rows are among those that the adapter was made from"
    assert any(warning.startswith(said) for warning in result.summary.warnings) is told


def test_what_is_wrong_with_an_evaluation_is_said_with_its_field(base_model, plain, pairs, unseen, tmp_path):
    with pytest.raises(ObjectiveUnavailable, match=r"^datasets\[1\]\.eval_dataset_id: .*dpo needs rows with"):
        run(base_model, [plain, pairs], tmp_path / "a", evaluations={1: unseen[0]})
    unread = DatasetFile(unseen[0].path, Format.JSONL)
    with pytest.raises(SchemaUnknown, match=r"^datasets\[0\]\.eval_dataset_id: row 1"):
        run(base_model, [plain, pairs], tmp_path / "b", evaluations={0: unread})
    spec = {"base_model": base_model, "datasets": [{"dataset_id": "a", "eval_dataset_id": "e"}, {"dataset_id": "b"}]}
    with pytest.raises(RequestInvalid, match=r"^datasets\[0\]\.eval_dataset_id: .* rows were not given"):
        initialize_jointly(
            InitializationSpec.model_validate(spec),
            [plain, pairs],
            {},
            out=tmp_path,
            settings=WorkerSettings(device="cpu"),
            on_progress=lambda *_: None,
        )


def test_all_that_the_rows_of_each_dataset_allow_is_the_default(base_model, plain, pairs, tmp_path):
    every = run(base_model, [plain, pairs], tmp_path / "a", asked=(None, None), start="zero").summary
    some = run(base_model, [plain, pairs], tmp_path / "b", asked=(None, (DPO,)), start="zero").summary

    assert every.objectives == ["datasets[0].sft", "datasets[1].sft", "datasets[1].dpo", "datasets[1].orpo"]
    assert every.objectives_reason == "all that the rows of each dataset allow"
    assert some.objectives == ["datasets[0].sft", "datasets[1].dpo"]
    assert some.objectives_reason == "as requested, and where nothing is, all that the rows allow"


def test_equal_requests_have_equal_fingerprints_whatever_the_datasets_are_called(base_model, plain, pairs, tmp_path):
    def fingerprint(name, datasets=(plain, pairs), **changes):
        return run(base_model, list(datasets), tmp_path / name, start="zero", **changes).summary.fingerprint

    first = fingerprint("a")

    assert fingerprint("b", ids=("ds_8", "ds_9")) == first
    unmapped = write(tmp_path / "same.jsonl", [{"prompt": "say:", "completion": " yes"}])
    others = [fingerprint("c", asked=((SFT,), (SFT,))), fingerprint("d", datasets=(unmapped, pairs))]
    assert len({first, *others, fingerprint("e", adapters="per_dataset")}) == 4


def test_what_is_wrong_with_a_dataset_is_said_with_its_place(base_model, plain, pairs, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt":\n')

    with pytest.raises(DatasetSyntaxInvalid, match=r"^datasets\[1\]: row 2"):
        run(base_model, [plain, DatasetFile(broken, Format.JSONL)], tmp_path / "a", asked=((SFT,), (SFT,)))
    with pytest.raises(ObjectiveUnavailable, match=r"^datasets\[0\]: objectives: dpo needs rows with"):
        run(base_model, [plain, pairs], tmp_path / "b", asked=((DPO,), (DPO,)))
    with pytest.raises(RowsTooLong, match=r"^datasets\[0\]: no row of 12 is left at max_length 2"):
        run(base_model, [plain, pairs], tmp_path / "c", max_length=2)
    with pytest.raises(RequestInvalid, match="the request names 2, and 1 were given"):
        run(base_model, [plain], tmp_path / "d")
    assert not any((tmp_path / name / "manifest.json").exists() for name in "abcd")


def test_the_command_line_builds_one_adapter_from_several_files(base_model, plain, pairs, unseen, tmp_path):
    arguments = ["init", base_model, plain.path, "--dataset", pairs.path, "--column", "prompt=question"]
    arguments += ["--eval", unseen[0].path, "--eval", unseen[1].path]
    chosen = ["--objective", "sft", "--objective", "1.dpo:beta=0.2", "--r", "2", "--dtype", "float32"]

    done = d2lora(*arguments, *chosen, "--out", "out", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "cos(datasets[0].sft,datasets[1].dpo)" in done.stdout
    assert "held out, cross-validated: datasets[1].dpo" in done.stdout
    assert "evaluation dataset: datasets[0].sft" in done.stdout
    assert "evaluation dataset: datasets[1].dpo" in done.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["spec"]["datasets"][1]["objectives"][0]["beta"] == 0.2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

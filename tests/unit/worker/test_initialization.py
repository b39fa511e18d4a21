import hashlib
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2lora.datasets import DatasetFile, Format
from d2lora.errors import D2LoraError, DeviceFailure, ObjectiveUnavailable, RequestInvalid, RowsTooLong, StorageFull
from d2lora.initializations import Dpo, InitializationSpec, LoraSpec
from d2lora.roles import Role
from d2lora.settings import WorkerSettings
from tests.support.models import tiny_gpt2, tiny_llama, tiny_tokenizer
from worker.initialization import initialize


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"], scope="module")
def base_model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    request.param().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def write_rows(path, count, *, paired=True):
    rows = []
    for number in range(count):
        row = {"prompt": f"item {number}:", "completion": " yes yes"}
        if paired:
            row = {"prompt": row["prompt"], "chosen": " yes yes", "rejected": f" no {number}"}
        rows.append(json.dumps(row))
    path.write_text("\n".join(rows) + "\n")
    return DatasetFile(path, Format.JSONL)


def run(base_model, dataset, out, *, evaluation=None, settings=None, **changes):
    spec = InitializationSpec(**{"base_model": base_model, "dataset_id": "ds", "lora": LoraSpec(r=4), **changes})
    out.mkdir()
    settings = settings or WorkerSettings(device="cpu")
    extras = {Role.EVALUATION: evaluation} if evaluation else {}
    return initialize(spec, dataset, extras, out=out, settings=settings, on_progress=lambda *_: None)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_stock_peft_applies_the_adapter_to_the_unmodified_base(base_model, tmp_path, rslora):
    run(
        base_model,
        write_rows(tmp_path / "rows.jsonl", 12),
        tmp_path / "out",
        lora=LoraSpec(r=4, lora_alpha=6, use_rslora=rslora),
    )

    base = AutoModelForCausalLM.from_pretrained(base_model)
    before = logits_of(base)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out"), is_trainable=True)
    after = logits_of(model)
    report = json.loads((tmp_path / "out" / "report.json").read_text())

    assert report["summary"]["start"] == "calibrated"
    assert not torch.allclose(before, after)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    for name, layer in report["layers"].items():
        module = model.get_submodule(f"base_model.model.{name}")
        update = module.get_delta_weight("default").detach().norm().item()
        assert update == pytest.approx(
            layer["relative_magnitude"] * module.base_layer.weight.detach().norm().item(), rel=1e-3
        )
        assert layer["gradient_norms"].keys() == {"sft", "dpo", "orpo"}
        assert all(-1.001 <= value <= 1.001 for value in layer["cosines"].values())
    assert report["summary"]["objectives_reason"] == "all that the rows allow"
    norms = {objective["type"]: objective["gradient_norm"] for objective in report["objectives"]}
    for name, norm in norms.items():
        assert norm**2 == pytest.approx(
            sum(layer["gradient_norms"][name] ** 2 for layer in report["layers"].values()), rel=1e-3
        )
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def test_the_delivered_adapter_has_the_evaluation_that_the_report_says(base_model, tmp_path):
    evaluation = write_rows(tmp_path / "eval.jsonl", 5)

    result = run(base_model, write_rows(tmp_path / "rows.jsonl", 12), tmp_path / "out", evaluation=evaluation)

    tokenizer = tiny_tokenizer()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_model), str(tmp_path / "out"))
    total = tokens = 0
    for number in range(5):
        prompt = tokenizer(f"item {number}:")["input_ids"]
        ids = torch.tensor([tokenizer(f"item {number}: yes yes</s>")["input_ids"]])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1], -1)
        own = logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
        total, tokens = total - own.sum().item(), tokens + len(own)
    assert result.summary.evaluation["nll"].adapter == pytest.approx(total / tokens, rel=1e-4)
    assert result.summary.evaluation["nll"].adapter < result.summary.evaluation["nll"].base


def test_rows_that_measure_and_were_learned_from_are_told(base_model, tmp_path):
    dataset, evaluation = write_rows(tmp_path / "rows.jsonl", 4), write_rows(tmp_path / "eval.jsonl", 6)
    with evaluation.path.open("a") as file:
        file.write('{"prompt": "another:", "chosen": " yes", "rejected": " no"}\n')

    result = run(base_model, dataset, tmp_path / "out", evaluation=evaluation, start="zero")
    alone = run(base_model, dataset, tmp_path / "alone", start="zero")

    said = "eval_dataset_id: 4 of 7 rows are among those that the adapter was made from; figures on these flatter it"
    assert said in result.summary.warnings
    assert not any("eval_dataset_id" in warning for warning in alone.summary.warnings)


def test_text_to_retain_that_is_to_measure_is_told_too(base_model, tmp_path):
    files = {role: write_rows(tmp_path / f"{role}.jsonl", 6, paired=False) for role in (Role.RETAIN, Role.EVALUATION)}
    spec = InitializationSpec(
        base_model=base_model, dataset_id="ds", lora=LoraSpec(r=4), retain_dataset_id="r", eval_dataset_id="e"
    )
    rows = write_rows(tmp_path / "rows.jsonl", 4, paired=False)
    (tmp_path / "out").mkdir()

    result = initialize(
        spec, rows, files, out=tmp_path / "out", settings=WorkerSettings(device="cpu"), on_progress=lambda *_: None
    )

    assert any("eval_dataset_id: 6 of 6 rows" in warning for warning in result.summary.warnings)


def test_the_manifest_lists_every_file_with_its_checksum(base_model, tmp_path):
    result = run(base_model, write_rows(tmp_path / "rows.jsonl", 6), tmp_path / "out")

    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "report.json", "manifest.json"}
    assert {entry["name"] for entry in manifest["files"]} == names - {"manifest.json"}
    assert result.files[-1].name == "manifest.json"
    for file in result.files:
        content = (tmp_path / "out" / file.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256)


def test_the_adapters_files_are_the_same_for_the_same_request(base_model, tmp_path):
    dataset = write_rows(tmp_path / "rows.jsonl", 6)

    first, second = (run(base_model, dataset, tmp_path / name) for name in ("a", "b"))

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert first.summary.fingerprint == second.summary.fingerprint


def test_the_report_has_the_digest_of_the_evaluation_rows_and_the_fingerprint_has_not(base_model, tmp_path):
    dataset, evaluation = write_rows(tmp_path / "rows.jsonl", 4), write_rows(tmp_path / "eval.jsonl", 3)

    alone = run(base_model, dataset, tmp_path / "alone", start="zero")
    measured = run(base_model, dataset, tmp_path / "measured", evaluation=evaluation, start="zero")

    report = json.loads((tmp_path / "measured" / "report.json").read_text())
    assert report["extra_dataset_sha256"] == {"evaluation": hashlib.sha256(evaluation.path.read_bytes()).hexdigest()}
    assert measured.summary.fingerprint == alone.summary.fingerprint


def test_another_seed_or_dataset_has_another_fingerprint(base_model, tmp_path):
    dataset, other = write_rows(tmp_path / "rows.jsonl", 6), write_rows(tmp_path / "other.jsonl", 7)

    prints = {
        run(base_model, rows, tmp_path / name, start="zero", seed=seed).summary.fingerprint
        for name, rows, seed in (("a", dataset, 0), ("b", dataset, 1), ("c", other, 0))
    }

    assert len(prints) == 3


def test_columns_that_are_read_otherwise_have_another_fingerprint(base_model, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"item {n}:", "a": " yes", "b": " no"}) + "\n" for n in range(4)))
    readings = [{"prompt": "q", "chosen": one, "rejected": other} for one, other in ("ab", "ba")]

    prints = {
        run(base_model, DatasetFile(path, Format.JSONL, columns), tmp_path / name, start="zero").summary.fingerprint
        for name, columns in zip("xy", readings, strict=True)
    }

    assert len(prints) == 2


def test_a_dataset_that_is_named_has_to_be_there(base_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 4)

    with pytest.raises(RequestInvalid, match="retain_dataset_id: the request names a dataset, and its rows"):
        run(base_model, rows, tmp_path / "out", retain_dataset_id="ds_1")


def test_a_fault_in_further_rows_names_their_field(base_model, tmp_path):
    rows, broken = write_rows(tmp_path / "rows.jsonl", 4), tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "only"}\n')

    with pytest.raises(D2LoraError, match=r"^eval_dataset_id: "):
        run(base_model, rows, tmp_path / "out", evaluation=DatasetFile(broken, Format.JSONL))


def test_the_configuration_keeps_a_reference_copy_harmless(base_model, tmp_path):
    run(base_model, write_rows(tmp_path / "rows.jsonl", 6), tmp_path / "out")

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())

    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == base_model
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == sorted(config["target_modules"])


def test_a_dataset_that_no_longer_fits_leaves_no_manifest(base_model, tmp_path):
    with pytest.raises(RowsTooLong):
        run(base_model, write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out", max_length=3)

    assert not any((tmp_path / "out").iterdir())


def test_dpo_on_rows_without_rejected_is_refused(base_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 3, paired=False)

    with pytest.raises(ObjectiveUnavailable, match="dpo"):
        run(base_model, rows, tmp_path / "out", objectives=[Dpo()])


def test_a_max_length_above_the_models_context_is_lowered_and_said(base_model, tmp_path):
    result = run(base_model, write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out", max_length=5000)

    if result.summary.warnings:
        assert "128" in result.summary.warnings[0]


def test_a_full_disk_is_reported_as_such(base_model, tmp_path, monkeypatch):
    def full(*_arguments, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("worker.sketch_files.os.pwrite", full)

    with pytest.raises(StorageFull):
        run(base_model, write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out")


def test_a_broken_accelerator_is_reported_as_such(base_model, tmp_path, monkeypatch):
    def broken(*_arguments, **_named):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("worker.statistics._forward_and_backward", broken)

    with pytest.raises(DeviceFailure):
        run(base_model, write_rows(tmp_path / "rows.jsonl", 3), tmp_path / "out")

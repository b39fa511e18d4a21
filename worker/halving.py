"""A batch in parts where memory runs out: half the rows at a time, down to a single one."""

from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

import torch

from d2lora.errors import OutOfMemory
from worker.batches import Batch
from worker.devices import says_out_of_memory
from worker.models import BaseModel

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def in_halves(
    base: BaseModel,
    batch: Batch,
    run: Callable[[Batch, set[Key]], Result],
    finished: frozenset[Key] = frozenset(),
) -> Iterator[tuple[Batch, Result]]:
    """Run a batch, in halves if memory runs out, and yield every part with what came of it.

    ``run`` gets a part on the model's device and the set of what holds all rows of this part already: it skips these,
    and adds to the set what it has finished. Since sums over the halves are sums over the batch, the halves of an
    attempt that ran out of memory then miss nothing and count nothing twice.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    done = set(finished)
    try:
        result = run(batch.to(base.device), done)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    else:
        yield batch, result
        return
    if len(batch.rows) == 1:
        size = batch.input_ids.numel()
        raise OutOfMemory(f"a row of {size} tokens does not fit into memory; lower max_length") from failure
    del failure  # its traceback keeps the activations alive
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
    for half in batch.halves():
        yield from in_halves(base, half, run, frozenset(done))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device's or the host's memory is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(error)

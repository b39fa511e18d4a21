"""What libraries raise when a machine gives out, as our errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from d2lora.errors import DeviceFailure, OutOfMemory, ScratchFull
from d2lora.scratch import is_full
from worker.devices import is_device_failure
from worker.halving import is_out_of_memory


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turn exhausted memory and disks, and broken accelerators, into our errors, whichever library noticed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_full(error) or "os error 28" in str(error):
            raise ScratchFull("no room left for statistics or adapter; free space and run again") from error
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory("memory is used up; lower max_tokens_per_batch or r, or use a larger machine") from error
        if is_device_failure(error):
            raise DeviceFailure("the accelerator failed; another process has to try again") from error
        raise

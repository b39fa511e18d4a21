"""The GPU image: from rows and a base model to an adapter. Start at `worker.pipeline`."""

import logging
import sys

# With the package `kernels` installed, bitsandbytes and transformers fetch compiled code from the hub while they are
# imported. This package runs no code that comes over the network, so to its processes `kernels` does not exist.
sys.modules["kernels"] = None  # type: ignore[assignment]  # how Python marks what cannot be imported
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it warns that it is missing

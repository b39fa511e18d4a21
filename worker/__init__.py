"""The GPU image: from rows and a base model to an adapter. Start at `worker.pipeline`."""

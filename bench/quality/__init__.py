"""Does an initialized adapter train better, and by how much: the same grid for every initializer."""

import os

# TRL's ORPO is experimental, which it says at every import.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

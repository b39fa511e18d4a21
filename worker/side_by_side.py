"""Statistics of several datasets as if they were of one: the bases of all of them, side by side.

What was sketched with the same test matrices has inner products across datasets too, so all that is done with one
dataset's statistics is done with these.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from worker.sketching import LayerStatistics


class SideBySide(Mapping[str, LayerStatistics]):
    """Layers with the bases of all parts, in the order of the parts; a layer is put together at every look-up."""

    def __init__(self, parts: Sequence[Mapping[str, LayerStatistics]]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> LayerStatistics:
        return joined([part[name] for part in self._parts])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])


def joined(layers: Sequence[LayerStatistics]) -> LayerStatistics:
    """Return a layer's statistics with the bases of all of these; no row adds to bases of two."""
    first = layers[0]
    tensors = [layer.tensors() for layer in layers]
    together = {name: torch.cat([one[name] for one in tensors]) for name in tensors[0] if name != "rows"}
    rows = torch.block_diag(*(one["rows"] for one in tensors))
    return type(first).from_tensors(first.shape, first.matrices, {**together, "rows": rows})

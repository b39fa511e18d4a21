"""A fold's statistics on disk: one safetensors file, whose layers are read when they are asked for.

Only one fold's sums live in memory during a pass; the others wait here, and so will the shards of a large job.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from worker.objectives import Counts
from worker.sketching import DenseGradient, LayerStatistics, Shape, Sketch, TestMatrices
from worker.statistics import Statistics

FORMAT = 1
"""Raised when a file's meaning changes, so that old and new workers never mix them up."""


def save(statistics: Statistics, path: Path) -> None:
    """Write the statistics; `load` gives them back bit for bit."""
    tensors = {
        f"{name}/{part}": tensor.cpu().contiguous()
        for name, layer in statistics.layers.items()
        for part, tensor in layer.tensors().items()
    }
    shapes = {
        name: [layer.shape.out_features, layer.shape.in_features, layer.shape.width]
        for name, layer in statistics.layers.items()
    }
    kind = "sketch" if isinstance(next(iter(statistics.layers.values())), Sketch) else "exact"
    header = {"format": FORMAT, "kind": kind, "shapes": shapes, "counts": asdict(statistics.counts)}
    save_file(tensors, path, metadata={"d2lora": json.dumps(header)})


def load(path: Path, matrices: TestMatrices) -> Statistics:
    """Return what `save` wrote, with layers read lazily onto the device of ``matrices``."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["d2lora"])
    assert header["format"] == FORMAT, f"statistics of format {header['format']}, this version reads {FORMAT}"
    layers = _StoredLayers(
        path, matrices, header["kind"], {name: Shape(*sizes) for name, sizes in header["shapes"].items()}
    )
    return Statistics(layers, Counts(**header["counts"]))


class _StoredLayers(Mapping[str, LayerStatistics]):
    """Layers of a file, read at every look-up."""

    def __init__(self, path: Path, matrices: TestMatrices, kind: str, shapes: dict[str, Shape]) -> None:
        self._path, self._matrices, self._shapes = path, matrices, shapes
        self._kind = Sketch if kind == "sketch" else DenseGradient
        self._parts = ("range", "corange", "rows") if kind == "sketch" else ("gradients", "rows")

    def __getitem__(self, name: str) -> LayerStatistics:
        with safe_open(self._path, framework="pt", device=str(self._matrices.device)) as file:
            tensors = {part: file.get_tensor(f"{name}/{part}") for part in self._parts}
        return self._kind.from_tensors(self._shapes[name], self._matrices, tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

"""A fold's statistics on disk: one safetensors file, summed in place and read layer by layer.

Only one layer's sums are in memory at a time: during the pass, while the files of several shards are added up, and
afterwards.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from worker.gradients import DenseGradient
from worker.matrices import Shape, TestMatrices
from worker.objectives import Counts
from worker.shard_files import damaged, header, metadata
from worker.sketching import LayerStatistics, Sketch
from worker.statistics import Statistics
from worker.whitening import MomentGradient, MomentSketch

_KINDS: dict[str, type[Sketch] | type[DenseGradient]] = {
    "sketch": Sketch,
    "exact": DenseGradient,
    "sketch+moment": MomentSketch,
    "exact+moment": MomentGradient,
}
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_ROOM_FOR_COUNTS = 256


class SketchFile:
    """A file of sums, all zero at first; close it, or use it as a context manager.

    ``made_from`` is the digest of the rows that it sums, if it is a shard's.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        shapes: Mapping[str, Shape],
        *,
        bases: int,
        matrices: TestMatrices,
        made_from: str | None = None,
    ) -> None:
        self._kind, self._shapes, self._bases, self._matrices = _KINDS[kind], shapes, bases, matrices
        self._header: dict[str, Any] = {}
        end = 0
        for name, shape in shapes.items():
            for part, (dtype, size) in self._kind.layout(shape, bases).items():
                start, end = end, end + math.prod(size) * _DTYPES[dtype].itemsize
                self._header[f"{name}/{part}"] = {"dtype": dtype, "shape": size, "data_offsets": [start, end]}
        sizes = {name: [shape.out_features, shape.in_features, shape.width] for name, shape in shapes.items()}
        self._about = {"kind": kind, "shapes": sizes, "made_from": made_from}
        self._buffer = bytearray(max(self._span(name)[1] - self._span(name)[0] for name in shapes))
        self._file = path.open("w+b")
        self._offset = self._write_header(Counts(), len(self._encoded(Counts())) + _ROOM_FOR_COUNTS)
        self._file.truncate(self._offset + end)  # a hole in the file reads as zeros

    def __enter__(self) -> "SketchFile":  # noqa: PYI034  # the shape checks of the tests cannot read Self
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def accumulators(self) -> dict[str, "Accumulator"]:
        """Return what a pass adds to, by layer."""
        return {name: Accumulator(self, name) for name in self._shapes}

    def add(
        self,
        name: str,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,
    ) -> None:
        """Add a batch to one layer's sums."""
        shape = self._shapes[name]
        sums = self._read(name)
        if inputs.device.type == "cpu":
            matrices = self._matrices.on(inputs.device)
            layer = self._kind.from_tensors(shape, matrices, {part: torch.from_numpy(sums[part]) for part in sums})
            layer.add(inputs, output_grads, weights, paired=paired)
        else:
            batch = self._kind.empty(shape, self._bases, self._matrices.on(inputs.device))
            batch.add(inputs, output_grads, weights, paired=paired)
            for part, tensor in batch.tensors().items():
                sums[part] += tensor.cpu().numpy()
        self._write(name)

    def add_file(self, path: Path, *, made_from: str | None) -> Counts:
        """Add the sums of another file, such as a shard's, and return what normalizes those.

        Raises:
            FormatMismatch: another version of the worker wrote the file.
            ChecksumMismatch: it is damaged, or not of these rows, layers and sizes.
        """
        about = header(path, "sums")
        if {name: about.get(name) for name in self._about} != {**self._about, "made_from": made_from}:
            raise damaged(path)
        try:
            with safe_open(path, framework="numpy") as file:
                for name in self._shapes:
                    for part, sums in self._read(name).items():
                        other = file.get_tensor(f"{name}/{part}")
                        if other.shape != sums.shape or other.dtype != sums.dtype:
                            raise damaged(path)
                        np.add(sums, other, out=sums)
                    self._write(name)
            return Counts(**about["counts"])
        except (SafetensorError, KeyError, TypeError) as error:
            raise damaged(path) from error

    def _parts(self, name: str) -> dict[str, Any]:
        layout = self._kind.layout(self._shapes[name], self._bases)
        return {part: self._header[f"{name}/{part}"] for part in layout}

    def _span(self, name: str) -> tuple[int, int]:
        """Return where a layer's sums lie; its parts are neighbours."""
        offsets = [offset for entry in self._parts(name).values() for offset in entry["data_offsets"]]
        return min(offsets), max(offsets)

    def _read(self, name: str) -> dict[str, NDArray[Any]]:
        """Return a layer's sums, in the buffer that all layers share: fresh memory costs more than the addition."""
        start, end = self._span(name)
        read = os.preadv(self._file.fileno(), [memoryview(self._buffer)[: end - start]], self._offset + start)
        assert read == end - start, "a file of sums is shorter than its header says"
        return {
            part: np.frombuffer(
                self._buffer,
                dtype=_DTYPES[entry["dtype"]],
                count=math.prod(entry["shape"]),
                offset=entry["data_offsets"][0] - start,
            ).reshape(entry["shape"])
            for part, entry in self._parts(name).items()
        }

    def _write(self, name: str) -> None:
        """Write back what `_read` has returned."""
        start, end = self._span(name)
        left, place = memoryview(self._buffer)[: end - start], self._offset + start
        while left:  # a disk that fills up takes a part first, and only then says so
            written = os.pwrite(self._file.fileno(), left, place)
            left, place = left[written:], place + written

    def finish(self, counts: Counts) -> None:
        """Write what normalizes the sums."""
        self._write_header(counts, self._offset - 8)
        self._file.flush()

    def _write_header(self, counts: Counts, length: int) -> int:
        """Write the header of a safetensors file, padded with spaces, and return where the data begins."""
        length += -length % 8
        self._file.seek(0)
        self._file.write(length.to_bytes(8, "little") + self._encoded(counts).ljust(length))
        self._file.flush()
        return 8 + length

    def _encoded(self, counts: Counts) -> bytes:
        about = metadata("sums", {**self._about, "counts": asdict(counts)})
        return json.dumps({"__metadata__": about, **self._header}).encode()


@dataclass(frozen=True)
class Accumulator:
    """One layer's sums in a file, as a pass sees them."""

    file: SketchFile
    name: str

    def add(
        self,
        inputs: Float[Tensor, "S T I"],
        output_grads: Float[Tensor, "S T O"],
        weights: Float[Tensor, "K S"],
        *,
        paired: bool,
    ) -> None:
        """Add a batch; all of it or, if memory runs out, nothing."""
        self.file.add(self.name, inputs, output_grads, weights, paired=paired)


def load(path: Path, matrices: TestMatrices) -> Statistics:
    """Return the statistics of a finished file, with layers read lazily onto the device of ``matrices``.

    Raises:
        FormatMismatch: another version of the worker wrote the file.
        ChecksumMismatch: it is damaged.
    """
    about = header(path, "sums")
    shapes = shapes_of(path)
    return Statistics(_StoredLayers(path, matrices, _KINDS[about["kind"]], shapes), Counts(**about["counts"]))


def shapes_of(path: Path) -> dict[str, Shape]:
    """Return the sizes of all layers' sums; raises as `load` does."""
    return {name: Shape(*sizes) for name, sizes in header(path, "sums")["shapes"].items()}


class _StoredLayers(Mapping[str, LayerStatistics]):
    """Layers of a file, read at every look-up; the file may be removed meanwhile."""

    def __init__(
        self, path: Path, matrices: TestMatrices, kind: type[Sketch] | type[DenseGradient], shapes: dict[str, Shape]
    ) -> None:
        self._matrices, self._kind, self._shapes = matrices, kind, shapes
        # Open for good: finding a layer anew means to read the names of all.
        self._file = safe_open(path, framework="pt", device=str(matrices.device))

    def __getitem__(self, name: str) -> LayerStatistics:
        parts: Sequence[str] = list(self._kind.layout(self._shapes[name], 1))
        tensors = {part: self._file.get_tensor(f"{name}/{part}") for part in parts}
        return self._kind.from_tensors(self._shapes[name], self._matrices, tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

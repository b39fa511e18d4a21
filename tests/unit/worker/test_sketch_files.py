import os

import pytest
import torch

from tests.unit.worker.test_sketching import random_batch
from worker.gradients import DenseGradient
from worker.matrices import Shape, TestMatrices
from worker.objectives import Counts
from worker.sketch_files import SketchFile, load
from worker.sketching import Sketch

SHAPES = {"a.wide": Shape(12, 30, 4), "b.tall": Shape(40, 10, 4)}
COUNTS = Counts(rows=10**9, chosen_tokens=10**12, sequence_tokens=10**12)


@pytest.mark.parametrize(("kind", "make"), [("sketch", Sketch), ("exact", DenseGradient)])
def test_sums_in_a_file_are_those_in_memory(tmp_path, kind, make):
    matrices = TestMatrices(0, torch.device("cpu"))
    expected = {name: make.empty(shape, 3, matrices) for name, shape in SHAPES.items()}

    with SketchFile(tmp_path / "fold", kind, SHAPES, bases=3, matrices=matrices) as file:
        for seed in range(3):
            for name, accumulator in file.accumulators().items():
                shape = SHAPES[name]
                batch = random_batch(shape.out_features, shape.in_features, rows=4, tokens=5, seed=seed)
                accumulator.add(*batch, paired=True)
                expected[name].add(*batch, paired=True)
        file.finish(COUNTS)
    loaded = load(tmp_path / "fold", matrices)

    assert loaded.counts == COUNTS
    assert list(loaded.layers) == list(SHAPES)
    for name, layer in expected.items():
        assert isinstance(loaded.layers[name], make)
        for part, tensor in layer.tensors().items():
            torch.testing.assert_close(loaded.layers[name].tensors()[part], tensor, rtol=1e-5, atol=1e-5)


def test_the_file_is_ordinary_safetensors(tmp_path):
    from safetensors.torch import load_file

    matrices = TestMatrices(0, torch.device("cpu"))
    with SketchFile(tmp_path / "fold", "sketch", SHAPES, bases=2, matrices=matrices) as file:
        file.finish(COUNTS)

    tensors = load_file(tmp_path / "fold")

    assert {name.partition("/")[0] for name in tensors} == set(SHAPES)
    assert tensors["a.wide/range"].shape == (2, 4, 30)
    assert not any(tensor.any() for tensor in tensors.values())


def test_a_write_that_takes_only_a_part_is_continued(tmp_path, monkeypatch):
    matrices = TestMatrices(0, torch.device("cpu"))
    shape, real = SHAPES["a.wide"], os.pwrite
    batch = random_batch(shape.out_features, shape.in_features, rows=4, tokens=5, seed=0)
    expected = Sketch.empty(shape, 3, matrices)
    expected.add(*batch, paired=True)
    monkeypatch.setattr("worker.sketch_files.os.pwrite", lambda file, data, place: real(file, data[:100], place))

    with SketchFile(tmp_path / "fold", "sketch", SHAPES, bases=3, matrices=matrices) as file:
        file.accumulators()["a.wide"].add(*batch, paired=True)
        file.finish(COUNTS)

    for part, tensor in load(tmp_path / "fold", matrices).layers["a.wide"].tensors().items():
        assert torch.equal(tensor, expected.tensors()[part])


def test_memory_that_runs_out_in_the_middle_of_an_update_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    matrices = TestMatrices(0, torch.device("cpu"))
    batch = random_batch(12, 30, rows=4, tokens=5, seed=0)
    with SketchFile(tmp_path / "fold", "sketch", SHAPES, bases=3, matrices=matrices) as file:
        sums = file.accumulators()["a.wide"]
        sums.add(*batch, paired=True)
        before = (tmp_path / "fold").read_bytes()

        def fail(*_arguments):
            raise MemoryError

        monkeypatch.setattr("torch.linalg.vecdot", fail)
        with pytest.raises(MemoryError):
            sums.add(*batch, paired=True)

        assert (tmp_path / "fold").read_bytes() == before

import dataclasses
import json
import tracemalloc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d2lora.errors import ChecksumMismatch, FormatMismatch, FormatOutdated
from tests.support.models import as_base, tiny_llama
from tests.unit.worker.conftest import as_examples, labeled_rows, reference_rows
from worker.batches import make_batches
from worker.low_rank import LowRank
from worker.matrices import Shape, TestMatrices
from worker.objectives import Counts, Scores
from worker.shard_files import (
    FORMAT,
    BasePin,
    read_batches,
    read_direction,
    read_scores,
    write_batches,
    write_direction,
    write_scores,
)
from worker.sketch_files import SketchFile
from worker.sketch_files import load as load_statistics

PIN = BasePin(identity="sha256:0", revision=None, dtype="float32")
SHAPES = {"a": Shape(12, 30, 4), "b": Shape(40, 10, 4)}
MATRICES = TestMatrices(0, torch.device("cpu"))


def some_batches(*, paired=True, count=9):
    rows = reference_rows(count, paired=paired)
    return make_batches(as_examples(rows), [row % 2 for row in range(count)], max_tokens=60, pad_token_id=5)


def some_scores(rows):
    return Scores(torch.rand(rows).double(), torch.arange(rows), torch.rand(rows).double(), torch.arange(rows))


def write_sums(path, *, shapes=SHAPES, kind="sketch", made_from="rows", fill=1.0, bases=2, rows=3):
    with SketchFile(path, kind, shapes, bases=bases, matrices=MATRICES, made_from=made_from) as file:
        for name in shapes:
            for sums in file._read(name).values():
                sums[...] += fill
            file._write(name)
        file.finish(Counts(rows, 10 * rows, 20 * rows))


def writers():
    batches, direction = some_batches(), {"a": LowRank(torch.ones(4, 2), torch.ones(2), torch.ones(2, 3), 1.0, 0.1)}
    return {
        "batches": (lambda path: write_batches(path, batches, PIN, pad_token_id=5), read_batches),
        "scores": (
            lambda path: write_scores(path, some_scores(5), made_from="rows"),
            lambda path: read_scores(path, made_from="rows", sizes=[2, 3]),
        ),
        "direction": (
            lambda path: write_direction(path, direction),
            lambda path: read_direction(path, torch.device("cpu")),
        ),
        "sums": (write_sums, lambda path: add_up(path.with_suffix(".sum"), path)),
        "merged": (lambda path: write_sums(path, made_from=None), lambda path: load_statistics(path, MATRICES)),
    }


def add_up(into, *paths, shapes=SHAPES, made_from="rows"):
    with SketchFile(into, "sketch", shapes, bases=2, matrices=MATRICES) as file:
        counts = sum((file.add_file(path, made_from=made_from) for path in paths), Counts())
        file.finish(counts)
    return counts


KINDS = ["batches", "scores", "direction", "sums", "merged"]


def rewritten(path, change):
    """Write the file anew after a change of what its header says."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["d2lora"])
    change(about)
    save_file(load_file(path), path, metadata={"d2lora": json.dumps(about)})


def test_a_pin_of_an_earlier_version_says_nothing_of_the_configuration():
    base = dataclasses.replace(as_base(tiny_llama()), configuration_sha256="1" * 64)
    pin = BasePin.of(base)
    earlier = BasePin.model_validate(pin.model_dump(exclude={"configuration_sha256"}))
    other = dataclasses.replace(base, configuration_sha256="2" * 64)

    assert [one.fits(base) for one in (pin, earlier)] == [True, True]
    assert [one.fits(other) for one in (pin, earlier)] == [False, True]
    assert not earlier.fits(dataclasses.replace(base, weights_sha256="2" * 64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_format_is_refused_with_the_way_out(tmp_path, kind):
    write, read = writers()[kind]
    write(tmp_path / "file")
    read(tmp_path / "file")

    for version, error, way_out in (
        (FORMAT + 1, FormatMismatch, "a worker of that version"),
        (FORMAT - 1, FormatOutdated, "begin anew"),
    ):
        rewritten(tmp_path / "file", lambda about, version=version: about.update(format=version))
        with pytest.raises(FormatMismatch, match=way_out) as refused:
            read(tmp_path / "file")
        assert type(refused.value) is error
        assert refused.value.retryable


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_or_garbled_file_is_an_error_of_its_own(tmp_path, kind):
    write, read = writers()[kind]
    path = tmp_path / "file"
    write(path)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")

    for damage in (
        b"",
        content[:7],
        content[: header_end // 2],
        content[:header_end],
        content[:-1],
        content + b"\0",
        b"\xff" * len(content),
        content[:8] + b"\xff" * (header_end - 8) + content[header_end:],
        content[:8] + b"{}".ljust(header_end - 8) + content[header_end:],
    ):
        path.write_bytes(damage)
        with pytest.raises(ChecksumMismatch, match="damaged"):
            read(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_holds_something_else_is_refused(tmp_path, kind):
    _, read = writers()[kind]
    for other, (write, _) in writers().items():
        if other != kind and {other, kind} != {"sums", "merged"}:
            write(tmp_path / other)
            with pytest.raises(ChecksumMismatch):
                read(tmp_path / other)


@pytest.mark.parametrize("paired", [True, False])
def test_batches_come_back_as_they_were(tmp_path, paired):
    batches = some_batches(paired=paired)

    write_batches(tmp_path / "file", batches, PIN, pad_token_id=5)
    base, again = read_batches(tmp_path / "file")

    assert base == PIN
    assert len(again) == len(batches) > 2
    for one, other in zip(batches, again, strict=True):
        assert (one.rows, one.fold, one.paired) == (other.rows, other.fold, other.paired)
        for name in ("input_ids", "attention_mask", "completion_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_labels_come_back_with_the_batches_and_scores_of_their_rows(tmp_path):
    batches = make_batches(as_examples(labeled_rows(9)), [0] * 9, max_tokens=30, pad_token_id=0)
    labels = torch.cat([batch.desirable for batch in batches])
    scores = Scores(torch.rand(9).double(), torch.arange(9), desirable=labels, mismatched_logps=torch.rand(9).double())

    write_batches(tmp_path / "batches", batches, PIN, pad_token_id=0)
    write_scores(tmp_path / "scores", scores, made_from="rows")

    again = read_batches(tmp_path / "batches")[1]
    assert len(again) > 2
    assert [batch.desirable.tolist() for batch in again] == [batch.desirable.tolist() for batch in batches]
    parts = read_scores(tmp_path / "scores", made_from="rows", sizes=[len(batch.rows) for batch in batches])
    assert torch.equal(Scores.concatenate(parts).desirable, labels)
    assert torch.equal(Scores.concatenate(parts).mismatched_logps, scores.mismatched_logps)


@pytest.mark.parametrize("name", ["lengths_S", "sizes_B", "tokens_N", "rows_R", "folds_B", "learned_N"])
def test_batches_whose_parts_do_not_fit_together_are_refused(tmp_path, name):
    path = tmp_path / "file"
    write_batches(path, some_batches(), PIN, pad_token_id=5)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata=metadata)

    with pytest.raises(ChecksumMismatch):
        read_batches(path)


def test_scores_come_back_by_batch(tmp_path):
    scores = some_scores(6)

    write_scores(tmp_path / "file", scores, made_from="rows")
    parts = read_scores(tmp_path / "file", made_from="rows", sizes=[1, 3, 2])

    assert [len(part.chosen_logps) for part in parts] == [1, 3, 2]
    assert torch.equal(Scores.concatenate(parts).rejected_logps, scores.rejected_logps)
    assert parts[0].prompt_logps is None
    for wrong in ({"made_from": "other", "sizes": [1, 3, 2]}, {"made_from": "rows", "sizes": [1, 3]}):
        with pytest.raises(ChecksumMismatch):
            read_scores(tmp_path / "file", **wrong)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for kind, (write, _) in writers().items():
        if kind != "scores":  # random on purpose
            write(tmp_path / "one")
            write(tmp_path / "other")
            assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes(), kind


@given(fills=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=5))
def test_files_add_up_with_their_counts(tmp_path_factory, fills):
    directory = tmp_path_factory.mktemp("sums")
    paths = [directory / str(number) for number in range(len(fills))]
    for path, fill in zip(paths, fills, strict=True):
        write_sums(path, fill=fill)

    counts = add_up(directory / "sum", *paths)

    assert counts == Counts(3 * len(fills), 30 * len(fills), 60 * len(fills))
    merged = load_statistics(directory / "sum", MATRICES)
    assert merged.counts == counts
    rounding = len(fills) * 2**-24 * sum(map(abs, fills))  # of sums in float32, where terms cancel too
    for layer in merged.layers.values():
        for tensor in layer.tensors().values():
            wanted = torch.full_like(tensor, sum(fills), dtype=torch.float64)
            torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=rounding)


@pytest.mark.parametrize(
    "other",
    [
        {"made_from": "other rows"},
        {"kind": "exact"},
        {"shapes": {"a": SHAPES["a"]}},
        {"shapes": {"a": SHAPES["a"], "c": SHAPES["b"]}},
        {"shapes": {"a": SHAPES["a"], "b": Shape(40, 10, 3)}},
        {"bases": 3},
    ],
    ids=["rows", "kind", "missing", "renamed", "width", "bases"],
)
def test_sums_of_other_rows_layers_or_sizes_are_not_added(tmp_path, other):
    write_sums(tmp_path / "file", **other)

    with pytest.raises(ChecksumMismatch):
        add_up(tmp_path / "sum", tmp_path / "file")


def test_adding_files_holds_one_layer_in_memory(tmp_path):
    shapes = {f"layer.{number}": Shape(200, 200, 16) for number in range(40)}
    for name in ("one", "other"):
        write_sums(tmp_path / name, shapes=shapes)
    layer = (tmp_path / "one").stat().st_size / len(shapes)

    tracemalloc.start()
    try:
        add_up(tmp_path / "sum", tmp_path / "one", tmp_path / "other", shapes=shapes)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert layer > 50_000
    # The stored part, the shard's, their sum and its bytes; a second layer would be as much again.
    assert peak < 5 * layer

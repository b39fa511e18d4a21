import pytest
import torch
from pydantic import ValidationError
from torch.distributed import DistBackendError

from d2lora.errors import OutOfMemory
from d2lora.settings import WorkerSettings
from tests.support.models import tiny_gpt2, tiny_llama
from worker.devices import is_device_failure, pick_device, spread, weight_bytes
from worker.halving import is_out_of_memory
from worker.matrices import Shape, TestMatrices

GIB = 2**30


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.AcceleratorError("something new"),
        RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("CUDA driver error: unknown error"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"),
        RuntimeError("HIP error: invalid device function"),
        RuntimeError("Triton Error [CUDA]: misaligned address"),
        DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, unhandled cuda error"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_a_broken_device_is_told_from_all_else(error):
    assert is_device_failure(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GiB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_memory_that_is_used_up_is_no_broken_device(error):
    assert is_out_of_memory(error)
    assert not is_device_failure(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"),
        ValueError("CUDA error: quoted in something else"),
        OSError("no such file"),
        OutOfMemory("memory is used up"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_other_errors_are_neither(error):
    assert not is_device_failure(error)
    assert not is_out_of_memory(error)


def test_a_model_that_one_device_holds_is_not_spread():
    assert spread(50 * GIB, [80 * GIB, 80 * GIB]) is None


@pytest.mark.parametrize("free", [[], [8 * GIB]])
def test_without_a_second_device_there_is_nothing_to_decide(free):
    assert spread(50 * GIB, free) is None


def test_a_larger_model_leaves_room_for_activations_on_every_device():
    rooms = spread(140 * GIB, [80 * GIB, 80 * GIB, 60 * GIB])

    assert rooms is not None
    assert sum(rooms.values()) >= 140 * GIB
    assert [round(room / GIB) for room in rooms.values()] == [56, 56, 42]


def test_less_room_for_activations_comes_before_a_refusal():
    rooms = spread(140 * GIB, [80 * GIB, 80 * GIB])

    assert rooms is not None
    assert [round(room / GIB) for room in rooms.values()] == [72, 72]


def test_a_model_that_all_devices_do_not_hold_is_refused_with_both_sizes():
    with pytest.raises(OutOfMemory, match=r"150\.0 GiB, and 2 devices have 160\.0 GiB"):
        spread(150 * GIB, [80 * GIB, 80 * GIB])


@pytest.mark.parametrize("model", [tiny_llama(), tiny_llama(tie=True), tiny_gpt2()], ids=["llama", "tied", "gpt2"])
def test_weights_take_what_pytorch_counts(model):
    expected = sum(parameter.numel() * 2 for parameter in model.parameters())

    assert weight_bytes(model, dtype=torch.bfloat16, quantization=None) == expected


def test_a_device_that_is_named_is_taken():
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize("cuda", [True, False])
def test_no_device_without_float64_is_taken(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    assert pick_device("auto") == ("cuda" if cuda else "cpu")
    with pytest.raises(ValidationError, match="device"):
        WorkerSettings(device="mps")


def test_test_matrices_are_the_same_on_every_device():
    shape = Shape(40, 24, 8)
    matrices = TestMatrices(3, torch.device("meta"))  # a second device, as far as this machine has one

    elsewhere = matrices.on(torch.device("cpu"))

    assert elsewhere.on(torch.device("cpu")) is elsewhere
    assert matrices.on(torch.device("cpu")) is elsewhere
    torch.testing.assert_close(elsewhere.omega(shape), TestMatrices(3, torch.device("cpu")).omega(shape))

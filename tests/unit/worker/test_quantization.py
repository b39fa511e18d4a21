import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2lora.errors import ModelUnsupported
from d2lora.initializations import Sft
from tests.support.models import as_base, tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.unit.worker.conftest import one_fold, reference_rows
from tests.unit.worker.test_initialization import run, write_rows
from tests.unit.worker.test_statistics import gathered, targets_of
from worker.loading import stored_quantization
from worker.models import layer_sizes, load, weight_norm
from worker.quantization import dequantized_weight
from worker.statistics import score

# bitsandbytes 0.50 still defines functions of torch.jit when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

ROWS = reference_rows(7, paired=True)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def checkpoint(request, tmp_path_factory):
    """A model whose weights are small enough that rounding them does not turn the activations into others."""
    directory = tmp_path_factory.mktemp("model")
    model = tiny_llama(hidden=64) if request.param == "llama" else tiny_gpt2(hidden=64)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 0.25
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def loaded(checkpoint, quantization=None, dtype="float32"):
    return load(checkpoint, revision=None, dtype=dtype, device="cpu", quantization=quantization).model


def with_weights_of(checkpoint, quantized):
    """The float model whose weights are those that the quantized one stands for."""
    twin = loaded(checkpoint)
    for name in targets_of(quantized):
        weight = twin.get_submodule(name).weight
        stored = dequantized_weight(quantized.get_submodule(name)).float()
        weight.data = stored if type(twin.get_submodule(name)).__name__ == "Linear" else stored.T.contiguous()
    return twin


def gradients(model, rows=ROWS):
    statistics, coefficients = gathered(model, rows, objectives=[Sft()])
    return {name: coefficients[0, 0].item() * layer.gradients[0] for name, layer in statistics.layers.items()}


def relative_difference(left, right):
    squares = [((left[name] - right[name]).norm() ** 2, right[name].norm() ** 2) for name in right]
    return (sum(one for one, _ in squares) / sum(other for _, other in squares)).sqrt().item()


@pytest.mark.parametrize(("quantization", "tolerance"), [("4bit", 1e-4), ("8bit", 2e-2)])
def test_statistics_are_those_of_the_float_model_with_the_dequantized_weights(checkpoint, quantization, tolerance):
    # 8 bits also round the activations, to 1 part in 127 of a token's largest.
    quantized = loaded(checkpoint, quantization)

    assert relative_difference(gradients(quantized), gradients(with_weights_of(checkpoint, quantized))) < tolerance


def test_statistics_differ_from_the_float_bases_by_no_more_than_noise_of_the_quantizations_size(checkpoint):
    plain = loaded(checkpoint)
    quantized = with_weights_of(checkpoint, loaded(checkpoint, "4bit"))
    noisy = loaded(checkpoint)
    generator = torch.Generator().manual_seed(0)
    for name, module in targets_of(plain).items():
        error = (quantized.get_submodule(name).weight - module.weight).norm()
        noise = torch.randn(module.weight.shape, generator=generator)
        noisy.get_submodule(name).weight.data += noise * error / noise.norm()

    by_quantization = relative_difference(gradients(quantized), gradients(plain))
    by_noise = relative_difference(gradients(noisy), gradients(plain))

    assert 0 < by_quantization < 1.25 * by_noise


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_forward_without_gradient_in_between_changes_nothing(checkpoint, quantization):
    model = loaded(checkpoint, quantization)
    first = gradients(model)

    score(as_base(model), one_fold(ROWS)[0])

    assert relative_difference(gradients(model), first) == 0


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_sizes_and_norms_are_those_of_the_weights_and_not_of_their_packing(checkpoint, quantization):
    plain, quantized = targets_of(loaded(checkpoint)), targets_of(loaded(checkpoint, quantization))

    assert plain.keys() == quantized.keys()
    for name, module in plain.items():
        assert layer_sizes(quantized[name]) == layer_sizes(module)
        assert weight_norm(quantized[name]) == pytest.approx(weight_norm(module), rel=0.02)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_checkpoint_that_is_quantized_already_is_loaded_as_it_is(checkpoint, quantization, tmp_path):
    model = loaded(checkpoint, quantization)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    for request in (None, quantization):
        assert relative_difference(gradients(loaded(str(tmp_path), request)), gradients(model)) == 0
    with pytest.raises(ModelUnsupported, match=f"quantized to {quantization} already"):
        loaded(str(tmp_path), "8bit" if quantization == "4bit" else "4bit")


def test_rows_that_bitsandbytes_does_not_give_back_are_refused(tmp_path):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    rows = torch.randn(64, 96)
    error = (dequantize_4bit(*quantize_4bit(rows, quant_type="nf4")) - rows).norm() / rows.norm()
    tiny_gpt2().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)

    if error < 0.1:  # this processor, or a newer bitsandbytes, does it right
        loaded(str(tmp_path), "4bit")
        return
    with pytest.raises(ModelUnsupported, match="4-bit rows of 96 weights"):
        loaded(str(tmp_path), "4bit")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4"])
def test_other_formats_are_refused_by_name(tmp_path, method):
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))

    with pytest.raises(ModelUnsupported, match=f"format '{method}'"):
        loaded(str(tmp_path))


def test_a_gguf_file_is_not_quantized_anew():
    from tests.end_to_end.test_real_model import GGUF
    from worker.loading import loading_plan

    with pytest.raises(ModelUnsupported, match="is a GGUF file"):
        loading_plan(GGUF, None, dtype="auto", target=torch.device("cpu"), quantization="4bit")


def test_a_plain_checkpoint_is_not_taken_for_a_quantized_one(checkpoint):
    assert stored_quantization(loaded(checkpoint).config, checkpoint) is None


@pytest.fixture(scope="module")
def built(checkpoint, tmp_path_factory):
    """The adapter's directory and the summary, by quantization."""
    directory = tmp_path_factory.mktemp("adapters")
    rows = write_rows(directory / "rows.jsonl", 12)
    return {
        quantization: (out, run(checkpoint, rows, out, quantization=quantization).summary)
        for quantization in ("4bit", "8bit", None)
        if (out := directory / str(quantization))
    }


def on_the_float_base(checkpoint, directory):
    """What stock PEFT adds to the unmodified base's weights, by layer."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), str(directory))
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_adapter_of_a_quantized_base_fits_the_float_base(checkpoint, built, quantization):
    directory, summary = built[quantization]
    report = json.loads((directory / "report.json").read_text())
    quantized = targets_of(loaded(checkpoint, quantization))

    updates = on_the_float_base(checkpoint, directory)

    assert summary.start == "calibrated"
    assert updates.keys() == report["layers"].keys() == quantized.keys()
    for name, layer in report["layers"].items():
        assert updates[name].norm().item() == pytest.approx(
            layer["relative_magnitude"] * weight_norm(quantized[name]), rel=1e-3
        )


@pytest.mark.parametrize(("quantization", "least"), [("4bit", 0.9), ("8bit", 0.99)])
def test_the_adapter_of_a_quantized_base_is_about_that_of_the_float_base(checkpoint, built, quantization, least):
    theirs = on_the_float_base(checkpoint, built[None][0])
    ours = on_the_float_base(checkpoint, built[quantization][0])

    flat = [torch.cat([one[name].flatten() for name in theirs]) for one in (ours, theirs)]

    assert torch.cosine_similarity(*flat, dim=0) > least


def test_quantization_is_part_of_the_fingerprint(built):
    assert len({summary.fingerprint for _, summary in built.values()}) == 3

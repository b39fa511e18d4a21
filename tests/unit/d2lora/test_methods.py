import json

import pytest
from pydantic import ValidationError

from d2lora.initializations import InitializationSpec, LoraSpec
from d2lora.methods import NAMES, Eva, LoraGa, Pissa

REQUEST = {"base_model": "m", "dataset_id": "ds_1"}
BEFORE_THERE_WERE_OTHERS = {
    "base_model": "m",
    "revision": None,
    "dataset_id": "ds_1",
    "eval_dataset_id": None,
    "method": "gradient",
    "objectives": None,
    "combination": {"type": "mgda"},
    "lora": {"r": 16, "lora_alpha": None, "target_modules": "all-linear", "use_rslora": False},
    "start": "calibrated",
    "statistics": "sketch",
    "max_length": 1024,
    "max_tokens_per_batch": None,
    "dtype": "auto",
    "quantization": None,
    "seed": 0,
    "metadata": {},
}


def test_a_request_from_before_there_were_other_methods_means_what_it_meant():
    stored = InitializationSpec.model_validate(BEFORE_THERE_WERE_OTHERS)

    assert stored == InitializationSpec(**REQUEST)
    assert stored.method == "gradient"
    now = stored.model_dump(mode="json")
    assert now["lora"].pop("ranks") is None
    assert {name: now[name] for name in BEFORE_THERE_WERE_OTHERS} == BEFORE_THERE_WERE_OTHERS


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"gradient", "warmup"}])
def test_a_name_alone_is_the_method_with_its_defaults(name):
    spec = InitializationSpec(**REQUEST, method=name)

    assert spec == InitializationSpec(**REQUEST, method={"type": name})
    assert spec.method.type == name
    assert InitializationSpec.model_validate_json(spec.model_dump_json()) == spec


def test_options_are_those_of_the_method():
    assert InitializationSpec(**REQUEST, method={"type": "pissa", "niter": 4}).method == Pissa(niter=4)
    with pytest.raises(ValidationError, match="niter"):
        InitializationSpec(**REQUEST, method={"type": "olora", "niter": 4})
    with pytest.raises(ValidationError, match="one of gradient, kaiming"):
        InitializationSpec(**REQUEST, method="loftq")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start", "calibrated"),
        ("start", "zero"),
        ("combination", {"type": "mean"}),
        ("objectives", [{"type": "sft"}]),
        ("statistics", "sketch"),
    ],
)
def test_a_field_that_the_method_would_ignore_is_refused_and_named(field, value):
    with pytest.raises(ValidationError, match=f"{field}: not used by method pissa"):
        InitializationSpec(**REQUEST, method="pissa", **{field: value})


def test_a_stored_request_has_only_the_fields_that_its_method_uses():
    stored = json.loads(InitializationSpec(**REQUEST, method=LoraGa()).model_dump_json())

    assert BEFORE_THERE_WERE_OTHERS.keys() - stored.keys() >= {"objectives", "combination", "start", "statistics"}
    assert stored["method"]["direction"] == "ArB2r"


@pytest.mark.parametrize("method", ["orthogonal", "pissa", "corda", "lora_ga"])
def test_what_peft_refuses_on_quantized_weights_is_refused_in_the_request(method):
    with pytest.raises(ValidationError, match="quantization"):
        InitializationSpec(**REQUEST, method=method, quantization="4bit")
    assert InitializationSpec(**REQUEST, method="eva", quantization="4bit").method == Eva()


def test_orthogonal_needs_an_even_rank():
    with pytest.raises(ValidationError, match="even"):
        InitializationSpec(**REQUEST, method="orthogonal", lora=LoraSpec(r=5))


WARMUP = {"type": "warmup", "warmup_dataset_id": "ds_2"}


def test_a_warm_up_is_kept_as_it_was_asked_for():
    spec = InitializationSpec(**REQUEST, method={**WARMUP, "from": "gradient", "trainer": "dpo"}, start="zero")

    assert InitializationSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.model_dump(mode="json")["method"]["from"] == "gradient"
    assert spec.model_dump(mode="json")["start"] == "zero"
    assert spec.method.coefficient == 0.1


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ({}, {"start": "zero"}, "start: not used by method warmup"),
        ({"from": "gradient"}, {"rounds": 2}, "rounds: not used by method warmup"),
        ({"beta": 0.2}, {}, "trainer sft has none"),
        ({}, {"quantization": "8bit"}, "quantization: a warm-up trains"),
        ({"steps": 0}, {}, "steps"),
        ({"warmup_dataset_id": ""}, {}, "warmup_dataset_id"),
    ],
)
def test_what_a_warm_up_would_ignore_or_cannot_do_is_refused(method, changes, told):
    with pytest.raises(ValidationError, match=told):
        InitializationSpec(**REQUEST, method={**WARMUP, **method}, **changes)

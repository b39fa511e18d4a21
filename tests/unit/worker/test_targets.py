import pytest
import torch
from torch import nn

from d2lora.errors import RankTooLarge, TargetInvalid, TargetsMissing, TargetUnsupported
from d2lora.initializations import LoraSpec
from tests.support.models import tiny_gpt2, tiny_llama
from worker.targets import lora_config, resolve_targets, unmatched


def resolve(model, **lora):
    config = lora_config(model, LoraSpec(**{"r": 2, **lora}), base_model="tiny", revision=None)
    return resolve_targets(model, config), config


def test_all_linear_means_every_linear_layer_but_the_head():
    targets, config = resolve(tiny_llama())

    assert len(targets) == 2 * 7
    assert not any("lm_head" in name for name in targets)
    assert config.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`")  # these models have no name
@pytest.mark.parametrize("model", [tiny_llama(), tiny_gpt2()], ids=["llama", "gpt2"])
@pytest.mark.parametrize("modules", ["all-linear", r".*layers\.1.*(q_proj|up_proj)|transformer\.h\.1.*c_fc"])
def test_targets_are_those_that_peft_wraps(model, modules):
    from peft import get_peft_model

    targets, config = resolve(model, target_modules=modules)

    wrapped = get_peft_model(model, config)
    names = {name for name, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert names == set(targets)
    wrapped.unload()


def test_names_that_need_their_path_are_written_with_it():
    targets, config = resolve(tiny_llama(), target_modules=r"model\.layers\.1\.self_attn\.q_proj")

    assert list(targets) == ["model.layers.1.self_attn.q_proj"]
    assert config.target_modules == ["model.layers.1.self_attn.q_proj"]


def test_conv1d_layers_are_told_to_peft():
    assert resolve(tiny_gpt2())[1].fan_in_fan_out is True
    assert resolve(tiny_llama())[1].fan_in_fan_out is False


def test_no_match_is_an_error_that_lists_what_there_is():
    with pytest.raises(TargetsMissing, match=r"q_proj"):
        resolve(tiny_llama(), target_modules=["nothing_like_this"])


def test_a_pattern_that_is_no_regular_expression_is_an_error_that_says_why():
    with pytest.raises(TargetInvalid, match=r"^lora\.target_modules: '\(\(' is not a regular expression: missing \)"):
        resolve(tiny_llama(), target_modules="((")


def test_names_that_match_nothing_beside_others_that_do_are_told():
    """PEFT passes over them in silence."""
    model = tiny_llama()

    found = unmatched(model, LoraSpec(target_modules=["q_proj", "up_porj", "layers.1.mlp", "layers.7.mlp"]))

    assert found == ["up_porj", "layers.7.mlp"]
    assert unmatched(model, LoraSpec(target_modules="all-linear")) == []


def test_a_rank_above_a_targets_smaller_side_names_the_target():
    with pytest.raises(RankTooLarge, match=r"k_proj.*12 x 24.*at most 12"):
        resolve(tiny_llama(), r=13, target_modules=["q_proj", "k_proj"])


def test_all_linear_skips_layers_whose_smaller_side_is_below_the_rank():
    targets, config = resolve(tiny_llama(), r=13)

    assert {name.rsplit(".", 1)[-1] for name in targets} == {"q_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
    assert len(targets) == 2 * 5
    assert config.target_modules == ["down_proj", "gate_proj", "o_proj", "q_proj", "up_proj"]


def test_a_rank_above_every_layers_smaller_side_is_refused():
    with pytest.raises(RankTooLarge, match=r"lora\.r: no linear layer is left for r = 25; r = 25 is above its smaller"):
        resolve(tiny_llama(), r=25)


def test_a_target_that_is_no_linear_layer_is_refused():
    with pytest.raises(TargetUnsupported, match="embed_tokens"):
        resolve(tiny_llama(), target_modules=["embed_tokens"])


def test_a_target_that_shares_its_weight_is_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight

    with pytest.raises(TargetUnsupported, match="shares its weight"):
        resolve(model, target_modules=["up_proj"])


def test_tied_embeddings_outside_the_targets_are_fine():
    targets, _ = resolve(tiny_llama(tie=True))

    assert len(targets) == 14


def test_the_output_head_is_refused():
    with pytest.raises(TargetUnsupported, match="output head"):
        resolve(tiny_llama(), target_modules=["lm_head"])


def test_experts_that_are_parameters_are_refused():
    model = tiny_llama()
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, 8, 24))
    model.model.layers[0].mlp.experts = experts

    with pytest.raises(TargetUnsupported, match="experts as parameters"):
        resolve(model, target_modules=["experts"])

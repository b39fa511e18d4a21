"""Which layers get LoRA: PEFT's own matching, and a refusal where a match would give a wrong adapter."""

import copy
import re
from collections.abc import Mapping

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from d2lora.errors import RankTooLarge, TargetInvalid, TargetsMissing, TargetUnsupported
from d2lora.initializations import LoraSpec
from worker.models import layer_sizes


def lora_config(model: PreTrainedModel, lora: LoraSpec, *, base_model: str, revision: str | None) -> LoraConfig:
    """Return PEFT's configuration for the adapter, with ``all-linear`` written out as module names.

    Raises:
        RankTooLarge: ``all-linear``, and no layer is left that can have this rank.
    """
    config = LoraConfig(
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=revision,
        # Plain, so that a second adapter made from this configuration never changes the base weights.
        init_lora_weights=True,
        inference_mode=True,
    )
    if asks_for_all_linear(lora):
        skipped = passed_over(model, lora.r)
        config.target_modules = set(_all_linear(model)) - skipped.keys()
        if skipped and not config.target_modules:
            raise RankTooLarge(f"lora.r: no linear layer is left for r = {lora.r}; {next(iter(skipped.values()))}")
    return config


def asks_for_all_linear(lora: LoraSpec) -> bool:
    """Whether the layers are left to us; PEFT takes capitals as well."""
    return isinstance(lora.target_modules, str) and lora.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def passed_over(model: PreTrainedModel, rank: int) -> dict[str, str]:
    """Return the linear layers that ``all-linear`` skips -> why: a user who names one of them gets an error."""
    taken: dict[str, bool] = {}
    reasons = {}
    for name in _all_linear(model):
        suffix = name.rsplit(".", 1)[-1]
        if suffix not in taken:
            taken[suffix] = _is_taken_for_experts(model, suffix)
        smaller = min(layer_sizes(model.get_submodule(name)))
        if smaller < rank:
            reasons[name] = f"r = {rank} is above its smaller side, {smaller}"
        elif taken[suffix]:
            reasons[name] = f"PEFT takes the name {suffix} for experts that are parameters"
    return reasons


def unmatched(model: PreTrainedModel, lora: LoraSpec) -> list[str]:
    """Return the names in a list of ``target_modules`` that no module has; PEFT passes over them in silence."""
    if isinstance(lora.target_modules, str):
        return []
    modules = [name for name, _ in model.named_modules()]
    alone = {one: LoraConfig(target_modules=[one]) for one in lora.target_modules}
    return [one for one, config in alone.items() if not any(_matches(config, name) for name in modules)]


def _all_linear(model: PreTrainedModel) -> list[str]:
    """Return what PEFT means by all-linear, in the order of the model's modules."""
    asked = LoraConfig(target_modules=INCLUDE_LINEAR_LAYERS_SHORTHAND, task_type="CAUSAL_LM")
    names = set(_maybe_include_all_linear_layers(asked, model).target_modules or [])
    return [name for name, _ in model.named_modules() if name in names]


def _is_taken_for_experts(model: PreTrainedModel, name: str) -> bool:
    alone = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(alone, model, None)
    except ValueError:  # it fuses this module's adapter with another's
        return True
    return name not in set(alone.target_modules or [])


def resolve_targets(model: PreTrainedModel, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the target layers by name, in the order of the model's modules; ``config`` is completed to match.

    Raises:
        TargetInvalid: what should be a regular expression is none.
        TargetsMissing: nothing matches.
        TargetUnsupported: a match is no Linear or Conv1D layer, shares its weight, is the output head, or has a name
            that PEFT takes for another layer's.
        RankTooLarge: ``r`` is above the smaller side of a target.
    """
    try:
        matched = {name: module for name, module in model.named_modules() if name and _matches(config, name)}
    except re.error as error:
        shown = _shown(config.target_modules)
        raise TargetInvalid(f"lora.target_modules: {shown} is not a regular expression: {error}") from error
    if not matched:
        raise TargetsMissing(
            f"lora.target_modules: {_shown(config.target_modules)} matches no module; "
            f"this model's linear layers end in {_linear_suffixes(model)}"
        )
    head = model.get_output_embeddings()
    shared = _shared_weights(model)
    kinds = set()
    for name, module in matched.items():
        if module is head:
            raise TargetUnsupported(f"lora.target_modules: {name!r} is the output head, which cannot be a target")
        if not isinstance(module, nn.Linear | Conv1D):
            raise TargetUnsupported(_why_not_linear(name, module))
        if id(module.weight) in shared:
            raise TargetUnsupported(
                f"lora.target_modules: {name!r} shares its weight with {shared[id(module.weight)]!r}; "
                "an adapter on one of them would be applied to neither or both, depending on the loader"
            )
        out_features, in_features = layer_sizes(module)
        if config.r > min(out_features, in_features):
            raise RankTooLarge(
                f"lora.r: {config.r} is above the smaller side of {name!r} ({out_features} x {in_features}); "
                f"use at most {min(out_features, in_features)} or leave that module out"
            )
        # A quantized layer replaces a Linear or a Conv1D; the adapter is for the layer that it replaced.
        kinds.add(issubclass(getattr(module, "source_cls", type(module)), Conv1D))
    if kinds == {True, False}:
        raise TargetUnsupported(
            "lora.target_modules: Linear and Conv1D layers in one adapter; PEFT has one fan_in_fan_out for all"
        )
    config.fan_in_fan_out = kinds == {True}
    config.target_modules = _written_out(model, config, set(matched))
    _refuse_names_of_experts(model, config)
    return matched


def _refuse_names_of_experts(model: PreTrainedModel, config: LoraConfig) -> None:
    """Return if PEFT applies the adapter to the modules that it was made for.

    In mixtures of experts whose checkpoints have a module per expert and whose models have none, PEFT takes every
    target that ends in such a module's name for the experts' parameters: also a dense layer's, or a shared expert's.
    """
    converted = copy.deepcopy(config)
    try:
        convert_peft_config_for_transformers(converted, model, None)
    except ValueError as error:  # it fuses two modules' adapters, and finds one of them
        raise TargetUnsupported(
            f"lora.target_modules: in base_model {config.base_model_name_or_path!r}: {error}"
        ) from error
    kept = set(converted.target_modules)
    lost = sorted({name.rsplit(".", 1)[-1] for name in set(config.target_modules) - kept})
    if lost:
        others = f"; of the targets asked for, PEFT applies {', '.join(sorted(kept))}" if kept else ""
        raise TargetUnsupported(
            f"lora.target_modules: in base_model {config.base_model_name_or_path!r} PEFT takes {', '.join(lost)} for "
            f"experts that are parameters, and would not apply an adapter to the modules of these names{others}"
        )


def _matches(config: LoraConfig, name: str) -> bool:
    return bool(check_target_module_exists(config, name))


def _written_out(model: PreTrainedModel, config: LoraConfig, matched: set[str]) -> list[str]:
    """Return target_modules in a fixed order: the modules' last names if these match the same, else full names."""
    short = copy.copy(config)
    short.target_modules = {name.rsplit(".", 1)[-1] for name in matched}
    same = {name for name, _ in model.named_modules() if name and _matches(short, name)} == matched
    return sorted(short.target_modules if same else matched)


def _why_not_linear(name: str, module: nn.Module) -> str:
    experts = [parameter for parameter, value in module.named_parameters(recurse=False) if value.ndim == 3]
    if experts:
        return (
            f"lora.target_modules: {name!r} holds its experts as parameters ({', '.join(experts)}), "
            "which LoRA layers cannot wrap; leave it out"
        )
    return f"lora.target_modules: {name!r} is a {type(module).__name__}; only Linear and Conv1D layers can be targets"


def _shared_weights(model: PreTrainedModel) -> Mapping[int, str]:
    """Return id of a weight that several modules hold -> one of the others' names."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    return {key: names[-1] for key, names in owners.items() if len(names) > 1}


def _linear_suffixes(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    names = {
        re.split(r"\.", name)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return ", ".join(sorted(names)) or "nothing (it has none)"


def _shown(target_modules: str | list[str] | set[str] | None) -> str:
    return repr(target_modules if isinstance(target_modules, str) else sorted(target_modules or []))

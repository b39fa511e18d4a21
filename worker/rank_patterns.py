"""Ranks of their own for layers, as PEFT's configuration writes them: ``rank_pattern`` and ``alpha_pattern``."""

import copy
import re
from collections.abc import Mapping

from peft import LoraConfig

from d2lora.initializations import LoraSpec
from worker.factors import Factors


def with_ranks(config: LoraConfig, lora: LoraSpec, factors: Mapping[str, Factors]) -> LoraConfig:
    """Return the configuration with the factors' ranks of all target layers, each scaled as ``r`` would be.

    The scaling is the same in all layers, so a reader that takes ranks from the tensors and knows ``r`` and
    ``lora_alpha`` alone applies the same adapter.
    """
    changed = copy.copy(config)
    ranks = {name: len(layer.lora_A) for name, layer in factors.items()}
    own = {name: rank for name, rank in ranks.items() if rank != lora.r}
    keys = _keys(own, ranks)
    changed.rank_pattern = {keys[name]: rank for name, rank in own.items()}
    changed.alpha_pattern = {keys[name]: _plain(lora.alpha_of(rank)) for name, rank in own.items()}
    return changed


def _keys(names: Mapping[str, int], layers: Mapping[str, int]) -> dict[str, str]:
    """Return keys that PEFT matches to these layers alone: the layer's name, anchored where that could be another's.

    PEFT takes a key as a regular expression for a name, or for what follows a dot in it. A reader that looks layers up
    by their names finds those that need no anchor, which is all of them in the usual models.
    """

    def key(name: str) -> str:
        if re.fullmatch(r"[\w.]+", name):
            matching = re.compile(rf"(.*\.)?({name})$")  # as PEFT's get_pattern_key
            if not any(other != name and matching.match(other) for other in layers):
                return name
        return f"^{re.escape(name)}"

    return {name: key(name) for name in names}


def _plain(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha

"""Which requests can go on from the statistics of an earlier one."""

from d2lora.initializations import Initialization, InitializationSpec, State

SAME = ("base_model", "revision", "dtype", "quantization", "max_length", "seed", "statistics")
"""Fields that decide what statistics are of; the combination, objectives, rank, scale and start may differ."""

MOST_RANKS = 2
"""An adapter's rank in units of the one that its sketches were made for; a sketch of 4 r fits 2 r directions."""


def obstacle(spec: InitializationSpec, base: Initialization) -> tuple[str, str] | None:
    """Return the field on account of which a request cannot be based on a job, and why; None if it can."""
    of_no_use = f"of {base.id}, whose statistics are of no use then"
    if base.state is not State.SUCCEEDED:
        found = "based_on", f"{base.id} is {base.state}; only one that has succeeded has statistics"
    elif base.statistics is None:
        found = "based_on", f"{base.id} keeps no statistics; it was not asked to, or its dataset was deleted"
    elif differing := [field for field in SAME if getattr(spec, field) != getattr(base.spec, field)]:
        found = differing[0], f"it differs from that {of_no_use}"
    elif spec.lora.target_modules != base.spec.lora.target_modules:
        found = "lora.target_modules", f"they differ from those {of_no_use}"
    elif (spec.whitening is None) != (base.spec.whitening is None):
        found = "whitening", f"{base.id} was made {'with' if base.spec.whitening else 'without'} it"
    elif spec.statistics == "sketch" and spec.lora.r > MOST_RANKS * base.statistics.r:
        found = "lora.r", f"the sketches of {base.id} are for ranks up to {MOST_RANKS * base.statistics.r}"
    elif spec.statistics == "sketch" and spec.lora.ranks is not None and spec.lora.r > base.statistics.r:
        found = "lora.ranks", f"the sketches of {base.id} allow ranks of their own up to lora.r {base.statistics.r}"
    else:
        return None
    return found

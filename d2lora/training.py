"""What an adapter is made from: one dataset, or several of which each has its own objectives."""

from collections.abc import Mapping

from pydantic import Field

from d2lora.objectives import Combination, Fixed, Frozen, Objective


class TrainingDataset(Frozen):
    """Rows, and what the adapter is to learn from them."""

    dataset_id: str = Field(min_length=1, max_length=64, description="the rows")
    objectives: list[Objective] | None = Field(
        default=None, min_length=1, description="all that these rows allow when omitted"
    )
    eval_dataset_id: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="rows that only measure the delivered adapter on these objectives",
    )


def check_training(training: Mapping[str, TrainingDataset], combination: Combination) -> None:
    """Return if datasets and objectives are distinct, and fixed weights as many as objectives.

    ``training`` is keyed by what the names of a dataset's fields begin with.

    Raises:
        ValueError: naming the field at fault.
    """
    ids: set[str] = set()
    weights = 0
    for place, dataset in training.items():
        kinds = [objective.type for objective in dataset.objectives or []]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"{place}objectives: each type may appear once")
        if dataset.dataset_id in ids:
            raise ValueError(f"{place}dataset_id: each dataset may appear once")
        ids.add(dataset.dataset_id)
        weights += len(kinds)
    if isinstance(combination, Fixed) and len(combination.weights) != weights:
        raise ValueError("combination.weights: one weight per entry of objectives is needed")

"""What the datasets of a request are for, and which of its fields names which."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from d2lora.errors import RequestInvalid
from d2lora.initializations import InitializationSpec


class Role(StrEnum):
    """What a job does with a dataset besides the one that its adapter is made from."""

    EVALUATION = "evaluation"
    """Rows that only measure the delivered adapter."""
    RETAIN = "retain"
    """General text that the adapter may not worsen."""
    WARMUP = "warmup"
    """General rows, on which method ``warmup`` trains."""


FIELDS: dict[Role, str] = {
    Role.EVALUATION: "eval_dataset_id",
    Role.RETAIN: "retain_dataset_id",
    Role.WARMUP: "method.warmup_dataset_id",
}
"""Role -> the field of a request that names the dataset; a dot leads into an object."""

MEASURING = frozenset({Role.EVALUATION})
"""Those whose rows have no part in the adapter."""

FOR_THE_OBJECTIVES = frozenset({Role.EVALUATION})
"""Those whose rows have to allow the objectives of the request."""


def extra_dataset_ids(spec: InitializationSpec) -> dict[Role, str]:
    """Return the ID of every dataset that a request names besides those that the adapter is made from."""
    named = {role: _value_at(spec, field) for role, field in FIELDS.items()}
    return {role: dataset_id for role, dataset_id in named.items() if dataset_id is not None}


def evaluation_dataset_ids(spec: InitializationSpec) -> dict[int, str]:
    """Return the IDs of the datasets that measure on the objectives of one of several, by the place of that one."""
    named = enumerate(spec.datasets or [])
    return {index: dataset.eval_dataset_id for index, dataset in named if dataset.eval_dataset_id is not None}


def evaluation_field(index: int) -> str:
    """Return the field that names one of these."""
    return f"datasets[{index}].eval_dataset_id"


def check_given(
    spec: InitializationSpec, extras: Mapping[Role, object], evaluations: Mapping[int, object] = {}
) -> None:
    """Raise `RequestInvalid` unless the datasets that a request names beside its own are there."""
    missing = [FIELDS[role] for role in extra_dataset_ids(spec) if role not in extras]
    missing += [evaluation_field(index) for index in evaluation_dataset_ids(spec) if index not in evaluations]
    if missing:
        raise RequestInvalid(f"{missing[0]}: the request names a dataset, and its rows were not given")


def without_dataset_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a request without those that only name datasets."""
    kept = {name: value for name, value in fields.items() if name not in {"dataset_id", "datasets"}}
    if fields.get("datasets") is not None:
        kept["datasets"] = [
            {name: value for name, value in dataset.items() if name not in {"dataset_id", "eval_dataset_id"}}
            for dataset in fields["datasets"]
        ]
    for field in FIELDS.values():
        _remove(kept, field.split("."))
    return kept


def with_dataset_ids(fields: dict[str, Any], extras: Mapping[Role, str]) -> dict[str, Any]:
    """Return the fields of a request that names these datasets too."""
    named = dict(fields)
    for role, dataset_id in extras.items():
        *path, last = FIELDS[role].split(".")
        place = named
        for name in path:
            inner = place.get(name, {})
            if not isinstance(inner, str | Mapping):
                raise RequestInvalid(f"{name}: must be an object, or a name that stands for one of that type")
            place[name] = {"type": inner} if isinstance(inner, str) else dict(inner)
            place = place[name]
        place[last] = dataset_id
    return named


def _remove(fields: dict[str, Any], path: list[str]) -> None:
    name, *rest = path
    if not rest:
        fields.pop(name, None)
    elif isinstance(fields.get(name), dict):
        fields[name] = dict(fields[name])
        _remove(fields[name], rest)


def _value_at(spec: InitializationSpec, field: str) -> str | None:
    value: object = spec
    for name in field.split("."):
        value = getattr(value, name, None)
    assert value is None or isinstance(value, str)
    return value

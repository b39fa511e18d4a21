"""The options that a request's fields have on the command line, under PEFT's and TRL's names."""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from d2lora.errors import RequestInvalid
from d2lora.initializations import InitializationSpec
from d2lora.roles import Role, with_dataset_ids

_LORA = ("r", "lora_alpha", "target_modules", "use_rslora", "ranks")
_OPTIONS: dict[str, Any] = {
    "r": Annotated[int | None, typer.Option("--r", help="LoRA rank (default: 16)")],
    "lora_alpha": Annotated[float | None, typer.Option(help="(default: 2 r)")],
    "target_modules": Annotated[
        list[str] | None, typer.Option(help="module names, repeatable; or once all-linear, or a regular expression")
    ],
    "use_rslora": Annotated[bool | None, typer.Option("--use-rslora", help="scale by alpha / sqrt(r)")],
    "ranks": Annotated[
        str | None,
        typer.Option(help="budget: a rank of its own for every layer, in all as many parameters as r has (default: r)"),
    ],
    "method": Annotated[
        str | None,
        typer.Option(
            help="gradient, PEFT's kaiming, pissa:niter=4, lora_ga, ..., or warmup:steps=16,from=gradient "
            "(default: gradient)"
        ),
    ],
    "objective": Annotated[
        list[str] | None,
        typer.Option(
            help="sft, dpo, orpo, kto, or dpo:loss_type=ipo,beta=0.2; repeatable (default: all that the rows allow); "
            "1.dpo is for the rows of the first --dataset"
        ),
    ],
    "combination": Annotated[
        str | None, typer.Option(help="mgda, upgrad, imtl_g, mean, or fixed:1,3 by the objectives (default: mgda)")
    ],
    "adapters": Annotated[
        str | None, typer.Option(help="per_dataset: with --dataset, an adapter for each (default: one for all)")
    ],
    "whitening": Annotated[
        str | None, typer.Option(help="default, or power=0.5,damping=0.1: whiten gradients by their inputs")
    ],
    "retain_tolerance": Annotated[
        float | None, typer.Option(help="nats per token by which the loss of --retain may rise (default: 0.01)")
    ],
    "direction": Annotated[
        str | None,
        typer.Option(help="orthogonalized or gradient: how far to step along singular directions (default: the first)"),
    ],
    "lora_a_scale": Annotated[
        str | None,
        typer.Option(
            help="outputs or rows: what of lora_A is as large as PEFT's; outputs suit LoRA's rates (default: outputs)"
        ),
    ],
    "start": Annotated[str | None, typer.Option(help="calibrated or zero (default: calibrated)")],
    "statistics": Annotated[str | None, typer.Option(help="sketch or exact (default: sketch)")],
    "second_pass_above": Annotated[
        float | None,
        typer.Option(help="gather layers of a larger relative sketch error twice; 0 for all (default: none)"),
    ],
    "rounds": Annotated[int | None, typer.Option(help="steps at most, each from statistics of its own (default: 1)")],
    "keep_statistics": Annotated[
        bool | None, typer.Option("--keep-statistics", help="keep gradient statistics for later --based-on")
    ],
    "based_on": Annotated[
        str | None,
        typer.Option(
            help="an initialization that kept its statistics, for init its directory: its rows are not passed again"
        ),
    ],
    "max_length": Annotated[int | None, typer.Option(help="tokens of a sequence (default: 1024)")],
    "max_tokens_per_batch": Annotated[int | None, typer.Option(help="padded tokens of one forward")],
    "dtype": Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16 (default: auto)")],
    "quantization": Annotated[str | None, typer.Option(help="load the base model in 4bit or 8bit (default: neither)")],
    "seed": Annotated[int | None, typer.Option(help="(default: 0)")],
    "revision": Annotated[str | None, typer.Option(help="commit, tag or branch of a hub model")],
    "spec": Annotated[Path | None, typer.Option(help="a JSON file with the request; the options above win over it")],
}

_EVALUATIONS = Annotated[
    list[Path] | None,
    typer.Option(
        "--eval",
        help="a file of rows that only measure the delivered adapter; with --dataset one for each, in order",
    ),
]
_EXTRAS: dict[Role, Any] = {
    Role.RETAIN: Annotated[
        Path | None, typer.Option("--retain", help="a file of general text that the calibrated step may not worsen")
    ],
    Role.WARMUP: Annotated[Path | None, typer.Option("--warmup", help="a file of general rows, for --method warmup")],
}
"""The files of rows that the command line takes besides those of datasets and what measures on their objectives."""


def with_spec_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of a request.

    It receives mappings named ``options`` and ``extras``, and a list named ``evaluations``.
    """
    every = _OPTIONS | {"evaluations": _EVALUATIONS} | {str(role): option for role, option in _EXTRAS.items()}
    given = inspect.signature(command).parameters.items()
    own = [parameter for name, parameter in given if name not in {"options", "extras", "evaluations"}]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in every.items()
    ]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in _OPTIONS}
        files = {role: arguments.pop(role) for role in _EXTRAS}
        extras = {role: path for role, path in files.items() if path is not None}
        evaluations = arguments.pop("evaluations") or []
        command(**arguments, options=options, extras=extras, evaluations=evaluations)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + added
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return wrapper


def build_spec(
    base_model: str,
    dataset_id: str,
    options: dict[str, Any],
    extras: Mapping[Role, str] = {},
    further: Sequence[str] = (),
    evaluations: Sequence[str] = (),
) -> InitializationSpec:
    """Return the request that the options describe.

    ``further`` are the IDs of the datasets that the adapter is made from besides ``dataset_id``, ``evaluations`` those
    of datasets that measure on the objectives of one and the other, and ``extras`` of what is for something else.

    Raises:
        typer.BadParameter: naming each field at fault.
    """
    values = {} if options["spec"] is None else _request(options["spec"])
    given = {name: value for name, value in options.items() if value is not None and name != "spec"}
    lora = {name: given.pop(name) for name in _LORA if name in given}
    if "target_modules" in lora:
        lora["target_modules"] = _target_modules(lora["target_modules"])
    if lora:
        values["lora"] = {**values.get("lora", {}), **lora}
    if further:
        objectives = by_dataset(given.pop("objective", []), 1 + len(further), "--objective")
        named_datasets = _datasets(values.pop("datasets", None), [dataset_id, *further], objectives, evaluations)
    elif "objective" in given:
        values["objectives"] = [_typed(text, "--objective") for text in given.pop("objective")]
    if evaluations and not further:
        extras = {**extras, Role.EVALUATION: evaluations[0]}
    given |= _objects(given)
    try:
        named = with_dataset_ids({**values, **given}, extras)
        rows = {"datasets": named_datasets} if further else {"dataset_id": dataset_id}
        return InitializationSpec.model_validate({**named, **rows, "base_model": base_model})
    except RequestInvalid as error:
        raise typer.BadParameter(error.detail) from error
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise typer.BadParameter("; ".join(faults)) from error


def _request(file: Path) -> dict[str, Any]:
    """Return the request that a file holds."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--spec {file}: {error}") from error
    if not isinstance(values, dict):
        raise typer.BadParameter(f"--spec {file}: must hold one object, the request")
    if not isinstance(values.get("lora", {}), dict):
        raise typer.BadParameter(f"--spec {file}: lora must be an object")
    return values


def by_dataset(texts: Sequence[str], datasets: int, option: str) -> list[list[str]]:
    """Return the texts of every dataset, which begin with its number and a dot; without one they are the first's.

    Raises:
        typer.BadParameter: there is no dataset of that number.
    """
    own: list[list[str]] = [[] for _ in range(datasets)]
    for text in texts:
        number, dot, rest = text.partition(".")
        numbered = dot and number.isdecimal()
        if numbered and int(number) >= datasets:
            raise typer.BadParameter(f"{option} {text}: there are {datasets} datasets, the first of them is 0")
        own[int(number) if numbered else 0].append(rest if numbered else text)
    return own


def _datasets(
    described: object,
    ids: Sequence[str],
    objectives: Sequence[Sequence[str]],
    evaluations: Sequence[str],
) -> list[dict[str, Any]]:
    """Return a request's ``datasets``; ``described`` is what ``--spec`` says of them, and the options win over it."""
    described = described or [{} for _ in ids]
    if not (isinstance(described, list) and all(isinstance(one, dict) for one in described)):
        raise typer.BadParameter("--spec: datasets must be a list of objects")
    if len(described) != len(ids):
        raise typer.BadParameter(f"--spec: datasets has {len(described)} entries, and {len(ids)} files are given")
    named = [{**one, "dataset_id": dataset_id} for one, dataset_id in zip(described, ids, strict=True)]
    for dataset, texts in zip(named, objectives, strict=True):
        if texts:
            dataset["objectives"] = [_typed(text, "--objective") for text in texts]
    for dataset, evaluation in zip(named, evaluations, strict=False):
        dataset["eval_dataset_id"] = evaluation
    return named


def _objects(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that are objects and that the options name in a word or a line."""
    objects: dict[str, Any] = {}
    if "whitening" in given:
        text = given["whitening"]
        objects["whitening"] = {} if text == "default" else _arguments(text, f"--whitening {text}")
    if "combination" in given:
        kind, _, weights = given["combination"].partition(":")
        objects["combination"] = {"type": kind, "weights": weights.split(",")} if weights else {"type": kind}
    if given.get("method", "gradient") != "gradient":
        objects["method"] = _typed(given["method"], "--method")
    return objects


def _target_modules(values: list[str]) -> str | list[str]:
    # One value that is no plain name is a pattern, as in PEFT.
    one_pattern = len(values) == 1 and (values[0] == "all-linear" or not values[0].replace("_", "").isalnum())
    return values[0] if one_pattern else values


def _typed(text: str, option: str) -> dict[str, Any]:
    """Return the object that ``dpo`` or ``dpo:beta=0.2`` names."""
    kind, _, arguments = text.partition(":")
    return {"type": kind, **_arguments(arguments, f"{option} {text}")}


def _arguments(text: str, option: str) -> dict[str, str]:
    """Return the fields of ``beta=0.2,loss_type=ipo``."""
    parsed = {}
    for argument in filter(None, text.split(",")):
        name, separator, value = argument.partition("=")
        if not separator:
            raise typer.BadParameter(f"{option}: arguments are written name=value")
        parsed[name] = value
    return parsed

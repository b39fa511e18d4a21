"""The adapter's ``README.md``: a model card that quotes the report."""

from d2lora import __version__
from worker.left_out import LeftOut, in_words
from worker.report import PeftReport, RanksReport, Report


def model_card(report: Report) -> str:
    """Return the adapter's README.md: metadata that hubs read, what this is, and the evidence in short."""
    summary = report.summary
    spec = report.spec
    made_from = f"from gradient statistics of {', '.join(summary.objectives)} on {summary.rows_used} rows"
    if report.reuse is not None:
        made_from += f", {report.reuse.rows_reused} of them as passed by `{report.reuse.based_on}`"
    if report.warmup is not None:
        made_from = "by a warm-up on general rows (D2LoRA, arXiv:2503.18089)"
    if report.peft is not None:
        made_from = f"by PEFT's {_method_name(report)}"
    what = "A starting point" if report.folders is None else "Starting points, one for each of several datasets,"
    introduction = (
        f"{what} for LoRA fine-tuning of `{report.base_model}` (r = {spec.lora.r}, "
        f"lora_alpha = {spec.lora.alpha:g}{_ranks(report.ranks)}), made by d2lora {__version__} {made_from}. "
        "It loads on the unmodified base model."
    )
    lines = [
        "---",
        f"base_model: {report.base_model}",
        "library_name: peft",
        f"license: {report.base_license}",
        "tags: [lora, d2lora, initialization]",
        "---",
        "",
        "# LoRA initialization",
        "",
        introduction,
        "",
        *_loading(report),
        "",
        *_freezing(report.peft),
        f"Start: **{summary.start}**; {summary.start_reason}.",
        "",
        *_learning_rates(report),
        *_not_adapted(report.left_out),
    ]
    if summary.held_out or summary.evaluation:
        lines += ["| held-out, cross-validated | base | adapter | rows |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {value.base:.4f} | {value.adapter:.4f} | {value.rows} |"
        for name, value in summary.held_out.items()
    ]
    for name, value in (summary.evaluation or {}).items():
        lines.append(f"| {name} (evaluation dataset) | {value.base:.4f} | {value.adapter:.4f} | {value.rows} |")
    if summary.retained is not None:
        kept = summary.retained
        lines.append(f"| nll of retain rows | {kept.base:.4f} | {kept.adapter:.4f} | {kept.rows} |")
    lines += [
        "",
        f"Base weights: `{report.base_identity}`. Dataset: `sha256:{report.dataset_sha256}`. Details: `report.json`.",
        "",
    ]
    return "\n".join(lines)


def _ranks(ranks: RanksReport | None) -> str:
    if ranks is None:
        return ""
    return f"; its parameters are spent on ranks of {ranks.smallest} to {ranks.largest}, which a server has to allow"


def _method_name(report: Report) -> str:
    method = report.spec.method
    return method if isinstance(method, str) else method.type


def _loading(report: Report) -> list[str]:
    """Return how to load the adapter, or where each of several is."""
    if report.folders is not None:
        return [f"- `{folder}`: the adapter for dataset `{dataset}`" for folder, dataset in report.folders.items()]
    return [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{report.base_model}")',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder", is_trainable=True)',
        "```",
    ]


def _learning_rates(report: Report) -> list[str]:
    """Return which learning rates suit training from our own factors."""
    if report.peft is not None or report.warmup is not None:
        return []
    if report.spec.lora_a_scale == "outputs":
        return [
            "Learning rates that suit LoRA's default start suit this one: on the dataset, lora_A's outputs are as",
            "large as that start's.",
            "",
        ]
    return [
        "Begin with a smaller learning rate than suits LoRA's default start, such as a quarter of it: lora_A's rows",
        "are as long as that start's and lie where inputs are large.",
        "",
    ]


def _not_adapted(left: list[LeftOut]) -> list[str]:
    """Return what the adapter leaves as it is, one item each."""
    return [*(f"- {in_words(one)}" for one in left), ""] if left else []


def _freezing(peft: PeftReport | None) -> list[str]:
    """Return how to train the ranks that the method trains and leave the offset as it is."""
    if peft is None or peft.frozen_ranks is None:
        return []
    return [
        f"The files have rank {peft.delivered_rank}. PEFT trains the first {peft.rank} ranks; the others hold the",
        "offset that makes the adapter fit the unmodified base. To train as PEFT does, keep the offset as it is, and",
        "use no weight decay:",
        "",
        "```python",
        "import torch",
        "",
        f"trained = torch.arange({peft.delivered_rank}) < {peft.rank}",
        "for name, parameter in model.named_parameters():",
        '    if ".lora_A." in name:',
        "        parameter.register_hook(lambda gradient: gradient * trained.to(gradient)[:, None])",
        '    if ".lora_B." in name:',
        "        parameter.register_hook(lambda gradient: gradient * trained.to(gradient))",
        "```",
        "",
    ]

"""SFT, DPO, ORPO and KTO as weightings of the same per-sequence gradients.

Every objective sees the model only through the summed log-probabilities of its sequences, so its gradient is a
weighted sum of their gradients (docs/method.md, eq. 1). What accumulates over a pass are un-normalized
*bases*; the objectives follow by a small matrix once all rows are counted, so beta and lambda need no new pass.

Shape legend
    R  rows    S  sequences, S = 2R for preference rows (chosen first) and R otherwise
    K  bases   J  objectives

References:
    [1] Rafailov et al. Direct Preference Optimization. 2023. arXiv:2305.18290
    [2] Hong, Lee, Thorne. ORPO: Monolithic Preference Optimization without Reference Model. 2024. arXiv:2403.07691
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from d2lora.errors import ObjectiveUnavailable
from d2lora.initializations import Dpo, Kto, Objective, Orpo, Sft
from d2lora.supervision import Supervision, rows_needed
from worker.preference_losses import (
    dpo_losses,
    dpo_slopes,
    is_per_token,
    kto_losses,
    kto_slopes,
    kto_slopes_at_start,
    slopes_at_start,
)


class Basis(StrEnum):
    """The sums of per-sequence gradients that a pass accumulates."""

    LIKELIHOOD = "likelihood"
    """Sum of grad L over chosen completions, of labeled rows over the desirable ones."""
    MARGIN = "margin"
    """Sum of grad (L_chosen - L_rejected)."""
    MEAN_MARGIN = "mean_margin"
    """Sum of grad (L_chosen / T_chosen - L_rejected / T_rejected)."""
    UNDESIRABLE = "undesirable"
    """Sum of grad L over the completions of rows whose label is false."""
    ODDS = "odds"
    """Sum of the gradients of log sigmoid(log-odds ratio), ORPO's second term."""
    SEQUENCE = "sequence"
    """Sum of grad log p(prompt and completion) over chosen sequences."""
    DPO = "dpo"
    """Sum of the gradients of the rows' DPO losses, at a policy that is not the reference (`Away`)."""
    KTO = "kto"
    """The same of KTO's."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities (summed over tokens, nats) of rows under one model; float64."""

    chosen_logps: Float[Tensor, " R"]
    chosen_tokens: Int[Tensor, " R"]
    rejected_logps: Float[Tensor, " R"] | None = None
    rejected_tokens: Int[Tensor, " R"] | None = None
    prompt_logps: Float[Tensor, " R"] | None = None
    """Of the chosen sequence's prompt; only filled for ``nll="full_sequence"``."""
    prompt_tokens: Int[Tensor, " R"] | None = None
    desirable: Bool[Tensor, " R"] | None = None
    """The rows' labels, if they have some."""
    mismatched_logps: Float[Tensor, " R"] | None = None
    """Of another row's completion after this row's prompt (`worker/mismatches.py`); only filled for KTO."""

    @staticmethod
    def concatenate(parts: Sequence["Scores"]) -> "Scores":
        """Return the rows of all parts, in order."""
        known = {name: [getattr(part, name) for part in parts] for name in parts[0].tensors()}
        return Scores(**{name: torch.cat(values) for name, values in known.items()})

    def split(self, sizes: Sequence[int]) -> list["Scores"]:
        """Return runs of rows of these sizes, in order."""
        parts = {name: tensor.split(list(sizes)) for name, tensor in self.tensors().items()}
        return [Scores(**{name: tensors[index] for name, tensors in parts.items()}) for index in range(len(sizes))]

    def part(self, rows: Sequence[int]) -> "Scores":
        """Return some of the rows."""
        return Scores(**{name: tensor[[*rows]] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return what is known, by name."""
        known = {name: getattr(self, name) for name in Scores.__dataclass_fields__}
        return {name: tensor for name, tensor in known.items() if tensor is not None}


@dataclass(frozen=True)
class Counts:
    """What the un-normalized bases have to be divided by; adds over batches, folds and shards."""

    rows: int = 0
    chosen_tokens: int = 0
    """Of labeled rows, those of the desirable ones."""
    sequence_tokens: int = 0
    """Predicted tokens of the chosen prompt and completion together."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.rows + other.rows,
            self.chosen_tokens + other.chosen_tokens,
            self.sequence_tokens + other.sequence_tokens,
        )


@dataclass(frozen=True)
class Away:
    """What DPO and KTO look at besides a batch's scores, where the policy is no longer the reference."""

    objectives: Sequence[Objective]
    reference: Scores
    """Of the same rows, under the base model."""
    shift: float = 0.0
    """KTO's reference point at the policy."""


def count(scores: Scores) -> Counts:
    """Return the normalizers of the given rows."""
    tokens = int((scores.chosen_tokens * _imitated(scores)).sum())
    prompt = 0 if scores.prompt_tokens is None else int(scores.prompt_tokens.sum())
    return Counts(len(scores.chosen_tokens), tokens, tokens + prompt)


def resolve_objectives(requested: Sequence[Objective] | None, supervision: Supervision) -> list[Objective]:
    """Return the requested objectives, or all that the rows allow.

    Raises:
        ObjectiveUnavailable: DPO or ORPO is asked of rows without a rejected completion, or KTO of rows without labels.
    """
    if requested is None:
        every: tuple[Objective, ...] = (Sft(), Dpo(), Orpo(), Kto())
        return [objective for objective in every if objective.type in supervision.objectives]
    for objective in requested:
        if objective.type not in supervision.objectives:
            raise ObjectiveUnavailable(
                f"objectives: {objective.type} needs {rows_needed(objective.type)}, and these have none"
            )
    return list(requested)


def bases_of(objectives: Sequence[Objective], *, away: bool = False) -> tuple[Basis, ...]:
    """Return the bases that the objectives are combinations of, without repetition.

    ``away``: at a policy that is not the reference, where a row's share of DPO and KTO depends on its log-ratios.
    """
    needed: list[Basis] = []
    for objective in objectives:
        match objective:
            case Dpo() if away:
                needed += [Basis.DPO]
            case Kto() if away:
                needed += [Basis.KTO]
            case Sft():
                needed += [Basis.LIKELIHOOD]
            case Dpo():
                slopes = slopes_at_start(objective)
                needed += [Basis.MEAN_MARGIN if is_per_token(objective) else Basis.MARGIN]
                needed += [Basis.LIKELIHOOD] if slopes.chosen != -slopes.rejected else []
            case Orpo():
                needed += [Basis.SEQUENCE if objective.nll == "full_sequence" else Basis.LIKELIHOOD, Basis.ODDS]
            case Kto():
                needed += [Basis.LIKELIHOOD, Basis.UNDESIRABLE]
            case _:
                assert_never(objective)
    return tuple(dict.fromkeys(needed))


def needs_prompt(objectives: Sequence[Objective]) -> bool:
    """Return whether a loss looks at the prompt's own log-probabilities."""
    return any(isinstance(objective, Orpo) and objective.nll == "full_sequence" for objective in objectives)


def needs_mismatches(objectives: Sequence[Objective]) -> bool:
    """Return whether a loss looks at completions after other rows' prompts."""
    return any(isinstance(objective, Kto) for objective in objectives)


def sequence_weights(bases: Sequence[Basis], scores: Scores, away: Away | None = None) -> Float[Tensor, "K S"]:
    """Return how much of each sequence's ``grad L_s`` every basis takes; DPO's at policy == reference without ``away``.

    With paired rows the columns are all chosen, then all rejected sequences.
    """
    one = torch.ones_like(scores.chosen_logps)
    zero = torch.zeros_like(one)
    rows = []
    for basis in bases:
        match basis:
            case Basis.LIKELIHOOD | Basis.SEQUENCE:
                chosen, rejected = one * _imitated(scores), zero
            case Basis.UNDESIRABLE:
                chosen, rejected = one * ~_imitated(scores), zero
            case Basis.MARGIN:
                chosen, rejected = one, -one
            case Basis.MEAN_MARGIN:
                assert scores.rejected_tokens is not None
                chosen, rejected = one / scores.chosen_tokens, -one / scores.rejected_tokens
            case Basis.ODDS:
                chosen, rejected = _log_odds_ratio_slopes(scores)
                flatness = torch.sigmoid(-log_odds_ratio(scores))
                chosen, rejected = flatness * chosen, flatness * rejected
            case Basis.DPO | Basis.KTO:
                assert away is not None
                chosen, rejected = _slopes_away(basis, scores, away)
            case _:
                assert_never(basis)
        rows.append(chosen if scores.rejected_logps is None else torch.cat([chosen, rejected]))
    return torch.stack(rows)


def objective_coefficients(
    objectives: Sequence[Objective], bases: Sequence[Basis], counts: Counts
) -> Float[Tensor, "J K"]:
    """Return the matrix that turns summed bases into gradients of mean losses."""
    matrix = torch.zeros(len(objectives), len(bases), dtype=torch.float64)
    for row, objective in zip(matrix, objectives, strict=True):
        match objective:
            case Sft():
                row[bases.index(Basis.LIKELIHOOD)] = -1.0 / counts.chosen_tokens
            case Dpo() if Basis.DPO in bases:
                row[bases.index(Basis.DPO)] = 1.0 / counts.rows
            case Kto() if Basis.KTO in bases:
                row[bases.index(Basis.KTO)] = 1.0 / counts.rows
            case Dpo():
                # With slopes c and r: c L_chosen + r L_rejected = -r (L_chosen - L_rejected) + (c + r) L_chosen.
                slopes = slopes_at_start(objective)
                margin = Basis.MEAN_MARGIN if is_per_token(objective) else Basis.MARGIN
                row[bases.index(margin)] = -slopes.rejected / counts.rows
                if slopes.chosen != -slopes.rejected:
                    row[bases.index(Basis.LIKELIHOOD)] = (slopes.chosen + slopes.rejected) / counts.rows
            case Orpo():
                if objective.nll == "full_sequence":
                    row[bases.index(Basis.SEQUENCE)] = -1.0 / counts.sequence_tokens
                else:
                    row[bases.index(Basis.LIKELIHOOD)] = -1.0 / counts.chosen_tokens
                row[bases.index(Basis.ODDS)] = -objective.beta / counts.rows
            case Kto():
                desirable, undesirable = kto_slopes_at_start(objective)
                row[bases.index(Basis.LIKELIHOOD)] = desirable / counts.rows
                row[bases.index(Basis.UNDESIRABLE)] = undesirable / counts.rows
            case _:
                assert_never(objective)
    return matrix


def row_losses(objective: Objective, scores: Scores, reference: Scores) -> Float[Tensor, " R"]:
    """Return one number per row whose mean is the objective's loss over these rows.

    Token means are ratios of sums, so a row's share is scaled by rows / tokens. ``reference`` is the base model's
    scores of the same rows; only DPO and KTO look at it.
    """
    match objective:
        case Sft():
            imitated = _imitated(scores)
            return _mean_nll(scores.chosen_logps * imitated, scores.chosen_tokens * imitated)
        case Dpo():
            return dpo_losses(objective, *_log_ratios(scores, reference, per_token=is_per_token(objective)))
        case Orpo():
            odds = -objective.beta * logsigmoid(log_odds_ratio(scores))
            if objective.nll == "completion":
                return _mean_nll(scores.chosen_logps, scores.chosen_tokens) + odds
            assert scores.prompt_logps is not None
            assert scores.prompt_tokens is not None
            tokens = scores.chosen_tokens + scores.prompt_tokens
            return _mean_nll(scores.chosen_logps + scores.prompt_logps, tokens) + odds
        case Kto():
            assert scores.desirable is not None
            log_ratios = scores.chosen_logps - reference.chosen_logps
            return kto_losses(objective, log_ratios, scores.desirable, shift_of_mismatches(scores, reference))
        case _:
            assert_never(objective)


def rows_measured(objective: Objective, scores: Scores) -> int:
    """Return how many of the rows the objective's loss is of."""
    return int(_imitated(scores).sum()) if isinstance(objective, Sft) else len(scores.chosen_logps)


def log_odds_ratio(scores: Scores) -> Float[Tensor, " R"]:
    """Return the log of the odds ratio on length-normalized probabilities, eq. 4 and 5 of [2]."""
    chosen, rejected = _mean_logps(scores)
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _slopes_away(basis: Basis, scores: Scores, away: Away) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Derivatives of the rows' DPO or KTO losses by the summed log-probabilities of chosen and rejected."""
    (objective,) = (one for one in away.objectives if one.type == basis)
    if isinstance(objective, Dpo):
        assert scores.rejected_tokens is not None
        per_token = is_per_token(objective)
        chosen, rejected = dpo_slopes(objective, *_log_ratios(scores, away.reference, per_token=per_token))
        return (chosen / scores.chosen_tokens, rejected / scores.rejected_tokens) if per_token else (chosen, rejected)
    assert isinstance(objective, Kto)
    assert scores.desirable is not None
    log_ratios = scores.chosen_logps - away.reference.chosen_logps
    return kto_slopes(objective, log_ratios, scores.desirable, away.shift), torch.zeros_like(log_ratios)


def _log_odds_ratio_slopes(scores: Scores) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Derivatives of the log-odds ratio by the summed log-probabilities of chosen and rejected."""
    chosen, rejected = _mean_logps(scores)
    assert scores.rejected_tokens is not None
    return (
        -1.0 / (torch.expm1(chosen) * scores.chosen_tokens),
        1.0 / (torch.expm1(rejected) * scores.rejected_tokens),
    )


def _mean_logps(scores: Scores) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    assert scores.rejected_logps is not None
    assert scores.rejected_tokens is not None
    # The odds p / (1 - p) have a pole at p = 1; log-probabilities come from float32 logits, which tell nothing closer
    # to 0 than one part in 2^24.
    ceiling = -(2.0**-24)
    return (
        (scores.chosen_logps / scores.chosen_tokens).clamp(max=ceiling),
        (scores.rejected_logps / scores.rejected_tokens).clamp(max=ceiling),
    )


def _log1mexp(x: Float[Tensor, " R"]) -> Float[Tensor, " R"]:
    """Return log(1 - exp(x)) for x < 0 without cancellation near 0 and near minus infinity."""
    return torch.where(x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def _log_ratios(
    scores: Scores, reference: Scores, *, per_token: bool
) -> tuple[Float[Tensor, " R"], Float[Tensor, " R"]]:
    """Return log(policy / reference) of chosen and rejected, of the whole completions or of their mean token."""
    assert scores.rejected_logps is not None
    assert scores.rejected_tokens is not None
    assert reference.rejected_logps is not None
    chosen, rejected = scores.chosen_logps - reference.chosen_logps, scores.rejected_logps - reference.rejected_logps
    return (chosen / scores.chosen_tokens, rejected / scores.rejected_tokens) if per_token else (chosen, rejected)


def _imitated(scores: Scores) -> Bool[Tensor, " R"]:
    """Which rows' completions are to be imitated: all, or those whose label is true."""
    return torch.ones_like(scores.chosen_tokens, dtype=torch.bool) if scores.desirable is None else scores.desirable


def shift_of_mismatches(scores: Scores, reference: Scores) -> float:
    """Return KTO's reference point: the mean log-ratio of mismatched completions, or 0 if that is negative.

    It is 0 at the start, where nothing needs to be scored.
    """
    if scores.mismatched_logps is None or reference.mismatched_logps is None:
        return 0.0
    return max(0.0, (scores.mismatched_logps - reference.mismatched_logps).mean().item())


def _mean_nll(logps: Float[Tensor, " R"], tokens: Int[Tensor, " R"]) -> Float[Tensor, " R"]:
    # Among few rows none may be desirable. An integer tensor would divide in float32.
    return -logps * (len(tokens) / tokens.sum().clamp(min=1).double())

"""Log-probabilities of completions, a chunk of vocabulary rows at a time, with their gradient.

The full logits of a batch (tokens x vocabulary) are the largest tensor of a forward pass by far. Here the head runs
only at positions that predict a counted token, in chunks; and since every objective needs the same cotangent
(d sum L / d L_s = 1), the gradient with respect to the hidden states is formed chunk by chunk in the forward.

Shape legend
    S  sequences    T  tokens of a padded sequence    H  hidden size    C  counted positions
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Head = Callable[[Tensor], Tensor]
"""Hidden states (..., H) to logits (..., vocabulary)."""


def sequence_logps(
    head: Head,
    hidden: Float[Tensor, "S T H"],
    input_ids: Int[Tensor, "S T"],
    counted: Bool[Tensor, "S T"],
    *,
    vocabulary: int,
) -> Float[Tensor, " S"]:
    """Return the summed log-probabilities (nats, float64) of the counted tokens of every sequence."""
    logps, _ = _chunked(head, hidden, input_ids, counted, vocabulary=vocabulary, with_gradient=False)
    return logps


def sequence_logps_and_gradient(
    head: Head,
    hidden: Float[Tensor, "S T H"],
    input_ids: Int[Tensor, "S T"],
    counted: Bool[Tensor, "S T"],
    *,
    vocabulary: int,
) -> tuple[Float[Tensor, " S"], Float[Tensor, "S T H"]]:
    """Return the summed log-probabilities and the gradient of their total by the hidden states."""
    logps, gradient = _chunked(head, hidden, input_ids, counted, vocabulary=vocabulary, with_gradient=True)
    assert gradient is not None
    return logps, gradient


def _chunked(
    head: Head,
    hidden: Float[Tensor, "S T H"],
    input_ids: Int[Tensor, "S T"],
    counted: Bool[Tensor, "S T"],
    *,
    vocabulary: int,
    with_gradient: bool,
) -> tuple[Float[Tensor, " S"], Float[Tensor, "S T H"] | None]:
    counted, input_ids = counted.to(hidden.device), input_ids.to(hidden.device)  # a spread model's inputs are elsewhere
    predicted = counted[:, 1:]  # the token at t is predicted by the hidden state at t - 1
    states_CH = hidden.detach()[:, :-1][predicted]
    targets_C = input_ids[:, 1:][predicted]
    logps_C = torch.empty(len(targets_C), dtype=torch.float64, device=hidden.device)
    gradient_CH = torch.empty_like(states_CH) if with_gradient else None
    # An accelerator wants large products; a CPU's cache does not, and its memory is the worker's.
    elements = 2**26 if hidden.device.type == "cuda" else 2**23
    size = max(16, elements // vocabulary)
    for start in range(0, len(targets_C), size):
        chunk = slice(start, start + size)
        states = states_CH[chunk]
        with torch.set_grad_enabled(with_gradient):
            states = states.requires_grad_(with_gradient)
            token_logps = -torch.nn.functional.cross_entropy(head(states).float(), targets_C[chunk], reduction="none")
        if gradient_CH is not None:
            (gradient_CH[chunk],) = torch.autograd.grad(token_logps.sum(), states)
        logps_C[chunk] = token_logps.detach().double()

    logps_ST = torch.zeros(predicted.shape, dtype=torch.float64, device=hidden.device)
    logps_ST[predicted] = logps_C
    logps = logps_ST.sum(1)
    if gradient_CH is None:
        return logps, None
    gradient = torch.zeros_like(hidden)
    gradient[:, :-1][predicted] = gradient_CH
    return logps, gradient

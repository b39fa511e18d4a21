"""What a model writes: GSM8K's exact match and ROUGE-L of titles, greedily decoded."""

import re

import torch
from rouge_score import rouge_scorer
from torch import nn
from transformers import PreTrainedTokenizerBase

from bench.quality.datasets import Kind, Row

_BATCH = 16
_NUMBER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def answer_of(text: str) -> str | None:
    """Return the number after the first ``####``, without commas and trailing zeros; None when there is none."""
    found = _NUMBER.search(text)
    if found is None:
        return None
    number = found[1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def row_scores(
    kind: Kind, rows: list[Row], model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, new_tokens: int
) -> dict[str, list[float]]:
    """Return ``exact_match`` or ``rouge_l`` (F1, 0 to 1) per row; nothing for kinds without a reference to match."""
    if kind not in {"gsm8k", "titles"}:
        return {}
    texts = _complete(rows, model, tokenizer, new_tokens=new_tokens)
    if kind == "gsm8k":
        expected = [answer_of(row["completion"]) for row in rows]
        return {"exact_match": [float(answer_of(text) == want) for text, want in zip(texts, expected, strict=True)]}
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(texts, rows, strict=True)
    return {
        "rouge_l": [
            round(scorer.score(row["completion"].strip(), text.strip().partition("\n")[0])["rougeL"].fmeasure, 4)
            for text, row in pairs
        ]
    }


def _complete(rows: list[Row], model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, new_tokens: int) -> list[str]:
    training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    limit = model.config.get_text_config().max_position_embeddings - new_tokens
    texts: list[str] = []
    try:
        for begin in range(0, len(rows), _BATCH):
            prompts = [row["prompt"] for row in rows[begin : begin + _BATCH]]
            # Only the prompt's beginning is lost where the context is too short, never its last words.
            tokenizer.truncation_side = "left"
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True, max_length=limit)
            device = next(model.parameters()).device
            with torch.no_grad():
                output = model.generate(
                    input_ids=inputs["input_ids"].to(device),
                    attention_mask=inputs["attention_mask"].to(device),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            written = output[:, inputs["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    finally:
        tokenizer.padding_side, tokenizer.truncation_side = side, "right"
        model.train(training)
    return texts

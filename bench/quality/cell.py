"""One cell from its description to its record."""

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.quality.choices import questions, right_answers
from bench.quality.datasets import General, Row, Splits, general_rows, in_batches, splits
from bench.quality.encoding import fits
from bench.quality.generation import row_scores
from bench.quality.grid import Cell, Places
from bench.quality.initializers import INITIALIZERS
from bench.quality.measuring import Held, Scores, compute, finite, mean_loss, preference, row_losses, score_all
from bench.quality.peft_starts import MethodFailed
from bench.quality.starts import Start, Work
from bench.quality.training import train
from d2lora.models import LocalModel, locate

Record = dict[str, Any]


def run(cell: Cell, places: Places) -> Record:
    """Return the cell's record; a method that cannot start here is a result, and any other error is raised."""
    path, protocol = places.models[cell.model], cell.protocol
    base, tokenizer = load(path)
    parts = splits(
        places.folders[cell.task.name],
        cell.task.kind,
        cell.task.trainer,
        rows=cell.rows,
        seed=cell.seed,
        validation_rows=protocol.validation_rows,
        test_rows=protocol.test_rows,
        with_test=cell.phase == "test",
        fits=lambda row: fits(row, tokenizer, max_length=protocol.max_length),
    )
    general = General([], [])
    if places.general is not None:
        general = general_rows(places.general, protocol.general_rows, protocol.retain_rows)
    measure = _Measure(cell, parts, general.measured, places, base, tokenizer)
    record: Record = {"fingerprint": cell.fingerprint, "cell": cell.model_dump(), "base": measure.base}
    # DPO's reference, for every method, is the base model as it was.
    reference = copy.deepcopy(base) if cell.task.trainer == "dpo" else None
    with tempfile.TemporaryDirectory(prefix="quality-") as name:
        directory = Path(name)
        work = Work(
            base,
            tokenizer,
            parts.train,
            cell.task.trainer,
            protocol,
            cell.seed,
            path,
            directory,
            general.learned,
            places.starts,
        )
        began, began_cpu = time.perf_counter(), time.process_time()
        try:
            start = INITIALIZERS[cell.initializer](work)
        except MethodFailed as error:
            return record | {"failed": str(error)}
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        record["initialization"] = {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)} | start.about
        return record | _trained(cell, start, reference, tokenizer, parts, measure, directory)


def load(path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a frozen model on the device, float32 on a CPU and bfloat16 elsewhere, and its tokenizer."""
    place = locate(path)
    arguments: dict[str, Any] = {}
    source = path
    if isinstance(place, LocalModel):
        source = str(place.directory)
        if place.gguf_file is not None:
            arguments["gguf_file"] = place.gguf_file
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(source, **arguments)
    if "gguf_file" in arguments:
        model.is_quantized = False  # its weights are dequantized floats, which trainers refuse by the mark alone
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval().requires_grad_(False), tokenizer


def _trained(
    cell: Cell,
    start: Start,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    parts: Splits,
    measure: "_Measure",
    directory: Path,
) -> Record:
    """Train, and return the curve and what is measured at the chosen and at the last step."""
    protocol = cell.protocol
    curve: list[Record] = []
    details: dict[str, Record] = {}

    def on_step(step: int, seconds: float, cpu_seconds: float) -> None:
        times = {"step": step, "seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3)}
        curve.append(times | measure.curve_point(start.model))
        if cell.phase == "test" and step in {cell.chosen_step, protocol.steps}:
            details[str(step)] = measure.details(start.model)

    on_step(0, 0.0, 0.0)
    rows = in_batches(parts.train, seed=cell.seed, steps=protocol.steps, batch=protocol.batch)
    batches = train(
        start.model,
        reference,
        tokenizer,
        rows,
        trainer=cell.task.trainer,
        learning_rate=cell.learning_rate,
        protocol=protocol,
        directory=directory,
        on_step=on_step,
    )
    return {"batches": batches, "curve": curve, "details": details, "failed": None}


class _Measure:
    """What is measured of a model on the rows that the cell may see, with the base model as reference."""

    def __init__(
        self,
        cell: Cell,
        parts: Splits,
        general: list[Row],
        places: Places,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.cell, self.tokenizer = cell, tokenizer
        length, autocast = cell.protocol.max_length, cell.protocol.autocast
        self.test = parts.test
        rows = parts.validation if parts.test is None else parts.test
        self.held = Held(rows, tokenizer, max_length=length, autocast=autocast)
        self.reference = score_all(base, self.held)
        self.general = Held(general, tokenizer, max_length=length, autocast=autocast) if general else None
        self.questions = []
        if places.questions is not None and cell.phase == "test":
            self.questions = questions(places.questions, cell.protocol.questions)
        self.base = self._point(base, self.reference) | self._untrained(base)

    def curve_point(self, model: torch.nn.Module) -> Record:
        """Return the losses, and for pairs the preferences."""
        return self._point(model, score_all(model, self.held))

    def _point(self, model: torch.nn.Module, scores: Scores) -> Record:
        point: Record = {"loss": finite(self._loss(scores))}
        if scores.rejected is not None:
            point |= {name: finite(value) for name, value in preference(scores, self.reference).items()}
        if self.general is not None:
            general = score_all(model, self.general)
            point["general_loss"] = finite(mean_loss("sft", general, general, beta=1.0).item())
        return point

    def details(self, model: torch.nn.Module) -> Record:
        """Return each test row's loss, and what the model writes."""
        assert self.test is not None
        protocol = self.cell.protocol
        scores = score_all(model, self.held)
        losses = row_losses(self.cell.task.trainer, scores, self.reference, beta=protocol.beta)
        with compute(next(model.parameters()).device.type, autocast=protocol.autocast):
            written = row_scores(
                self.cell.task.kind,
                self.test[: protocol.generation_rows],
                model,
                self.tokenizer,
                new_tokens=protocol.new_tokens,
            )
        return {"row_losses": [finite(value) for value in losses.tolist()], **written, **self._untrained(model)}

    def _untrained(self, model: torch.nn.Module) -> Record:
        """Return which questions of a task that is not trained are answered rightly."""
        if not self.questions:
            return {}
        protocol = self.cell.protocol
        return {
            "untrained": right_answers(
                model, self.questions, self.tokenizer, max_length=protocol.max_length, autocast=protocol.autocast
            )
        }

    def _loss(self, scores: Scores) -> float:
        return mean_loss(self.cell.task.trainer, scores, self.reference, beta=self.cell.protocol.beta).item()

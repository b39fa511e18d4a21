"""Running cells in processes of their own, with progress; what is there already is not run again."""

import os
import platform
import subprocess
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

from bench.quality.cell import Record
from bench.quality.choosing import Choice, Key, choose
from bench.quality.grid import ROOT, Cell, Places, Plan
from bench.quality.store import Store


class CellsFailed(Exception):
    """Some cells raised; the others are stored, and running again tries only these."""


def run_plans(
    plans: Sequence[Plan], places: Places, store: Store, *, processes: int, threads: int
) -> tuple[list[Record], dict[Key, Choice], list[Record]]:
    """Run all plans' cells, choose, and run what was chosen for the test split.

    Returns the test records, the choices, and the records of cells whose method could not start.

    Raises:
        CellsFailed: at least one cell could not be run.
    """
    tune = [cell for plan in plans for cell in plan.tune_cells(places)]
    expected_tests = sum(
        len({(cell.group, cell.initializer) for cell in plan.tune_cells(places)}) * len(plan.seeds) for plan in plans
    )
    _run_cells("tune", tune, places, store, processes=processes, threads=threads, to_come=expected_tests)
    choices: dict[Key, Choice] = {}
    test = []
    for plan in plans:
        found = choose(store.read(plan.tune_cells(places)))
        choices |= found
        test += [cell for choice in found.values() for cell in choice.test_cells(plan.seeds)]
    _run_cells("test", test, places, store, processes=processes, threads=threads, to_come=0)
    return store.read(test), choices, [record for record in store.read(tune) if record.get("failed")]


def _run_cells(
    phase: str, cells: list[Cell], places: Places, store: Store, *, processes: int, threads: int, to_come: int
) -> None:
    missing = [cell for cell in cells if not store.has(cell)]
    print(f"{phase}: {len(cells)} cells, {len(cells) - len(missing)} are there", flush=True)
    if not missing:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    began, faults = time.monotonic(), []
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    with pool:
        futures = {pool.submit(_run_one, cell, places, store, threads): cell for cell in missing}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                note = ""
                if (error := future.exception()) is not None:
                    faults.append(f"{futures[future]}: {type(error).__name__}: {error}")
                    note = "FAILED "
                rate = (time.monotonic() - began) / done
                left = timedelta(seconds=round(rate * (len(missing) - done + to_come)))
                print(f"  {done}/{len(missing)} {note}{futures[future]}; {left} left", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if faults:
        raise CellsFailed("\n".join(faults))


def _run_one(cell: Cell, places: Places, store: Store, threads: int) -> None:
    import torch
    from transformers.utils import logging

    from bench.quality.cell import run

    # What the libraries advise once per cell; errors still come through as exceptions.
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    record = run(cell, places)
    store.write(cell, record | {"hardware": hardware(threads), "commit": commit()})


def commit() -> str:
    """Return the commit that is checked out, and whether files were changed since."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def hardware(threads: int) -> dict[str, str]:
    """Return what a cell ran on, without this machine's name."""
    import torch

    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": f"{processor}, {os.cpu_count()} cores, {threads} thread(s) per cell",
        "accelerator": device,
        "python": platform.python_version(),
    }

"""Starts that learning rates share: made once, and kept as the files that PEFT loads."""

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from bench.quality.starts import Start, Work

_ABOUT = "about.json"
"""What a start says of itself, beside its files."""


def kept(work: Work, request: Sequence[str], make: Callable[[Path], dict[str, Any]]) -> Start:
    """Return the start that answers this request, all of what decides it, loaded on the base as a user would.

    ``make`` leaves an adapter's files in the directory that it is given, and returns what there is to say of them. What
    that cost is said by every cell that shares it.
    """
    place = (work.kept or work.directory) / hashlib.sha256("\n".join(request).encode()).hexdigest()[:20]
    if not place.exists():
        out = work.directory / "adapter"
        out.mkdir()
        began, began_cpu = time.perf_counter(), time.process_time()
        about = make(out)
        cost = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - began_cpu}
        (out / _ABOUT).write_text(json.dumps(about | {name: round(value, 3) for name, value in cost.items()}))
        _put(out, place)
    model = PeftModel.from_pretrained(work.base, str(place), is_trainable=True)
    return Start(model, json.loads((place / _ABOUT).read_text()))


def _put(out: Path, place: Path) -> None:
    """Put the files in place in one move, so that whoever is killed leaves none or all of them."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as beside:
        whole = shutil.copytree(out, Path(beside) / "start")
        with contextlib.suppress(OSError):  # another cell was there first, with the same files
            whole.rename(place)

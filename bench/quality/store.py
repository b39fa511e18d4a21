"""Records of cells in a directory, one file each; a file that is there is complete."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.quality.cell import Record
from bench.quality.grid import Cell


@dataclass(frozen=True)
class Store:
    """Records by fingerprint."""

    directory: Path

    def has(self, cell: Cell) -> bool:
        """Whether the cell need not run again."""
        return self._path(cell).exists()

    def read(self, cells: Iterable[Cell]) -> list[Record]:
        """Return the records of those cells that have one, in their order."""
        return [json.loads(self._path(cell).read_text(encoding="utf-8")) for cell in cells if self.has(cell)]

    def write(self, cell: Cell, record: Record) -> None:
        """Put a record in place in one move, so that whoever is killed leaves none or all of it."""
        path = self._path(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".writing")
        beside.write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)

    def _path(self, cell: Cell) -> Path:
        return self.directory / f"{cell.fingerprint}.json"

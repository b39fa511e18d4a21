"""Where a base model's files are, found out without loading them.

A base model is a hub ID, a local directory with safetensors, a ``.gguf`` file, or a directory that holds exactly one.
Pickle weights are never loaded: they run code.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from d2lora.errors import ModelNotFound, ModelUnsupported, WeightsUnsafe

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A base model on this machine's disk."""

    directory: Path
    gguf_file: str | None
    """Name of the GGUF file inside ``directory``; None when the weights are safetensors."""

    @property
    def weight_files(self) -> list[Path]:
        """The files that hold the weights, in a fixed order."""
        if self.gguf_file is not None:
            return [self.directory / self.gguf_file]
        return sorted(self.directory.glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class HubModel:
    """A base model that is fetched by its ID."""

    id: str


def locate(base_model: str) -> LocalModel | HubModel:
    """Return where ``base_model`` is; an existing path wins over a hub ID of the same spelling.

    Raises:
        ModelNotFound: neither an existing path nor the spelling of a hub ID.
        WeightsUnsafe: a directory whose only weights are pickles.
        ModelUnsupported: a directory with several GGUF files.
    """
    path = Path(base_model).expanduser()
    if path.exists():
        return _inspect(path)
    looks_local = base_model.startswith(("/", "./", "../", "~")) or base_model.endswith(".gguf")
    if looks_local or not _HUB_ID.fullmatch(base_model):
        raise ModelNotFound(f"base_model: {base_model!r} is no file or directory here; give its path, or a hub ID")
    return HubModel(base_model)


def _inspect(path: Path) -> LocalModel:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"base_model: {str(path)!r} is neither a directory nor a .gguf file")
        return LocalModel(path.parent, path.name)
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return LocalModel(path, None)
    gguf = sorted(path.glob("*.gguf"))
    if len(gguf) == 1:
        return LocalModel(path, gguf[0].name)
    if gguf:
        raise ModelUnsupported(f"base_model: {str(path)!r} holds {len(gguf)} GGUF files; name one of them")
    if any(file.suffix in _PICKLE_SUFFIXES for file in path.iterdir()):
        raise WeightsUnsafe(
            f"base_model: {str(path)!r} holds only pickle weights, which run code when loaded; "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    raise ModelNotFound(f"base_model: {str(path)!r} holds no config.json with *.safetensors, and no .gguf file")

"""Where a base model's files are, and how large it is, found out without loading it.

A base model is a hub ID, a local directory with safetensors, a ``.gguf`` file, or a directory that holds exactly one.
Pickle weights are never loaded: they run code.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from d2lora.errors import ModelError, ModelNotFound, ModelUnsupported, WeightsUnsafe
from d2lora.settings import ModelSettings
from d2lora.weight_files import gguf_parameters, safetensors_parameters

_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_SIZE_IN_NAME = re.compile(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)
"""Such as 135M, 0.5B, 8x7B; not the A3B of active parameters, and not 4bit."""


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


def path_of(base_model: str) -> Path | None:
    """Return the path that this spells, which need not exist; None if no file system could have it."""
    try:
        path = Path(base_model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, below what may not be read, an unknown user's home, NUL
        return None
    return path


def locate(base_model: str) -> LocalModel | HubModel:
    """Return where ``base_model`` is; an existing path wins over a hub ID of the same spelling.

    Raises:
        ModelNotFound: neither an existing path nor the spelling of a hub ID.
        WeightsUnsafe: a directory whose only weights are pickles.
        ModelUnsupported: a directory with several GGUF files.
    """
    path = path_of(base_model)
    if path is not None and path.exists():
        try:
            return _inspect(path)
        except PermissionError as error:
            raise ModelNotFound(f"base_model: {base_model!r} may not be read here") from error
    looks_local = base_model.startswith(("/", "./", "../", "~")) or base_model.endswith(".gguf")
    if looks_local or not _HUB_ID.fullmatch(base_model):
        raise ModelNotFound(f"base_model: {base_model!r} is no file or directory here; give its path, or a hub ID")
    return HubModel(base_model)


def parameters_of(base_model: str) -> float | None:
    """Return about how many parameters the model has; None when neither its files nor its ID tell.

    Local files are counted. A hub model is taken at its name ("SmolLM2-135M"): the largest size in it, and 8x7B as 56
    billion, so that what is said is rather too much than too little.
    """
    try:
        place = locate(base_model)
        if isinstance(place, LocalModel):
            if place.gguf_file is not None:
                return float(gguf_parameters(place.weight_files[0]))
            return float(sum(safetensors_parameters(path) for path in _loaded_files(place)))
    except (ModelError, OSError, ValueError, KeyError):
        return None  # the worker says what is wrong with it
    sizes = [
        int(experts or 1) * float(number) * (1e6 if unit in "mM" else 1e9)
        for experts, number, unit in _SIZE_IN_NAME.findall(place.id.rsplit("/", 1)[-1])
    ]
    return max(sizes, default=None)


def queue_of(parameters: float | None, settings: ModelSettings) -> str:
    """Return the queue for a model of this size: cpu, gpu-small or gpu-large.

    A model of unknown size goes to gpu-large: there it fits if it fits anywhere, where a smaller machine could run out
    of memory and lose the job.
    """
    if parameters is None or parameters > settings.gpu_small_parameters:
        return "gpu-large"
    return "cpu" if parameters <= settings.cpu_parameters else "gpu-small"


def _loaded_files(place: LocalModel) -> list[Path]:
    """Return the safetensors files that transformers loads; some models lie beside a second copy of themselves."""
    index = place.directory / "model.safetensors.index.json"
    if index.exists():
        return [place.directory / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    single = place.directory / "model.safetensors"
    return [single] if single.exists() else place.weight_files


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

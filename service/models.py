"""Which base models a request may name: the operator's list of hub IDs, and directories below the operator's roots."""

from fnmatch import fnmatchcase

from d2lora.errors import ModelNotAllowed, ModelNotFound
from d2lora.models import HubModel, LocalModel, locate, path_of
from d2lora.settings import ModelSettings


def check_base_model(base_model: str, settings: ModelSettings) -> None:
    """Return if the worker may load this model.

    Whether a hub has it is for the worker to find out; a local one is looked at here.

    Raises:
        ModelNotAllowed: it is neither on the list nor below a root.
        ModelNotFound, WeightsUnsafe, ModelUnsupported: a local model that cannot be loaded.
    """
    path = path_of(base_model)
    roots = [root.resolve() for root in settings.roots]
    inside = path is not None and any(path.resolve().is_relative_to(root) for root in roots)
    # Outside the roots nothing is said about which paths exist.
    looks_local = base_model.startswith(("/", "./", "../", "~")) or base_model.endswith(".gguf")
    if not inside and (looks_local or (path is not None and path.exists())):
        raise ModelNotAllowed(
            f"base_model: {base_model!r} is not below a directory that this service may read; "
            "its operator sets them in D2LORA_MODELS_ROOTS"
        )
    if path is not None and inside and path.exists():
        match locate(base_model):
            case LocalModel(directory=directory):
                if not any(directory.resolve().is_relative_to(root) for root in roots):
                    raise ModelNotFound(f"base_model: {base_model!r} leads out of its directory")
            case HubModel():
                pass
        return
    located = locate(base_model)
    if isinstance(located, HubModel) and not any(fnmatchcase(located.id, pattern) for pattern in settings.allowed):
        raise ModelNotAllowed(
            f"base_model: {base_model!r} is not on this service's list; its operator sets it in D2LORA_MODELS_ALLOWED"
        )

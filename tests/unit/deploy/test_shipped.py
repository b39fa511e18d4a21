"""The cheap half of `make deploy-check`: no tool is needed, so it runs with every test."""

import json
import re
from pathlib import Path

import pytest
import yaml

from deploy import dotenv, variables
from deploy.tally import Tally

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = [
    ROOT / "docker-compose.yml",
    ROOT / "service" / "Dockerfile",
    ROOT / "worker" / "Dockerfile",
    *(ROOT / "helm" / "d2lora" / "templates").rglob("*.*"),
]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_shipped_sets_only_variables_that_exist(path):
    assert set(re.findall(r"\bD2LORA_[A-Z_]+\b", path.read_text())) <= variables.known()


def test_the_chart_can_set_every_setting_but_the_local_stores():
    text = "".join(path.read_text() for path in SHIPPED if "helm" in path.parts)

    assert variables.known() - set(re.findall(r"\bD2LORA_[A-Z_]+\b", text)) == {"D2LORA_STORAGE_ROOT"}


def test_a_misspelt_variable_and_a_value_of_the_wrong_kind_are_seen():
    assert variables.unknown({"D2LORA_WORKER_QUEUE": "[]", "HF_HOME": "/cache"}) == {"D2LORA_WORKER_QUEUE"}
    assert variables.problems({"D2LORA_WORKER_SHARD_TOKENS": "500000", "D2LORA_BROKER_URL": None}) == []
    (problem,) = variables.problems({"D2LORA_WORKER_SHARD_TOKENS": "5e5"})
    assert "shard_tokens" in problem


def test_the_written_secrets_are_fresh_complete_and_understood():
    example = (ROOT / ".env.example").read_text()
    first, second = (dict(re.findall(r"^([A-Z0-9_]+)=(.*)$", dotenv.dotenv(example), re.MULTILINE)) for _ in range(2))

    secret = {name for name in first if first[name] != second[name]}
    asked = set(re.findall(r"\$\{([A-Z0-9_]+):\?", (ROOT / "docker-compose.yml").read_text()))
    assert secret == asked
    keys = first["API_KEYS"].strip("'")
    assert len(json.loads(keys)["default"]) > 40
    assert variables.problems({"D2LORA_SERVICE_API_KEYS": keys}) == []


def test_a_file_of_secrets_is_for_its_owner_and_never_replaced(tmp_path, monkeypatch, capsys):
    path = tmp_path / ".env"
    monkeypatch.setattr("sys.argv", ["dotenv.py", str(path)])
    monkeypatch.setattr(dotenv, "ROOT", tmp_path)
    (tmp_path / ".env.example").write_text((ROOT / ".env.example").read_text())

    assert dotenv.main() == 0
    written = path.read_text()
    assert dotenv.main() == 1

    assert path.read_text() == written
    assert path.stat().st_mode & 0o777 == 0o600
    password = re.search(r"POSTGRES_PASSWORD=(\w+)", written).group(1)
    assert password not in capsys.readouterr().out


def test_every_value_of_the_chart_is_described_by_its_schema():
    chart = ROOT / "helm" / "d2lora"
    schema = json.loads((chart / "values.schema.json").read_text())

    def compare(values, described, path):
        described = schema["definitions"][described["$ref"].rpartition("/")[2]] if "$ref" in described else described
        for name, value in values.items():
            rules = described.get("properties", {}).get(name) or next(
                (rule for pattern, rule in described.get("patternProperties", {}).items() if re.search(pattern, name)),
                described.get("additionalProperties"),
            )
            assert rules, f"{path}.{name}"
            if isinstance(value, dict):
                compare(value, rules, f"{path}.{name}")

    compare(yaml.safe_load((chart / "values.yaml").read_text()), schema, "values")


def test_the_chart_is_of_the_programs_version():
    from d2lora import __version__

    chart = yaml.safe_load((ROOT / "helm" / "d2lora" / "Chart.yaml").read_text())

    assert chart["appVersion"] == __version__


def test_a_check_that_does_not_hold_is_counted_and_shown(capsys):
    tally = Tally()

    tally.equal(1, 1, "one")
    tally.none([], "nothing")
    tally.none(["b", "a"], "something")

    assert str(tally) == "2 checks passed, 1 failed"
    assert capsys.readouterr().out == "FAILED: something: a, b\n"

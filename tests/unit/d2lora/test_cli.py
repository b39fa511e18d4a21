import json
import socket
import subprocess
import sys

import pytest
import typer

from d2lora.display import print_summary
from d2lora.initializations import Dpo, Fixed, Kto, Mean, Orpo, ResultSummary, Retained, Sft, Whitening
from d2lora.methods import Pissa
from d2lora.options import _OPTIONS, build_spec
from d2lora.roles import FIELDS, Role

ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def d2lora(*arguments, cwd, **environment):
    import os

    clean = {name: value for name, value in os.environ.items() if not name.startswith("D2LORA")}
    return subprocess.run(
        [sys.executable, "-m", "d2lora.cli", *map(str, arguments)],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW * 3)
    return path


def options(**given):
    return {**dict.fromkeys(_OPTIONS), **given}


def test_options_become_a_request():
    spec = build_spec(
        "m",
        "ds",
        options(
            r=8, lora_alpha=4.0, target_modules=["q_proj"], use_rslora=True, objective=["sft", "dpo:beta=0.3"], seed=3
        ),
    )

    assert (spec.lora.r, spec.lora.lora_alpha, spec.lora.target_modules, spec.lora.use_rslora) == (
        8,
        4.0,
        ["q_proj"],
        True,
    )
    assert spec.objectives == [Sft(), Dpo(beta=0.3)]
    assert spec.seed == 3


@pytest.mark.parametrize("role", Role)
def test_a_file_for_every_role_can_be_named(role, rows, tmp_path):
    help_text = d2lora("init", "--help", cwd=tmp_path, COLUMNS="200").stdout

    field = FIELDS[role].split(".")[-1].removesuffix("_dataset_id")
    assert f"--{field} " in help_text


def test_a_warm_up_and_its_rows_become_a_method():
    given = options(method="warmup:steps=4,from=gradient,learning_rate=0.001")

    method = build_spec("m", "ds", given, {Role.WARMUP: "ds_2"}).method

    assert (method.warmup_dataset_id, method.steps, method.start, method.learning_rate) == ("ds_2", 4, "gradient", 1e-3)
    with pytest.raises(typer.BadParameter, match="warmup_dataset_id"):
        build_spec("m", "ds", given)
    with pytest.raises(typer.BadParameter, match="method"):
        build_spec("m", "ds", options(), {Role.WARMUP: "ds_2"})


def test_files_become_dataset_ids():
    assert build_spec("m", "ds", options(), {Role.EVALUATION: "ds_2"}).eval_dataset_id == "ds_2"
    retain = build_spec("m", "ds", options(retain_tolerance=0.1), {Role.RETAIN: "ds_3"})
    assert (retain.retain_dataset_id, retain.retain_tolerance) == ("ds_3", 0.1)


def test_an_objective_takes_its_fields_by_name():
    spec = build_spec("m", "ds", options(objective=["dpo:loss_type=robust,label_smoothing=0.2,beta=1"]))

    assert spec.objectives == [Dpo(loss_type="robust", label_smoothing=0.2, beta=1.0)]
    kto = build_spec("m", "ds", options(objective=["kto:desirable_weight=1.33"])).objectives
    assert kto == [Kto(desirable_weight=1.33)]


def test_a_combination_is_named_with_its_weights():
    assert build_spec("m", "ds", options(combination="mean")).combination == Mean()
    two = options(combination="fixed:1,3", objective=["sft", "orpo"])
    assert build_spec("m", "ds", two).combination == Fixed(weights=[1, 3])
    for wrong in ("median", "mean:1", "fixed", "fixed:a,b"):
        with pytest.raises(typer.BadParameter, match="combination"):
            build_spec("m", "ds", options(combination=wrong))


def test_a_method_is_named_with_its_options():
    assert build_spec("m", "ds", options(method="pissa:niter=4")).method == Pissa(niter=4)
    assert build_spec("m", "ds", options(method="gradient")).method == "gradient"
    with pytest.raises(typer.BadParameter, match="start: not used by method eva"):
        build_spec("m", "ds", options(method="eva", start="zero"))


def test_whitening_takes_its_fields_by_name():
    assert build_spec("m", "ds", options(whitening="default")).whitening == Whitening()
    assert build_spec("m", "ds", options(whitening="power=1,damping=0.3")).whitening == Whitening(damping=0.3, power=1)
    for wrong in ("power", "power=2", "damping=0", "strength=1"):
        with pytest.raises(typer.BadParameter, match="whitening"):
            build_spec("m", "ds", options(whitening=wrong))
    with pytest.raises(typer.BadParameter, match="whitening: not used by method eva"):
        build_spec("m", "ds", options(method="eva", whitening="default"))


def test_statistics_are_kept_and_gone_on_from():
    spec = build_spec("m", "ds", options(keep_statistics=True, based_on="init_1"))

    assert (spec.keep_statistics, spec.based_on) == (True, "init_1")
    with pytest.raises(typer.BadParameter, match="based_on, keep_statistics: not used by method eva"):
        build_spec("m", "ds", options(method="eva", keep_statistics=True, based_on="init_1"))


def test_what_is_not_given_keeps_its_default():
    assert build_spec("m", "ds", options()).model_dump(exclude={"base_model", "dataset_id"}) == {
        **build_spec("other", "other", options()).model_dump(exclude={"base_model", "dataset_id"})
    }


@pytest.mark.parametrize(
    ("given", "meant"),
    [(["all-linear"], "all-linear"), (["q_proj"], ["q_proj"]), (["q", "v"], ["q", "v"]), ([r".*\.q"], r".*\.q")],
)
def test_one_value_that_is_no_plain_name_is_a_pattern(given, meant):
    assert build_spec("m", "ds", options(target_modules=given)).lora.target_modules == meant


def test_a_file_holds_a_request_and_options_win_over_it(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"lora": {"r": 8, "use_rslora": True}, "seed": 5, "objectives": [{"type": "orpo"}]}))

    spec = build_spec("m", "ds", options(spec=path, r=4))

    assert (spec.lora.r, spec.lora.use_rslora, spec.seed, spec.objectives) == (4, True, 5, [Orpo()])


@pytest.mark.parametrize(
    ("content", "given", "said"),
    [
        ([], {}, "must hold one object"),
        ("text", {"r": 4}, "must hold one object"),
        ({"lora": 5}, {"r": 4}, "lora must be an object"),
        ({"lora": None}, {"r": 4}, "lora must be an object"),
        ({"lora": 5}, {}, "lora"),
        ({"objectives": 5}, {}, "objectives"),
    ],
)
def test_a_file_that_holds_no_request_is_a_usage_error(tmp_path, content, given, said):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(content))

    with pytest.raises(typer.BadParameter, match=said):
        build_spec("m", "ds", options(spec=path, **given))


@pytest.mark.parametrize("datasets", [5, {"a": 1}, "ab", [5, {}], [None, None]])
def test_datasets_of_a_file_that_are_no_objects_are_a_usage_error(tmp_path, datasets):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"datasets": datasets}))

    with pytest.raises(typer.BadParameter, match="datasets"):
        build_spec("m", "ds_1", options(spec=path), further=["ds_2"])
    with pytest.raises(typer.BadParameter, match="datasets"):
        build_spec("m", "ds_1", options(spec=path))


@pytest.mark.parametrize("method", [5, [], None])
def test_a_method_of_a_file_that_is_no_object_is_a_usage_error(tmp_path, method):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"method": method}))

    with pytest.raises(typer.BadParameter, match="method"):
        build_spec("m", "ds", options(spec=path), {Role.WARMUP: "ds_2"})


@pytest.mark.parametrize("given", [{"r": 0}, {"objective": ["ppo"]}, {"objective": ["dpo:beta"]}, {"start": "warm"}])
def test_a_wrong_option_is_a_usage_error(given):
    with pytest.raises(typer.BadParameter):
        build_spec("m", "ds", options(**given))


def test_validate_says_what_is_in_a_file(rows, tmp_path):
    done = d2lora("validate", rows, cwd=tmp_path)

    assert done.returncode == 0
    assert "3 rows of preference; objectives: sft, dpo, orpo" in done.stdout
    assert json.loads(d2lora("validate", rows, "--json", cwd=tmp_path).stdout)["rows"] == 3


def test_validate_names_the_row_at_fault(rows, tmp_path):
    rows.write_text(ROW + '{"prompt": "a", "chosen": "b", "rejected": "b"}\n')

    done = d2lora("validate", rows, cwd=tmp_path)

    assert done.returncode == 1
    assert "chosen_equals_rejected: row 2" in done.stderr
    assert "row 2, field rejected" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["validate", "nothing.jsonl"], 2, "there is no file"),
        (["validate", "rows.jsonl", "--column", "prompt"], 2, "ours=theirs"),
        (["validate", "rows.jsonl", "--column", "prompt=a", "--column", "prompt=b"], 2, "is mapped to a already"),
        (["submit", "m", "rows.jsonl", "--r", "0"], 2, "greater than or equal to 1"),
        (["submit", "m", "rows.jsonl", "--out", "a", "--api-key", "k"], 2, "give --wait as well"),
        (["submit", "m", "rows.jsonl", "--wait", "--out", ".", "--api-key", "k"], 1, "not an empty directory"),
        (["status", "init_1"], 2, "no API key"),
        (["status", "init_1", "--api-key", "k\u00e9y"], 2, "what no key can"),
        (["status", "init_1", "--api-key", "k\r"], 2, "what no key can"),
        (["status", "", "--api-key", "k"], 1, "not_found: '' is no ID"),
        (["datasets", "delete", "", "--api-key", "k"], 1, "not_found: '' is no ID"),
        (["status", "init_1", "--api-key", "k", "--url", "http://127.0.0.1:9"], 3, "service_unreachable"),
        (["init", "/nowhere", "rows.jsonl", "--out", "out"], 1, "model_not_found"),
        (["init", "/nowhere", "rows.jsonl", "--out", "."], 1, "not an empty directory"),
        (["init", "m", "rows.jsonl", "--out", "out", "--based-on", "none"], 1, "based_on: 'none' has no statistics"),
        (["init", "m", "rows.jsonl", "--out", "rows.jsonl/out"], 2, "Not a directory"),
        (["submit", "m", "rows.jsonl", "--wait", "--out", "rows.jsonl/out", "--api-key", "k"], 2, "Not a directory"),
        (["validate", "/proc/self/mem", "--format", "jsonl"], 2, "Input/output error"),
        (["status", "init_1", "--api-key", "k", "--url", "http://localhost:abc"], 2, "--url http://localhost:abc: "),
        (["up", "--host", "0.0.0.0"], 2, "--allow-model"),
        (["nonsense"], 2, "No such command"),
    ],
)
def test_every_failure_has_its_exit_code_and_says_why(rows, tmp_path, arguments, code, said):
    done = d2lora(*arguments, cwd=tmp_path)

    assert (done.returncode, said in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr.replace("transformers", "")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_commands_that_need_the_rooms_say_so_without_them(rows, tmp_path):
    script = (
        "import sys, d2lora.cli as cli; cli.find_spec = lambda name: None; "
        f"sys.argv = ['d2lora', 'init', 'm', {str(rows)!r}, '--out', 'o']; cli.main()"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert done.returncode == 2
    assert "needs a checkout" in done.stderr


def test_what_is_forgotten_of_retain_rows_is_printed(capsys):
    kept = Retained(base=4.4, unrestrained=4.6, adapter=4.41, rows=5, tolerance=0.01, mu=2.0, strengths=[0.0, 1.0])
    nothing = {"objectives": [], "objectives_reason": "", "weights": {}, "cosines": {}, "held_out": {}}
    rows = {"rows_used": 8, "rows_truncated": 0, "rows_dropped": 0}
    summary = ResultSummary(start="zero", start_reason="", fingerprint="f", retained=kept, **nothing, **rows)

    print_summary(summary)

    assert "retain rows: nll 4.4000 -> 4.4100 on 5 rows" in capsys.readouterr().out


def test_a_port_where_something_listens_is_not_taken_for_ours(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        done = d2lora("up", "--port", port, cwd=tmp_path)

    assert done.returncode == 2
    assert f"--port {port}: something listens there already" in done.stderr
    assert "d2lora is up" not in done.stdout

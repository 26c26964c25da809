"""Contents of the environment and of other users' files do not appear in a run's files or output."""

from __future__ import annotations

import os
import pickle
import stat
import sys
import types
from pathlib import Path

import pytest
import yaml

from megatron_mopd.config import ConfigError, config_from_dict, load_config, save_config, to_dict
from megatron_mopd.config.interpolation import MAY_NAME_VARIABLES
from megatron_mopd.observe.access import closed_to_others, others_may_enter
from megatron_mopd.observe.page import write_page
from megatron_mopd.observe.run_log import RunLog
from tests import _runs
from tests.faults.fuzz_configs import PATHS

SECRET = "sk-7f3a-never-show-me"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MOPD_HIDDEN", SECRET)
    monkeypatch.setenv("MOPD_ROOT", str(tmp_path))


def load(tmp_path, text, *overrides):
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", overrides)


ALLOWED = """
run_dir: ${oc.env:MOPD_ROOT}/run
student: {load: "${oc.env:MOPD_HIDDEN}"}
teachers:
  - {name: math, load: "${run_dir}/../${oc.env:MOPD_HIDDEN}/math"}
  - {name: self}
teacher_storage: {mmap_directory: "${oc.env:MOPD_NOT_THERE,/tmp/${oc.env:MOPD_HIDDEN}}"}
data:
  tokenizer: "${.prompts[0].path}.model"
  prompts: [{path: "${oc.env:MOPD_HIDDEN}/a.jsonl"}, {path: 'b\\${x}.jsonl'}]
  eval: ${data.prompts}
log: {wandb_project: "${oc.env:MOPD_HIDDEN}", wandb_name: "${oc.env:MOPD_NOT_THERE,null}"}
"""


def test_the_run_has_the_value_and_the_file_the_name(tmp_path, monkeypatch):
    config = load(tmp_path, ALLOWED, "student.load=${oc.env:MOPD_ROOT}/${oc.env:MOPD_HIDDEN}")
    assert config.run_dir == f"{tmp_path}/run" and Path(config.run_dir) == tmp_path / "run"
    assert config.student.load == f"{tmp_path}/{SECRET}"
    assert config.teachers[0].load == f"{tmp_path}/run/../{SECRET}/math"
    assert config.teacher_storage.mmap_directory == f"/tmp/{SECRET}"
    assert config.data.eval[0].path == f"{SECRET}/a.jsonl" and config.data.eval[1].path == "b${x}.jsonl"
    assert config.data.tokenizer == f"{SECRET}/a.jsonl.model" and config.log.wandb_name is None
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert SECRET not in text and str(tmp_path) not in text and SECRET not in repr(config)
    saved = yaml.safe_load(text)
    assert saved["run_dir"] == "${oc.env:MOPD_ROOT}/run"
    assert saved["teachers"][0]["load"] == "${oc.env:MOPD_ROOT}/run/../${oc.env:MOPD_HIDDEN}/math"
    assert saved["data"]["eval"][0]["path"] == "${oc.env:MOPD_HIDDEN}/a.jsonl"
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(to_dict(config)) == config and pickle.loads(pickle.dumps(config)) == config
    monkeypatch.setenv("MOPD_ROOT", "/elsewhere")
    assert load_config(tmp_path / "config.yaml").run_dir == "/elsewhere/run", "not resolved again"


def test_nothing_of_it_in_what_a_run_records(tmp_path, monkeypatch):
    """Neither config.yaml, nor the page, nor the data sent to Weights & Biases."""
    sent = {}
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **arguments: sent.update(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = load(tmp_path, ALLOWED, "log.tensorboard=false", "log.wandb_project=project")
    log = RunLog(config, 0)
    log.step(1, {"loss": 1.0})
    log.close()
    save_config(config, Path(config.run_dir) / "config.yaml")
    page = write_page(config.run_dir).read_text()
    assert "${oc.env:MOPD_HIDDEN}" in page and SECRET not in page
    assert sent["config"]["student"]["load"] == "${oc.env:MOPD_HIDDEN}" and SECRET not in str(sent)
    assert all(SECRET.encode() not in path.read_bytes() for path in (tmp_path / "run").iterdir())


REFUSED = [
    "seed: ${oc.env:MOPD_HIDDEN}",
    "device: ${oc.env:MOPD_HIDDEN}",
    "student: ${oc.env:MOPD_HIDDEN}",
    "recipe: ${oc.env:MOPD_HIDDEN}",
    "run_dir: ['${oc.env:MOPD_HIDDEN}']",
    "routing: {default: '${oc.env:MOPD_HIDDEN}'}",
    "teachers: [{name: '${oc.env:MOPD_HIDDEN}'}]",
    "objective: {per_domain: {math: '${oc.env:MOPD_HIDDEN}'}}",
    "data: {prompts: [{task: gcd, params: {x: '${oc.env:MOPD_HIDDEN}'}}]}",
    "run_dir: ${oc.env:MOPD_HIDDEN}\ndevice: ${run_dir}",
    "data: {tokenizer: '${oc.env:MOPD_HIDDEN}'}\nrouting: ${data}",
    "student: {load: '${oc.env:MOPD_HIDDEN}'}\nseed: ${student}",
    "run_dir: x-${student}\nstudent: {load: '${oc.env:MOPD_HIDDEN}'}",
    "seed: ${oc.decode:${oc.env:MOPD_HIDDEN}}",
    "run_dir: ${oc.decode:${oc.env:MOPD_HIDDEN}}",
    "run_dir: ${oc.create:${oc.env:MOPD_HIDDEN}}",
    "run_dir: ${oc.select:${oc.env:MOPD_HIDDEN}}",
    "run_dir: ${oc.env:${oc.env:MOPD_HIDDEN}}",
    "run_dir: ${${oc.env:MOPD_HIDDEN}}",
    "run_dir: ${custom:x}",
    "run_dir: ${run_dir}",
    "run_dir: ${oc.env:MOPD_HIDDEN",
    "run_dir: ${oc.env:MOPD_NOT_THERE}",
    "include: ${oc.env:MOPD_HIDDEN}/x.yaml\nseed: ${oc.env:MOPD_HIDDEN}",
]


@pytest.mark.parametrize("text", REFUSED)
def test_elsewhere_it_is_refused_and_not_quoted(tmp_path, text):
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    message = str(raised.value)
    if not text.startswith("include"):  # the path of a missing file is reported
        assert SECRET not in message
        assert (
            raised.value.__cause__ is None
            and raised.value.__suppress_context__
            or not raised.value.__context__
        )
    assert "\n" not in message
    with pytest.raises(ConfigError) as raised:
        load_config(None, ["run_dir=x", "seed=${oc.env:MOPD_HIDDEN}"])
    assert SECRET not in str(raised.value) and str(raised.value).startswith("seed: takes no environment")


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "token"]
)
def test_names_of_secrets_are_refused_everywhere(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, SECRET)
    for key in (
        "run_dir: x\nlog: {wandb_project: '${oc.env:%s}'}",
        "run_dir: ${oc.env:%s}",
        "seed: ${oc.env:%s,1}",
    ):
        with pytest.raises(ConfigError, match="name of a secret") as raised:
            load(tmp_path, key % name)
        assert SECRET not in str(raised.value)
    monkeypatch.setenv("MOPD_TOKENIZERS", "/models")
    assert load(tmp_path, "run_dir: ${oc.env:MOPD_TOKENIZERS}/x").run_dir == "/models/x"


def test_the_keys_that_may_name_one_are_keys():
    known = {"".join(f".{p}" if isinstance(p, str) else "[*]" for p in path)[1:] for path in PATHS}
    assert set(MAY_NAME_VARIABLES) <= known


def test_references_without_the_environment(tmp_path):
    config = load(
        tmp_path,
        "run_dir: x\nseed: 3\nteachers: [{name: a, load: '${run_dir}/../${seed}'}]\n"
        "schedule: {train_iters: '${seed}'}\nrouting: {default: '${teachers[0].name}'}",
    )
    assert config.schedule.train_iters == 3 and config.teachers[0].load == "x/../3"
    assert config.routing == {"default": "a"} and to_dict(config)["teachers"][0]["load"] == "x/../3"


def test_a_checkpoint_s_description_reads_no_environment():
    from megatron_mopd.config import model_config_from_dict

    assert model_config_from_dict({"load": "${oc.env:MOPD_HIDDEN}"}, "x").load == "${oc.env:MOPD_HIDDEN}"


@pytest.mark.parametrize(
    "content",
    [
        f"root:{SECRET}:19000:0:99999:7:::\ndaemon:*:19000",
        f"{SECRET}",
        f"'{SECRET}",
        f'"{SECRET}',
        f"user: a\n{SECRET}",
        f"a: {SECRET}: b",
        f"{SECRET}: 1",
        f"{SECRET}: 1\n{SECRET}: 2",
        f"&{SECRET} *{SECRET}x",
        f"a: *{SECRET}",
        f"a: !{SECRET} 1",
        f"%{SECRET}\n",
        f"- {SECRET}",
        f'{{"prompt": "{SECRET}", "domain": "math"}}\n{{"prompt": "x"}}',
        f'{{"prompt": "{SECRET}"}}',
        f"seed: 1\n\t{SECRET}: 2",
        f"@{SECRET}",
        f"a: |\n{SECRET}",
        f"seed: [{SECRET}\n",
        f"data: {SECRET}-{SECRET}-{SECRET}",
        f"data: [{SECRET}]",
        f"log: {{wandb_project: [{{a: {SECRET}}}]}}",
        f"{SECRET}\x00",
        b"\xff" + SECRET.encode(),
    ],
)
@pytest.mark.parametrize("how", ["include", "config"])
def test_a_file_that_is_no_configuration_is_not_quoted(tmp_path, content, how):
    other = tmp_path / "other"
    other.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, f"run_dir: x\ninclude: {other}") if how == "include" else load_config(other)
    message = str(raised.value)
    assert SECRET not in message and "\n" not in message
    assert str(other) in message or message.startswith(("data", "log")), message


def test_where_a_file_goes_wrong_is_said(tmp_path):
    (tmp_path / "other.yaml").write_text("seed: 1\ndevice: cpu: cuda\n")
    with pytest.raises(
        ConfigError, match=r"other.yaml: not readable as YAML: mapping values .* line 2, column 12"
    ):
        load(tmp_path, "run_dir: x\ninclude: other.yaml")


def modes(directory):
    paths = [directory, *directory.rglob("*")]
    return {str(path.relative_to(directory)): stat.S_IMODE(path.lstat().st_mode) for path in paths}


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def test_a_run_is_closed_to_others(tmp_path, umask):
    """All files of a run, whichever library writes them, under a common umask and a stricter one."""
    _runs.write_inputs(tmp_path)
    for mask, name in ((0o022, "run"), (0o077, "strict")):
        umask(mask)
        log = {"tensorboard": True, "report": True}
        values = _runs.values(tmp_path, run_dir=str(tmp_path / name), log=log)
        outcome = _runs.run_main(_runs.write_config(tmp_path / "config.yaml", values))
        assert outcome.statuses == [0] and "others may" not in outcome.stdout[0], outcome.printed
        found = modes(tmp_path / name)
        assert {"config.yaml", "metrics.jsonl", "report.png", "checkpoints"} <= found.keys()
        assert any("events" in path for path in found)
        assert not {path: oct(mode) for path, mode in found.items() if mode & (0o007 | mask)}
        assert found["."] == 0o770 & ~mask


def test_a_directory_that_was_there_is_left_and_said(tmp_path, umask):
    (tmp_path / "run").mkdir(mode=0o755)
    assert "chmod -R o-rwx" in others_may_enter(tmp_path / "run")
    with closed_to_others():
        (tmp_path / "run" / "file").write_text("")
    assert modes(tmp_path / "run") == {".": 0o755, "file": 0o640}
    os.chmod(tmp_path / "run", 0o750)
    assert others_may_enter(tmp_path / "run") is None and others_may_enter(tmp_path / "none") is None
    assert umask(0o022) == 0o022, "the umask has changed"


def test_the_page_is_closed_to_others(tmp_path, umask):
    from megatron_mopd.commands import report

    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "loss": 1.0}\n')
    report.main([str(tmp_path), "--output", str(tmp_path / "page.html")])
    assert modes(tmp_path)["page.html"] == 0o640

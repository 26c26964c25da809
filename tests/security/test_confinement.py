"""Confined processes: what hostile code can do in them, how they end, and what is reported when protections
are missing."""

import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from megatron_mopd.backend.finding import Level
from megatron_mopd.commands import confinement_examination, doctor
from megatron_mopd.commands.confinement_examination import attack_findings, attack_summary
from megatron_mopd.config import ConfigError, load_config
from megatron_mopd.confinement import process as client
from megatron_mopd.confinement.kernel import Confinement, landlock_version
from megatron_mopd.confinement.process import ConfinedProcess, HandlerError, Unanswered, examine
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.observe.run_log import RunLog
from megatron_mopd.run import setup

# The attacks that may succeed where `Confinement.missing` reports it.
READING = ("read a file", "list a directory", "read /etc/passwd", "read the trainer's environment")
EXPLAINED = {
    "read this user's files and processes": (*READING, "read another process's memory"),
    "write and remove files": (
        *("write a new file", "overwrite a file", "truncate a file", "remove a file", "rename a file"),
        *("make a link", "make a directory", "change this package"),
    ),
    "truncate files": ("truncate a file",),
    "change modes, times and attributes of files": (
        *("change a file's mode", "change a file's times", "set an extended attribute"),
    ),
    "connect to UNIX sockets": ("connect to a UNIX socket",),
    "use UDP": ("send by UDP",),
    "use the network": ("send by UDP", "connect by TCP", "listen on a TCP port"),
    "signal and trace this user's processes": (
        *("signal a process of this user", "kill its supervisor", "have the kernel signal a process"),
        "trace a process",
    ),
    "start processes that outlive it": ("fork", "start a program", "raise its priority"),
    "make any other system call": (
        *("become another program", "start a thread", "enter a new namespace", "make calls through io_uring"),
        *("outlive its supervisor", "leave its session", "listen on a TCP port"),
    ),
}


def possible(findings):
    return [finding.subject for finding in findings[1:] if finding.level != Level.OK]


def explained(missing):
    return {attack for phrase in missing for attack in EXPLAINED[phrase]}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Create a module that a confined process can run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    count = iter(range(1000))

    def make(source):
        name = f"confined_{os.getpid()}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        return name

    return make


@pytest.fixture
def confined(module):
    made = []

    def make(source):
        made.append(ConfinedProcess(module(source)))
        return made[-1]

    yield make
    for process in made:
        process.close()


HANDLERS = """
    import os, resource, signal, sys, time
    from megatron_mopd.confinement.server import WorkerLimits, serve
    STATE = []

    def remember(value):
        STATE.append(value)
        return STATE

    def interrupt():
        raise KeyboardInterrupt

    def end():
        sys.exit(0)

    def die():
        os._exit(0)

    def rest(seconds):
        time.sleep(seconds)
        return seconds

    def processor_limit():
        return resource.getrlimit(resource.RLIMIT_CPU)[0]

    def echo(value):
        return value

    def pid():
        return os.getpid()

    serve({f.__name__: f for f in (remember, interrupt, end, die, rest, processor_limit, echo, pid)},
          WorkerLimits(longest_answer=1000), checks_evaluation=False)
"""


def test_the_attacks_on_this_machine():
    """All are refused if the kernel and libseccomp support it; otherwise only reported ones succeed."""
    findings = attack_findings()
    missing = examine().missing()
    assert set(possible(findings)) <= explained(missing), findings
    assert len(findings) > 35
    if not missing:
        assert attack_summary(findings).startswith(f"all {len(findings) - 1} attacks were refused")


WEAKER = {
    "no seccomp": "kernel.pyseccomp = None",
    "no seccomp, no namespace": "kernel.pyseccomp = None; kernel._NEW_USER_IPC_NETWORK = 1",
    "no Landlock": "kernel.landlock_version = lambda: 0",
    "Landlock of Linux 5.13, no seccomp": "kernel.pyseccomp = None; kernel.landlock_version = lambda: 1",
    "nothing": "kernel.pyseccomp = None; kernel._NEW_USER_IPC_NETWORK = 1; kernel.landlock_version = int",
}


@pytest.mark.parametrize("weakness", WEAKER)
def test_where_the_kernel_gives_less_it_works_and_what_is_possible_has_been_said(weakness, module):
    name = module(f"""
        import runpy
        from megatron_mopd.confinement import kernel
        {WEAKER[weakness]}
        runpy.run_module("megatron_mopd.commands.confinement_attacks", run_name="__main__")
    """)
    process = ConfinedProcess(name)
    confinement = process.start()
    process.close()
    missing = confinement.missing()
    assert missing and confinement.warning() and confinement.advice()
    assert missing == confinement.to_dict()["missing"]
    findings = attack_findings(name)
    assert findings[0].level == Level.WARNING and ", ".join(missing) in findings[0].text
    found = set(possible(findings))
    assert found <= explained(missing), (found - explained(missing), missing)
    assert found, "the attacks do not detect the missing protection"
    # Resource limits and the supervisor prevent these everywhere.
    assert not found & {"use 8 GiB of memory", "map 8 GiB of memory", "run for ever", "overwrite a file"}


def test_only_missing_parts_are_said():
    full = Confinement("Linux", 7, True, False, True)
    assert full.missing() == [] and full.warning() is None
    assert Confinement("Linux", 0, True, False, True).missing() == ["read this user's files and processes"]
    mac = Confinement("Darwin", 0, False, False, False)
    assert "use the network" in mac.missing() and "score untrusted answers on Linux" in mac.warning()
    assert "pyseccomp" in Confinement("Linux", 7, False, True, False).warning()


def test_secrets_of_the_trainer_are_not_in_its_environment(confined, monkeypatch):
    monkeypatch.setenv("MOPD_TEST_SECRET", "hunter2")
    process = confined(HANDLERS)
    process.start()
    started = psutil.Process(process._process.pid)
    assert "hunter2" not in str(started.environ())
    assert set(started.environ()) <= {
        *("PYTHONPATH", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
        *client._KEPT_VARIABLES,
        "LC_CTYPE",  # set by Python itself
    }


def test_an_answer_alone_leaves_nothing_behind(confined):
    process = confined(HANDLERS)
    assert process.ask("remember", 1, seconds=30, alone=True) == [1]
    assert process.ask("remember", 2, seconds=30, alone=True) == [2]
    assert process.ask("remember", 3, seconds=30) == [3]
    assert process.ask("remember", 4, seconds=30) == [3, 4], "a reused worker keeps its state"


@pytest.mark.parametrize("name", ["interrupt", "end"])
def test_no_exception_of_a_handler_ends_the_worker(confined, name):
    process = confined(HANDLERS)
    worker = process.ask("pid", seconds=30)
    with pytest.raises(HandlerError, match="KeyboardInterrupt|SystemExit"):
        process.ask(name, seconds=30)
    assert process.ask("pid", seconds=30) == worker


def test_a_worker_that_is_late_or_dies_is_replaced_and_its_supervisor_stays(confined):
    process = confined(HANDLERS)
    process.start()
    supervisor = process._process.pid
    worker = process.ask("pid", seconds=30)
    with pytest.raises(Unanswered, match="no answer within 0.2 s"):
        process.ask("rest", 60, seconds=0.2)
    assert not psutil.pid_exists(worker)
    with pytest.raises(Unanswered, match="died"):
        process.ask("die", seconds=30)
    with pytest.raises(Unanswered):
        process.ask("echo", "x" * 2000, seconds=30)  # more than `longest_answer`
    assert process.ask("echo", "x", seconds=30) == "x"
    assert process._process.pid == supervisor


def test_of_many_requests_each_has_its_own_time_and_outcome(confined):
    process = confined(HANDLERS)
    requests = [("echo", 1), ("rest", 60), ("end",), ("echo", 2), ("die",), ("echo", 3)]
    answers = process.ask_many(requests, seconds=0.5)
    assert [answers[i] for i in (0, 3, 5)] == [1, 2, 3]
    assert all(isinstance(answers[i], Unanswered) for i in (1, 2, 4))
    assert isinstance(answers[2], HandlerError) and not isinstance(answers[1], HandlerError)


def test_closing_does_not_wait_for_an_answer(confined):
    process = confined(HANDLERS)
    process.start()
    outcome = []

    def wait():
        with pytest.raises(Unanswered):
            process.ask("rest", 600, seconds=600)
        outcome.append("ended")

    waiting = threading.Thread(target=wait)
    waiting.start()
    while process._lock.acquire(blocking=False):
        process._lock.release()
    process.close()
    waiting.join(60)
    assert outcome == ["ended"]
    with pytest.raises(Unanswered, match="closed"):
        process.ask("echo", 1, seconds=1)


def test_processor_time_is_limited_by_the_kernel_too(confined):
    process = confined(HANDLERS)
    assert 2 <= process.ask("processor_limit", seconds=2, alone=True) <= 30


def test_no_limit_of_time_is_possible(confined):
    assert confined(HANDLERS).ask("echo", 1, seconds=float("inf")) == 1


def test_confined_processes_go_first_when_memory_is_short(confined):
    process = confined(HANDLERS)
    worker = process.ask("pid", seconds=30)
    for number in (worker, process._process.pid):
        assert Path(f"/proc/{number}/oom_score_adj").read_text().strip() == "1000"


def test_requests_larger_than_a_pipe_arrive_whole(confined):
    process = confined(HANDLERS.replace("longest_answer=1000", "longest_answer=1 << 24"))
    text = "é" * 1_000_000
    assert process.ask("echo", text, seconds=60) == text


def silent_process(tmp_path, first):
    return f"""
        import os, struct, sys, time
        from megatron_mopd.confinement.kernel import Confinement
        import json
        hello = json.dumps(Confinement().to_dict()).encode()
        os.write(1, struct.pack("<I", len(hello)) + hello)
        {first}
        time.sleep(600)
    """


@pytest.mark.parametrize(
    "takeover",
    {
        "it stops reading": "pass",
        "a child keeps the pipes": "os.fork() or time.sleep(600)",
        "it writes for ever": "[os.write(1, b'\\xff' * 65536) for _ in range(1 << 30)]",
        "it announces more than it says": "os.write(1, struct.pack('<I', 100) + b'a')",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_process_that_was_taken_over_holds_nobody_up(takeover, confined, tmp_path, monkeypatch):
    """Writing a request, reading an answer and ending the process all have timeouts; its children end too."""
    monkeypatch.setattr(client, "_GRACE_SECONDS", 0.5)
    process = confined(silent_process(tmp_path, takeover[1]))
    process.start()
    family = [psutil.Process(process._process.pid)]
    if "child" in takeover[0]:
        deadline = time.monotonic() + 60
        while not (children := family[0].children()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert children
        family += children
    started = time.monotonic()
    with pytest.raises(Unanswered):
        process.ask("score", "x" * 2_000_000, seconds=0.5)
    assert time.monotonic() - started < 30, "far over the limit of one second"
    assert process._process is None
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


@pytest.mark.parametrize(
    "reply", [b"a[1]", b'a{"value": 1, "more": 2}', b"a\xff", b'a"1"', b"a" + b"[" * 900, b"x", b""]
)
def test_an_answer_that_is_none_is_refused(reply, confined, tmp_path):
    packed = struct.pack("<I", len(reply)) + reply
    whole = struct.pack("<I", len(packed)) + packed
    process = confined(silent_process(tmp_path, f"os.write(1, {whole!r})"))
    with pytest.raises(Unanswered):
        process.ask("score", seconds=5)


def test_a_trainer_that_is_killed_leaves_no_process(module, tmp_path):
    """The trainer's end of the pipes closes, whatever the worker is doing."""
    name = module(HANDLERS)
    trainer = f"""
import sys, threading, time
sys.path[:0] = {sys.path!r}
from megatron_mopd.confinement.process import ConfinedProcess
process = ConfinedProcess({name!r})
process.start()
threading.Thread(target=process.ask, args=("rest", 600), kwargs={{"seconds": 600}}, daemon=True).start()
time.sleep(1)
print(process._process.pid, flush=True)
time.sleep(600)
"""
    started = subprocess.Popen([sys.executable, "-c", trainer], stdout=subprocess.PIPE)
    family = [psutil.Process(int(started.stdout.readline()))]
    family += family[0].children()
    started.send_signal(signal.SIGKILL)
    started.wait()
    started.stdout.close()
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and len(gone) == 2


def test_a_process_that_cannot_start_says_how_to_find_out(confined):
    process = confined("raise SystemExit(3)")
    with pytest.raises(Unanswered, match="cannot be started; run it by hand"):
        process.start()


def test_the_doctor_says_it(monkeypatch, capsys):
    weak = Confinement("Linux", 0, True, False, True)
    monkeypatch.setattr(confinement_examination, "examine", lambda: weak)
    (finding,) = confinement_examination.confinement_findings()
    assert (
        finding.level == Level.WARNING
        and "read this user's files" in finding.text
        and "Landlock" in finding.advice
    )
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--confinement"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "connect by TCP" in printed and "attacks" in printed.splitlines()[-1]


def run_inputs(verifier, text="1 + 1"):
    prompts = [Prompt(text, (1,), "d", "2", verifier, None, 0, "p")]
    return SimpleNamespace(prompts=prompts, eval_prompts=None)


def test_the_start_of_a_run_warns_once_a_host_and_records_what_there_is(monkeypatch, capsys, tmp_path):
    weak = Confinement("Linux", 0, True, False, True)
    monkeypatch.setattr(setup, "examine", lambda: weak)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert setup.examine_confinement(run_inputs("math_verify")) is weak
    printed = capsys.readouterr().out
    assert printed.startswith("warning: ") and "read this user's files" in printed
    assert printed.count("\n") == 1
    assert setup.examine_confinement(run_inputs("exact_match", ({"role": "user", "content": "1"},))) is weak
    assert setup.examine_confinement(run_inputs("exact_match")) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert setup.examine_confinement(run_inputs("math_verify")) is None

    log = RunLog(load_config(None, [f"run_dir={tmp_path}"]), 0)
    log.started({}, 1, torch.device("cpu"), weak)
    log.close()
    assert json.loads((tmp_path / "run.json").read_text())["confinement"] == weak.to_dict()


def test_a_full_confinement_is_not_mentioned(monkeypatch, capsys):
    monkeypatch.setattr(setup, "examine", lambda: Confinement("Linux", 7, True, False, True))
    assert setup.examine_confinement(run_inputs("math_verify")).missing() == []
    assert capsys.readouterr().out == ""


def test_a_run_that_cannot_confine_answers_does_not_start(monkeypatch):
    def examine():
        raise Unanswered("cannot be started")

    monkeypatch.setattr(setup, "examine", examine)
    with pytest.raises(ConfigError, match="answers must be scored in a confined process: cannot"):
        setup.examine_confinement(run_inputs("math_verify"))


def test_landlock_is_used_where_it_is():
    assert examine().landlock == landlock_version()


def test_the_report_of_a_confinement_is_plain(tmp_path):
    fields = json.loads(json.dumps(Confinement("Linux", 7, True, False, True).to_dict()))
    assert fields["missing"] == [] and fields["landlock"] == 7

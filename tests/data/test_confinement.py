"""A verifier's process cannot touch the disk or the network, and its replies are not trusted."""

import pickle
import socket
import subprocess
from types import SimpleNamespace

import pytest

from megatron_mopd.data.confinement import confine
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.scoring_process import ScoringProcess
from megatron_mopd.data.verifiers import score
from tests._distributed import run_ranks


def what_is_possible(rank, directory, port):
    has_landlock = confine(3 << 30)
    outcomes = {}

    def attempt(name, act):
        try:
            act()
            outcomes[name] = "done"
        except (OSError, MemoryError, subprocess.CalledProcessError) as error:
            outcomes[name] = type(error).__name__

    def write(path):
        with open(path, "w") as file:
            file.write("x" * 10)

    attempt("read", lambda: (directory / "kept").read_text())
    attempt("write", lambda: write(directory / "new"))
    attempt("overwrite", lambda: write(directory / "kept"))
    attempt("remove", (directory / "kept").unlink)
    attempt("rename", lambda: (directory / "kept").rename(directory / "moved"))
    attempt("connect", lambda: socket.create_connection(("127.0.0.1", port), timeout=2).close())
    attempt("memory", lambda: bytearray(4 << 30))
    attempt("child", lambda: subprocess.run(["rm", str(directory / "kept")], check=True, capture_output=True))
    return has_landlock, outcomes


def test_what_a_confined_process_can_do(tmp_path):
    (tmp_path / "kept").write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ((has_landlock, outcomes),) = run_ranks(1, lambda rank: what_is_possible(rank, tmp_path, port))
    assert outcomes["read"] == "done" and outcomes["memory"] == "MemoryError"
    assert outcomes["write"] != "done"
    if has_landlock:  # Linux 5.13; the connection needs 6.7
        assert (tmp_path / "kept").read_text() == "kept"
        refused = {name: outcomes[name] for name in ("write", "overwrite", "remove", "rename")}
        assert set(refused.values()) == {"PermissionError"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_verdicts_come_from_a_confined_process():
    """A formula that has to be scored elsewhere still is."""
    prompt = Prompt("", (1,), "math", "1024", "math_verify", None, 0, "p")
    assert score(prompt, "$2^{10}$").raw == 1.0 and score(prompt, "$2^{11}$").raw == 0.0


@pytest.mark.parametrize(
    "reply", [pickle.dumps(1.0), b"1.0" * 100, b"1.0\n1.0\n", b"null, 1\n", b'"<script>"\n', b"[1]\n", b""]
)
def test_a_reply_that_is_no_score_is_none(reply):
    process = ScoringProcess()
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
        process._process = SimpleNamespace(
            stdin=SimpleNamespace(write=lambda data: None, flush=lambda: None),
            stdout=cat.stdout,
            kill=cat.kill,
            communicate=lambda: None,
        )
        cat.stdin.write(reply)
        cat.stdin.close()
        assert process.score(("exact_match", "a", "a", None), seconds=5.0) is None
        cat.kill()

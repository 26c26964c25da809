"""Two "nodes" on one machine, in separate network namespaces where that is permitted, and agents on them.

A node runs one torchrun agent. Each namespace has a virtual network interface, `mopd0`, and the nodes are
connected only through these; without the permission both nodes use the loopback interface.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LAUNCHER = Path(__file__).parents[2] / "launch" / "train.sh"


@dataclass(frozen=True)
class Node:
    """Where an agent runs: its address, its network interface, and the prefix of commands that run there."""

    name: str
    address: str
    interface: str
    enter: list[str] = field(default_factory=list)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes in namespaces, removed afterwards; on loopback if namespaces are not permitted."""
    tag, address = os.getpid(), "10.213.77."
    nodes = [
        Node(f"node-{n}", f"{address}{n}", "mopd0", ["ip", "netns", "exec", f"mopd-{tag}-{n}"])
        for n in (1, 2)
    ]
    names = [node.enter[-1] for node in nodes]
    made = []
    try:
        try:
            if shutil.which("ip") is None:
                raise FileNotFoundError("ip")
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
            cards = [("mopd0", "netns", name) for name in names]
            _ip("link", "add", *cards[0], "type", "veth", "peer", "name", *cards[1])
            for node, name in zip(nodes, names):
                _ip("-n", name, "addr", "add", f"{node.address}/24", "dev", "mopd0")
                for card in ("lo", "mopd0"):
                    _ip("-n", name, "link", "set", card, "up")
        except (OSError, subprocess.CalledProcessError):
            yield tuple(Node(f"node-{n}", "127.0.0.1", "lo") for n in (1, 2))
        else:
            yield tuple(nodes)
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Agent:
    """`launch/train.sh` on one node, with all processes that it starts; their output goes to `log`."""

    def __init__(self, node: Node, log: Path, settings: dict[str, str], arguments: list[str]):
        self.node, self.log = node, log
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GLOO_")}
        environment |= {"PYTHON": sys.executable, "NETWORK": node.interface}
        if node.enter:
            environment["LOCAL_ADDR"] = node.address
        environment |= {"PYTHONPATH": str(LAUNCHER.parents[1])} | settings
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                [*node.enter, str(LAUNCHER), *arguments],
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """The agent and the ranks that it started, which are in separate sessions."""
        tree = [self.process.pid]
        for pid in tree:
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    tree += map(int, (thread / "children").read_text().split())
        return tree

    def kill(self) -> None:
        """Kill the agent and its ranks at once, as if the node lost power."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

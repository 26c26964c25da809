"""Reads the launcher's environment variables: this process's rank and the rendezvous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_mopd.config import ConfigError

_START = "start with torchrun (or launch/train.sh), which sets it"
_OTHER_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE"}
"""Launchers that start several processes without torchrun's variables -> their variable with the number."""


@dataclass(frozen=True)
class Launch:
    """One process of a job; `local_rank` is its number on the host and its GPU index."""

    rank: int
    world_size: int
    local_rank: int
    master: tuple[str, int] | None
    """Host and port of the rendezvous; `None` for a single-process job."""
    local_world_size: int | None = None
    """Number of the job's processes on this host, if there are several and the launcher provides it."""

    @property
    def is_on_one_host(self) -> bool:
        """Whether all processes are known to be on this host."""
        return self.world_size in (1, self.local_world_size)


def read_launch(environment: Mapping[str, str]) -> Launch:
    """The job according to torchrun's variables; a single process if there are none.

    Raises `ConfigError` for variables that are missing, not numbers, or inconsistent.
    """

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name)
        if text is None and default is not None:
            return default
        if text is None:
            raise ConfigError(
                f"{name} is not set although WORLD_SIZE={environment.get('WORLD_SIZE')}; {_START}"
            )
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"{name}={text!r} is not a number; {_START}") from None

    world_size = number("WORLD_SIZE", 1)
    if "WORLD_SIZE" not in environment:
        _refuse_other_launchers(environment)
        if number("RANK", 0) != 0:
            raise ConfigError(f"RANK={environment['RANK']} but WORLD_SIZE is not set; {_START}")
    if world_size <= 1:
        return Launch(0, 1, number("LOCAL_RANK", 0), None)
    rank = number("RANK")
    if not 0 <= rank < world_size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={world_size}; {_START}")
    if "MASTER_ADDR" not in environment:
        number("MASTER_ADDR")
    master = environment["MASTER_ADDR"], number("MASTER_PORT")
    return Launch(rank, world_size, number("LOCAL_RANK"), master, number("LOCAL_WORLD_SIZE", 0) or None)


def _refuse_other_launchers(environment: Mapping[str, str]) -> None:
    """Refuse several processes that each consider themselves the whole job and would overwrite each other's
    run_dir."""
    for launcher, variable in _OTHER_LAUNCHERS.items():
        count = environment.get(variable, "1")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{launcher} started {count} processes that do not know about each other (RANK is not set); "
                f"let {launcher} start launch/train.sh once per node, as launch/slurm.sbatch does"
            )

"""Start-up of the ranks, and the object that holds every process group.

`start_ranks` initializes torch.distributed after a check-in that reports missing ranks;
`build_parallel_groups` creates the TP x CP x EP x DP x PP groups with megatron-core and returns
`ParallelGroups`, which is passed around.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_mopd.backend import cpu, versions
from megatron_mopd.backend.blocks import Block, block_of, check_block_size
from megatron_mopd.backend.check_in import check_in
from megatron_mopd.backend.launch_environment import read_launch
from megatron_mopd.backend.lifeline import Lifeline
from megatron_mopd.backend.network import interface_names, interface_problems
from megatron_mopd.backend.process_groups import only_own_groups
from megatron_mopd.config import ConfigError, ParallelConfig


@dataclass(frozen=True)
class ParallelGroups:
    """Every process group of the run, with the sizes and ranks used throughout the package."""

    collection: ProcessGroupCollection
    """megatron-core's own collection, passed to its models, schedules and optimizers."""
    config: ParallelConfig
    device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        return dist.get_world_size()

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.collection.pp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.collection.cp

    @property
    def dp(self) -> dist.ProcessGroup:
        """Ranks that train on different samples (without context parallelism)."""
        return self.collection.dp

    @property
    def block(self) -> Block:
        """The data-parallel ranks that run the same instructions as this one."""
        return block_of(self.config, self.dp.rank(), self.dp_size)

    def in_block(self, group: dist.ProcessGroup) -> list[int]:
        """The global ranks of a group of this stage that are in this rank's block."""
        stage, width = self.world_size // self.pp_size, self.block.size * self.tp_size * self.cp_size
        ranks = dist.get_process_group_ranks(group)
        return [rank for rank in ranks if rank % stage // width == self.block.index]

    @property
    def tp_size(self) -> int:
        return self.collection.tp.size()

    @property
    def cp_size(self) -> int:
        return self.collection.cp.size()

    @property
    def dp_size(self) -> int:
        return self.collection.dp.size()

    @property
    def pp_size(self) -> int:
        return self.collection.pp.size()

    @property
    def vpp_size(self) -> int:
        return self.config.virtual_pipeline_model_parallel_size or 1

    @property
    def is_first_stage(self) -> bool:
        return self.collection.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.collection.pp.rank() == self.pp_size - 1

    @property
    def replica_size(self) -> int:
        """The number of ranks that together hold one copy of the dense model: TP x CP x PP."""
        return self.tp_size * self.cp_size * self.pp_size

    @property
    def replica_rank(self) -> int:
        """This rank among those of its copy of the model; all of them work on the same samples."""
        return (self.pp.rank() * self.cp_size + self.cp.rank()) * self.tp_size + self.tp.rank()

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline, the source of its results."""
        return dist.get_process_group_ranks(self.pp)[-1]


def select_device(name: str) -> torch.device:
    """The device this rank computes on; installs the CPU backend if that is the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device: 'cuda' was requested but torch sees no CUDA device; use device=auto or device=cpu"
        )
    if name == "cpu" or not torch.cuda.is_available():
        cpu.install()
        device = torch.device("cpu")
    else:
        local_rank, gpus = read_launch(os.environ).local_rank, torch.cuda.device_count()
        if local_rank >= gpus:
            raise ConfigError(
                f"LOCAL_RANK={local_rank}, but this host has {gpus} GPU{'s' * (gpus != 1)}, counted from 0; "
                "start no more ranks than that on it (--nproc-per-node gpu), or use device=cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    versions.install()
    return device


def start_ranks(device: torch.device, timeout_minutes: float) -> Lifeline:
    """Initialize torch.distributed from torchrun's variables, or a world of one process without them.

    Returns the lifeline by which the ranks detect each other's death; a rank that may exit before the others
    must release it (a normal exit of the interpreter does so, too). Every rank first checks in with the
    store. Raises `ConfigError` naming the missing ranks if some do not check in within the timeout; also for
    variables that are inconsistent or name a network interface that does not exist, and for a mix of GPU and
    CPU ranks. Collectives: none before all ranks have checked in.
    """
    if dist.is_initialized():
        return Lifeline()
    timeout = timedelta(minutes=timeout_minutes)
    launch = read_launch(os.environ)
    rank, world_size = launch.rank, launch.world_size
    if launch.master is None:
        store: dist.Store = dist.HashStore()
    else:
        host, port = launch.master
        if problems := interface_problems(os.environ, interface_names()):
            raise ConfigError(f"{problems[0]}; set it to one of them, or unset it")
        agent_owns_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = dist.TCPStore(
                host,
                port,
                is_master=rank == 0 and not agent_owns_store,
                timeout=timeout,
                wait_for_workers=False,
            )
        except (dist.DistError, RuntimeError, TimeoutError) as error:
            raise ConfigError(
                f"rank {rank} could not reach the rendezvous at {host}:{port} within {timeout_minutes:g} "
                f"minutes ({str(error).splitlines()[0]}); check that rank 0 is running and the port is open"
            ) from None
        # A restarted job must not find the check-ins of the previous attempt in a store that outlives the
        # ranks. A store that rank 0 has just created has none, and there agents may disagree on the count:
        # one that replaces a lost node's agent starts at 0.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agent_owns_store else "0"
        store = dist.PrefixStore(f"megatron_mopd/{attempt}", store)
    lifeline = Lifeline(store, rank, world_size)
    if world_size > 1:
        check_in(store, rank, world_size, timeout_minutes, device.type)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=None if device.type == "cpu" else device,
    )
    lifeline.connected()
    return lifeline


def end_ranks(lifeline: Lifeline) -> None:
    """Call after the last collective of a successful job: this rank may then exit before the others."""
    lifeline.release()
    dist.destroy_process_group()


def check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    """Raise `ConfigError` if the layout does not fit `world_size` ranks, regardless of the model."""
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or tp
    if world_size < (fewest := fewest_ranks(parallel)):
        started = "1 was" if world_size == 1 else f"{world_size} were"
        raise ConfigError(
            f"parallel: TP {tp} x PP {pp} x CP {cp} with EP {ep} needs at least {fewest} ranks, and "
            f"{started} started; use torchrun --nproc-per-node {fewest} (several nodes: launch/train.sh), "
            "or smaller sizes"
        )
    if world_size % (tp * pp * cp):
        raise ConfigError(
            f"parallel: tensor_model_parallel_size x pipeline_model_parallel_size x context_parallel_size = "
            f"{tp} x {pp} x {cp} = {tp * pp * cp} does not divide the number of ranks, {world_size}; "
            f"valid products: {', '.join(map(str, _divisors(world_size)))}"
        )
    if world_size % (etp * ep * pp):
        valid = _divisors(world_size // pp // etp) if world_size % (pp * etp) == 0 else []
        raise ConfigError(
            f"parallel.expert_model_parallel_size: {ep} (x expert_tensor_parallel_size {etp} x pipeline "
            f"{pp}) does not divide the number of ranks, {world_size}; "
            f"valid: {', '.join(map(str, valid)) or 'none'}"
        )
    check_block_size(parallel, world_size // (tp * pp * cp))


def validate_layout(
    parallel: ParallelConfig,
    world_size: int,
    *,
    num_layers: int,
    num_moe_experts: int | None,
    num_attention_heads: int,
    num_query_groups: int | None = None,
) -> None:
    """Raise `ConfigError` naming the parallel size that does not fit `world_size` ranks or the model, and the
    valid sizes. No collectives.
    """
    check_world_size(parallel, world_size)
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep = parallel.expert_model_parallel_size
    if ep > 1 and not num_moe_experts:
        raise ConfigError(
            "parallel.expert_model_parallel_size: above 1, but the model has no num_moe_experts"
        )
    if num_moe_experts and num_moe_experts % ep:
        raise ConfigError(
            f"parallel.expert_model_parallel_size: {ep} does not divide num_moe_experts={num_moe_experts}; "
            f"valid: {', '.join(map(str, _divisors(num_moe_experts)))}"
        )
    chunks = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    if (parallel.virtual_pipeline_model_parallel_size or 1) > 1 and pp == 1:
        raise ConfigError(
            "parallel.virtual_pipeline_model_parallel_size: needs pipeline_model_parallel_size of at least 2"
        )
    if num_layers % chunks:
        raise ConfigError(
            f"parallel.pipeline_model_parallel_size: {pp} stages x "
            f"{parallel.virtual_pipeline_model_parallel_size or 1} virtual chunks do not divide "
            f"num_layers={num_layers}; valid products: {', '.join(map(str, _divisors(num_layers)))}"
        )
    for name, heads in (("num_attention_heads", num_attention_heads), ("num_query_groups", num_query_groups)):
        if heads and heads % tp and not (name == "num_query_groups" and tp % heads == 0):
            raise ConfigError(
                f"parallel.tensor_model_parallel_size: {tp} does not divide {name}={heads}; "
                f"valid: {', '.join(map(str, _divisors(heads)))}"
            )
    if parallel.sequence_parallel and tp == 1:
        raise ConfigError("parallel.sequence_parallel: needs tensor_model_parallel_size of at least 2")
    if num_moe_experts and tp > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            "parallel.sequence_parallel: must be true for a mixture-of-experts model with TP > 1"
        )


def fewest_ranks(parallel: ParallelConfig) -> int:
    """The smallest number of ranks that the layout fits."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    experts = parallel.expert_model_parallel_size * (parallel.expert_tensor_parallel_size or tp)
    return pp * math.lcm(tp * parallel.context_parallel_size, experts)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def build_parallel_groups(parallel: ParallelConfig, device: torch.device, seed: int) -> ParallelGroups:
    """Create the parallel groups of the started ranks and seed megatron-core's random-number tracker.

    Every rank must call it with the same arguments; a rank creates its own groups, about twenty, and waits
    for nobody else than their members.
    """
    vpp = parallel.virtual_pipeline_model_parallel_size
    with only_own_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=vpp if vpp and vpp > 1 else None,
            context_parallel_size=parallel.context_parallel_size,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
            distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes)),
            create_gloo_process_groups=device.type != "cpu",
        )
    seed_model_parallel(seed)
    return ParallelGroups(ProcessGroupCollection.use_mpu_process_groups(), parallel, device)


def seed_model_parallel(seed: int) -> None:
    """Reseed megatron-core's random-number streams (dropout, router jitter). No collectives."""
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy_parallel_groups(keep_models_working: bool = True) -> None:
    """Discard the groups (tests build several layouts in one process).

    By default, models built on them continue to work. Otherwise every group except the world is destroyed,
    because each gloo group has polling threads; this is collective over all ranks.
    """
    parallel_state.destroy_model_parallel()
    if keep_models_working:
        return
    dist.barrier()
    for group in [group for group in dist.distributed_c10d._world.pg_map if group != dist.group.WORLD]:
        dist.destroy_process_group(group)

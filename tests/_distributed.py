"""Forked gloo ranks for the tests: run one function on every rank and return the results to the parent.

    results = run_ranks(2, check_gradient, "reverse_kl")     # check_gradient(rank, "reverse_kl") on 2 ranks

    with RankPool(2) as pool:                                 # the same two processes serve many cases
        for case in cases:
            results = pool.run(check_gradient, case)

Ranks are forked from the calling process, so they start with everything that it has imported (megatron-core
takes about 6 s). Rules that follow from forking:

- The parent must not have a process group, serve a store (see `_agent.py`) or use CUDA.
- Import this module before any torch work: it sets the parent to one intra-op thread, because a child that
  inherits the state of an OpenMP pool without its threads waits for them forever. Children run one thread.
- `run_ranks` inherits `fn` and its arguments through the fork, so closures and lambdas work. `RankPool.run`
  pickles them: `fn` must be a module-level function of a module imported before the pool was created.
- megatron-core's process groups do not outlive a task: the next `run` starts without any.
- Return values are pickled by value: detached tensors, numbers, strings and containers of them.

When a rank fails, its traceback is raised in the parent at once and the other ranks are killed. The same
applies to a rank that exits without an error message and to a run that exceeds `timeout` (unfinished ranks
first print their stacks to stderr).
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

from megatron_mopd.backend.gloo import share_device

torch.set_num_threads(1)
# A garbage collection in a fork would visit half a million objects of the parent and copy their pages.
os.register_at_fork(after_in_child=gc.freeze)


class RankError(RuntimeError):
    """A rank raised, died or hung; the message contains the rank and its traceback."""


class RankPool:
    """`world_size` forked processes joined in one gloo group, reused for every `run` until `close`."""

    def __init__(self, world_size, timeout=60, _inherited_task=None):
        if dist.is_initialized():
            raise RuntimeError("ranks are forked: the parent must not have a process group")
        self.timeout = timeout
        context = multiprocessing.get_context("fork")
        self._connections, self._processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            parents_ends = [*self._connections, ours]
            arguments = (rank, world_size, theirs, parents_ends, timeout, _inherited_task)
            process = context.Process(target=_rank_main, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that a dead child reads as end-of-file here
            self._connections.append(ours)
            self._processes.append(process)
        # Rank 0 serves the rendezvous, on a port that the kernel picks, so that two pools never race for one.
        # The parent must not: a pool forked while a server thread holds a lock would wait for it forever.
        port = pickle.loads(self._connections[0].recv_bytes()) if self._connections[0].poll(timeout) else None
        if not isinstance(port, int):
            self.close(kill=True)
            raise RankError(f"rank 0 did not start within {timeout} s" if port is None else port[1])
        for connection in self._connections[1:]:
            connection.send_bytes(pickle.dumps(port))

    def run(self, fn, *args, timeout=None):
        """Call `fn(rank, *args)` on every rank and return the list of results, rank 0 first."""
        self.start(fn, *args)
        return self.collect(timeout)

    def start(self, fn, *args):
        """Start `fn(rank, *args)` on every rank; `collect` waits for the results."""
        if not self._processes:
            raise RankError("the pool is closed (an earlier run failed, or close() was called)")
        task = pickle.dumps((fn, args))
        for connection in self._connections:
            connection.send_bytes(task)

    def collect(self, timeout=None):
        """Wait for the task of `start` and return its results, rank 0 first."""
        timeout = timeout or self.timeout
        deadline = time.monotonic() + timeout
        results, waiting = {}, dict(enumerate(self._connections))
        while waiting:
            ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close(kill=True)
                raise RankError(f"no answer from ranks {sorted(waiting)} within {timeout} s")
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                try:
                    succeeded, value = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, ConnectionError):
                    self._processes[rank].join(1)
                    succeeded, value = False, f"process ended with exit code {self._processes[rank].exitcode}"
                if not succeeded:
                    self.close(kill=True)
                    raise RankError(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(len(results))]

    def close(self, kill=False):
        """Stop the ranks: ask them to exit, or kill them with `kill`."""
        for connection, process in zip(self._connections, self._processes, strict=True):
            if kill:
                process.kill()
            elif process.is_alive():
                connection.send_bytes(pickle.dumps(None))
        for connection, process in zip(self._connections, self._processes, strict=True):
            process.join(10)
            process.kill()
            process.join()
            connection.close()
        self._connections, self._processes = [], []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close(kill=exception[0] is not None)


def run_ranks(world_size, fn, *args, timeout=60):
    """Fork `world_size` ranks, call `fn(rank, *args)` on each and return their results, rank 0 first."""
    with RankPool(world_size, timeout, _inherited_task=(fn, args)) as pool:
        return pool.collect(timeout)


def _rank_main(rank, world_size, connection, parents_ends, timeout, inherited_task):
    """Join the process group and run tasks until the task is None."""
    for inherited in parents_ends:
        inherited.close()  # so that the parent's death, whatever its cause, reads as end-of-file here
    torch.set_num_threads(1)
    share_device()
    # megatron-core's checkpoint writer starts processes, which a daemonic process must not do.
    multiprocessing.current_process()._config["daemon"] = False
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        limit = timedelta(seconds=timeout)
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=limit, wait_for_workers=False)
            connection.send_bytes(pickle.dumps(store.port))
        else:
            port = pickle.loads(connection.recv_bytes())
            store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=store.timeout)
        task = inherited_task or pickle.loads(connection.recv_bytes())
        while task is not None:
            _answer(connection, rank, *task, timeout)
            task = pickle.loads(connection.recv_bytes())
            _forget_groups()
    except BaseException:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
    # No interpreter shutdown: this process must not run the parent's exit handlers and test plugins.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _forget_groups():
    """Destroy megatron-core's groups of the previous tasks, which all ranks have finished: every gloo group
    has its own threads, and a pool serves many layouts."""
    parallel_state = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None and parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        for group in [group for group in dist.distributed_c10d._world.pg_map if group != dist.group.WORLD]:
            dist.destroy_process_group(group)


def _answer(connection, rank, fn, args, timeout):
    faulthandler.dump_traceback_later(0.9 * timeout, file=sys.__stderr__)
    try:
        answer = pickle.dumps((True, fn(rank, *args)))
    except BaseException:
        # Stay alive until the parent kills us: an early exit would bury the cause in peers' socket errors.
        answer = pickle.dumps((False, traceback.format_exc()))
    finally:
        faulthandler.cancel_dump_traceback_later()
    connection.send_bytes(answer)

"""Memory of one micro-batch's loss with 1 and with 12 domains, forward and backward together.

    python -m benchmarks.head_gradient [--domains 1 12] [--dtype bfloat16]

The same twelve responses belong to one domain or to twelve, each with its own teacher, and the objective
compares full distributions in both directions (`full_vocab_kl` and `add: {forward_kl: 1}`): 2 or 24 losses on
one head. The result is the peak size of the tensors that the loss allocates, in addition to hidden states and
weights, in units of the head in float32, which is the minimum for a sum of its gradients.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_mopd.commands  # noqa: F401  (silences messages of the dependencies)
from benchmarks.teacher_scaling import DOMAINS, learner
from benchmarks.teacher_scaling import trajectories as of_all_domains
from megatron_mopd.backend.parallel import ParallelGroups, build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import Config, config_from_dict
from megatron_mopd.estimate.measured_memory import MadeBytes
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.step import build_loss
from megatron_mopd.training.step_batch import plan_step

CHUNK = 24
"""Number of tokens whose logits exist at one time: one response, so that one domain needs no more than
twelve."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", type=int, nargs="+", default=[1, 12])
    parser.add_argument("--dtype", default="float32", help="params_dtype")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    device = select_device("cpu")
    start_ranks(device, 10)
    with tempfile.TemporaryDirectory() as name:
        config = configuration(name, options.dtype)
        groups = build_parallel_groups(config.parallel, device, seed=1)
        first = None
        print(f"{options.dtype}\ndomains  peak bytes  in heads  ratio")
        for domains in options.domains:
            peak, head = loss_bytes(config, groups, domains)
            first = first or peak
            print(f"{domains:7d}  {peak:10d}  {peak / head:8.2f}  {peak / first:5.3f}")
    dist.destroy_process_group()


def configuration(directory: str, dtype: str) -> Config:
    return config_from_dict(
        {
            "run_dir": directory,
            "params_dtype": dtype,
            "objective": {"kind": "full_vocab_kl", "add": {"forward_kl": 1.0}, "chunk_size": CHUNK},
            "schedule": {"global_batch_size": DOMAINS, "micro_batch_size": DOMAINS},
            "optimizer": {"use_distributed_optimizer": False},
        }
    )


def loss_bytes(config: Config, groups: ParallelGroups, domains: int) -> tuple[int, int]:
    """Bytes at the peak of one micro-batch's loss and its backward, and of the head in float32."""
    item = learner(config, groups, domains, Path(config.run_dir) / f"{config.params_dtype}-{domains}")
    batch = plan_step(item, of_all_domains(0)[:DOMAINS])
    (micro_batch,) = batch.student
    for name, scored in batch.teachers.items():
        for part in scored:
            batch.scores.keep(name, part, random_states(item, part.tokens.shape))
    loss = build_loss(item, batch)
    hidden = random_states(item, micro_batch.tokens.shape).requires_grad_()
    with MadeBytes() as made:
        loss(micro_batch, hidden)[0].backward()
    head = unwrap(item.chunks[-1]).head_weight()
    assert head.main_grad.abs().max() > 0, "the head must have a gradient"
    return made.peak, 4 * head.numel()


def random_states(item: Learner, shape: torch.Size) -> torch.Tensor:
    """Random hidden states [s, b, h] for tokens of shape [b, s]."""
    config = unwrap(item.chunks[-1]).config
    return torch.randn(shape[1], shape[0], config.hidden_size, dtype=config.params_dtype)


if __name__ == "__main__":
    main()

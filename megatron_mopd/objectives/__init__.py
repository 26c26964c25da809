"""Training objectives: exact vocab-parallel divergences and sampled-token quantities."""

from megatron_mopd.objectives.diagnostics import DivergenceDiagnostics
from megatron_mopd.objectives.divergence import vocab_parallel_kl
from megatron_mopd.objectives.linear_cross_entropy import linear_cross_entropy, sampled_token_logprobs
from megatron_mopd.objectives.linear_kl import linear_kl

__all__ = [
    "DivergenceDiagnostics",
    "linear_cross_entropy",
    "linear_kl",
    "sampled_token_logprobs",
    "vocab_parallel_kl",
]

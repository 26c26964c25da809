"""Allowed values of the configuration keys that several packages refer to, each set defined once.

Not part of `config/`, which imports megatron-core, because the pipeline planner runs without torch.
"""

from typing import Literal

VocabularyKind = Literal["full_vocab_kl", "top_k_kl", "forward_kl", "jsd"]
"""`objective.kind`: divergences between whole distributions, which are back-propagated."""
TokenKind = Literal["sampled_token"]
"""`objective.kind`: advantages of sampled tokens that compare the student's log-probs with teachers'."""
PolicyKind = Literal[TokenKind, "grpo"]
"""`objective.kind`: detached advantages of sampled tokens, multiplied by log theta."""
ObjectiveKind = Literal[VocabularyKind, PolicyKind, "sft"]
Reduction = Literal["token_mean", "sequence_mean", "domain_mean"]
ScheduleKind = Literal["bubble_fill", "back_to_back", "serial"]
StorageMode = Literal["host", "host_sharded", "mmap"]
"""`teacher_storage.mode`"""

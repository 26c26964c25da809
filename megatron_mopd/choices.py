"""The values of configuration keys that several packages know by name, each set defined once.

Outside `config/`, which imports megatron-core: the pipeline planner runs without torch.
"""

from typing import Literal

VocabularyKind = Literal["full_vocab_kl", "top_k_kl", "forward_kl", "jsd"]
"""`objective.kind`: divergences of whole distributions, which are back-propagated."""
PolicyKind = Literal["sampled_token", "grpo"]
"""`objective.kind`: advantages of sampled tokens, detached, in front of log theta."""
ObjectiveKind = Literal[VocabularyKind, PolicyKind, "sft"]
Reduction = Literal["token_mean", "sequence_mean", "domain_mean"]
ScheduleKind = Literal["bubble_fill", "back_to_back", "serial"]
StorageMode = Literal["host", "host_sharded", "mmap"]
"""`teacher_storage.mode`"""

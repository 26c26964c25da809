"""Multi-teacher on-policy distillation of mixture-of-experts models on megatron-core."""

__version__ = "0.1.0"

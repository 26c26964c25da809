"""Multi-teacher on-policy distillation of mixture-of-experts models on megatron-core."""

import warnings

__version__ = "0.1.0"

# Every import of megatron-core says half a dozen times that Apex or Transformer Engine is not there. Nothing
# is wrong then: what stands in for them is this package's own choice (`model/specs.py`). These sentences
# only; every other warning is shown.
warnings.filterwarnings(
    "ignore",
    message=r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to ",
    category=UserWarning,
)

"""What all tests share: megatron-core is imported once, before any rank is forked, and the parent never
computes."""

import warnings

from tests import _distributed  # noqa: F401  (one intra-op thread before anything else touches torch)

warnings.filterwarnings("ignore")

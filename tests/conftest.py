"""What all tests share: megatron-core is imported once, before any rank is forked, and the parent never
computes."""

import warnings

from tests import _distributed, _unwritten_memory  # noqa: F401  (one intra-op thread before anything else)

warnings.filterwarnings("ignore")

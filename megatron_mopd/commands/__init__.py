"""Command-line programs, one module each, run by `tools/` and the installed `mopd-*` scripts.

A process that imports this package is one of these programs, and its output is its own: messages of the
dependencies are silenced before the first of them is imported. Importing the rest of megatron_mopd as a
library changes no filter.
"""

from megatron_mopd.backend.dependency_messages import silence_dependencies

silence_dependencies()

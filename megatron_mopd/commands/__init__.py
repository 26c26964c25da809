"""Command lines: one module for each, which `tools/` and the installed `mopd-*` programs start."""

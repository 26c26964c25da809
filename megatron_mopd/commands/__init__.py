"""Command-line programs, one module each, run by `tools/` and the installed `mopd-*` scripts."""

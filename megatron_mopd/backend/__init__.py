"""Adapts megatron-core to the machine: process groups, CPU backend, version differences, failures, files."""

"""Where megatron-core meets the machine: process groups, the CPU backend, version differences."""

"""Compiles every tuning configuration of the Triton kernels for Hopper (sm_90), which needs no GPU.

Run by `test_triton_kernels.py` in a separate process, like `interpreted_triton.py`. Prints one JSON object
{kernel: [[block, warps, 128-bit loads, local memory accesses (spills)], ...]}.
"""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_mopd.objectives import triton_kernels

HOPPER = GPUTarget("cuda", 90, 32)


def compile_for_hopper(kernel, config, constants):
    """bf16 logits, fp32 row scalars, strides and widths divisible by 16, as in training."""
    names = kernel.fn.arg_names
    constants = {**constants, **config.kwargs, "INVERSE_TEMPERATURE": 1.0, "MASKED": False}
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: "*fp32" for name in names}
    types.update(student="*bf16", teacher="*bf16", out="*bf16", rows="i32", columns="i32")
    types.update({name: "i64" for name in names if name.endswith("stride")})
    types.update({name: "constexpr" for name in constants})
    source = ASTSource(
        fn=kernel.fn,
        signature={name: types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants},
    )
    return triton.compile(source, target=HOPPER, options={"num_warps": config.num_warps}).asm["ptx"]


def main():
    divergence = {"BETA": 0.5, "LIMIT": 0.1, "WITH_GRADIENT": True}
    kernels = {
        "statistics": (triton_kernels._statistics_kernel, {"WITH_CROSS": True, "WITH_ENTROPY": True}),
        "mean_score": (triton_kernels._mean_score_kernel, {"BETA": 0.5, "LIMIT": 0.1}),
        **{
            kind: (triton_kernels._divergence_kernel, {**divergence, "KIND": kind})
            for kind in ("reverse_kl", "forward_kl", "jsd")
        },
    }
    results = {}
    for name, (kernel, constants) in kernels.items():
        results[name] = []
        for config in kernel.configs:
            ptx = compile_for_hopper(kernel, config, constants)
            local = ptx.count("ld.local") + ptx.count("st.local")
            wide = ptx.count("ld.global.v4")
            results[name].append([config.kwargs["BLOCK"], config.num_warps, wide, local])
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Compiles every Triton kernel for the GPU architecture argv[1] (80, 90, ...); needs no GPU.

A program of its own: Triton's interpreter, which the tests run in, replaces the compiler.
"""

import sys

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optrot_edge.kernels.fourth_power import _cube_kernel, _cube_matmul_kernel, tile_shape
from optrot_edge.kernels.hadamard import TRITON_BLOCKS, _hadamard_kernel


def build(kernel, pointers, constants, warps):
    """Cubin of `kernel`; `pointers` name element types, other arguments are int32 multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else "i32" for name in names}
    signature |= {name: f"*{element}" for name, element in pointers.items()}
    if "scale" in names:
        signature["scale"] = "fp32"
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names)
               if signature[name] not in ("constexpr", "fp32")}
    source = ASTSource(kernel, signature, {(names.index(key),): value for key, value in constants.items()},
                       aligned)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    built = compile(source, target=target, options={"num_warps": warps, "num_stages": 3})
    assert built.asm["cubin"], kernel
    assert built.metadata.shared <= 99 * 1024, (kernel, built.metadata.shared)  # a consumer GPU's limit
    return built


def main():
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float32, "tf32x3"),
                             (torch.bfloat16, "ieee")):
        rows, widest, depth, warps = tile_shape(dtype, precision)
        element = "fp32" if dtype == torch.float32 else "bf16"
        pointers = {"x": element, "r": element, "weights": "fp32", "cubed": element, "partial": "fp32"}
        for weighted, columns in ((False, widest), (True, widest), (True, 16)):
            constants = {"D": 4096, "WEIGHTED": weighted, "PRECISION": precision, "UPCAST": False,
                         "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "x_column": 1, "r_column": 1}
            built = build(_cube_matmul_kernel, pointers, constants, warps)
            # Anything but float32 at full precision belongs on the tensor cores.
            tensor_cores = precision != "ieee" or dtype == torch.bfloat16
            assert ("mma" in built.asm["ptx"]) == tensor_cores, (element, precision)
    build(_cube_kernel, {"y": "fp32", "weights": "fp32", "partial": "fp32"},
          {"WEIGHTED": True, "BLOCK": 4096}, 4)
    for block in TRITON_BLOCKS:
        for element in ("fp32", "fp16", "bf16"):
            build(_hadamard_kernel, {"x": element, "y": element},
                  {"ROWS": 4096 // block, "BLOCK": block, "STAGES": block.bit_length() - 1}, 4)
    print("compiled")


if __name__ == "__main__":
    main()

"""Compiles every Triton kernel for the GPU architecture argv[1] (80, 90, 120, ...); needs no GPU.

A program of its own: Triton's interpreter, which the tests run in, replaces the compiler.
"""

import sys

import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from optrot_edge.kernels import fake_quant, fourth_power, gptq, hadamard

ELEMENTS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOATS = ("scale", "clip")


def build(kernel, pointers, constants, warps, unaligned=()):
    """Compiled `kernel`; `pointers` name element types, other arguments are int32, multiples of 16 but `unaligned`."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else "fp32" if name in FLOATS else "i32" for name in names}
    signature |= {name: f"*{element}" for name, element in pointers.items()}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names)
               if signature[name] not in ("constexpr", "fp32") and name not in unaligned}
    source = ASTSource(kernel, signature, {(names.index(key),): value for key, value in constants.items()},
                       aligned)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    built = compile(source, target=target, options={"num_warps": warps, "num_stages": 3})
    assert built.asm["cubin"], kernel
    assert built.metadata.shared <= 99 * 1024, (kernel, constants, built.metadata.shared)  # a consumer GPU's limit
    return built


def build_fourth_power():
    for precision in fourth_power.PRECISIONS:
        rows, widest, depth, warps = fourth_power.tile_shape(precision)
        element, stored = "bf16" if precision == "bf16" else "fp32", "fp32" if precision == "ieee" else "bf16"
        pointers = {"x": element, "r": element, "weights": "fp32", "cubed": stored, "partial": "fp32"}
        for weighted, columns in ((False, widest), (True, widest), (True, 16)):
            constants = {"D": 4096, "WEIGHTED": weighted, "UPCAST": False, "ROWS": rows, "COLUMNS": columns,
                         "PRECISION": "tf32" if precision == "tf32" else "ieee", "DEPTH": depth, "GROUP": 8,
                         "x_column": 1, "r_row" if precision == "tf32" else "r_column": 1}
            built = build(fourth_power._cube_matmul_kernel, pointers, constants, warps)
            # Anything but float32 at full precision belongs on the tensor cores, Hopper's own where there are.
            product = "wgmma" if sys.argv[1] == "90" and columns == widest else "mma"
            assert (product in built.asm["ptx"]) == (precision != "ieee"), (precision, columns)
    build(fourth_power._cube_kernel, {"y": "fp32", "weights": "fp32", "partial": "fp32"},
          {"WEIGHTED": True, "BLOCK": 4096}, 4)


def build_hadamard():
    for element in ELEMENTS.values():
        for block in (2, 64, 512, 4096, 8192, 16384):  # what a pass takes; larger blocks are two passes
            rows = max(1, 4096 // block)
            build(hadamard._hadamard_kernel, {"x": element, "y": element},
                  {"STRIDE": 1, "ROWS": rows, "BLOCK": block, "STAGES": block.bit_length() - 1},
                  hadamard.tile_warps(rows * block))
        for order, power in ((12, 1), (12, 1024), (28, 512), (44, 64), (64, 256)):
            side = hadamard.padded(order)
            groups = max(1, 4096 // (side * power))
            build(hadamard._hadamard_core_kernel, {"x": element, "y": element, "core": "fp32"},
                  {"ORDER": order, "SIDE": side, "GROUPS": groups, "POWER": power, "UPCAST": False,
                   "STAGES": power.bit_length() - 1}, hadamard.tile_warps(side * groups * power))
    for source, stride, block in (("fp32", 16384, 2), ("fp32", 512 * 28, 4)):
        build(hadamard._hadamard_kernel, {"x": source, "y": "bf16"},
              {"STRIDE": stride, "ROWS": 4096 // block, "BLOCK": block, "STAGES": block.bit_length() - 1},
              hadamard.tile_warps(4096))


def build_fake_quant():
    for element in ELEMENTS.values():
        for width in (1, 128, 4096, 14336):
            columns, rows, warps = fake_quant.tile_shape(width)
            build(fake_quant._fake_quant_kernel, {"x": element, "y": element, "scales": "fp32"},
                  {"WIDTH": width, "TOP": 7, "SMALLEST": fake_quant.SMALLEST_SCALE, "ROWS": rows,
                   "COLUMNS": columns}, warps)


def build_gptq():
    pointers = dict.fromkeys(("residual", "feedback", "scales", "offsets", "levels", "errors"), "fp32")
    for offsets, codebook, top in ((True, False, 15), (True, False, 255), (False, True, 15)):
        constants = {"TOP": top, "OFFSETS": offsets, "CODEBOOK": codebook, "BLOCK": gptq.BLOCK,
                     "INNER": gptq._INNER, "ROWS": gptq._ROWS}
        built = build(gptq._solve_kernel, pointers | {"group": "i32", "codes": "u8"}, constants, gptq._ROWS // 32,
                      unaligned=("rows",))
        # A row's columns stay in one thread: nothing is exchanged from one rounding to the next.
        assert "shfl" not in built.asm["ptx"], constants


if __name__ == "__main__":
    build_fourth_power()
    build_hadamard()
    build_fake_quant()
    build_gptq()
    print("compiled")

"""R4 in ONNX: one MatMul with a block's Hadamard matrix, or two with its Kronecker factors.

    python benchmarks/onnx_r4.py

Reshape, MatMul (one or two), Reshape, as `exporters/onnx_rotations.py` draws it, in onnxruntime on the CPU, float32;
medians over runs that take turns, in milliseconds, for a token and for a prompt of 256. What R4 costs in a whole model
is in `onnx_speed.py`.
"""

from __future__ import annotations

import argparse
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table
from rotations import save

from optrot_edge.sylvester import kronecker_orders, sylvester

WIDTHS, BLOCKS, ROWS, TURNS = (1536, 8960), (64, 128, 256), (1, 256), 101


def session(width: int, left: int, right: int, threads: int) -> onnxruntime.InferenceSession:
    """The transform of every left · right of `width` channels."""
    inner = [width // (left * right), *([left] if left > 1 else []), right]
    shapes = {"split": [0, 0, *inner], "join": [0, 0, width]}
    stored = [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
    stored += [numpy_helper.from_array(sylvester(order), f"h{order}") for order in {left, right} - {1}]
    nodes = [helper.make_node("Reshape", ["x", "split"], ["a"]), helper.make_node("MatMul", ["a", f"h{right}"], ["b"])]
    if left > 1:
        nodes.append(helper.make_node("MatMul", [f"h{left}", "b"], ["c"]))
    nodes.append(helper.make_node("Reshape", ["c" if left > 1 else "b", "join"], ["y"]))
    graph = helper.make_graph(nodes, "r4", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, None, width])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(threads: int) -> list[dict]:
    """Milliseconds of both ways."""
    rows = []
    for width in WIDTHS:
        for block in BLOCKS:
            ways = {"one": session(width, 1, block, threads),
                    "two": session(width, *kronecker_orders(block), threads)}
            for count in ROWS:
                x = np.random.default_rng(0).standard_normal((1, count, width)).astype(np.float32)
                assert np.allclose(*(way.run(None, {"x": x})[0] for way in ways.values()), atol=1e-4)
                times: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(TURNS):
                    for name, way in ways.items():
                        start = time.perf_counter()
                        way.run(None, {"x": x})
                        times[name].append(1e3 * (time.perf_counter() - start))
                one, two = (float(np.median(times[name])) for name in ("one", "two"))
                rows.append({"width": width, "block": block, "tokens": count, "one": one, "two": two,
                             "two to one": two / one})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_r4.json")
    given = parser.parse_args()
    found = {name: metadata.version(name) for name in ("onnxruntime", "numpy")}
    results = {"settings": {"threads": given.threads, "turns": TURNS}, "versions": found, "rows": run(given.threads)}
    save(given.out, results)
    table = Table("d_ff", "block", "tokens", "one MatMul, ms", "two, ms", "two to one")
    for row in results["rows"]:
        table.add_row(*map(str, (row["width"], row["block"], row["tokens"])), f"{row['one']:.3f}", f"{row['two']:.3f}",
                      f"{row['two to one']:.2f}")
    Console().print(table)

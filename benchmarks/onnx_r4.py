"""R4 in ONNX: one MatMul with a block's Hadamard matrix, or two with its Kronecker factors.

    python benchmarks/onnx_r4.py

Reshape, MatMul (one or two), Reshape, as `exporters/onnx_rotations.py` draws it, in onnxruntime on the CPU, float32,
for a token and for a prompt of 256. Graphs of 10 and of 110 transforms in a row take turns; a hundredth of the
difference is what one takes without the call around it. Medians in microseconds. What R4 costs in a whole model is in
`onnx_speed.py`.
"""

from __future__ import annotations

import argparse
import itertools
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

WIDTHS, BLOCKS, TURNS, CHAINS = (1536, 8192), (64, 128, 256, 512), {1: 201, 256: 5}, (10, 110)


def session(width: int, left: int, right: int, count: int, threads: int) -> onnxruntime.InferenceSession:
    """`count` times the transform of every left · right of `width` channels."""
    inner = [width // (left * right), *([left] if left > 1 else []), right]
    shapes = {"split": [0, 0, *inner], "join": [0, 0, width]}
    stored = [numpy_helper.from_array(np.array(shape), name) for name, shape in shapes.items()]
    stored += [numpy_helper.from_array(sylvester(order), f"h{order}") for order in {left, right} - {1}]
    nodes, value = [], "x"

    def add(kind: str, *inputs: str) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"v{len(nodes)}"]))
        return nodes[-1].output[0]

    for _ in range(count):
        value = add("MatMul", add("Reshape", value, "split"), f"h{right}")
        if left > 1:
            value = add("MatMul", f"h{left}", value)
        value = add("Reshape", value, "join")
    graph = helper.make_graph(nodes, "r4", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, None, width])],
                              [helper.make_tensor_value_info(value, TensorProto.FLOAT, None)], stored)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(threads: int) -> list[dict]:
    """Microseconds of both ways."""
    rows = []
    for width, block in itertools.product(WIDTHS, BLOCKS):
        ways = {"one": (1, block), "two": kronecker_orders(block)}
        graphs = {(name, count): session(width, *orders, count, threads)
                  for name, orders in ways.items() for count in CHAINS}
        for tokens, turns in TURNS.items():
            x = np.random.default_rng(0).standard_normal((1, tokens, width)).astype(np.float32)
            once = (session(width, *orders, 1, threads).run(None, {"x": x})[0] for orders in ways.values())
            assert np.allclose(*once, atol=1e-4)
            times: dict[tuple[str, int], list[float]] = {case: [] for case in graphs}
            for _ in range(turns):
                for case, graph in graphs.items():
                    start = time.perf_counter()
                    graph.run(None, {"x": x})
                    times[case].append(1e6 * (time.perf_counter() - start))
            found = {name: float(np.median(np.subtract(*(times[name, count] for count in CHAINS[::-1]))))
                     / (CHAINS[1] - CHAINS[0]) for name in ways}
            rows.append({"width": width, "block": block, "tokens": tokens, **found,
                         "two to one": found["two"] / found["one"]})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_r4.json")
    given = parser.parse_args()
    found = {name: metadata.version(name) for name in ("onnxruntime", "numpy")}
    settings = {"threads": given.threads, "turns": TURNS, "chains": CHAINS}
    results = {"settings": settings, "versions": found, "rows": run(given.threads)}
    save(given.out, results)
    table = Table("d_ff", "block", "tokens", "one MatMul, µs", "two, µs", "two to one")
    for row in results["rows"]:
        table.add_row(*map(str, (row["width"], row["block"], row["tokens"])), f"{row['one']:.1f}", f"{row['two']:.1f}",
                      f"{row['two to one']:.2f}")
    Console().print(table)

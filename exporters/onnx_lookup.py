"""Rows of a quantised embedding, decoded by stock ONNX operators.

onnxruntime's own `GatherBlockQuantized` has no CPU kernel in the WebAssembly build that transformers.js loads by
default (onnxruntime-web 1.31), so graphs for CPUs decode the rows they look up with operators that every build has.
They read the very tensors that `MatMulNBits` multiplies with, as they are stored.
"""

from __future__ import annotations

import onnx_ir as ir

from optrot_edge.gridspec import GridSpec


class RowLookup:
    """Methods for a class of onnxruntime-genai's builder."""

    def make_row_lookup(self, name: str, ids: str, spec: GridSpec, shape: tuple[int, int],
                        parts: dict[str, str]) -> str:
        """Rows `ids` of a matrix of that shape [vocab, hidden] on grid `spec`; the value's name.

        `parts` are the names of its "qweight" [vocab, blocks, bytes], "scales" [vocab, blocks] and, for grids with
        zero-points, "qzeros" [vocab, bytes].
        """
        blocks = shape[1] // spec.group_size
        codes = self._unpacked(f"{name}/codes", parts["qweight"], ids, spec.bits, [blocks, spec.group_size])
        if "qzeros" in parts:
            zeros = self._unpacked(f"{name}/zeros", parts["qzeros"], ids, spec.bits, [-1])
            zeros = self._op("Slice", f"{name}/zeros/Slice", [zeros, *map(_int64, ([0], [blocks], [2]))], [blocks])
            zeros = self._op("Unsqueeze", f"{name}/zeros/Unsqueeze", [zeros, _int64([3])], [blocks, 1])
        else:
            zeros = f"/model/constants/FLOAT/{float(2 ** (spec.bits - 1))}"
        scales = self._op("Gather", f"{name}/scales/Gather", [parts["scales"], ids], [blocks], axis=0)
        scales = self._op("Unsqueeze", f"{name}/scales/Unsqueeze", [scales, _int64([3])], [blocks, 1])
        whole = [blocks, spec.group_size]
        levels = self._op("Sub", f"{name}/Sub", [codes, zeros], whole)
        values = self._op("Mul", f"{name}/Mul", [levels, scales], whole)
        return self._op("Reshape", f"{name}/Reshape", [values, _int64([0, 0, shape[1]])], [shape[1]])

    def _unpacked(self, name: str, packed: str, ids: str, bits: int, shape: list[int]) -> str:
        """Integers of the rows `ids`, as floats [batch, sequence, *shape]; the first lies in a byte's lowest bits."""
        stored = list(self.values[packed].shape[1:])
        rows = self._op("Gather", f"{name}/Gather", [packed, ids], stored, ir.DataType.UINT8, axis=0)
        rest = self._op("Cast", f"{name}/Cast", [rows], stored, to=ir.DataType.FLOAT)
        if bits == 8:
            return rest
        parts, axis = [], _int64([len(stored) + 2])
        for index in range(8 // bits - 1):
            step = f"{name}/{index}"
            upper = self._op("Mul", f"{step}/Mul", [rest, f"/model/constants/FLOAT/{2.0 ** -bits}"], stored)
            upper = self._op("Floor", f"{step}/Floor", [upper], stored)
            whole = self._op("Mul", f"{step}/Whole", [upper, f"/model/constants/FLOAT/{2.0 ** bits}"], stored)
            parts.append(self._op("Sub", f"{step}/Sub", [rest, whole], stored))
            rest = upper
        columns = [self._op("Unsqueeze", f"{name}/{index}/Unsqueeze", [part, axis], [*stored, 1])
                   for index, part in enumerate([*parts, rest])]
        stacked = self._op("Concat", f"{name}/Concat", columns, [*stored, 8 // bits], axis=-1)
        known = shape if shape != [-1] else [stored[0] * 8 // bits]
        return self._op("Reshape", f"{name}/Reshape", [stacked, _int64([0, 0, *known])], known)

    def _op(self, kind: str, name: str, inputs: list[str], shape: list, dtype: ir.DataType = ir.DataType.FLOAT,
            **attributes) -> str:
        """A node whose output is [batch, sequence, *shape]; that output's name."""
        output = f"{name}/output_0"
        self.make_node(kind, inputs=inputs, outputs=[output], name=name, **attributes)
        self.make_value(output, dtype, shape=["batch_size", "sequence_length", *shape])
        return output


def _int64(values: list[int]) -> str:
    """The builder's name for a constant."""
    return f"/model/constants/INT64/{values}"

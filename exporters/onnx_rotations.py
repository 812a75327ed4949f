"""R3 and R4 as ordinary ONNX nodes, which every onnxruntime runs."""

from __future__ import annotations

from optrot_edge.sylvester import kronecker_orders, sylvester

ONE_MATRIX = 128  # largest Hadamard block that is one MatMul


class OnlineRotations:
    """Methods for a class of onnxruntime-genai's builder; `plan` (r3_block, r4_block) and `stored` are that class's."""

    def _hadamard(self, name: str, root_input: str, width: int, block: int) -> str:
        """Walsh-Hadamard transform of every `block` of the last axis, `width` wide; the new value's name.

        Blocks above ONE_MATRIX go as a matrix [p, q] through one of order q from the right and of order p from the
        left, of which Sylvester's matrix of order p · q is the Kronecker product (`benchmarks/onnx_r4.py`).
        """
        left, right = hadamard_factors(block)
        inner = [width // block, *([left, right] if left > 1 else [block])]
        shape = ["batch_size", "sequence_length", *inner]
        self.make_reshape(f"{name}/Split", [root_input, f"/model/constants/INT64/{[0, 0, *inner]}"], self.io_dtype,
                          shape)
        value = f"{name}/Split/output_0"
        for side, order in (("Right", right), ("Left", left)):
            if order > 1:
                matrix = self._hadamard_matrix(order)
                inputs = [value, matrix] if side == "Right" else [matrix, value]
                value = f"{name}/{side}/output_0"
                self.make_node("MatMul", inputs=inputs, outputs=[value], name=f"{name}/{side}")
                self.make_value(value, self.io_dtype, shape=shape)
        self.make_reshape(f"{name}/Join", [value, f"/model/constants/INT64/[0, 0, {width}]"], self.io_dtype,
                          self.make_hidden_state_shape(last_dim=width))
        return f"{name}/Join/output_0"

    def _hadamard_matrix(self, order: int) -> str:
        """Name of the matrix that all layers share."""
        name = f"hadamard_{order}"
        if name not in self.stored:
            self.stored.add(name)
            self.make_initializer(sylvester(order), name, to=self.io_dtype)
        return name

    def is_fused_rope_supported(self) -> bool:
        return self.plan.r3_block is None and super().is_fused_rope_supported()

    def make_attention_qk_rope(self, layer_id: int, **kwargs):
        caches = super().make_attention_qk_rope(layer_id, **kwargs)
        if self.plan.r3_block:
            for letter, heads in (("q", self.num_attn_heads), ("k", self.num_kv_heads)):
                self.attention_attrs[f"{letter}_path"] = self._hadamard(
                    f"/model/layers.{layer_id}/attn/{letter}_rotary/R3", self.attention_attrs[f"{letter}_path"],
                    heads * self.head_size, self.plan.r3_block)
        return caches


def hadamard_factors(block: int) -> tuple[int, int]:
    """Orders of the matrices that transform a block, from the left (1: none) and from the right."""
    return (1, block) if block <= ONE_MATRIX else kronecker_orders(block)

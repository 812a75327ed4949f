"""A shipped file differs from its arm in the embedding and the head, and in nothing else."""

import gguf
import numpy as np
import pytest
from shipping import is_tied, ship

from tests.tiny_gguf import write_gguf


@pytest.mark.parametrize("case", ["smollm2", "llama"])
def test_only_embedding_and_head_change(tiny, tmp_path, case):
    arm = write_gguf(tmp_path / "arm.gguf", tiny(case), qtype=gguf.GGMLQuantizationType.F16,
                     changes={"unknown": 7})
    source = gguf.GGUFReader(arm)
    assert is_tied(arm) == (case == "smollm2")
    types = ("q8_0",) if is_tied(arm) else ("q4_0", "q8_0")
    shipped = gguf.GGUFReader(ship(arm, types, tmp_path / "shipped.gguf"))
    wanted = dict(zip(("token_embd.weight", "output.weight"), types, strict=False))
    assert [t.name for t in shipped.tensors] == [t.name for t in source.tensors]
    for old, new in zip(source.tensors, shipped.tensors, strict=True):
        if old.name in wanted:
            assert new.tensor_type.name.lower() == wanted[old.name]
            weights = gguf.quants.dequantize(new.data, new.tensor_type)
            limit = {"q8_0": 0.01, "q4_0": 0.2}[wanted[old.name]]
            error = np.linalg.norm(weights - old.data.astype(np.float32)) / np.linalg.norm(weights)
            assert 0 < error < limit
        else:
            assert new.tensor_type == old.tensor_type
            assert np.array_equal(new.data, old.data)
    for name, field in source.fields.items():
        assert shipped.fields[name].types == field.types
        assert shipped.fields[name].contents() == field.contents()

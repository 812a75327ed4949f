"""The tensors that a checkpoint must hold: exporters check them before they write anything."""

from __future__ import annotations

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family, get_family
from optrot_edge.tensor_types import all_shapes


def expected_tensors(checkpoint: QuantizedCheckpoint) -> tuple[Family, ModelConfig, dict[str, tuple[int, ...]]]:
    """Family, configuration, and canonical names and shapes in file order; InputError when the checkpoint's differ."""
    config = ModelConfig.from_dict(checkpoint.manifest.get("model"))
    stored = checkpoint.manifest.get("tensors")
    if not isinstance(stored, dict):
        raise InputError(f"{checkpoint.path}: the manifest lists no tensors; quantise again")
    family = get_family(config.family)
    if config.tie_word_embeddings and "lm_head.weight" in checkpoint:
        raise InputError(f"{checkpoint.path}: lm_head.weight is there although the model says that it is "
                         "tied to the embedding; set tie_word_embeddings to false or leave it out")
    if not config.tie_word_embeddings and "lm_head.weight" not in checkpoint:
        raise InputError(f"{checkpoint.path}: no lm_head.weight although the model says that it is not tied "
                         "to the embedding; a runtime would use the embedding in its place")
    shapes = all_shapes(family, config)
    for name in [*shapes, *checkpoint.names]:
        entry = stored.get(name)
        if name not in shapes or entry is None or tuple(entry["shape"]) != shapes[name]:
            found = "nothing" if entry is None else entry["shape"]
            wanted = list(shapes[name]) if name in shapes else "nothing"
            raise InputError(f"{checkpoint.path}: {name} should be {wanted} and is {found}")
    return family, config, shapes

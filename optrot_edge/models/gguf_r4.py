"""How GGUF files with the online rotation R4 are marked. Imports neither torch nor gguf.

`general.architecture` is the base with "-optrot" behind it, which every llama.cpp refuses, so that none computes
nonsense; all other keys keep the base as prefix. `optrot.format_version`, `optrot.base_architecture` and
`optrot.r4_block` say what must be done: `ffn_down` reads its input after a normalised Walsh-Hadamard transform of
blocks of that many channels. The same is said in `prism.hadamard` v1, the keys of PrismML's llama.cpp (pull requests
119 to 121 there).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optrot_edge.errors import InputError

if TYPE_CHECKING:
    from optrot_edge.models.gguf_file import GGUFFile

FORMAT_VERSION = 1
SUFFIX = "-optrot"
VERSION_KEY, BASE_KEY, BLOCK_KEY = "optrot.format_version", "optrot.base_architecture", "optrot.r4_block"


def base_architecture(architecture: str) -> str:
    """The architecture that keys and graph have: "llama" for "llama-optrot"."""
    return architecture.removesuffix(SUFFIX)


def read_r4_block(file: GGUFFile) -> int | None:
    """Block of R4 of a model's file, None without R4.

    Raises InputError for marks that are incomplete, do not fit the model, or are a newer optrot-edge's.
    """
    architecture = file.value("general.architecture")
    if BLOCK_KEY not in file.entries:
        if isinstance(architecture, str) and architecture.endswith(SUFFIX):
            raise InputError(f"{file.path} is {architecture} but lacks {BLOCK_KEY}; export the package again")
        return None
    version = file.value(VERSION_KEY)
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{file.path}: {VERSION_KEY} is {version!r}; export the package again")
    if version > FORMAT_VERSION:
        raise InputError(f"{file.path} was written by a newer optrot-edge (format {version}; this one reads up to "
                         f"{FORMAT_VERSION}); upgrade: pip install --upgrade optrot-edge")
    block = file.value(BLOCK_KEY)
    width = file.value(f"{base_architecture(str(architecture))}.feed_forward_length")
    if not all(isinstance(value, int) and value is not True for value in (block, width)) or (
            block < 2 or block & (block - 1) or width < block or width % block):
        raise InputError(f"{file.path}: {BLOCK_KEY} is {block!r}, which is no power of two that divides the "
                         f"feed-forward length {width!r}; export the package again")
    return block

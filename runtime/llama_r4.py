"""The online rotation R4 in llama.cpp as it is: an eval callback that transforms what `ffn_down` reads, in place.

llama.cpp calls `llama_context_params.cb_eval` with every node of its graph: first to ask whether the node's result is
wanted (ask), then, for those that are, when it has been computed. `examples/llama_cpp/optrot_r4.c` is this file in C.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.sylvester import kronecker_orders, sylvester

TENSOR = "ffn_swiglu"  # with "-" and the layer behind it: the input of ffn_down, as llama_graph's build_ffn names it
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_FUNCTIONS = (("ggml_get_name", ctypes.c_char_p, [_POINTER]), ("ggml_nelements", ctypes.c_int64, [_POINTER]),
              ("ggml_nbytes", _SIZE, [_POINTER]),
              ("ggml_backend_tensor_get", None, [_POINTER, _POINTER, _SIZE, _SIZE]),
              ("ggml_backend_tensor_set", None, [_POINTER, _POINTER, _SIZE, _SIZE]))
_LIBRARIES = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}


def architecture_override(c, architecture: str):
    """`llama_model_params.kv_overrides` under which a file counts as `architecture`; must outlive the loading."""
    overrides = (c.llama_model_kv_override * 2)()  # the empty key of the second ends the list
    overrides[0].tag, overrides[0].key = c.LLAMA_KV_OVERRIDE_TYPE_STR, b"general.architecture"
    overrides[0].value.val_str = architecture.encode()
    return overrides


class R4Callback:
    """R4 for one context: normalised Walsh-Hadamard transforms of blocks of `block` channels in every layer.

    c: the `llama_cpp` module. width: channels of what `ffn_down` reads. `install` it in the parameters of the context,
    and keep it as long as that; call `begin` before each `llama_decode` and `check` after it. Raises InputError when
    ggml's library cannot be found.
    """

    def __init__(self, c, block: int, width: int, layers: int):
        self._ggml = _load_ggml(c)
        self._width, self._names = width, {f"{TENSOR}-{layer}".encode(): layer for layer in range(layers)}
        self._left, self._right = map(sylvester, kronecker_orders(block))
        self._counts = [0] * layers
        self._error: BaseException | None = None
        self._callback = c.ggml_backend_sched_eval_callback(self._eval)

    def install(self, params) -> None:
        """Have contexts that are made with these `llama_context_params` call this object."""
        params.cb_eval = self._callback

    def begin(self) -> None:
        """Forget what was transformed before."""
        self._counts = [0] * len(self._counts)
        self._error = None

    def check(self) -> None:
        """InputError unless every layer was transformed, each as often as the others, since `begin`."""
        if self._error is not None:
            raise self._error
        wrong = [layer for layer, count in enumerate(self._counts) if not count or count != self._counts[0]]
        if wrong:
            raise InputError(f"this llama.cpp computed no {TENSOR}-{wrong[0]}, so that R4 could not be applied and the "
                             "logits are wrong; install the llama-cpp-python that constraints.txt of optrot-edge names")

    def _eval(self, tensor: int, ask: bool, _user_data) -> bool:
        layer = self._names.get(self._ggml.ggml_get_name(tensor))
        if ask or layer is None:
            return layer is not None
        try:
            self._transform(tensor)
        except BaseException as error:  # nothing can be raised through C: `check` does it
            self._error = self._error or error
            return False
        self._counts[layer] += 1
        return True

    def _transform(self, tensor: int) -> None:
        """`x ← x H` for the tensor's rows, wherever its memory is."""
        size = self._ggml.ggml_nelements(tensor)
        if size % self._width or self._ggml.ggml_nbytes(tensor) != 4 * size:
            name = self._ggml.ggml_get_name(tensor).decode()
            raise InputError(f"llama.cpp's {name} is not float32 in rows of {self._width}, so that R4 cannot be "
                             "applied; install the llama-cpp-python that constraints.txt of optrot-edge names")
        if not size:  # the last layer of a batch that wants no logits
            return
        x = np.empty(size, np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, x.ctypes.data, 0, x.nbytes)
        x = transform(x, self._left, self._right)
        self._ggml.ggml_backend_tensor_set(tensor, x.ctypes.data, 0, x.nbytes)


def transform(x: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Contiguous float32 [n] times kron(left, right) by blocks; both symmetric, so that a block X as a matrix becomes
    left · X · right: two small products instead of a large one.

    Block by block, because one product of all rows makes the BLAS start threads, which then fight llama.cpp's.
    """
    return (left @ x.reshape(-1, len(left), len(right)) @ right).reshape(-1)


def _load_ggml(c):
    """ggml's library, which llama.cpp has loaded, with the functions used here declared."""
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(c.__file__).parent / "lib")
    path = folder / _LIBRARIES.get(sys.platform, "libggml-base.so")
    try:
        ggml = ctypes.CDLL(str(path))
        for name, result, arguments in _FUNCTIONS:
            getattr(ggml, name).restype, getattr(ggml, name).argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise InputError(f"a file with R4 needs ggml's library beside llama.cpp's: {error}; install the "
                         "llama-cpp-python that constraints.txt of optrot-edge names") from None
    return ggml

"""One matrix product of ggml, the library under llama.cpp, called as llama.cpp calls it: for `quant.eval.kernel_speed`.

The weight goes into the first of ggml's repacking buffers (AMX, interleaved blocks) that takes the product, else into
plain memory; the tokens are float32, which the product quantizes itself. The library comes with llama-cpp-python.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

POINTER, SIZE, INT, LONG, BOOL = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64, ctypes.c_bool


SILENT = ctypes.CFUNCTYPE(None, INT, ctypes.c_char_p, POINTER)(lambda level, text, data: None)


class InitParams(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", BOOL))


# name -> (result, arguments); from ggml.h, ggml-backend.h and ggml-cpu.h
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_log_set": (None, (POINTER, POINTER)),
    "ggml_init": (POINTER, (InitParams,)),
    "ggml_free": (None, (POINTER,)),
    "ggml_tensor_overhead": (SIZE, ()),
    "ggml_graph_overhead_custom": (SIZE, (SIZE, BOOL)),
    "ggml_new_tensor_2d": (POINTER, (POINTER, INT, LONG, LONG)),
    "ggml_mul_mat": (POINTER, (POINTER, POINTER, POINTER)),
    "ggml_new_graph_custom": (POINTER, (POINTER, SIZE, BOOL)),
    "ggml_build_forward_expand": (None, (POINTER, POINTER)),
    "ggml_nbytes": (SIZE, (POINTER,)),
    "ggml_backend_cpu_init": (POINTER, ()),
    "ggml_backend_free": (None, (POINTER,)),
    "ggml_backend_cpu_set_n_threads": (None, (POINTER, INT)),
    "ggml_backend_cpu_buffer_type": (POINTER, ()),
    "ggml_backend_get_device": (POINTER, (POINTER,)),
    "ggml_backend_dev_backend_reg": (POINTER, (POINTER,)),
    "ggml_backend_dev_supports_op": (BOOL, (POINTER, POINTER)),
    "ggml_backend_reg_get_proc_address": (POINTER, (POINTER, ctypes.c_char_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (POINTER, (POINTER, POINTER)),
    "ggml_backend_alloc_ctx_tensors": (POINTER, (POINTER, POINTER)),
    "ggml_backend_buft_name": (ctypes.c_char_p, (POINTER,)),
    "ggml_backend_buffer_free": (None, (POINTER,)),
    "ggml_backend_tensor_set": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_tensor_get": (None, (POINTER, POINTER, SIZE, SIZE)),
    "ggml_backend_graph_compute": (INT, (POINTER, POINTER)),
}


def installed() -> bool:
    """Whether llama-cpp-python, which carries ggml, is there."""
    return importlib.util.find_spec("llama_cpp") is not None


@cache
def functions() -> Any:
    """ggml's functions with their signatures, by name without `ggml_`."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "lib"
    libraries = [ctypes.CDLL(str(next(folder.glob(f"lib{name}.*")))) for name in ("ggml-base", "ggml-cpu", "ggml")]
    found = {}
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(next(lib for lib in libraries if hasattr(lib, name)), name)
        function.restype, function.argtypes = result, arguments
        found[name.removeprefix("ggml_")] = function
    found["log_set"](SILENT, None)
    return type("Ggml", (), {name: staticmethod(function) for name, function in found.items()})


@cache
def lane() -> ThreadPoolExecutor:
    """The one thread that computes with ggml.

    ggml configures a thread's AMX tiles once and trusts them from then on; where torch or our kernels use tiles in the
    same thread, its next product is an illegal instruction.
    """
    return ThreadPoolExecutor(1)


class Matmul:
    """y = x @ dequantize(weight)^T for `copies` equal weights [n, k] in ggml type `kind` ("Q4_0", "Q8_0"), m tokens."""

    def __init__(self, kind: str, weight: NDArray[np.float32], m: int, threads: int, copies: int = 1) -> None:
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        self.lib = functions()
        self.shape = (m, len(weight))
        code = GGMLQuantizationType[kind]
        packed = np.ascontiguousarray(quantize(weight, code))
        self.weight_bytes = packed.nbytes
        self.backend = self.lib.backend_cpu_init()
        self.lib.backend_cpu_set_n_threads(self.backend, threads)
        device = self.lib.backend_get_device(self.backend)
        n, k = weight.shape
        for name, kind_of_buffer in self._buffer_types():
            self.buffer_name = name
            weights, context = self._context(copies), self._context(2 * copies + 2, graphs=copies)
            tensors = [self.lib.new_tensor_2d(weights, int(code), k, n) for _ in range(copies)]
            buffer = self.lib.backend_alloc_ctx_tensors_from_buft(weights, kind_of_buffer)
            self.x = self.lib.new_tensor_2d(context, int(GGMLQuantizationType.F32), k, m)
            self.products = [self.lib.mul_mat(context, tensor, self.x) for tensor in tensors]
            if self.lib.backend_dev_supports_op(device, self.products[0]):
                break
            self._free([buffer], [weights, context])
        for tensor in tensors:
            self.lib.backend_tensor_set(tensor, packed.ctypes.data, 0, packed.nbytes)
        buffers = [buffer, self.lib.backend_alloc_ctx_tensors(context, self.backend)]
        self.graphs = [self.lib.new_graph_custom(context, 8, False) for _ in range(copies)]
        for graph, product in zip(self.graphs, self.products, strict=True):
            self.lib.build_forward_expand(graph, product)
        self.following = 0
        finalize(self, self._free, buffers, [weights, context], [self.backend])

    @staticmethod
    def _free(buffers: list[Any], contexts: list[Any], backends: Sequence[Any] = ()) -> None:
        lib = functions()
        for free, things in ((lib.backend_buffer_free, buffers), (lib.free, contexts), (lib.backend_free, backends)):
            for thing in things:
                free(thing)

    def _context(self, tensors: int, graphs: int = 0) -> Any:
        size = tensors * self.lib.tensor_overhead() + graphs * self.lib.graph_overhead_custom(8, False)
        return self.lib.init(InitParams(size, None, True))

    def _buffer_types(self) -> list[tuple[str, Any]]:
        """Repacking ones in ggml's order, then plain memory."""
        registry = self.lib.backend_dev_backend_reg(self.lib.backend_get_device(self.backend))
        address = self.lib.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        function = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(address)
        extra = function(self.lib.backend_get_device(self.backend))
        found: list[Any] = []
        while extra and extra[len(found)]:
            found.append(extra[len(found)])
        found.append(self.lib.backend_cpu_buffer_type())
        return [(self.lib.backend_buft_name(each).decode(), each) for each in found]

    def set_tokens(self, x: NDArray[np.float32]) -> None:
        """x [m, k]."""
        x = np.ascontiguousarray(x, dtype=np.float32)
        self.lib.backend_tensor_set(self.x, x.ctypes.data, 0, x.nbytes)

    def __call__(self) -> None:
        """The product with the next copy of the weight."""
        self.seconds()

    def seconds(self) -> float:
        """The same, and how long it took in ggml's thread."""
        return lane().submit(self._compute).result()

    def _compute(self) -> float:
        start = time.perf_counter()
        code = self.lib.backend_graph_compute(self.backend, self.graphs[self.following])
        if code != 0:
            raise RuntimeError(f"ggml_backend_graph_compute ended with {code}")
        self.following = (self.following + 1) % len(self.graphs)
        return time.perf_counter() - start

    def result(self) -> NDArray[np.float32]:
        """y [m, n] of the copy that was used last."""
        y = np.full(self.shape, np.nan, dtype=np.float32)
        self.lib.backend_tensor_get(self.products[self.following - 1], y.ctypes.data, 0, y.nbytes)
        return y


def random(kind: str, m: int, n: int, k: int, threads: int, cold_bytes: int) -> Matmul:
    """A product of random numbers, with copies of the weight that exceed `cold_bytes` together."""
    rng = np.random.default_rng(0)
    bits = 4.5 if kind == "Q4_0" else 8.5
    made = Matmul(
        kind, rng.standard_normal((n, k), dtype=np.float32), m, threads, copies=int(cold_bytes // (n * k * bits / 8)) + 1
    )
    made.set_tokens(rng.standard_normal((m, k), dtype=np.float32))
    return made

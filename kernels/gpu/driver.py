"""The CUDA driver through ctypes: load a cubin into torch's context, launch it on torch's stream. No Triton, no toolkit."""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

LIBRARY = "libcuda.so.1"
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
SHARED_WITHOUT_ASKING = 48 * 1024
BUFFER_POINTER, BUFFER_SIZE, END = 1, 2, 0  # CU_LAUNCH_PARAM_*
SIGNATURES = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, c_void_p],
    "cuGetErrorString": [c_int, c_void_p],
    "cuDeviceGet": [c_void_p, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuModuleLoadData": [c_void_p, c_char_p],
    "cuModuleGetFunction": [c_void_p, c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
}


class CudaError(RuntimeError):
    """A driver call that failed: its name, the driver's error name and message."""


class Driver:
    """The calls that loading and launching take; each raises CudaError unless the driver returned success."""

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self.cuda = ctypes.CDLL(library)
        except OSError as error:
            raise CudaError(f"{library} cannot be loaded: {error}") from error
        for name, types in SIGNATURES.items():
            getattr(self.cuda, name).argtypes = types
        self.call("cuInit", 0)
        self.contexts: dict[int, c_void_p] = {}

    def call(self, name: str, *args: object) -> None:
        code = getattr(self.cuda, name)(*args)
        if code:
            raise CudaError(f"{name} failed: {self.text('cuGetErrorName', code)}: {self.text('cuGetErrorString', code)}")

    def text(self, name: str, code: int) -> str:
        found = c_char_p()
        failed = getattr(self.cuda, name)(code, byref(found))
        return f"error {code}" if failed or found.value is None else found.value.decode()

    def enter(self, index: int) -> None:
        """Make the primary context of device `index`, the one that torch uses, current in this thread."""
        if index not in self.contexts:
            device, context = c_int(), c_void_p()
            self.call("cuDeviceGet", byref(device), index)
            self.call("cuDevicePrimaryCtxRetain", byref(context), device)  # kept: torch does not let go of it either
            self.contexts[index] = context
        self.call("cuCtxSetCurrent", self.contexts[index])

    def load(self, code: bytes, symbol: str, shared_bytes: int, index: int) -> c_void_p:
        """The function `symbol` of a cubin on device `index`, allowed `shared_bytes` of dynamic shared memory."""
        self.enter(index)
        module, function = c_void_p(), c_void_p()
        self.call("cuModuleLoadData", byref(module), code)
        self.call("cuModuleGetFunction", byref(function), module, symbol.encode())
        if shared_bytes > SHARED_WITHOUT_ASKING:
            self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared_bytes)
        return function

    def launch(
        self,
        function: c_void_p,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: bytes,
        index: int,
    ) -> None:
        """Enqueue one launch. parameters: all of the kernel's, packed as its parameter buffer. Does not wait."""
        self.enter(index)
        buffer = (ctypes.c_char * len(parameters)).from_buffer_copy(parameters)
        size = c_size_t(len(parameters))
        extra = (c_void_p * 5)(BUFFER_POINTER, ctypes.addressof(buffer), BUFFER_SIZE, ctypes.addressof(size), END)
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, shared_bytes, stream, None, extra)


@functools.cache
def driver() -> Driver:
    """The driver of this process."""
    return Driver()

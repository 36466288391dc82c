"""Attention on CPUs, and the cache of keys and values that it reads.

Shapes: B batch, H query heads, Hkv key-value heads (H a multiple of Hkv), T queries, S keys the cache has room for, D head
dimension (a multiple of 8, at most 256). Softmax and sums are float32. Tensors may be any views whose D is contiguous, so
what transformers hands over, [B, T, H, D] transposed, is read where it lies.

`start`, one int64, is the number of tokens before the queries: query t sees keys [first[b], start + t]. Nothing beyond is
read, so a static cache needs no clearing. Without `start` every query sees all S keys. `first` [B] int64 is the number of
padding keys on the left; a query that sees no key gives zeros.

The int8 cache holds a key as code * k_scale[b, h, s] * k_channel[h, d] and a value as code * v_scale[b, h, s]. Some
channels of K are many times larger than the others; without the factor per channel they would use up the codes of all.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from quant.kernels.cpu import library

MAX_DIM = 256

_SCHEMA = "(Tensor q, Tensor k, Tensor v, {}Tensor? start, Tensor? first, float scale) -> Tensor"
torch.library.define("lowbit::cpu_attention", _SCHEMA.format(""))
torch.library.define("lowbit::cpu_attention_int8", _SCHEMA.format("Tensor k_scale, Tensor v_scale, Tensor k_channel, "))
torch.library.define(
    "lowbit::cpu_append_kv", "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor start) -> ()"
)
torch.library.define(
    "lowbit::cpu_append_kv_int8",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_scale, Tensor(d!) v_scale, "
    "Tensor k_channel, Tensor start) -> ()",
)

_Sizes15, _Sizes11 = ctypes.c_int64 * 15, ctypes.c_int64 * 11


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes that would make C++ read outside a tensor."""
    (b, h, _, d), kv = q.shape, k.shape
    if kv != v.shape or kv[0] != b or kv[3] != d or kv[1] == 0 or h % kv[1]:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(kv)}, v {tuple(v.shape)}; attention needs [B, H, T, D] and twice [B, Hkv, S, D]"
        )
    if d % 8 or d > MAX_DIM:
        raise ValueError(f"head dimension {d} is not supported; it must be a multiple of 8 and at most {MAX_DIM}")


def _inner(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.stride(3) != 1:
            raise ValueError(f"strides {tensor.stride()}: the last dimension must be contiguous")


def _position(start: Tensor, tokens: int, room: int) -> int:
    """`start` as a number, after checking that the tokens fit."""
    first = int(start)
    if first < 0 or first + tokens > room:
        raise ValueError(f"tokens {first} to {first + tokens} do not fit into a cache of {room}; make it longer")
    return first


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scales: tuple[Tensor, Tensor, Tensor] | None, start: Tensor | None, first: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    _check(q, k, v)
    _inner(q, k, v)
    (b, h, t, d), (hkv, s) = q.shape, k.shape[1:3]
    if scales is None and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}; they must be of one dtype")
    if not scale > 0:
        raise ValueError(f"scale {scale} is not supported; it must be positive")
    if first is not None and (first.dtype != torch.int64 or first.numel() != b or not first.is_contiguous()):
        raise ValueError(f"first is {first.dtype} {tuple(first.shape)}; it must be int64 [{b}]")
    position = -1 if start is None else _position(start, t, s)
    y = torch.empty((b, t, h, d), dtype=q.dtype)
    if y.numel() == 0:
        return y
    sizes = _Sizes15(b, h, hkv, t, s, d, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    pointers = (None, None, None) if scales is None else tuple(one.data_ptr() for one in scales)
    library.load().lowbit_attention(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), y.data_ptr(), *pointers),
        *(None if first is None else first.data_ptr(), sizes, position, scale, library.dtype_code(q)),
    )
    return y


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, first: Tensor | None, scale: float) -> Tensor:
    """softmax(scale * q . k) . v as [B, T, H, D]. q [B, H, T, D]; k, v [B, Hkv, S, D]; all of one float dtype."""
    return _attend(q, k, v, None, start, first, scale)


def _check_scales(cache: Tensor, k_scale: Tensor, v_scale: Tensor, k_channel: Tensor) -> None:
    b, hkv, s, d = cache.shape
    for name, given, shape in (
        ("k_scale", k_scale, (b, hkv, s)),
        ("v_scale", v_scale, (b, hkv, s)),
        ("k_channel", k_channel, (hkv, d)),
    ):
        if given.shape != shape or given.dtype != torch.float32 or not given.is_contiguous():
            raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}; it must be a contiguous float32 {shape}")


def cpu_attention_int8(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, k_channel: Tensor, start: Tensor | None,
    first: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The same over int8 k, v [B, Hkv, S, D] with float32 k_scale, v_scale [B, Hkv, S] and k_channel [Hkv, D]."""
    if not k.dtype == v.dtype == torch.int8:
        raise ValueError(f"k is {k.dtype}, v {v.dtype}; this operator reads an int8 cache")
    _check_scales(k, k_scale, v_scale, k_channel)
    return _attend(q, k, v, (k_scale, v_scale, k_channel), start, first, scale)


def _append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, scales: tuple[Tensor, Tensor, Tensor] | None, start: Tensor
) -> None:
    (b, hkv, t, d), (s, stored) = k.shape, (k_cache.shape[2], k_cache.dtype)
    if k.shape != v.shape or k_cache.shape != v_cache.shape or k_cache.shape != (b, hkv, s, d) or k.dtype != v.dtype:
        raise ValueError(
            f"k is {tuple(k.shape)}, v {tuple(v.shape)}, the caches {tuple(k_cache.shape)} and {tuple(v_cache.shape)}; "
            "they must be twice [B, Hkv, T, D] of one dtype and twice [B, Hkv, S, D]"
        )
    if d > MAX_DIM:
        raise ValueError(f"head dimension {d} is not supported; it must be at most {MAX_DIM}")
    wanted = k.dtype if scales is None else torch.int8
    if not stored == v_cache.dtype == wanted or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        raise ValueError(f"the caches are {stored} and {v_cache.dtype}; they must be contiguous {wanted}")
    _inner(k, v)
    position = _position(start, t, s)
    sizes = _Sizes11(b, hkv, t, s, d, *k.stride()[:3], *v.stride()[:3])
    pointers = (None, None, None) if scales is None else tuple(one.data_ptr() for one in scales)
    library.load().lowbit_append(
        *(k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), *pointers),
        *(sizes, position, library.dtype_code(k)),
    )


def cpu_append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, start: Tensor) -> None:
    """Write k, v [B, Hkv, T, D] to places [start, start + T) of the contiguous caches [B, Hkv, S, D] of the same dtype."""
    _append(k, v, k_cache, v_cache, None, start)


def cpu_append_kv_int8(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor, v_scale: Tensor, k_channel: Tensor, start: Tensor
) -> None:
    """The same into int8 caches and their scales; see the top of this file."""
    _check_scales(k_cache, k_scale, v_scale, k_channel)
    _append(k, v, k_cache, v_cache, (k_scale, v_scale, k_channel), start)


def _fake(q: Tensor, *_: Tensor | float | None) -> Tensor:
    b, h, t, d = q.shape
    return q.new_empty((b, t, h, d))


def _fake_append(*_: Tensor) -> None:
    return None


for _name, _function in (("cpu_attention", cpu_attention), ("cpu_attention_int8", cpu_attention_int8)):
    torch.library.impl(f"lowbit::{_name}", "cpu", _function)
    torch.library.register_fake(f"lowbit::{_name}", _fake)
for _name, _writer in (("cpu_append_kv", cpu_append_kv), ("cpu_append_kv_int8", cpu_append_kv_int8)):
    torch.library.impl(f"lowbit::{_name}", "cpu", _writer)
    torch.library.register_fake(f"lowbit::{_name}", _fake_append)

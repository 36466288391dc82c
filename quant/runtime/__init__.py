"""Generation as compiled graphs: a decode step is one call, without Python between its layers.

    model = quant.load("out", compile=True)      # compiles once per kind of model and machine, then finds it on disk
    model.generate(...)                          # as always; runs the graphs where it can, says so where it cannot

`decoder.py` and `whisper.py` say what a step computes, `attend.py` how it keeps keys and values, `artifact.py` compiles and
keeps graphs, `shims.h` is how graphs call our kernels, `session.py` runs them, `generate.py` ties them to transformers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from quant.runtime import artifact, attend, decoder, whisper
from quant.runtime.generate import attach
from quant.runtime.linears import dtype_of
from quant.runtime.session import Session, SpeechSession, graph


def refuses(model: Any) -> str | None:
    """Why `model` cannot be compiled, or None."""
    from quant.kernels.cpu import library
    from quant.serve import softmax, token_bits

    if model.device.type != "cpu":
        return f"it is on {model.device}; compiled are models on the CPU"
    if str(model.config._attn_implementation).startswith(softmax.PREFIX):
        return "its attention probabilities are quantized; compiled are models with float attention"
    if model.config._attn_implementation == token_bits.NAME:
        return "attention decides the bits of its tokens; compiled are models that read all tokens alike"
    try:
        library.load()
    except library.Unavailable as error:
        return str(error)
    family = whisper if model.config.is_encoder_decoder else decoder
    why: str | None = family.refuses(model)
    return why


def compiled(model: Any, cache: str = "float", say: artifact.Say | None = None) -> bool:
    """Make `model.generate` run compiled graphs; `model.runtime` is then the Session. True where that was possible.

    cache: "float" keeps keys and values in the model's dtype, "int8" in about half of bfloat16's memory. say: is told, in one
    line, what was compiled and how long it took; None never compiles and only takes graphs that are on disk. A model that
    cannot be compiled stays as it is, with a warning that gives the reason. Raises ValueError for another `cache`.
    """
    if cache not in attend.KINDS:
        raise ValueError(f"cache {cache!r} is unknown; allowed: {', '.join(attend.KINDS)}")
    if (reason := refuses(model)) is not None:
        if say is not None:
            warnings.warn(f"{type(model).__name__} stays eager, not compiled: {reason}", stacklevel=2)
        return False
    dtype = dtype_of(model)
    about = {"cache": cache, "dtype": str(dtype), "config": model.config.to_json_string()}
    runtime = (_speech if model.config.is_encoder_decoder else _text)(model, about, cache, dtype, say)
    if runtime is not None:
        attach(model, runtime)
    return runtime is not None


def _text(model: Any, about: dict[str, Any], cache: str, dtype: torch.dtype, say: artifact.Say | None) -> Session | None:
    text = decoder.Decoder(model).eval()
    made = graph(text, about, cache, dtype, None, say)
    return None if made is None else Session(text, cache, dtype, made)


def _speech(model: Any, about: dict[str, Any], cache: str, dtype: torch.dtype, say: artifact.Say | None) -> Session | None:
    text, audio = whisper.Decoder(model).eval(), whisper.Audio(model).eval()
    hidden = torch.zeros(2, model.config.max_source_positions, model.config.d_model, dtype=dtype)
    heard = artifact.get("audio", audio, about, (hidden,), ({0: torch.export.Dim("b", min=1, max=4096)},), say)
    if heard is None:
        return None
    with torch.no_grad():
        keys = audio(hidden[:1])[0][0]
    made = graph(text, about, cache, dtype, keys.shape[1:], say)
    return None if made is None else SpeechSession(text, cache, dtype, made, heard)

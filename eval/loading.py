"""Opens either side of a comparison: a folder this package wrote, or a float checkpoint, as an ordinary transformers model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from quant.masked import Masking, bidirectional, masking

Kind = Literal["text", "masked", "speech"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ValueError names the file when it is absent or is not one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}; give a model folder with a config.json") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}; a model folder's JSON files hold an object")
    return found


def is_ours(folder: Path) -> bool:
    """True for a folder written by `quantize`."""
    method = (read_json(folder / "config.json").get("quantization_config") or {}).get("quant_method")
    return method == "lowbit"


def kind(folder: Path) -> Kind:
    """Whether `folder` holds a speech recognizer (an encoder-decoder that hears), a masked-diffusion language model or a
    causal one.

    Raises ValueError for any other encoder-decoder, and for a model that attends to both sides but names no mask token.
    """
    config = read_json(folder / "config.json")
    if not config.get("is_encoder_decoder"):
        if bidirectional(config) and masking(config) is None:
            raise ValueError(
                f"{folder} holds a model that attends to both sides, so it has no perplexity, and names no mask token; "
                "if it fills in masks, write mask_token_id into its config.json"
            )
        return "masked" if bidirectional(config) else "text"
    if config.get("model_type") in {"whisper", "moonshine", "speech_to_text"}:
        return "speech"
    raise ValueError(
        f"{folder} is an encoder-decoder of type {config.get('model_type')!r}; evaluated are causal language models and "
        "speech recognizers (whisper, moonshine, speech_to_text)"
    )


def masking_of(folder: Path) -> Masking:
    """How the masked-diffusion model of `folder` is masked."""
    found = masking(read_json(folder / "config.json"))
    assert found is not None, folder
    return found


def require_next_token(folder: Path) -> None:
    """Raise ValueError for a model that does not write token after token, each from those before."""
    if kind(folder) == "masked":
        raise ValueError(
            f"{folder} holds a masked-diffusion model, which does not write token after token; `quantize eval` measures it"
        )


def load(folder: Path, dtype: torch.dtype, device: str, compile: bool | None = False) -> Any:  # noqa: A002
    """The model of `folder` in eval mode, float tensors as `dtype`, on `device`; quantized linears stay packed.

    compile: as of quant.load, for a quantized model on a CPU.
    """
    if is_ours(folder):
        import quant

        return quant.load(folder, dtype=dtype, device=device, compile=compile and device == "cpu").eval()
    from transformers import AutoModelForCausalLM, AutoModelForSpeechSeq2Seq

    from quant import adopted

    adopted.register()
    auto = AutoModelForSpeechSeq2Seq if kind(folder) == "speech" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype).to(device).eval()


def source(folder: Path) -> str | None:
    """The float model recorded as the origin of a quantized `folder`; None where nothing is recorded."""
    path = folder / "report.json"
    recorded = read_json(path).get("source") if path.is_file() else None
    return str(recorded) if recorded else None


def sides(out: str, against: str | None, say: Callable[[str], None]) -> tuple[Path, Path | None]:
    """Folders of the model and of its reference: `against`, else the recorded source; None, and `say` why, without either."""
    from quant.models import resolve

    folder = resolve(out)
    if against is not None:
        return folder, resolve(against)
    recorded = source(folder)
    if recorded is None:
        say(f"{out} records no source and --against is not given: measured without a reference")
        return folder, None
    try:
        return folder, resolve(recorded)
    except ValueError as error:
        say(f"the recorded source {recorded!r} is not there ({error}): measured without a reference; name it with --against")
        return folder, None


def weight_bytes(folder: Path) -> int:
    """Bytes on disk of the safetensors files of `folder`."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def quiet() -> None:
    """Keep transformers to errors: its progress bars and generation advice drown a report."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def versions() -> dict[str, str]:
    """Versions of what computes the numbers, for reports."""
    import platform

    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}

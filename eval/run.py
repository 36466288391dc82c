"""`quantize run OUT INPUT`: one greedy answer, or one transcript, from a quantized (or float) folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from quant.eval import loading


def answer(model: Any, tokenizer: Any, prompt: str, new: int) -> str:
    """The model's greedy reply; the chat template is applied where the tokenizer has one."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    said = model.generate(**inputs, max_new_tokens=new, do_sample=False)
    text: str = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def transcribe(model: Any, processor: Any, path: Path) -> str:
    """The model's greedy transcript of the first 30 s of an audio file."""
    from quant import audio

    if not path.is_file():
        raise ValueError(f"{path} is no audio file; a speech model needs one, for instance clip.wav")
    (features,) = audio.features(processor, [audio.read_clip(path)])
    said = model.generate(features.input_features.to(model.device, model.dtype), do_sample=False, num_beams=1)
    text: str = processor.batch_decode(said, skip_special_tokens=True)[0]
    return text.strip()


@click.command("run")
@click.argument("out")
@click.argument("given", metavar="INPUT")
@click.option("--new", default=80, show_default=True, type=click.IntRange(min=1), help="Tokens to generate at most.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(list(loading.DTYPES)))
@click.option("--device", default="cpu", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="Compile a quantized OUT first, once; later runs find it on disk.")
def command(out: str, given: str, new: int, dtype: str, device: str, compiled: bool) -> None:
    """Answer INPUT (a prompt, or an audio file for a speech model) with OUT."""
    from transformers import AutoProcessor, AutoTokenizer

    from quant.models import resolve

    loading.quiet()
    folder = resolve(out)
    loading.require_next_token(folder)
    speech = loading.kind(folder) == "speech"
    model = loading.load(folder, loading.DTYPES[dtype], device, compiled or None)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with torch.inference_mode():
        if speech:
            console.print(transcribe(model, AutoProcessor.from_pretrained(folder), Path(given)))
        else:
            console.print(answer(model, AutoTokenizer.from_pretrained(folder), given, new))

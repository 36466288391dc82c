"""Whether compiled graphs write what eager layers write: greedy ids of the same prompts or clips, counted.

    python -m quant.eval.same_text OUT [--audio CLIPS] [--limit 12] [--new 48] [--dtype bfloat16]

The two are the same model in the same process; they are equal where every id is. The logits of the last prompt are compared
as well, since equal texts may hide unequal numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from quant.eval import loading
from quant.eval.samples import common
from quant.eval.speech import Recognizer

PROMPT = 32  # tokens of each text window that are the prompt


@dataclass(frozen=True, kw_only=True)
class SameText:
    """Of `texts` texts, how many were equal id by id; of the others, how many new tokens were. `logits`: bit for bit."""

    texts: int
    equal: int
    first_differences: tuple[int, ...]
    equal_logits: int


Write = Callable[[Any], tuple[Tensor, Tensor]]  # model -> new ids [T], their logits [T, V]


def text_writers(folder: Path, text: str | None, limit: int, new: int) -> Iterator[Write]:
    """One per prompt: the beginnings of windows of the evaluation text."""
    from transformers import AutoTokenizer

    from quant.text import documents, windows

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for ids in windows(tokenizer, documents(text, "evaluation"), 8 * PROMPT, limit, seed=None).tokens[:, :PROMPT]:

        def write(model: Any, prompt: Tensor = ids[None]) -> tuple[Tensor, Tensor]:
            out = model.generate(prompt, do_sample=False, max_new_tokens=new, return_dict_in_generate=True, output_logits=True)
            return out.sequences[0, PROMPT:], torch.cat(out.logits)

        yield write


def speech_writers(folder: Path, audio: str, limit: int, new: int, language: str) -> Iterator[Write]:
    """One per clip."""
    from transformers import AutoProcessor

    from quant.audio import clips

    processor = AutoProcessor.from_pretrained(folder)
    for clip in clips(audio, limit):

        def write(model: Any, samples: Any = clip.samples) -> tuple[Tensor, Tensor]:
            recognizer = Recognizer(model, processor, language)
            out = model.generate(
                **recognizer.features(samples),
                **recognizer.options,
                num_beams=1,
                do_sample=False,
                max_new_tokens=new,
                return_dict_in_generate=True,
                output_logits=True,
            )
            return out.sequences[0][-len(out.logits) :], torch.cat(out.logits)

        yield write


@torch.inference_mode()
def count(eager: Any, fast: Any, writers: Iterator[Write]) -> SameText:
    """Run every writer with both models."""
    texts, logits, differences = 0, 0, []
    for write in writers:
        (a, a_logits), (b, b_logits) = write(eager), write(fast)
        texts += 1
        if not torch.equal(a, b):
            differences.append(common(a, b))
        logits += a_logits.shape == b_logits.shape and torch.equal(a_logits, b_logits)
    return SameText(texts=texts, equal=texts - len(differences), first_differences=tuple(differences), equal_logits=logits)


@click.command()
@click.argument("out", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--text", help="As of `quantize eval`.")
@click.option("--audio", help="Folder or jsonl of clips, for speech models.")
@click.option("--limit", type=int, default=12, show_default=True, help="Prompts or clips.")
@click.option("--new", type=int, default=48, show_default=True, help="Most new tokens of each.")
@click.option("--language", default="en", show_default=True, help="Language code of the clips.")
@click.option("--dtype", type=click.Choice([*loading.DTYPES]), default="bfloat16", show_default=True)
def main(out: Path, text: str | None, audio: str | None, limit: int, new: int, language: str, dtype: str) -> None:
    """Counts the greedy texts that compiled graphs and eager layers write alike."""
    loading.quiet()
    speech = loading.kind(out) == "speech"
    if speech and audio is None:
        raise click.UsageError("a speech model writes from recordings: give --audio a folder of clips or a jsonl")
    eager, fast = (loading.load(out, loading.DTYPES[dtype], "cpu", how) for how in (False, True))
    writers = speech_writers(out, audio, limit, new, language) if speech and audio else text_writers(out, text, limit, new)
    found = count(eager, fast, writers)
    click.echo(f"{found.equal} of {found.texts} texts equal, {found.equal_logits} with equal logits at every token ({dtype})")
    for tokens in found.first_differences:
        click.echo(f"  one differs after {tokens} new tokens")


if __name__ == "__main__":
    main()

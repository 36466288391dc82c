"""Word errors of a transcript, and the two things around them: normalization before, loops beside.

WER = (substitutions + deletions + insertions) / reference words, pooled over the corpus (not a mean of clip WERs)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jiwer
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

LOOP_TIMES = 4
LOOP_LONGEST = 16  # words of the repeated phrase


@dataclass(frozen=True)
class Edits:
    """Word edits of one clip; `words` of its transcript."""

    words: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        """All edits together."""
        return self.substitutions + self.deletions + self.insertions


def edits(text: str, heard: str) -> Edits:
    """Minimal word edits that turn `heard` into `text`; both normalized, words split at spaces, `text` may be empty."""
    out = jiwer.process_words(text, heard)
    return Edits(len(text.split()), out.substitutions, out.deletions, out.insertions)


def loops(text: str) -> bool:
    """True when a phrase of 1 to LOOP_LONGEST words occurs LOOP_TIMES times in a row: the mark of a decoder gone round."""
    words = text.split()
    for size in range(1, min(LOOP_LONGEST, len(words) // LOOP_TIMES) + 1):
        run = 0  # words in a row that equal the word `size` before them
        for at in range(size, len(words)):
            run = run + 1 if words[at] == words[at - size] else 0
            if run >= size * (LOOP_TIMES - 1):
                return True
    return False


def normalizer(processor: Any, language: str, folder: Path | None = None) -> tuple[Callable[[str], str], str]:
    """Whisper's own text normalizer for `language` (code, "en" or other) and its name for the report.

    The English one wants the table of British spellings OpenAI publishes. It is taken from the tokenizer, from
    `normalizer.json` in the model's `folder`, or from an installed whisper-normalizer or openai-whisper package;
    without any, British and American spellings count as different words and the name says so.
    """
    if language != "en":
        return BasicTextNormalizer(), "whisper-basic"
    spelling = getattr(processor.tokenizer, "english_spelling_normalizer", None)
    for path in [] if spelling else _spelling_files(folder):
        if path.is_file():
            spelling = json.loads(path.read_text(encoding="utf-8"))
            break
    name = "whisper-english" if spelling else "whisper-english without spelling map"
    return EnglishTextNormalizer(spelling or {}), name


def _spelling_files(folder: Path | None) -> list[Path]:
    files = [folder / "normalizer.json"] if folder is not None else []
    for package in ("whisper_normalizer", "whisper"):
        spec = find_spec(package)  # located, not imported
        files += (
            [Path(root) / "normalizers" / "english.json" for root in (spec.submodule_search_locations or [])] if spec else []
        )
    return files

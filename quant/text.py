"""Text to calibrate on and to measure on, and its windows of tokens.

Without a source the text is `wikipedia` (a hundred articles, fetched once) and `manual` (the Python manual inside the standard
library: 460 kB of English and code that needs no network); either can be asked for alone. Both are split by topic, by a hash
of its name, into about 70 % for calibration and 30 % for evaluation, so nothing is measured on text that was calibrated on.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quant import wikipedia
from quant.models import from_hub

Split = Literal["calibration", "evaluation"]
SEPARATOR = "\n\n"
CALIBRATION_SHARE = 0.7
HUB_SOURCES: dict[str, tuple[str, dict[Split, str], str]] = {  # name -> hub repository, file per split, its builder
    "wikitext2": (
        "Salesforce/wikitext",
        {
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
        "parquet",
    ),
    "c4": (
        "allenai/c4",
        {"calibration": "en/c4-train.00000-of-01024.json.gz", "evaluation": "en/c4-validation.00000-of-00008.json.gz"},
        "json",
    ),
}
DATASETS = ("wikipedia", "manual", *HUB_SOURCES)
PASSAGE = 4000  # characters, about: passages of the built-in texts are mixed, so that the first windows hold some of each
C4_DOCUMENTS = {"calibration": 4000, "evaluation": 1100}  # from the start of the shard


@dataclass(frozen=True)
class Corpus:
    """Named documents; the name goes into reports."""

    name: str
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Windows:
    """tokens int64 [count, length]; `available` tokens were in the corpus, of which count * length are used."""

    tokens: Tensor
    available: int


def documents(source: str | None, split: Split) -> Corpus:
    """The text of `source`: None (wikipedia and manual), a name of DATASETS, a .txt or .jsonl file, or a folder of such files.

    A file or folder has no split of its own: both splits are all of it. Raises ValueError (one line) when the source is
    missing, empty, not text, a .jsonl row is bad (with its line number), or an index or hub cannot be reached.
    """
    if source is None:
        both = [documents(name, split) for name in ("wikipedia", "manual")]
        mixed = sorted((text for corpus in both for text in corpus.documents), key=_unit)
        return Corpus(" and ".join(corpus.name for corpus in both), tuple(mixed))
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".jsonl") and file.is_file())
        if not files:
            raise ValueError(f"{source} holds no .txt or .jsonl file; give text files, {' or '.join(DATASETS)}")
        return Corpus(source, tuple(text for file in files for text in _read(file)))
    if path.is_file():
        return Corpus(source, tuple(_read(path)))
    if source == "manual":
        return Corpus(f"Python {platform.python_version()} manual, {split} part", _passages(_manual(), split))
    if source == "wikipedia":
        try:
            found = wikipedia.articles()
        except ValueError as error:
            raise ValueError(
                f"{error}; or give --calib manual (for evaluation --text manual), which needs no network"
            ) from None
        return Corpus(f"Wikipedia sample, {split} part", _passages(found, split))
    if source in HUB_SOURCES:
        return Corpus(f"{source}, {split} part", _from_hub(source, split))
    raise ValueError(f"{source} does not exist; give a .txt or .jsonl file, a folder of them, or {' or '.join(DATASETS)}")


def windows(tokenizer: Any, corpus: Corpus, length: int, count: int | None, seed: int | None) -> Windows:
    """Non-overlapping windows of `length` tokens of the joined documents, tokenized once; the remainder is dropped.

    `seed` None keeps the order of the text (evaluation, the convention of GPTQ's perplexity); a number shuffles (calibration).
    `count` None takes all; fewer are returned when the text holds fewer: compare `tokens.shape[0]`. The tokenizer adds its
    special tokens once, at the start of the text. Raises ValueError when there is not one whole window.
    """
    # verbose=False: the text is longer than the model's context on purpose, it is cut below
    ids = tokenizer(SEPARATOR.join(corpus.documents), return_attention_mask=False, verbose=False).input_ids
    found = len(ids) // length
    if found == 0:
        raise ValueError(f"{corpus.name} is too short: {len(ids)} tokens, one window needs {length}; give more text")
    tokens = torch.tensor(ids[: found * length], dtype=torch.int64).reshape(found, length)
    if seed is not None:
        tokens = tokens[torch.randperm(found, generator=torch.Generator().manual_seed(seed))]
    return Windows(tokens[:count].clone(), len(ids))


def _manual() -> dict[str, str]:
    """Topics of the Python manual. A paragraph that several topics share is kept in the longest of them only."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, str] = {}
    for topic in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        fresh = []
        for paragraph in topics[topic].strip().split("\n\n"):
            key = " ".join(paragraph.split())  # the same paragraph is indented differently in different topics
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph)
        kept[topic] = SEPARATOR.join(fresh)
    return kept


def _passages(topics: Mapping[str, str], split: Split) -> tuple[str, ...]:
    """The topics that belong to `split` in pieces of whole paragraphs, in an order that mixes topics and never changes."""
    pieces = []
    for topic, text in topics.items():
        if (_unit(topic) < CALIBRATION_SHARE) != (split == "calibration"):
            continue
        piece: list[str] = []
        for paragraph in text.split(SEPARATOR):
            piece.append(paragraph)
            if sum(map(len, piece)) >= PASSAGE:
                pieces.append(SEPARATOR.join(piece))
                piece = []
        pieces.append(SEPARATOR.join(piece))
    return tuple(sorted(filter(None, pieces), key=_unit))


def _unit(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _read(path: Path) -> list[str]:
    """Documents of one file: a .jsonl has one per row, any other file is one document."""
    texts = [_field(path, number, row) for number, row in read_rows(path)] if path.suffix == ".jsonl" else [read_text(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} is empty; give a file with text")
    return texts


def _field(path: Path, number: int, row: dict[str, Any]) -> str:
    strings = {key: value for key, value in row.items() if isinstance(value, str)}
    if "text" not in strings and len(strings) != 1:
        raise ValueError(
            f"{path} line {number} has {', '.join(row) or 'no fields'}; a field text, or one string field, is needed"
        )
    return strings["text"] if "text" in strings else next(iter(strings.values()))


def read_text(path: Path) -> str:
    """Content of a UTF-8 text file. Raises ValueError when it cannot be read or is not text."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); give a .txt or .jsonl file") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if "\0" in text:
        raise ValueError(f"{path} holds NUL bytes, so it is no text; give a .txt or .jsonl file")
    return text


def read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of each row of a .jsonl file. Raises ValueError with the number of a bad line."""
    rows = []
    # not splitlines(): JSON strings may hold U+2028 and other separators unescaped
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error.msg}); each line is one object") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is {type(row).__name__}; each line is one object")
        rows.append((number, row))
    return rows


def _from_hub(name: str, split: Split) -> tuple[str, ...]:
    """WikiText-2 raw (train or test, by line) or the first documents of C4's first English shard (train or validation)."""
    from datasets import load_dataset

    repository, files, kind = HUB_SOURCES[name]
    # one file by name: it is found in the hub's cache without a network, and a missing network is known at once
    file = from_hub(repository, [files[split]], "dataset") / files[split]
    if not file.is_file():
        raise ValueError(f"data set {name} has no {files[split]} on the hub any more; give a .txt or .jsonl file instead")
    rows = load_dataset(kind, data_files=str(file), split="train", streaming=True)
    return tuple(row["text"] for row in islice(rows, C4_DOCUMENTS[split] if name == "c4" else None))

"""Text: the built-in split shares nothing, sources are refused in one line, windows are the text and nothing else."""

from __future__ import annotations

import bz2
import hashlib
import json
from pathlib import Path

import pytest
import torch

from quant import text, wikipedia
from quant.text import Corpus, documents, windows


class Letters:
    """A tokenizer with one token per character and a start token."""

    class Output:
        """What a tokenizer call returns."""

        def __init__(self, ids: list[int]) -> None:
            self.input_ids = ids

    def __call__(self, content: str, **options: object) -> Letters.Output:
        return Letters.Output([0, *map(ord, content)])


def paragraphs(corpus: Corpus) -> set[str]:
    return {" ".join(part.split()) for document in corpus.documents for part in document.split("\n\n")} - {""}


def refusal(source: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        documents(source, "calibration")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_splits_of_the_manual_share_no_paragraph() -> None:
    calibration, evaluation = documents("manual", "calibration"), documents("manual", "evaluation")
    assert not paragraphs(calibration) & paragraphs(evaluation)
    assert calibration.name != evaluation.name


def test_the_splits_cover_the_manual_in_the_stated_shares() -> None:
    from pydoc_data.topics import topics

    both = [sum(map(len, documents("manual", split).documents)) for split in ("calibration", "evaluation")]
    assert 0.55 < both[0] / sum(both) < 0.85
    everything = {" ".join(part.split()) for topic in topics.values() for part in topic.strip().split("\n\n")} - {""}
    kept = paragraphs(documents("manual", "calibration")) | paragraphs(documents("manual", "evaluation"))
    assert kept == everything
    assert documents("manual", "evaluation") == documents("manual", "evaluation")


def test_the_default_mixes_articles_and_manual_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = {f"title {i}": "\n\n".join([f"article {i} " + "word " * 300] * 40) for i in range(20)}
    monkeypatch.setattr(wikipedia, "articles", lambda: titles)
    calibration, evaluation = documents(None, "calibration"), documents(None, "evaluation")
    assert {d for d in calibration.documents if d.startswith("article")}.isdisjoint(evaluation.documents)
    first = [d.startswith("article") for d in calibration.documents[:12]]
    assert any(first)
    assert not all(first)
    assert set(documents("manual", "calibration").documents) < set(calibration.documents)


def test_articles_are_prose_from_the_kept_slice_and_an_altered_slice_is_not_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prose = "A '''low-bit''' [[number|integer]] takes few bits.<ref>A. B.</ref> It is packed with others into a word of memory."
    source = f"{{{{Infobox}}}}\n== Heading ==\n{prose}\n* a list entry. short\n"
    pages = f"<page><title>Bits</title><revision><text>{source.replace('<', '&lt;')}</text></revision></page>"
    pages += "<page><title>Bit</title><revision><text>#REDIRECT [[Bits]]</text></revision></page>"
    data = bz2.compress(f"<mediawiki xmlns='http://x/'>{pages}</mediawiki>".encode())
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(wikipedia, "SHA256", hashlib.sha256(data).hexdigest())
    kept = tmp_path / "texts" / "wikipedia.xml.bz2"
    kept.parent.mkdir()
    kept.write_bytes(data)
    assert wikipedia.articles() == {"Bits": "A low-bit integer takes few bits. It is packed with others into a word of memory."}

    def offline(*_: object) -> Path:
        raise ValueError("pip could not download gensim")

    monkeypatch.setattr(wikipedia, "download", offline)
    kept.write_bytes(data[:-1])
    assert "--calib manual" in refusal("wikipedia")
    assert not kept.exists()


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain\n\nmüll", encoding="utf-8")
    rows = [{"text": "one\u2028line", "source": "s"}, {"body": "the only string", "n": 3}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    assert documents(str(tmp_path / "a.txt"), "calibration").documents == ("plain\n\nmüll",)
    assert documents(str(tmp_path), "evaluation").documents == ("plain\n\nmüll", "one\u2028line", "the only string")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b" \n\n", "is empty"),
        ("binary.txt", b"\x89PNG\xff\xfe", "not UTF-8"),
        ("nul.txt", b"a\0b", "NUL"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": ', "line 3 is not JSON"),
        ("list.jsonl", b'{"text": "a"}\n["b"]', "line 2 is list"),
        ("two.jsonl", b'{"a": "x", "b": "y"}', "line 1 has a, b"),
        ("number.jsonl", b'{"text": 3}', "line 1 has text"),
        ("none.jsonl", b"\n", "is empty"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(str(tmp_path / name))
    assert said in message
    assert name in message


def test_missing_sources(tmp_path: Path) -> None:
    assert "does not exist" in refusal("wikitext3")
    assert "no .txt or .jsonl" in refusal(str(tmp_path))


def test_hub_data_sets_ask_for_separate_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    repository, files, _ = text.HUB_SOURCES["wikitext2"]
    for split, file in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        pandas.write_table(pyarrow.table({"text": ["", f" = {split} = \n"]}), tmp_path / file)
    asked = []

    def from_hub(*arguments: object) -> Path:
        asked.append(arguments)
        return tmp_path

    monkeypatch.setattr(text, "from_hub", from_hub)
    assert documents("wikitext2", "evaluation").documents == ("", " = evaluation = \n")
    assert asked == [(repository, [files["evaluation"]], "dataset")]


def test_evaluation_windows_are_the_text_in_order() -> None:
    corpus = Corpus("two", ("abcdefg", "hij"))
    got = windows(Letters(), corpus, length=4, count=None, seed=None)
    stream = [0, *map(ord, "abcdefg\n\nhij")]
    assert got.available == len(stream) == 13
    assert got.tokens.dtype == torch.int64
    assert got.tokens.tolist() == [stream[0:4], stream[4:8], stream[8:12]]


def test_calibration_windows_are_a_seeded_choice_without_overlap() -> None:
    corpus = Corpus("long", ("".join(chr(i) for i in range(1, 1000)),))
    every = windows(Letters(), corpus, length=10, count=None, seed=None).tokens
    got = windows(Letters(), corpus, length=10, count=20, seed=1).tokens
    again = windows(Letters(), corpus, length=10, count=20, seed=1).tokens
    other = windows(Letters(), corpus, length=10, count=20, seed=2).tokens
    assert got.shape == (20, 10)
    assert torch.equal(got, again)
    assert not torch.equal(got, other)
    assert got.unique().numel() == got.numel()
    assert {tuple(row) for row in got.tolist()} <= {tuple(row) for row in every.tolist()}


def test_fewer_windows_than_asked_and_none_at_all() -> None:
    corpus = Corpus("short", ("abcdefg",))
    assert windows(Letters(), corpus, length=4, count=100, seed=0).tokens.shape == (2, 4)
    with pytest.raises(ValueError, match="short is too short: 8 tokens, one window needs 9"):
        windows(Letters(), corpus, length=9, count=1, seed=0)

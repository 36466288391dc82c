"""A hundred encyclopedia articles as plain text, without a data hub: 2.5 MB of English prose to calibrate on.

They are a slice of an English Wikipedia dump (text licence CC BY-SA 3.0) that the wheel of gensim carries as test data. The
slice is taken out of the pinned wheel once and kept; its sha256 is checked at every use.
"""

from __future__ import annotations

import bz2
import contextlib
import hashlib
import os
import re
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from quant.wheels import Wheel, cache_folder, download

WHEEL = Wheel(
    name="gensim",
    version="4.4.0",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    selector=("--implementation=cp", "--python-version=3.11", "--abi=cp311", "--platform=manylinux_2_28_x86_64"),
)
SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"  # of the slice itself
NOTE = re.compile(r"<ref[^>]*/>|<ref.*?</ref>", re.DOTALL)
PROSE = 80  # characters; shorter lines are headings, list entries, captions


def articles() -> dict[str, str]:
    """Title -> paragraphs of prose. Raises ValueError (one line) where the slice cannot be had."""
    import mwparserfromhell

    found = {}
    for page in ElementTree.fromstring(bz2.decompress(_slice())):
        title, source = (page.findtext(f".//{{*}}{tag}") or "" for tag in ("title", "text"))
        if not source or source.lower().startswith("#redirect"):
            continue
        lines = str(mwparserfromhell.parse(NOTE.sub("", source)).strip_code()).splitlines()
        prose = [line.strip() for line in lines if len(line) >= PROSE and ". " in line and "|" not in line]
        if prose:
            found[title] = "\n\n".join(prose)
    return found


def _slice() -> bytes:
    """The compressed dump, from the cache or else from the wheel."""
    kept = cache_folder() / "texts" / "wikipedia.xml.bz2"
    if kept.is_file():
        data = kept.read_bytes()
        if hashlib.sha256(data).hexdigest() == SHA256:
            return data
        kept.unlink()
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            with zipfile.ZipFile(download(WHEEL, Path(scratch))) as wheel:
                data = wheel.read(WHEEL.member)
            fresh = Path(scratch) / kept.name
            fresh.write_bytes(data)
            with contextlib.suppress(OSError):  # another process may have put the same bytes there
                os.replace(fresh, kept)
    except OSError as error:
        raise ValueError(f"the text cache {kept.parent} cannot be written ({error.strerror}); set LOWBIT_CACHE") from error
    return data

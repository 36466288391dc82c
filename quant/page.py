"""HTML pages that need nothing from outside: templates of `quant/pages`, filled by jinja2, every value escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table
from rich.text import Text

FOLDER = Path(__file__).parent / "pages"


def rows_of(table: Table) -> list[list[str]]:
    """Header and rows of a terminal's table as plain text."""
    cells = [[str(column.header), *(Text.from_markup(str(cell)).plain for cell in column.cells)] for column in table.columns]
    return [list(row) for row in zip(*cells, strict=True)]


def write(path: Path, template: str, **values: Any) -> None:
    """Fill a template of FOLDER; ValueError when `path` cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(template).render(values, rows_of=rows_of)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; give --html a path in a folder that exists") from error

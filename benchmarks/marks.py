"""Tables on a page of the docs, between marks that name them: `<!-- attention -->` to `<!-- /attention -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def fill_page(page: Path, tables: Mapping[str, str]) -> None:
    """Put tables between their marks; nothing else of the page changes.

    Marks without a table stay empty: what it is made from was not measured yet.

    Raises:
        ValueError: The page has not one pair of marks for a table.
    """
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        filled = f"<!-- {name} -->\n\n{table}\n\n<!-- /{name} -->"
        text, found = re.subn(
            rf"^<!-- {name} -->$.*?^<!-- /{name} -->$", lambda _, new=filled: new, text, flags=re.MULTILINE | re.DOTALL
        )
        if found != 1:
            raise ValueError(f"{page.name}: got {found} pairs of marks of {name}, expected one")
    page.write_text(text, encoding="utf-8")

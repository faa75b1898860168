"""What the documentation imports is there."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IMPORT = re.compile(r"^from (fedveil[\w.]*) import \(?([\w, \n]+)", re.MULTILINE)


def test_every_import_of_the_documentation_works():
    found = [
        (page.name, module, name.strip())
        for page in PAGES
        for module, names in IMPORT.findall(page.read_text(encoding="utf-8"))
        for name in names.split("\n\n")[0].split("\n")[0].split(",")
        if name.strip()
    ]
    assert len(found) > 20
    missing = [
        f"{page}: from {module} import {name}"
        for page, module, name in found
        if not hasattr(importlib.import_module(module), name)
    ]
    assert not missing

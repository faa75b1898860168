"""Write the corpus of `tests/fuzz/corpus/` anew: `python fuzz/build_corpus.py`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "fuzz" / "corpus"
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))


def main() -> None:
    """Replace all files."""
    from fuzz_seeds import seeds

    found = seeds()
    shutil.rmtree(CORPUS, ignore_errors=True)
    for name, (data, _) in found.items():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    print(f"{len(found)} files, {sum(len(data) for data, _ in found.values())} bytes")


if __name__ == "__main__":
    main()

"""Every file of the corpus ends as it is written down, within caps on memory and time."""

import os
from pathlib import Path

import fuzz_known
import pytest
from fuzz_caps import ENTRIES, under_caps
from fuzz_seeds import seeds

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
FILES = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.glob("*/*"))
MIB = 2**20


@pytest.fixture(scope="module")
def built():
    return seeds()


def test_the_corpus_is_what_its_builder_makes(built):
    assert sorted(built) == FILES, "python fuzz/build_corpus.py writes it anew"
    # What honest clients measured differs in last bits from one processor to the next.
    for name in (name for name in FILES if name.startswith("read/")):
        assert (CORPUS / name).read_bytes() == built[name][0], name


def test_what_is_known_is_in_the_corpus():
    assert set(fuzz_known.FILES) <= set(FILES)


def test_the_corpus_is_small():
    assert 40 <= len(FILES) <= 60
    assert sum((CORPUS / name).stat().st_size for name in FILES) < 200_000


@pytest.mark.parametrize("name", FILES)
def test_every_file_ends_as_it_is_written_down(name, built, request):
    if name in fuzz_known.FILES:
        request.applymarker(pytest.mark.xfail(reason=fuzz_known.FILES[name], strict=True))
    said = ENTRIES[name.split("/")[0]]((CORPUS / name).read_bytes())
    assert built[name][1] in said


@pytest.mark.parametrize("entry", sorted(ENTRIES))
def test_no_file_takes_much_memory_or_time(entry):
    files = set(FILES) - set(fuzz_known.FILES)
    paths = [str(CORPUS / name) for name in sorted(files) if name.startswith(entry)]
    for line in under_caps(entry, paths):
        size = os.path.getsize(line["path"])
        # A server and a model are made anew after a reply that is taken.
        allowed = 24 * MIB + 40 * size
        assert line["grown"] < allowed, line
        assert line["traced"] < allowed, line
        assert line["seconds"] < 5, line

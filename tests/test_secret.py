import base64
import copy
import hmac
import io
import pickle
import stat
import struct
import subprocess
import sys
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil import ConfigurationError, FedveilError, Secret

ZERO = Secret(bytes(32))


GOLDEN = [14508375832852762084, 12654366678495810934]


def test_words_are_pinned():
    assert ZERO.words(2, "golden").tolist() == GOLDEN


@given(
    st.binary(min_size=32, max_size=32), st.lists(st.text(max_size=9) | st.integers(), max_size=3)
)
def test_words_are_chacha20_under_a_key_derived_by_hkdf(value, purpose):
    assert Secret(value).words(20, *purpose).tolist() == reference(value, 20, *purpose)


def test_more_words_begin_with_fewer():
    assert ZERO.words(100, "a")[:7].tolist() == ZERO.words(7, "a").tolist()


@pytest.mark.parametrize("other", [("ab", ""), ("a", "b", ""), ("b", "a"), ("ab",), ("a",), ()])
def test_purposes_do_not_run_into_each_other(other):
    assert ZERO.words(4, "a", "b").tolist() != ZERO.words(4, *other).tolist()


def test_a_number_and_its_digits_are_two_purposes():
    assert ZERO.words(4, 12).tolist() != ZERO.words(4, "12").tolist()


def test_another_process_draws_the_same_words():
    code = "import fedveil; print(fedveil.Secret(bytes(32)).words(4, 'mask', 'c', 1).tolist())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(ZERO.words(4, "mask", "c", 1).tolist())


def test_generated_secrets_differ():
    assert len({Secret.generate().fingerprint() for _ in range(20)}) == 20


def test_equal_bytes_are_equal_secrets():
    assert Secret(bytes(32)) == ZERO
    assert hash(Secret(bytes(32))) == hash(ZERO)
    assert Secret(bytes(31) + b"\1") != ZERO
    assert bytes(32) != ZERO


@pytest.mark.parametrize("wrong", [b"", b"x" * 31, b"x" * 33, "x" * 32, None, bytearray(32)])
def test_a_secret_of_the_wrong_size_is_refused_and_not_quoted(wrong):
    with pytest.raises(ConfigurationError) as caught:
        Secret(wrong)
    assert "xxx" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_cannot_be_pickled(protocol):
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dump({"deep": [ZERO]}, io.BytesIO(), protocol)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_secret_cannot_be_copied(duplicate):
    with pytest.raises(TypeError):
        duplicate(ZERO)


def test_text_forms_show_nothing():
    value = b"0123456789abcdef0123456789abcdef"
    shown = "".join(form(Secret(value)) for form in (repr, str, ascii, "{}".format))
    shown += Secret(value).fingerprint()
    for spelling in (value.decode(), value.hex(), base64.b64encode(value).decode()):
        assert spelling[:8] not in shown


class TestFile:
    def test_created_once_and_read_again(self, tmp_path):
        path = tmp_path / "new" / "federation.secret"
        made = Secret.from_file(path, create=True)
        assert Secret.from_file(path) == Secret.from_file(str(path), create=True) == made

    def test_only_its_owner_may_read_it(self, tmp_path):
        path = tmp_path / "federation.secret"
        Secret.from_file(path, create=True)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(ConfigurationError, match="nowhere"):
            Secret.from_file(tmp_path / "nowhere")

    @pytest.mark.parametrize("content", [b"", b"secretword", b"ab" * 31, b"ab" * 33, b"\xff" * 64])
    def test_unusable_content_is_not_quoted(self, tmp_path, content):
        path = tmp_path / "bad"
        path.write_bytes(content)
        with pytest.raises(FedveilError) as caught:
            Secret.from_file(path)
        shown = "".join(traceback.format_exception(caught.value))
        assert not content or content.decode("latin1")[:8] not in shown


def reference(secret: bytes, count: int, *purpose: str | int) -> list[int]:
    """RFC 5869 and RFC 8439 written out."""
    info = b"fedveil secret v1"
    for part in purpose:
        text = ("i" if isinstance(part, int) else "s") + str(part)
        info += struct.pack("<I", len(text.encode())) + text.encode()
    extracted = hmac.digest(bytes(32), secret, "sha256")
    key = hmac.digest(extracted, info + b"\1", "sha256")
    stream = b"".join(chacha20_block(key, counter) for counter in range(-(-count // 8)))
    return list(struct.unpack(f"<{count}Q", stream[: 8 * count]))


def chacha20_block(key: bytes, counter: int) -> bytes:
    start = [
        *struct.unpack("<4I", b"expand 32-byte k"),
        *struct.unpack("<8I", key),
        counter,
        0,
        0,
        0,
    ]
    state = list(start)
    columns = [(i, i + 4, i + 8, i + 12) for i in range(4)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    for a, b, c, d in (columns + diagonals) * 10:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) % 2**32
            mixed = state[z] ^ state[x]
            state[z] = (mixed << turn | mixed >> (32 - turn)) % 2**32
    return struct.pack("<16I", *((s + t) % 2**32 for s, t in zip(state, start, strict=True)))

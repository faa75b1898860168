import base64
import copy
import hmac
import io
import os
import pickle
import stat
import struct
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil import ConfigurationError, FedveilError, Secret
from fedveil.errors import FedveilWarning

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

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o666])
    def test_that_others_can_read_or_replace_is_taken_with_a_warning(self, tmp_path, mode):
        path = tmp_path / "federation.secret"
        made = Secret.from_file(path, create=True)
        path.chmod(mode)
        with pytest.warns(FedveilWarning, match=rf"mode {mode:04o}.*chmod 600") as told:
            assert Secret.from_file(path) == made
        assert path.read_text().strip()[:8] not in str(told[0].message)
        assert told[0].filename == __file__

    @pytest.mark.parametrize("mode", [0o600, 0o400])
    def test_that_nobody_else_can_read_is_taken_in_silence(self, tmp_path, mode):
        path = tmp_path / "federation.secret"
        made = Secret.from_file(path, create=True)
        path.chmod(mode)
        assert Secret.from_file(path) == made  # a warning would be an error here

    def test_a_link_is_judged_by_the_file_that_it_names(self, tmp_path):
        path, link = tmp_path / "a" / "secret", tmp_path / "link"
        made = Secret.from_file(path, create=True)
        link.symlink_to(path)
        assert Secret.from_file(link, create=True) == made
        path.chmod(0o644)
        with pytest.warns(FedveilWarning, match="0644"):
            Secret.from_file(link)

    def test_a_link_to_nothing_is_not_followed(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ConfigurationError, match="no secret file"):
            Secret.from_file(tmp_path / "link", create=True)
        assert os.listdir(tmp_path) == ["link"]

    @pytest.mark.parametrize("create", [True, False])
    def test_a_folder_is_no_secret(self, tmp_path, create):
        with pytest.raises(ConfigurationError, match=r"cannot be read.*expected a file"):
            Secret.from_file(tmp_path, create=create)

    def test_a_file_in_the_way_of_its_folder_is_said(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigurationError, match="secret file cannot be written"):
            Secret.from_file(tmp_path / "file" / "secret", create=True)

    def test_a_huge_file_is_not_read(self, tmp_path):
        path = tmp_path / "huge"
        with path.open("wb") as file:
            file.truncate(1 << 40)
        path.chmod(0o600)
        with pytest.raises(ConfigurationError, match="cannot be used"):
            Secret.from_file(path)

    def test_of_many_who_make_it_at_once_all_get_the_same(self, tmp_path):
        def make(_):
            return Secret.from_file(tmp_path / "secret", create=True)

        with ThreadPoolExecutor(16) as pool:
            assert len(set(pool.map(make, range(64)))) == 1
        assert os.listdir(tmp_path) == ["secret"]

    @pytest.mark.parametrize("moment", ["fsync", "link"])
    def test_interrupted_it_is_made_whole_by_the_next(self, tmp_path, monkeypatch, moment):
        def power_cut(*arguments):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(f"fedveil.secret.os.{moment}", power_cut)
            with pytest.raises(KeyboardInterrupt):
                Secret.from_file(tmp_path / "secret", create=True)
        assert not (tmp_path / "secret").exists()
        Secret.from_file(tmp_path / "secret", create=True)

    def test_where_there_are_no_links_it_is_made_all_the_same(self, tmp_path, monkeypatch):
        def no_links(*arguments):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr("fedveil.secret.os.link", no_links)
        before = os.umask(0)
        try:
            made = Secret.from_file(tmp_path / "secret", create=True)
        finally:
            os.umask(before)
        assert Secret.from_file(tmp_path / "secret") == made
        assert os.listdir(tmp_path) == ["secret"]

    @pytest.mark.parametrize("content", [b"", b"secretword", b"ab" * 31, b"ab" * 33, b"\xff" * 64])
    def test_unusable_content_is_not_quoted(self, tmp_path, content):
        path = tmp_path / "bad"
        path.write_bytes(content)
        path.chmod(0o600)
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

"""What passes for an app of fedveil's: a bundle is looked at, and nothing of it is unpacked."""

import io
import shutil
import zipfile
from contextlib import suppress
from importlib.resources import files

import pytest
import tomli_w
from flwr.cli.build import build_fab_from_disk
from hypothesis import given
from hypothesis import strategies as st

from fedveil.errors import ProtocolError
from fedveil.flower.bundle import CLIENT, check_bundle

SETTINGS = {
    "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
    "project": {"name": "federation", "version": "1.0.0", "license": "MIT", "dependencies": []},
    "tool": {"flwr": {"app": {
        "publisher": "owner",
        "components": {"serverapp": "their.own:server", "clientapp": CLIENT},
    }}},
}  # fmt: skip


def bundle(settings=SETTINGS, compression=zipfile.ZIP_DEFLATED, **others):
    """A bundle as Flower makes it, with other files by name (/ as __)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        if settings is not None:
            text = settings if isinstance(settings, str) else tomli_w.dumps(settings)
            archive.writestr("pyproject.toml", text)
        for name, content in others.items():
            archive.writestr(name, content)
        archive.writestr(".info/CONTENT", "pyproject.toml,0,0")
    return buffer.getvalue()


def changed(path, value):
    """The settings with one value another, or a key more."""

    def copy(table, keys):
        key, *rest = keys
        return {**table, key: copy(table.get(key, {}), rest) if rest else value}

    return copy(SETTINGS, path.split("/"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Flower's own building
def test_the_app_that_owners_are_given_passes(tmp_path):
    app = tmp_path / "app"
    app.mkdir()
    template = files("fedveil.deploy") / "templates" / "owner" / "pyproject.toml"
    shutil.copy(str(template), app)
    check_bundle(build_fab_from_disk(app))
    (app / "README.md").write_text("# ours")
    (app / "LICENSE").write_text("free")
    check_bundle(build_fab_from_disk(app))


def test_an_app_with_any_server_program_passes_since_none_runs_here():
    check_bundle(bundle())


@pytest.mark.parametrize(
    "name",
    [
        "client.py", "fedveil/__init__.py", "fedveil/flower/apps.py", "torch.py", "src/client.py",
        "../pyproject.toml", "/etc/cron.d/job", "C:\\x.py", "sitecustomize.py", "x.pth", "run.yaml",
        "inner.zip", "Pyproject.toml", "pyproject.toml/x.py", ".info/hook.py", "./pyproject.toml",
        "README.md\x1b[2J.py", "folder/",
    ],
)  # fmt: skip
def test_any_other_file_is_refused_and_named_on_one_plain_line(name):
    with pytest.raises(ProtocolError, match="the file ") as caught:
        check_bundle(bundle(**{name: "import os"}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tool/flwr/app/components/clientapp", "evil:app"),
        ("tool/flwr/app/components/clientapp", "os:abort"),
        ("tool/flwr/app/components/clientapp", "fedveil.flower.apps:server"),
        ("tool/flwr/app/components/clientapp", f" {CLIENT}"),
        ("tool/flwr/app/components/clientapp", [CLIENT]),
        ("tool/flwr/app/components", {"serverapp": "a:b"}),
        ("tool/flwr/app/components/agentapp", "fedveil.flower.apps:client"),
        ("tool/flwr/app/config", {"module": "evil"}),
        ("tool/flwr/app/fab-format-version", 1),
        ("tool/flwr/federations", {"default": "x"}),
        ("tool/hatch", {"build": {"hooks": {"custom": {"path": "hook.py"}}}}),
        ("tool/uv", {"sources": {}}),
        ("tool", "none"),
        ("project/dependencies", ["fedveil-extra"]),
        ("project/dependencies", "evil"),
        ("project/optional-dependencies", {"x": ["evil"]}),
        ("project/scripts", {"flwr-clientapp": "evil:main"}),
        ("project/entry-points", {"torch.backends": {"x": "evil"}}),
        ("project/gui-scripts", {"x": "evil:main"}),
        ("project/dynamic", ["dependencies"]),
        ("build-system/backend-path", ["."]),
        ("build-system/requires", ["hatchling", "evil"]),
        ("build-system/build-backend", "evil"),
        ("dependency-groups", {"x": ["evil"]}),
    ],
)
def test_settings_that_would_run_or_install_something_are_refused(path, value):
    with pytest.raises(ProtocolError, match="not fedveil's own"):
        check_bundle(bundle(changed(path, value)))


@pytest.mark.parametrize(
    "data",
    [
        b"", b"PK\x05\x06", b"import os", bundle()[:-30], bundle(None), bundle("not toml ["),
        bundle("\udcff".encode("utf-8", "surrogateescape").decode("latin-1") + "= ="),
        bundle(compression=zipfile.ZIP_LZMA)[:200], bundle("a = " + "[" * 100_000),
    ],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_bundle_is_refused(data):
    with pytest.raises(ProtocolError, match="not fedveil's own"):
        check_bundle(data)


def test_a_bundle_that_is_too_large_is_refused_unread():
    with pytest.raises(ProtocolError, match="at most 262144 bytes"):
        check_bundle(bundle() + bytes(1 << 20))


def test_a_file_that_unpacks_to_more_than_it_may_is_refused():
    bomb = bundle("#" + "x" * (16 << 20))
    assert len(bomb) < 256 * 1024
    with pytest.raises(ProtocolError, match="at most 262144 bytes"):
        check_bundle(bomb)


def test_a_file_that_unpacks_to_more_than_its_head_says_is_not_read_to_its_end():
    bomb = bundle("#" + "x" * (16 << 20))
    size = (16 << 20) + 1
    assert bomb.count(size.to_bytes(4, "little")) == 2  # in the file's own head and in the list
    lying = bomb.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match="not fedveil's own"):
        check_bundle(lying)


def test_a_file_that_is_there_twice_is_refused():
    buffer = io.BytesIO(bundle())
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("pyproject.toml", tomli_w.dumps(changed("project/name", "other")))
    with pytest.raises(ProtocolError, match="a file twice"):
        check_bundle(buffer.getvalue())


@given(st.data())
def test_whatever_bytes_come_the_answer_is_an_error_of_ours_or_none(data):
    good = bytearray(bundle())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        check_bundle(bytes(good))

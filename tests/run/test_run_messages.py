"""Messages that are kept."""

import resource
from contextlib import contextmanager

import pytest

import fedveil
import toys


@contextmanager
def no_file_beyond(size):
    """Real, not pretended: the system lets no file of this process grow past it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_message_that_cannot_be_kept_is_an_error_and_the_run_resumes(tmp_path):
    settings = {"out": tmp_path, "keep_messages": True}
    toys.federation(toys.mlp(), **settings).run(1)
    with (
        no_file_beyond(12_000),
        pytest.raises(fedveil.CheckpointError, match=r"update\.safetensors could not be written"),
    ):
        toys.federation(toys.mlp(), **settings).run(2, resume=True)
    assert not list(tmp_path.rglob("*.unfinished")), "half a message is no message"
    resumed = toys.federation(toys.mlp(), **settings).run(2, resume=True)
    assert [record.round for record in resumed.rounds] == [1, 2]
    assert not resumed.rounds[-1].failed

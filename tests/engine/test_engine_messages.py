"""Messages that are kept."""

from pathlib import Path

import pytest

import fedveil
import toys


def test_a_message_that_cannot_be_kept_is_an_error_and_the_run_resumes(tmp_path, monkeypatch):
    written = Path.write_bytes

    def full(path, data):
        if path.name.endswith(".update.safetensors") and path.parent.name == "round-000002":
            raise OSError(28, "No space left on device")
        return written(path, data)

    settings = {"out": tmp_path, "keep_messages": True}
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(fedveil.CheckpointError, match="could not be kept"):
        toys.federation(toys.mlp(), **settings).run(2)
    monkeypatch.undo()
    resumed = toys.federation(toys.mlp(), **settings).run(2, resume=True)
    assert [record.round for record in resumed.rounds] == [1, 2]
    assert not resumed.rounds[-1].failed

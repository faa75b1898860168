"""Worker processes: whatever models and data are made of reaches them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import toys
from fedveil import ConfigurationError, FedAvg


def deep(depth=150):
    """More tensors than a process can be handed as open files."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3) for _ in range(depth)]
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), *layers)


def test_models_and_data_may_be_of_any_number_of_tensors():
    clients = {f"partner-{number}": toys.rows(300, seed=number) for number in range(2)}
    words = {"clients": clients, "scheme": FedAvg()}
    before = torch.multiprocessing.get_sharing_strategy()
    one = toys.federation(deep(), **words).run(1)
    two = toys.federation(deep(), workers=2, **words).run(1)
    assert not two.rounds[0].failed
    assert toys.same(toys.weights(one.global_model), toys.weights(two.global_model))
    assert torch.multiprocessing.get_sharing_strategy() == before


SMALL = """
import sys
sys.path.insert(0, {tests!r})
import toys
from fedveil import FedAvg

if __name__ == "__main__":
    clients = {{f"partner-{{n}}": toys.rows(1500, seed=n) for n in range(2)}}
    run = toys.federation(toys.mlp(), clients=clients, scheme=FedAvg(), workers=2)
    print(run.run(1).rounds[0].failed)
"""


@pytest.mark.parametrize("size", ["1m", "2m"])
def test_small_shared_memory_is_enough(size, tmp_path):
    """Containers have little of it: 3000 images take 12 MB there, a page each."""
    unshare = [shutil.which("unshare") or "", "-Urm", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    try:
        subprocess.run([*unshare, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount anything")
    script = tmp_path / "small.py"
    script.write_text(SMALL.format(tests=str(Path(toys.__file__).parent)), encoding="utf-8")
    command = f'{mount} && exec "$0" "$1"'
    found = subprocess.run(
        [*unshare, command, sys.executable, str(script)],
        capture_output=True, text=True, env=os.environ, timeout=240,
    )  # fmt: skip
    assert found.stdout.strip() == "{}", found.stderr[-2000:]


def test_what_cannot_be_handed_over_is_refused_before_anything_is_released():
    run = toys.federation(toys.mlp(), workers=2, scheme=FedAvg())
    run.task.transform = lambda image: image
    with pytest.raises(ConfigurationError, match="workers=1"):
        run.run(1)

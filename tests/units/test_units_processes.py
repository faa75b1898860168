"""Rules that are registered here are known to the processes that do the clients' part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import torch
from torch import nn
from fedveil import Federation, FedQSN, ImageClassification, Secret, Training
from fedveil.units import Pattern, Rule, register_rule
from units_net import Gated

if __name__ == "__main__":  # as a script has it, so that no worker sees the rule
    register_rule(Rule(("Gated",), (Pattern("neurons", ("gate", "up"), ("down",)),)))
    draw = torch.Generator().manual_seed(0)
    rows = [{"image": torch.randn(1, 4, 4, generator=draw), "label": i % 3} for i in range(6)]
    results = [
        Federation(
            Gated(), [rows, rows[:4]], task=ImageClassification(), scheme=FedQSN(),
            training=Training(steps=2, batch_size=2), secret=Secret(bytes(32)), workers=workers,
        ).run(1)
        for workers in (1, 2)
    ]
    states = [result.global_model.state_dict() for result in results]
    assert all(not result.rounds[0].failed for result in results), results[1].rounds[0].failed
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    print("alike")
"""

NET = """
import torch
import torch.nn.functional as F
from torch import nn

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(16, 40), nn.Linear(16, 40), nn.Linear(40, 3)

    def forward(self, x):
        x = x.flatten(1)
        x = -x if x.sum() > 1e9 else x
        return self.down(F.silu(self.gate(x)) * self.up(x))
"""


def test_workers_know_the_rules_of_the_script_that_starts_them(tmp_path: Path) -> None:
    (tmp_path / "units_net.py").write_text(NET)
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "alike", done.stderr

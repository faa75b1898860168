"""Rounds of large cohorts in the in-process engine: what one more client costs the server.

    python benchmarks/cohort.py                  # 10, 100 and 1,000 clients; about 2 minutes
    python benchmarks/cohort.py 5000             # another number

The client's half of every round is timed on its own; the rest of the round is the server's: masks,
releases, bytes, checks, sums, the exposure ledger, the checkpoint. Each size runs in a process of
its own, in which peak memory is that of everything.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from speed.rounds import RATE, examples, net

import fedveil
from fedveil.engine.crew import Answer, Job
from fedveil.engine.in_process import InTurn
from fedveil.tasks import ImageClassification

ROUNDS = 3
SCHEMES = {
    "grouped masks (the default)": fedveil.FedQSN(),
    "a mask of its own for each client": fedveil.FedQSN(policy="sticky"),
}


@dataclass
class Timed(InTurn):
    """Clients in turn, whose seconds are added up by round."""

    seconds: tuple[float, ...] = ()

    def answers(self, jobs: Iterable[Job]) -> Iterator[Answer]:
        spent = 0.0
        for answer in super().answers(jobs):
            spent += answer.seconds
            yield answer
        self.seconds += (spent,)


def measure(clients: int, scheme: fedveil.FedQSN) -> dict[str, float]:
    """Milliseconds per client and round of server and client, and peak memory in MB."""
    row = [{"image": image, "label": label} for image, label in examples(1)]
    training = fedveil.Training(steps=1, batch_size=1, learning_rate=RATE, optimizer="sgd")
    with tempfile.TemporaryDirectory() as folder:
        federation = fedveil.Federation(
            net(),
            {f"client-{number}": row for number in range(clients)},
            task=ImageClassification(),
            scheme=scheme,
            training=training,
            out=Path(folder) / "run",
        )
        crew = Timed(federation.workplace())
        rounds = federation.run(ROUNDS, crew=crew).rounds
    server = [
        record.seconds - seconds for record, seconds in zip(rounds, crew.seconds, strict=True)
    ]
    return {
        "server": 1000 * median(server) / clients,
        "client": 1000 * median(crew.seconds) / clients,
        "round": median(record.seconds for record in rounds),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clients", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--one", choices=list(SCHEMES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.clients[0], SCHEMES[options.one])))
        return 0
    table = Table("masks", "clients", "server, ms per client", "client, ms", "round, s", "peak, MB")
    for name in SCHEMES:
        for clients in options.clients:
            command = [sys.executable, __file__, str(clients), "--one", name]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(told.splitlines()[-1])
            table.add_row(
                name,
                f"{clients:,}",
                f"{found['server']:.2f}",
                f"{found['client']:.2f}",
                f"{found['round']:.2f}",
                f"{found['memory']:.0f}",
            )
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

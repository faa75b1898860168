"""A federation in a process of its own: `python process.py OUT ROUNDS [options]`.

It prints a line for every event, and with --stop EVENT it then waits to be killed.
"""

import argparse
import sys
import time

from fedveil import Evaluation, FedQSN, Observer
from toys import digest, federation, mlp, rows, weights

SCHEME = FedQSN(server_mask=0.25, client_mask=0.25, units="neurons", policy="fresh", update_bits=4)


CLIENTS = {f"partner-{i}": rows(6 + 2 * i, seed=i) for i in range(4)}


class Told(Observer):
    def __init__(self, stop):
        self.stop = stop

    def tell(self, event):
        print(event, flush=True)
        while event == self.stop:
            time.sleep(1)

    def round_started(self, number, clients):
        self.tell(f"started {number}")

    def client_finished(self, number, client, failure):
        self.tell(f"{client} {number}")

    def round_finished(self, record):
        self.tell(f"finished {record.round}")


def standard(out, **changes):
    """The federation that every process runs. The order of a sum of three shows in its bits."""
    settings = {
        "clients": CLIENTS,
        "scheme": SCHEME,
        "clients_per_round": 3,
        "test": rows(6, seed=7),
        **changes,
    }
    settings.setdefault("evaluation", Evaluation(proxies_every=1))
    return federation(mlp(), out=out, **settings)


def main(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("rounds", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--stop", default="")
    options = parser.parse_args(arguments)
    run = standard(
        options.out, workers=options.workers, observer=Told(options.stop), keep_messages=True
    )
    print(digest(weights(run.run(options.rounds).global_model)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

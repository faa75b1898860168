"""What attackers make of released bytes on the demo's task, over seeds: docs/audit.md's table.

    python -m studies.attacks                           # seeds 0 1 2: half an hour on two cores
    python -m studies.attacks --seeds 0 --only fedqsn-paper --rounds 2       # whether it works

Each recipe runs once per seed; then the client who took part most often, and coalitions of those
who did, use what they were sent. Finished runs are kept in runs/attacks/results.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import transformers

from fedveil.audit import Evidence, Kept
from fedveil.audit.attacks import fine_tune, impute, pool
from fedveil.demo import (
    OF_PUBLIC,
    RELEASED_ONCE,
    SCHEMES,
    Scene,
    Setting,
    build_federation,
    prepare,
)
from fedveil.demo import fast_matmul as fast
from fedveil.federation import Stage
from studies.results import Results

ROUNDS = 12
LAST = (1, 2, 4, 8)
"""Proxies that one client keeps: the last so many that it was sent."""
IN_ONE_ROUND, IN_ALL = (2, 4), (2, 4, 8)
"""Clients who pool what they were sent: in the last round in which all of them took part (more of
them have such a round only early on), or in all rounds."""
TUNERS = 4
"""Clients who train on: what it brings depends on their data; their mean is reported."""
EFFORT = 2
"""An attacker trains as many times longer than in the federation, at most."""
ALONE = "own data, from the public model"
ALL = "all of one client's proxies"


def attack(name: str, scene: Scene, setting: Setting, workers: int) -> dict[str, float]:
    """One recipe with one seed; then accuracies in percent, by what was attacked how."""
    at = setting.at_once() if name in RELEASED_ONCE else setting
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        federation = build_federation(
            scene, at, SCHEMES[name], workers, out, keep=True, public=name in OF_PUBLIC
        )
        federation.run(at.rounds)
        return figures(Evidence(out), federation.stage(scene.public))


def figures(evidence: Evidence, stage: Stage) -> dict[str, float]:
    """Everything that is tried on one run."""
    found = {name: accuracy(stage, state) for name, state in stage.models.items()}
    assert stage.public is not None
    found["public"] = accuracy(stage, stage.public)
    order = sorted(evidence.clients, key=lambda one: (-len(evidence.proxies([one])), one))
    sent = evidence.proxies([order[0]])
    by_client = [trained(evidence, stage, client) for client in order[:TUNERS]]
    by_training = {name: statistics.mean(one[name] for one in by_client) for name in by_client[0]}
    found[ALONE] = by_training.pop(ALONE)
    for last in LAST:
        if last <= len(sent):
            note(found, f"the last {last} of one client's proxies", evidence, stage, sent[-last:])
    note(found, ALL, evidence, stage, sent)
    found |= by_training
    for size in IN_ONE_ROUND:
        if pooled := last_common(evidence, order[:size]):
            note(found, f"{size} clients, one round", evidence, stage, pooled)
    for size in IN_ALL:
        pooled = evidence.proxies(order[:size])
        note(found, f"{size} clients, all rounds", evidence, stage, pooled)
    return found


def trained(evidence: Evidence, stage: Stage, client: str) -> dict[str, float]:
    """What one client reaches by training on its own data, from nothing of ours and from all."""
    sent = evidence.proxies([client])
    known, rounds = pool(evidence, sent), EFFORT * len(sent)
    begins = {
        ALONE: stage.public,
        f"{ALL}, zeros, fine-tuned": impute(known, evidence.manifest),
        f"{ALL}, public, fine-tuned": impute(known, evidence.manifest, stage.public),
    }
    found = {}
    for name, start in begins.items():
        assert start is not None
        tuned = fine_tune(
            stage.model, stage.task, stage.data[client], stage.training, start, rounds=rounds
        )
        found[name] = accuracy(stage, tuned.state)
    return found


def note(
    found: dict[str, float], name: str, evidence: Evidence, stage: Stage, sent: Sequence[Kept]
) -> None:
    """What some proxies reach together, with zeros and with the public model in its holes."""
    known = pool(evidence, sent)
    found[f"{name}, zeros"] = accuracy(stage, impute(known, evidence.manifest))
    found[f"{name}, public"] = accuracy(stage, impute(known, evidence.manifest, stage.public))


def last_common(evidence: Evidence, clients: Sequence[str]) -> list[Kept]:
    """What some clients were sent in the last round of all of them; nothing if there is none."""
    by_round: dict[int, list[Kept]] = {}
    for kept in evidence.proxies(clients):
        by_round.setdefault(kept.round, []).append(kept)
    common = [number for number, all_kept in by_round.items() if len(all_kept) == len(clients)]
    return by_round[max(common)] if common else []


def accuracy(stage: Stage, state: object) -> float:
    """On the owner's test set, in percent."""
    return stage.measure(state)["accuracy"]  # type: ignore[arg-type]


def show(results: Results) -> str:
    """Mean over seeds, and the range, as a table in Markdown."""
    names = results.names()
    cases = list(dict.fromkeys(case for n in names for row in results.of(n) for case in row))
    lines = [["accuracy in %", *names], ["---", *["---:"] * len(names)]]
    for case in cases:
        cells = []
        for name in names:
            values = [row[case] for row in results.of(name) if case in row]
            cells.append(
                f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
                if values
                else "-"
            )
        lines.append([case, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"))
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    results = Results(arguments.out)
    for seed in arguments.seeds:
        setting, scene = (
            replace(Setting(judging_documents=0), seed=seed, rounds=arguments.rounds),
            None,
        )
        for name in arguments.only:
            if not results.has(name, seed):
                scene = scene or prepare(setting)
                results.add(name, seed, attack(name, scene, setting, arguments.workers))
                print(f"seed {seed}, {name}: done", flush=True)
    print(show(results))


if __name__ == "__main__":
    with fast():  # as the demo
        main()

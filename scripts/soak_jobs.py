"""Jobs under attack for as long as you like: `python scripts/soak_jobs.py --minutes 20`.

Rounds of random traffic and faults against a real server process; after each, everything must come to rest, and a
checker goes over all that clients and watchers saw. Leases and graces are a tenth of the defaults. Everything random
follows from the seed: `--seed S --round K` repeats one round. Exits 1 on any violation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from anywhere

from tests.storm import SHORTENED, Report, Traffic, storm_round, train_twins
from tests.tiny import build_tiny_base


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="begin no round after so long (default 5)")
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, which is printed first")
    parser.add_argument("--round", type=int, default=None, help="only this round")
    parser.add_argument("--seconds", type=float, default=40, help="of traffic and faults in a round (default 40)")
    parser.add_argument("--clients", type=int, default=4, help="that call at the same time (default 4)")
    parser.add_argument("--trainings", type=int, default=4, help="in a round, at most; 0 needs no torch (default 4)")
    parser.add_argument("--keep", type=Path, default=None, help="folder for what the rounds leave; default: none")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    _say(arguments.json, {"seed": seed, "shortened": SHORTENED}, f"seed {seed}; shortened tenfold: {SHORTENED}")
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return asyncio.run(_soak(arguments, seed, folder))


async def _soak(arguments: argparse.Namespace, seed: int, folder: Path) -> int:
    began = time.monotonic()
    base = build_tiny_base(folder / "base")
    twins = await train_twins(folder / "twins", base) if arguments.trainings else {}
    traffic = Traffic(seconds=arguments.seconds, clients=arguments.clients, trainings=arguments.trainings)
    faults: Counter[str] = Counter()
    states: Counter[str] = Counter()
    rounds = calls = events = num_violations = 0
    number = 1 if arguments.round is None else arguments.round
    while True:
        home = folder / f"round-{number}"
        shutil.rmtree(home, ignore_errors=True)
        report = await storm_round(home, base, seed, number, traffic, twins)
        _tell_round(arguments.json, report, time.monotonic() - began)
        rounds, num_violations = rounds + 1, num_violations + len(report.violations)
        faults, states = faults + report.faults, states + report.states
        calls += len(report.history.calls)
        events += sum(len(watch.events) for watch in report.history.watches)
        if arguments.keep is None:
            shutil.rmtree(home, ignore_errors=True)
        if arguments.round is not None or time.monotonic() - began > arguments.minutes * 60:
            break
        number += 1
    total = {
        "rounds": rounds,
        "faults": dict(faults),
        "jobs": dict(states),
        "calls": calls,
        "events_watched": events,
        "violations": num_violations,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seed": seed,
    }
    told = (
        f"{rounds} rounds in {total['minutes']} min, {faults.total()} faults ({_listed(faults)}), "
        f"{states.total()} jobs ({_listed(states)}), {calls} calls, "
        f"{events} events watched, {num_violations} violations"
    )
    _say(arguments.json, total, told)
    return 1 if num_violations else 0


def _tell_round(as_json: bool, report: Report, seconds: float) -> None:
    history = report.history
    facts = {
        "round": history.round,
        "seconds": round(seconds),
        "faults": dict(report.faults),
        "jobs": dict(report.states),
        "calls": len(history.calls),
        "watchers": len(history.watches),
        "violations": [str(violation) for violation in report.violations],
    }
    told = (
        f"{seconds:5.0f} s, round {history.round}: {_listed(report.faults)}; jobs: {_listed(report.states)}; "
        f"{len(history.calls)} calls, {len(history.watches)} watchers, {len(report.violations)} violations"
    )
    _say(as_json, facts, "\n".join([told, *map(str, report.violations)]))


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{what} {count}" for what, count in sorted(counter.items())) or "nothing"


def _say(as_json: bool, facts: dict[str, object], text: str) -> None:
    print(json.dumps(facts) if as_json else text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

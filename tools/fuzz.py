"""Random hostile input by kind; every outcome is right, refused in one line, or a fault.

    python tools/fuzz.py KIND --count N --seed S --json FILE [--only SEED]

Kinds: checkpoints, ops, commands, kills, disks; each is described in `tools/fuzzing/<kind>_kind.py`. A case
is drawn from its own seed, S, S + 1, …, so that `--only SEED` runs one again. Exit code 1: faults.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tools.fuzzing.outcome import BAD, Outcome, counts, run_forked, run_here  # noqa: E402

KINDS = ("checkpoints", "ops", "commands", "kills", "disks")

#: Seconds that a case may take; those of the last two run a command twice.
LIMITS = {"kills": 240.0, "disks": 240.0}
LIMIT = 5.0
#: A command that quantises, on a machine that does other things too.
LIMITS["commands"] = 20.0


def run(kind: str, seeds: Sequence[int], folder: str, forked: bool = True) -> list[Outcome]:
    """The cases of these seeds.

    Args:
        folder: what cases share, a tiny model, is made there once.
        forked: a crash or a hang ends one case; else it ends this process.
    """
    module = importlib.import_module(f"tools.fuzzing.{'kills' if kind == 'disks' else kind}_kind")
    if kind == "disks" and (why := module.can_mount()):
        print(why, file=sys.stderr)
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import w2a4  # noqa: F401  before processes fork

        module.prepare(folder)
        case = module.full_disk if kind == "disks" else module.case
        if not forked:
            return [run_here(case, seed) for seed in seeds]
        return list(run_forked(case, seeds, LIMITS.get(kind, LIMIT)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=100, help="cases, 100 if not given")
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--json", type=Path, help="every outcome and the counts")
    parser.add_argument("--only", type=int, help="the case of this seed, and what it says")
    given = parser.parse_args()
    seeds = range(given.seed, given.seed + given.count) if given.only is None else [given.only]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run(given.kind, seeds, folder)
    for outcome in outcomes:
        if outcome.result in BAD or given.only is not None:
            print(f"{outcome.seed}: {outcome.result}: {outcome.note}")
    print(json.dumps({"kind": given.kind, **counts(outcomes)}))
    if given.json is not None:
        found = {"kind": given.kind, "counts": counts(outcomes), "cases": [o.to_dict() for o in outcomes]}
        given.json.write_text(json.dumps(found, indent=1))
    return int(any(outcome.result in BAD for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

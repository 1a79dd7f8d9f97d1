"""A session of `benchmarks.gpu_run` whose shared process is a fake."""

import os
import sys

from benchmarks.gpu.session import Session
from support.paths import ROOT

#: A shared process that does what the names of its stages say.
FAKE = """
import json, os, sys, time
from pathlib import Path
from benchmarks.files import append_line
results, *names = sys.argv[1:]
for name in names:
    append_line(Path(results), {"stage": name, "event": "begin"})
    append_line(Path(results), {"stage": name, "pid": os.getpid()})
    if "hangs" in name: time.sleep(60)
    if "dies" in name: os.kill(os.getpid(), 11)
    if "leaves" in name: sys.exit("no more")
    status = "failed" if "fails" in name else "ok"
    append_line(Path(results), {"stage": name, "status": status, "seconds": 0.1})
"""


def session(folder, seconds=60, program=FAKE):
    command = [sys.executable, "-c", program, str(folder / "results.jsonl")]
    return Session(folder, command, seconds, os.environ | {"PYTHONPATH": str(ROOT)})

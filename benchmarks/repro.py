"""From a fresh clone: how long `make repro` takes, how long the second one takes, the peak memory of each stage,
and which files differ from the committed run (on the machine that made it: none).

Run: python benchmarks/repro.py        (with a warm package cache; ends in a table and a line of JSON)
"""
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"make repro": 480, "dvc repro": 120, "second make repro": 10}  # seconds on 2 cores
MEMORY = 4 << 30  # bytes, for any stage


def timed(cwd, *command):
    "Seconds that `command` takes; its output only where it fails."
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    start = time.monotonic()
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}")
    return time.monotonic() - start


def main():
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "skinlesion"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds = {"make setup": timed(clone, "make", "setup")}
        seconds["dvc repro"] = timed(clone, "make", "repro")
        seconds["make repro"] = seconds["make setup"] + seconds["dvc repro"]
        changed = subprocess.run(
            ["git", "status", "--porcelain"], cwd=clone, text=True, capture_output=True, check=True
        ).stdout.split("\n")
        seconds["second make repro"] = timed(clone, "make", "repro")
        runs = {
            str(p.parent.relative_to(clone / "reports")): json.loads(p.read_text())
            for p in sorted((clone / "reports").rglob("run.json"))
        }
    for name, taken in seconds.items():
        limit = LIMITS.get(name)
        print(f"{name:20s} {taken:7.1f} s" + (f"   limit {limit} s: ratio {taken / limit:.2f}" if limit else ""))
    for stage, run in runs.items():
        peak = run["peak_memory_bytes"]
        print(f"{stage:20s} {run['seconds']:7.1f} s   peak {peak / 2**30:.2f} GiB: ratio {peak / MEMORY:.2f}")
    print("files that differ from the committed run:", ", ".join(c for c in changed if c) or "none")
    load = os.getloadavg()[0]
    print(
        json.dumps(
            {
                "seconds": seconds,
                "load": load,
                "peak_memory_bytes": {s: r["peak_memory_bytes"] for s, r in runs.items()},
            }
        )
    )


if __name__ == "__main__":
    main()

"""How long `skinlesion run train` takes until the first training step begins, beyond what importing the packages takes.

    python benchmarks/start_up.py [--rounds 3] [--member image]

A copy of this repository in a temporary folder (the files that git tracks, with the embedded data) runs the stage
`prepare` once. Then `train` is stopped where its first optimiser step begins: a hook for all optimisers of torch writes
down the time and ends the kernel.
run       seconds from calling `python -m skinlesion.pipeline.cli run train --member M` to that moment.
imports   seconds of two bare processes, one after the other: one imports the packages of the runner, one those of the
          notebook, neither anything of `skinlesion`. The runner and its kernel each import, so both count; of the
          packages listed below, only those that the two have loaded by then.
A round measures both, and the difference is the median over the rounds. Target: at most 6 s beyond bare imports.
Processor time of all processes is printed too and has no target. The verdict counts only where `quiet` is true: a load
of at most 1 before the start.
"""
import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = 6.
RUNNER = 'papermill nbformat nbconvert jupyter_client pydantic typer ruamel.yaml dvc torch pandas'.split()
NOTEBOOK = (
    'torch torchvision timm lightning lightning.fabric lightning.pytorch albumentations cv2 pandas '
    'scipy.stats sklearn sklearn.metrics '
    'matplotlib.pyplot seaborn safetensors dvclive ipykernel.kernelapp'
).split()
HOOK = """

# benchmarks/start_up.py: the first step begins
import os as _os, sys as _sys, time as _time
from torch.optim.optimizer import register_optimizer_step_pre_hook as _register
def _first_step(*_):
    with open({note!r}, 'w') as file: file.write(str(_time.time()) + ' ' + ' '.join(_sys.modules))
    _os._exit(0)
_register(_first_step)
"""


def copy_repository(to):
    "What git tracks, as it is on the disk now, in a repository of its own, with the data and the outputs of `prepare`."
    names = (
        subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, check=True).stdout.decode().split('\0')
    )
    for name in filter(None, names):
        if not (ROOT / name).is_file():
            continue
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name)
    subprocess.run(['git', 'init', '-q'], cwd=to, check=True)
    subprocess.run([sys.executable, '-m', 'dvc', 'pull', '-q', 'data.dvc'], cwd=to, check=True)


def call(cwd, *args, check=True):
    "Run a command of the copy's own library; its output only where it fails."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'NO_ALBUMENTATIONS_UPDATE': '1'}
    done = subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if check and done.returncode:
        raise SystemExit(f"{' '.join(args)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def processor():
    "Processor seconds of all processes that have ended below this one."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loaded(cwd, note):
    "The packages that the runner and the notebook load, of those listed above."
    code = 'import sys, skinlesion.pipeline.cli, skinlesion.pipeline.runner; print(*sys.modules)'
    runner = call(cwd, '-c', code).split()
    notebook = note.read_text().split()[1:]
    return [n for n in RUNNER if n in runner], [n for n in NOTEBOOK if n in notebook]


def time_imports(cwd, packages):
    "Seconds (wall, processor) of two bare processes."
    start = time.time()
    spent = processor()
    for names in packages:
        call(cwd, '-c', f'import {", ".join(names)}')
    return time.time() - start, processor() - spent


def time_run(cwd, member, note):
    "Seconds (wall, processor) from the command to the first step."
    note.unlink(missing_ok=True)
    start = time.time()
    spent = processor()
    shown = call(cwd, '-m', 'skinlesion.pipeline.cli', 'run', 'train', '--member', member, check=False)
    if not note.exists():
        raise SystemExit(f'no training step began:\n{shown[-4000:]}')
    return float(note.read_text().split()[0]) - start, processor() - spent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--member', default='image')
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)
    if load > 1:
        print(f'warning: the load is {load} before the benchmark starts; other work makes the figures unreliable')
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / 'copy'
        note = Path(folder) / 'first_step'
        copy.mkdir()
        copy_repository(copy)
        call(copy, '-m', 'skinlesion.pipeline.cli', 'run', 'prepare')
        training = copy / 'skinlesion/model/training.py'
        training.write_text(training.read_text() + HOOK.format(note=str(note)))
        time_run(copy, args.member, note)  # warm-up: file cache and byte code
        packages = loaded(copy, note)
        time_imports(copy, packages)
        print(f"the runner loads {', '.join(packages[0])}; the notebook {', '.join(packages[1])}", flush=True)
        rounds = []
        for k in range(args.rounds):
            sides = dict(imports=lambda: time_imports(copy, packages), run=lambda: time_run(copy, args.member, note))
            done = {name: sides[name]() for name in (list(sides) if k % 2 else list(sides)[::-1])}
            rounds.append(done)
            print(f"round {k + 1}: to the first step {done['run'][0]:.1f} s, bare imports {done['imports'][0]:.1f} s, "
                  f"beyond them {done['run'][0] - done['imports'][0]:.1f} s", flush=True)
    def middle(f):
        return round(statistics.median(f(r) for r in rounds), 2)
    beyond = middle(lambda r: r['run'][0] - r['imports'][0])
    print(
        json.dumps(
            dict(
                benchmark='start_up',
                first_step_s=middle(lambda r: r['run'][0]),
                imports_s=middle(lambda r: r['imports'][0]),
                beyond_imports_s=beyond,
                target_s=TARGET,
                ratio=middle(lambda r: r['run'][0] / r['imports'][0]),
                met=beyond <= TARGET,
                beyond_imports_processor_s=middle(lambda r: r['run'][1] - r['imports'][1]),
                rounds=len(rounds),
                quiet=load <= 1,
                cores=os.cpu_count(),
                load_before=load,
                load_after=round(os.getloadavg()[0], 1),
            )
        )
    )


if __name__ == '__main__':
    main()

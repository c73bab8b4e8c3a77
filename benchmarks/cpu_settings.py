"""What channels-last, bf16, torch.compile and threads bring on this CPU, for training and for prediction.

    python benchmarks/cpu_settings.py [--backbone resnet10t mobilenetv2_100] [--size 64 128] [--batch 16 32] ...

Every setting changes one thing of the baseline: fp32, channels-last, eager, all cores as threads, which is what `fit`
and a `Predictor` use on a CPU. A round runs each setting once, in an order that rotates with the rounds. A ratio is the
median over the rounds of the baseline's seconds over the setting's: above 1 the setting is faster than the default.
`contiguous` leaves channels-last out, `bf16` uses autocast, `threads N` takes another number of threads, `compile`
wraps the model in torch.compile (default mode). The time of compiling is given apart (`compile_s`) and is in no ratio,
with the number of steps after which it has paid for itself. `compile` needs a C++ compiler; where there is none, a
message says so. A setting is named in `faster` where its ratio is 1.05 or more in every round of this machine. A
verdict counts only where `quiet` is true.
"""
import argparse
import json
import os
import shutil
import statistics
import time

import torch
from torch.nn import functional as F

from skinlesion.model.fusion import create_model
from skinlesion.model.optim import param_groups

BASELINE = dict(layout=torch.channels_last, bf16=False, compiled=False, threads=os.cpu_count())


def settings(threads, compiled):
    "Name -> what differs from the baseline."
    found = dict(default={}, contiguous=dict(layout=torch.contiguous_format), bf16=dict(bf16=True))
    found |= {f'threads {n}': dict(threads=n) for n in threads if n != BASELINE['threads']}
    return found | (dict(compile=dict(compiled=True)) if compiled else {})


class Runner:
    "One model under one setting: steps of training, and answers."
    def __init__(self, backbone, size, batch, layout, bf16, compiled, threads):
        self.bf16 = bf16
        self.threads = threads
        self.layout = layout
        self.model = create_model(backbone, 7, seed=0).to(memory_format=layout)
        self.call = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(param_groups(self.model, .05, 1e-3), lr=1e-3, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=layout)
        self.targets = torch.arange(batch) % 7

    def logits(self):
        "One forward pass."
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bf16):
            return self.call(self.images).float()

    def train(self, steps):
        "Seconds per step of training."
        torch.set_num_threads(self.threads)
        self.model.train()
        start = time.perf_counter()
        for _ in range(steps):
            loss = F.cross_entropy(self.logits(), self.targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return (time.perf_counter() - start) / steps

    def answer(self, steps):
        "Seconds per batch of answers."
        torch.set_num_threads(self.threads)
        self.model.eval()
        with torch.inference_mode():
            start = time.perf_counter()
            for _ in range(steps):
                self.logits()
        return (time.perf_counter() - start) / steps


def make_runners(args, case):
    "A runner per setting, warmed up, and the seconds of compiling; a setting that cannot run is reported and left out."
    runners = {}
    compiling = None
    for name, changes in settings(args.threads, args.compile).items():
        try:
            runner = Runner(*case, **BASELINE | changes)
            start = time.perf_counter()
            runner.train(1), runner.answer(1)
            first = time.perf_counter() - start
            if name == 'compile':
                compiling = first - runner.train(1) - runner.answer(1)
            runners[name] = runner
        except Exception as e:
            print(
                f"{case[0]}: {name} cannot run here: {type(e).__name__}: {str(e).strip().splitlines()[0][:120]}",
                flush=True,
            )
            torch._dynamo.reset()
    return runners, compiling


def compare(args, case):
    "Ratios by setting for one model: one line of JSON, and a table before it."
    runners, compiling = make_runners(args, case)
    names = list(runners)
    rounds = []
    for k in range(args.rounds):
        turned = names[k % len(names):] + names[:k % len(names)]
        rounds.append({name: (runners[name].train(args.steps), runners[name].answer(args.steps)) for name in turned})
    result = dict(benchmark='cpu_settings', backbone=case[0], size=case[1], batch=case[2], rounds=args.rounds)
    for i, what in enumerate(('train', 'answer')):
        ratios = {name: [r['default'][i] / r[name][i] for r in rounds] for name in names}
        rate = round(case[2] / statistics.median(r['default'][i] for r in rounds), 1)
        del ratios['default']
        said = ', '.join(
            f'{name} x{statistics.median(v):.2f} ({min(v):.2f}-{max(v):.2f})' for name, v in ratios.items()
        )
        print(f'{case[0]} at {case[1]} px, batch {case[2]}, {what}: default {rate} images/s; {said}', flush=True)
        result |= {
            f'{what}_images_per_s': rate,
            f'x_{what}': {name: round(statistics.median(v), 3) for name, v in ratios.items()},
            f'faster_{what}': [name for name, v in ratios.items() if min(v) >= 1.05],
        }
    if compiling is not None:
        gain = statistics.median(r['default'][0] - r['compile'][0] for r in rounds)
        result |= dict(
            compile_s=round(compiling, 1), compile_pays_after_steps=round(compiling / gain) if gain > 0 else None
        )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', nargs='+', default=['resnet10t', 'mobilenetv2_100', 'efficientnet_b0'])
    for name, default in dict(size=[64, 128, 224], batch=[16, 32, 16]).items():
        parser.add_argument(f'--{name}', type=int, nargs='+', default=default)
    parser.add_argument('--threads', type=int, nargs='*', default=[1, os.cpu_count()], help='numbers of threads to try')
    for name, default in dict(rounds=5, steps=3).items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument(
        '--no-compile',
        dest='compile',
        action='store_false',
        help='leave torch.compile out (it takes a minute or two per model)',
    )
    args = parser.parse_args()
    if not len(args.backbone) == len(args.size) == len(args.batch):
        parser.error('give --backbone, --size and --batch as many values each')
    if args.compile and not (os.environ.get('CXX') or shutil.which('g++') or shutil.which('clang++')):
        print('compile is left out: no C++ compiler (g++, clang++) is on the PATH')
        args.compile = False
    load = round(os.getloadavg()[0], 1)
    if load > 1:
        print(f'warning: the load is {load} before the benchmark starts; other work makes the ratios unreliable')
    for case in zip(args.backbone, args.size, args.batch):
        print(
            json.dumps(
                compare(args, case)
                | dict(
                    quiet=load <= 1,
                    cores=os.cpu_count(),
                    load_before=load,
                    load_after=round(os.getloadavg()[0], 1),
                    capability=torch.backends.cpu.get_cpu_capability(),
                )
            ),
            flush=True,
        )


if __name__ == '__main__':
    main()

"""What maps of evidence cost, against bare passes of the same model and against grad-cam's own Score-CAM.

    python benchmarks/maps.py [--backbone efficientnet_b0] [--size 224] [--rounds 9] [--scored tf_efficientnet_lite0]
        [--weights wheel] [--channels 64] [--fidelity 0.9] [--maps 1000] [--picture FILE]

picture   baseline: a forward and a backward pass to the picture; eval mode, parameters frozen.
layer     baseline: a forward and a backward pass to the default layer and no further.
gradcam   `compute_cam` of one picture at the default layer, which earlier calls have found. Target: at most 1.15 of
          `picture`.
more      the slowest gradient method at its slowest layer, on a picture whose pass was made. Target: at most 30 ms.
scorecam  `score_cam` of a pass that was made, against the weights by grad-cam at the same layer for `--channels` of its
          channels, scaled up to all. Target: at least 10 times as fast. How many channels are alike depends on the
          picture and on trained weights, so this part takes a backbone with published ones, fetched once
          (`--weights none`: random ones).
memory    growth of the resident memory from the 200th to the last of `--maps` Grad-CAMs of 64 px. Target: below 8 MiB.

A round measures all of a part one after the other, in an order that changes with the rounds. A ratio is the median over
the rounds of the wall clock's ratio to the baseline in the same round, with the least and the greatest, so that other
work on the machine affects all alike; the ratio in processor time is printed beside it and has no target. One thread.
"""
import argparse
import json
import os
import statistics
import time
from contextlib import redirect_stderr
from io import StringIO

import cv2
import numpy as np
import psutil
import torch
from pytorch_grad_cam import ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from skinlesion.explain.cam import MAP_METHODS, compute_cam, draw_map
from skinlesion.explain.channels import FIDELITY, channel_groups, score_cam
from skinlesion.explain.layers import default_layer, find_layer, target_layers
from skinlesion.explain.passes import MapPass
from skinlesion.images import normalise
from skinlesion.model.fusion import create_model

STEADY = 200 # maps after which the memory must not grow


def frozen_model(backbone, weights='none'):
    "A model of seven classes in eval mode, whose parameters need no gradient."
    model = create_model(backbone, 7, seed=0, pretrained=weights).eval()
    return model.requires_grad_(False)


def read_picture(path, size):
    "A normalised picture (1,3,S,S)."
    pixels = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    return normalise(cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC)[None])


def to_picture(model, picture):
    "A forward and a backward pass to the picture."
    picture = picture.clone().requires_grad_()
    return torch.autograd.grad(model(picture).max(), picture)


def to_layer(model, picture, module):
    "A forward and a backward pass to the output of a module."
    kept = []
    def keep(module, args, output):
        kept.append(output.requires_grad_())
        return output.clone()
    handle = module.register_forward_hook(keep)
    score = model(picture).max()
    handle.remove()
    return torch.autograd.grad(score, kept)


def taken(work):
    "Seconds (wall, processor) of a call."
    start = time.perf_counter()
    spent = time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - spent


def interleaved(works, rounds):
    "Name -> seconds (rounds, 2) of each work; the first round does not count."
    names = list(works)
    times = []
    for k in range(rounds + 1):
        turn = k % len(names)
        done = {name: taken(works[name]) for name in names[turn:] + names[:turn]}
        times.append([done[name] for name in names])
    return dict(zip(names, np.array(times[1:]).transpose(1, 0, 2)))


def ratio(times, name, base):
    "Median ratio of the wall clock, its range, and the median ratio in processor time."
    wall, processor = (times[name] / times[base]).T
    return dict(
        x=round(float(np.median(wall)), 3),
        x_range=[round(float(wall.min()), 3), round(float(wall.max()), 3)],
        x_processor=round(float(np.median(processor)), 3),
    )


def milliseconds(times):
    "Name -> median of the wall clock."
    return {name: round(1e3 * float(np.median(seconds[:, 0])), 1) for name, seconds in times.items()}


def measure_memory(backbone, maps):
    "Growth of the resident memory, MiB."
    model = frozen_model(backbone)
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    resident = []
    for _ in range(maps):
        compute_cam(model, picture)
        resident.append(psutil.Process().memory_info().rss / 2**20)
    growth = resident[-1] - resident[min(STEADY, maps) - 1]
    return dict(maps=maps, resident_mib=round(resident[-1]), growth_mib=round(growth, 1), met=growth < 8)


def measure_grad_cam(backbone, picture, rounds):
    "Grad-CAM against both baselines, and what another method or layer costs."
    model = frozen_model(backbone)
    size = tuple(picture.shape[2:])
    layer = default_layer(model, size)
    module = find_layer(model, layer)
    works = dict(
        picture=lambda: to_picture(model, picture),
        layer=lambda: to_layer(model, picture, module),
        gradcam=lambda: compute_cam(model, picture),
    )
    times = interleaved(works, rounds)
    against = ratio(times, 'gradcam', 'picture')
    result = dict(layer=layer, milliseconds=milliseconds(times), against_picture=against)
    result |= dict(against_layer=ratio(times, 'gradcam', 'layer'), met=against['x'] <= 1.15)
    return result, measure_more(model, picture, rounds)


def measure_more(model, picture, rounds):
    "Milliseconds of another gradient method or layer on the same picture."
    run = MapPass(model, picture, layers=tuple(target_layers(model)))
    methods = [name for name, method in MAP_METHODS.items() if 'backward' in method.passes and method.needs == 'layer']
    works = {}
    for method in methods:
        for layer in run.layers:
            works[f'{method} at {layer}'] = lambda method=method, layer=layer: draw_map(run, method, layer)
    times = interleaved(works, rounds)
    found = milliseconds(times)
    slowest = max(found, key=found.get)
    processor = 1e3 * float(np.median(times[slowest][:, 1]))
    about = dict(slowest=slowest, slowest_ms=found[slowest], slowest_processor_ms=round(processor, 1))
    return about | dict(median_ms=round(statistics.median(found.values()), 1), met=found[slowest] <= 30)


def measure_score_cam(backbone, weights, picture, channels, fidelity, rounds):
    "Score-CAM against grad-cam's on some of the channels, scaled up."
    model = frozen_model(backbone, weights)
    run = MapPass(model, picture)
    (layer,) = run.layers
    maps = run.activations(layer)
    theirs = ScoreCAM(model, [])
    given = picture, None, [ClassifierOutputTarget(run.targets[0])], maps[:, :channels], None
    def library():
        with redirect_stderr(StringIO()): # it draws a progress bar
            theirs.get_cam_weights(*given)
    times = interleaved(dict(library=library, ours=lambda: score_cam(run, layer, fidelity)), rounds)
    times['library'] = times['library'] * maps.shape[1] / min(channels, maps.shape[1])
    faster = ratio(times, 'library', 'ours')
    groups = int(channel_groups(maps[0], fidelity).max())
    about = dict(backbone=backbone, weights=weights, layer=layer, channels=maps.shape[1], groups=groups)
    return about | dict(fidelity=fidelity, milliseconds=milliseconds(times), faster=faster, met=faster['x'] >= 10)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--backbone', default='efficientnet_b0')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--scored', default='tf_efficientnet_lite0')
    parser.add_argument('--weights', default='wheel')
    parser.add_argument('--channels', type=int, default=64)
    parser.add_argument('--fidelity', type=float, default=FIDELITY)
    parser.add_argument('--maps', type=int, default=1000)
    parser.add_argument('--picture', default='data/images/SYN_0000001.jpg')
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 1)
    picture = read_picture(args.picture, args.size)
    result = dict(benchmark='maps', backbone=args.backbone, size=args.size, rounds=args.rounds)
    result['memory'] = measure_memory(args.backbone, args.maps)
    print(json.dumps(result['memory']), flush=True)
    result['gradcam'], result['more'] = measure_grad_cam(args.backbone, picture, args.rounds)
    print(json.dumps(dict(gradcam=result['gradcam'], more=result['more'])), flush=True)
    result['scorecam'] = measure_score_cam(
        args.scored, args.weights, picture, args.channels, args.fidelity, min(args.rounds, 3)
    )
    result |= dict(load_before=load, load_after=round(os.getloadavg()[0], 1), cores=os.cpu_count())
    print(json.dumps(result), flush=True)


if __name__ == '__main__':
    main()

"""What maps of evidence and their measures cost, and whether the lean Score-CAM is as good as the full one.

    python benchmarks/maps.py [--parts memory gradcam scorecam removal faithfulness] [--backbone efficientnet_b0]
        [--size 224] [--rounds 9] [--scored tf_efficientnet_lite0] [--weights wheel] [--channels 64] [--fidelity 0.9]
        [--maps 1000] [--picture FILE] [--dataset FOLDER] [--removed 24] [--images 500] [--threads 2]

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
removal   deletion area into blur (less is better) of the maps by `score_cam` at `--fidelity` less that of the maps by
          `score_cam` at fidelity 1, which asks once per channel, as grad-cam does; `--removed` pictures, the same
          backbone, size and layer as `scorecam`. So that there is an answer to lose, the head is logistic regression
          on pictures of 280 other lesions. Target: the 95 % interval of the paired difference, lesions drawn with
          replacement, does not lie wholly above 0. Beside it stand insertion less deletion (more is better; the mean
          over blur and skin) and both differences for maps drawn by lot, which tell what `--removed` pictures can
          tell apart.
faithfulness  `measure_maps` (all measures but ROAD) of four methods and the five maps that used no model, `--images`
          pictures of 128 px, random weights, `--threads` threads; without the time of drawing the maps, which stands
          beside it. Target: at most 10 minutes for 500 pictures on 2 cores; other numbers are scaled to 500.

The last two take pictures of as many lesions, the classes in turn, from FOLDER: a dataset folder of `skinlesion
import`, or HAM10000 as its publisher lays it out; by default ../shared/data/ham10000, or `data` where that is absent.

A round measures all of a part one after the other, in an order that changes with the rounds. A ratio is the median over
the rounds of the wall clock's ratio to the baseline in the same round, with the least and the greatest, so that other
work on the machine affects all alike; the ratio in processor time is printed beside it and has no target. `removal`
and `faithfulness` are measured once. One thread, but for `faithfulness`.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from pytorch_grad_cam import ScoreCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from sklearn.linear_model import LogisticRegression

from skinlesion.data.collections import import_ham10000
from skinlesion.data.schema import read_dataset
from skinlesion.explain.cam import MAP_METHODS, compute_cam, draw_map, unit_maps
from skinlesion.explain.channels import FIDELITY, channel_groups, score_cam
from skinlesion.explain.choice import probabilities_of
from skinlesion.explain.faithfulness import random_maps
from skinlesion.explain.layers import default_layer, find_layer, target_layers
from skinlesion.explain.measures import measure_maps
from skinlesion.explain.passes import MapPass
from skinlesion.explain.removal import removal_areas
from skinlesion.files import repo_root
from skinlesion.images import normalise, read_image, read_mask, resize_image
from skinlesion.model.fusion import create_model
from skinlesion.stats.resamples import Resamples

PARTS = ('memory', 'gradcam', 'scorecam', 'removal', 'faithfulness')
STEADY = 200 # maps after which the memory must not grow
FITTED = 280 # lesions that the head is fitted to
MEASURED = ('gradcam', 'gradcam_plus', 'layercam', 'eigencam') # methods of `faithfulness`
MEASURED_SIZE = 128 # pixels a side of its pictures


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


def one_per_lesion(dataset, count):
    "Rows of `count` lesions, an image of each, the classes in turn as far as they have lesions."
    shuffled = dataset.table.sample(frac=1, random_state=0).drop_duplicates('lesion_id')
    turn = shuffled.groupby('diagnosis').cumcount()
    rows = shuffled.iloc[np.argsort(turn, kind='stable')][:count]
    if len(rows) < count:
        print(f'{dataset.info.name} has pictures of {len(rows)} lesions, fewer than {count}: all are taken', flush=True)
    return rows


def read_pictures(dataset, rows, size):
    "The pictures of rows, squashed to (N,S,S,3) uint8."
    return np.stack([resize_image(read_image(dataset.image_path(image)), size) for image in rows.image_id])


def fit_head(model, images, targets):
    "Logistic regression on the features of a frozen model, classes weighed equally, as its head."
    with torch.inference_mode():
        features = torch.cat([model.embed(batch) for batch in images.split(32)]).double().numpy()
    centre = features.mean(0)
    scale = features.std(0) + 1e-6
    fitted = LogisticRegression(C=.01, class_weight='balanced', max_iter=1000).fit((features - centre) / scale, targets)
    weight = fitted.coef_ / scale
    head = model.heads['diagnosis']
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(fitted.intercept_ - weight @ centre))


def score_cam_maps(model, images, fidelity):
    "Score-CAM's maps of the predicted classes (N,S,S), and processor seconds for each."
    maps = []
    seconds = []
    for image in images.split(1):
        run = MapPass(model, image)
        (layer,) = run.layers
        start = time.process_time()
        raw = score_cam(run, layer, fidelity)
        seconds.append(time.process_time() - start)
        maps.append(unit_maps(run.place(np.maximum(raw, 0), layer))[0])
    return np.concatenate(maps), float(np.mean(seconds))


def mean_difference(first, second, lesion_ids):
    "Mean of first - second over the pictures that both have a value for: value, low, high, n."
    difference = first - second
    defined = np.isfinite(difference)
    leaf = Resamples(lesion_ids).mean(np.nan_to_num(difference), defined, 'no picture has both maps', paired=True)
    rounded = {name: leaf[name] if leaf[name] is None else round(leaf[name], 4) for name in ('value', 'low', 'high')}
    return rounded | dict(n=leaf['n'])


def measure_removal(dataset, backbone, weights, size, fidelity, count):
    "The areas under deletion of the lean Score-CAM, of the full one and of maps drawn by lot."
    rows = one_per_lesion(dataset, count + FITTED)
    images = normalise(read_pictures(dataset, rows, size))
    targets = np.array([dataset.label_set.codes.index(code) for code in rows.diagnosis])
    model = frozen_model(backbone, weights)
    fit_head(model, images[count:], targets[count:])
    images = images[:count]
    lesion_ids = rows.lesion_id.to_numpy()[:count]
    predict = probabilities_of(model)
    predicted = predict(images, None).argmax(1)
    maps = {}
    seconds = {}
    for name, share in dict(lean=fidelity, full=1.).items():
        maps[name], seconds[name] = score_cam_maps(model, images, share)
    maps['random'] = random_maps(len(images), size, size)
    areas = removal_areas(predict, images, maps, predicted)
    result = dict(dataset=dataset.info.name, pictures=len(images), backbone=backbone, size=size, fidelity=fidelity)
    accuracy = round(float((predicted == targets[:count]).mean()), 2)
    result |= dict(layer=default_layer(model, (size, size)), accuracy=accuracy)
    result['processor_seconds'] = {name: round(spent, 2) for name, spent in seconds.items()}
    for measure in ('deletion_blur', 'insertion_less_deletion'):
        means = {name: round(float(np.nanmean(areas[name][measure])), 4) for name in maps}
        for name in ('lean', 'random'):
            pair = areas[name][measure], areas['full'][measure]
            means[f'{name}_less_full'] = mean_difference(*pair, lesion_ids)
        result[measure] = means
    return result | dict(met=result['deletion_blur']['lean_less_full']['low'] <= 0)


def measure_faithfulness(dataset, backbone, count, threads):
    "What it costs to measure the maps of four methods, and to draw them."
    rows = one_per_lesion(dataset, count)
    images = normalise(read_pictures(dataset, rows, MEASURED_SIZE))
    mask_paths = [dataset.mask_path(image) for image in rows.image_id]
    masks = [None if path is None else read_mask(path) for path in mask_paths]
    model = frozen_model(backbone)
    predict = probabilities_of(model)
    targets = np.concatenate([predict(batch, None).argmax(1) for batch in images.split(32)])
    torch.set_num_threads(threads)
    maps = {}
    def draw():
        maps.update({name: compute_cam(model, images, method=name, targets=list(targets)) for name in MEASURED})
    drawing = taken(draw)
    measuring = taken(lambda: measure_maps(predict, images, maps, targets, masks))
    torch.set_num_threads(1)
    minutes = measuring[0] / len(images) * 500 / 60
    result = dict(dataset=dataset.info.name, images=len(images), size=MEASURED_SIZE, backbone=backbone, threads=threads)
    result |= dict(methods=MEASURED, masks=sum(mask is not None for mask in masks))
    for name, (wall, processor) in dict(draw=drawing, measure=measuring).items():
        result |= {f'{name}_seconds': round(wall, 1), f'{name}_processor_seconds': round(processor, 1)}
    return result | dict(measure_minutes_for_500=round(minutes, 2), met=minutes <= 10)


def open_dataset(folder, scratch):
    "The dataset of a folder; HAM10000 as its publisher lays it out is imported into a scratch folder."
    if not (folder / 'dataset.json').is_file():
        import_ham10000(folder, scratch / 'data')
        folder = scratch / 'data'
    return read_dataset(folder)


def measure_part(part, args, picture, dataset):
    "Name -> what was measured, of one part."
    if part == 'memory':
        return dict(memory=measure_memory(args.backbone, args.maps))
    if part == 'gradcam':
        grad_cam, more = measure_grad_cam(args.backbone, picture, args.rounds)
        return dict(gradcam=grad_cam, more=more)
    scored = args.scored, args.weights
    if part == 'scorecam':
        rounds = min(args.rounds, 3)
        return dict(scorecam=measure_score_cam(*scored, picture, args.channels, args.fidelity, rounds))
    if part == 'removal':
        return dict(removal=measure_removal(dataset, *scored, args.size, args.fidelity, args.removed))
    return dict(faithfulness=measure_faithfulness(dataset, args.backbone, args.images, args.threads))


def read_arguments():
    "The arguments of the command line."
    shared = repo_root().parent / 'shared' / 'data' / 'ham10000'
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--backbone', default='efficientnet_b0')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--scored', default='tf_efficientnet_lite0')
    parser.add_argument('--weights', default='wheel')
    parser.add_argument('--channels', type=int, default=64)
    parser.add_argument('--fidelity', type=float, default=FIDELITY)
    parser.add_argument('--maps', type=int, default=1000)
    parser.add_argument('--picture', default='data/images/SYN_0000001.jpg')
    parser.add_argument('--dataset', type=Path, default=shared if shared.is_dir() else Path('data'))
    parser.add_argument('--removed', type=int, default=24)
    parser.add_argument('--images', type=int, default=500)
    parser.add_argument('--threads', type=int, default=2)
    return parser.parse_args()


def main():
    args = read_arguments()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 1)
    result = dict(benchmark='maps', backbone=args.backbone, size=args.size, rounds=args.rounds)
    picture = read_picture(args.picture, args.size) if {'gradcam', 'scorecam'} & set(args.parts) else None
    with tempfile.TemporaryDirectory(prefix='maps.') as scratch:
        needs_dataset = {'removal', 'faithfulness'} & set(args.parts)
        dataset = open_dataset(args.dataset, Path(scratch)) if needs_dataset else None
        for part in args.parts:
            measured = measure_part(part, args, picture, dataset)
            print(json.dumps(measured), flush=True)
            result |= measured
    result |= dict(load_before=load, load_after=round(os.getloadavg()[0], 1), cores=os.cpu_count())
    print(json.dumps(result), flush=True)


if __name__ == '__main__':
    main()

"Killed after any step, a run resumes to the same bytes; parts of a step add up; errors state why a run stopped."
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from madeup import PLAIN_GIT
from skinlesion.data.datasets import LesionDataset, make_loader
from skinlesion.data.metadata import MetadataEncoder
from skinlesion.model import batches, logs, training
from skinlesion.model.fusion import create_model
from skinlesion.model.head_specs import HeadSpec
from skinlesion.model.logs import make_logger
from skinlesion.model.optim import suggest_rate
from skinlesion.model.recipe import Recipe
from skinlesion.model.training import find_learning_rate, fit
from skinlesion.taxonomy import LabelSet

LABELS = LabelSet("squares", ("a", "b", "c"), dict(a="a", b="b", c="c"), frozenset("c"))
HEADS = (
    HeadSpec("severe", "ordinal", levels=("mild", "moderate", "severe"), weight=0.5),
    HeadSpec("urgent", "binary", weight=0.3),
)
EVERYTHING = dict(
    epochs=5,
    batch_size=5,
    accumulate=2,
    ema_decay=0.9,
    mix="mixup",
    mix_alpha=1.0,
    patience=2,
    warmup_epochs=1.5,
    freeze_epochs=1,
    layer_decay=0.8,
    learning_rate=2e-3,
    loss="focal",
    sampler="balanced",
    metric="balanced_accuracy",
    checkpoint_minutes=0,
)


pytestmark = pytest.mark.usefixtures("one_thread")


class Store:
    "What a dataset needs of an image store, in memory."
    size = 32

    def __init__(self, images):
        self.images = images
    def position(self, image_id):
        return list(self.images).index(image_id)
    def image(self, image_id):
        return self.images[image_id]


def squares(n=24, seed=0, augment=None, heads=False):
    "Coloured noise of three classes; age tells two of them apart; some answers of the further heads are missing."
    rng = np.random.default_rng(seed)
    codes = ["abc"[i % 3] for i in range(n)]
    pixels = rng.normal(110, 40, (n, 32, 32, 3))
    for image, code in zip(pixels, codes):
        image[..., "abc".index(code) % 2] += 30
    table = pd.DataFrame(dict(image_id=[f"ISIC_{seed}{i:03}" for i in range(n)], diagnosis=codes, sex="", site="",
                              age=[(60 if code == "c" else 30) + rng.integers(20) for code in codes]))
    extra = dict(
        severe=torch.tensor([i % 4 - 1 for i in range(n)]),
        urgent=torch.tensor([(-1, 0, 1)[i // 2 % 3] for i in range(n)]),
    )
    return LesionDataset(
        Store(dict(zip(table.image_id, pixels.clip(0, 255).astype(np.uint8)))),
        table,
        LABELS,
        MetadataEncoder(50.0, 20.0),
        augment,
        seed,
        extra if heads else None,
    )


def make_run(heads=True, backbone="test_resnet", fusion="concat", drop_rate=.3, n=24, **changes):
    "Model, data and recipe of a small run in which all that can be switched on is."
    train = squares(n, augment="light", heads=heads)
    valid = squares(12, 1, heads=heads)
    head = "cosine" if changes.get("loss") == "ldam" else "linear"
    model = create_model(
        backbone,
        3,
        train.metadata.shape[1],
        fusion,
        drop_rate=drop_rate,
        heads=list(HEADS) if heads else None,
        seed=0,
        head=head,
    )
    return model, train, valid, Recipe(**EVERYTHING | changes)


def result_bytes(result):
    "The weights of a result and its history, as bytes."
    return b"".join(v.numpy().tobytes() for v in result.model.state_dict().values()) + result.history.to_csv().encode()


class Killed(Exception):
    "Instead of a signal, where one process kills itself many times."


def kill_at(step):
    "An `on_step` that ends the run after so many steps."
    def on_step(done):
        if done == step:
            raise Killed
    return on_step


def kill_series(tmp_path, steps, workers=0, **changes):
    "Kill after each of `steps`, go on: how many were killed, and how many of them ended on the same bytes."
    lines = []
    whole = result_bytes(fit(*make_run(**changes), progress=lines.append))
    killed = same = 0
    for step in steps:
        folder = tmp_path / f"{workers}_{step}"
        with pytest.raises(Killed):
            fit(*make_run(**changes, workers=workers), work_dir=folder, on_step=kill_at(step))
        killed = killed + 1
        said = []
        same += result_bytes(fit(*make_run(**changes, workers=workers), progress=said.append, work_dir=folder)) == whole
        assert said[0].startswith("↻ going on") and said[1:] == lines, said
        assert [p.name for p in folder.iterdir()] == ["state.pt"], said
    return killed, same


def count_steps(**changes):
    "How many steps the run makes before it is done or stopped early."
    seen = []
    history = fit(*make_run(**changes), on_step=seen.append).history
    return len(seen), len(history)


SLOW_SERIES = {
    "everything": {}, "in one batch a step": dict(accumulate=1, freeze_epochs=0),
    "cutmix and fp16": dict(mix="cutmix", precision="fp16"),
    "bf16": dict(precision="bf16", epochs=2, patience=9),
    "LDAM, deferred weights": dict(loss="ldam", epochs=3, deferred=.5, weight_power=0., sampler="shuffle"),
    "no further heads": dict(heads=False, fusion="none", ema_decay=0., loss="cross_entropy", metric="loss"),
}


def test_the_series_stops_early():
    "The run of the series does end before its last epoch, with a last step of fewer batches, so both are covered."
    steps, epochs = count_steps()
    assert epochs < EVERYTHING["epochs"] and steps == 3 * epochs, (steps, epochs)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_some_steps(tmp_path, workers):
    "In the middle of the frozen epoch, at its end, in the middle and at the last step of later ones."
    steps = (3, 5) if workers else (2, 4, 6)
    assert kill_series(tmp_path, steps, workers) == (len(steps), len(steps))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", SLOW_SERIES)
def test_killed_at_every_step(tmp_path, name, workers):
    "Every step of a run, one after another."
    steps, _ = count_steps(**SLOW_SERIES[name])
    result = kill_series(tmp_path, range(1, steps + 1), workers, **SLOW_SERIES[name])
    print(f"\n{name}, {workers} loader workers: {result[0]} interruptions, {result[1]} byte-identical")
    assert result == (steps, steps)


CHILD = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_training import make_run, result_bytes
from skinlesion.model.training import fit
kill, folder = int(sys.argv[1]), sys.argv[2]
def on_step(done):
    if done == kill: os.kill(os.getpid(), signal.SIGKILL)
run = fit(*make_run(workers=2, checkpoint_minutes={minutes}), work_dir=folder, on_step=on_step, progress=print)
open(sys.argv[3], 'wb').write(result_bytes(run))
"""


def test_killed_by_signal(tmp_path):
    "SIGKILL in a child of this process, with states seldom enough that work is lost."
    child = os.fork()
    if not child:
        def stop(done):
            return done == 7 and os.kill(os.getpid(), signal.SIGKILL)
        try:
            fit(*make_run(workers=2, checkpoint_minutes=.001), work_dir=tmp_path, on_step=stop)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    said = []
    resumed = fit(*make_run(), work_dir=tmp_path, progress=said.append)
    assert said[0].startswith("↻ going on") and result_bytes(resumed) == result_bytes(fit(*make_run()))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(7,), (2, 4, 7)])
def test_killed_by_signal_in_other_processes(tmp_path, kills):
    "SIGKILL after some steps of a run that saves its state seldom: the bytes of an undisturbed run."
    text = CHILD.format(tests=str(Path(__file__).parent), minutes=.001)
    def start(kill):
        return subprocess.run(
            [sys.executable, "-c", text, str(kill), *(str(tmp_path / name) for name in ("work", "out"))],
            capture_output=True,
            text=True,
        )
    assert [start(step).returncode for step in kills] == [-signal.SIGKILL] * len(kills)
    last = start(0)
    assert last.returncode == 0, last.stderr
    assert last.stdout.startswith("↻ going on"), last.stdout  # the fingerprint is the same in another process
    assert (tmp_path / "out").read_bytes() == result_bytes(fit(*make_run()))


def test_no_loader_process_is_left(tmp_path):
    "Not after a run, and not while an error that ended one is still held."
    fit(*make_run(workers=2, epochs=2))
    with pytest.raises(Killed) as held:
        fit(*make_run(workers=2), on_step=kill_at(4))
    assert held.value and multiprocessing.active_children() == []
    model, train, _, config = make_run(workers=1, epochs=2)
    train.metadata[7, 0] = float("nan")
    with pytest.raises(FloatingPointError) as held:
        find_learning_rate(model, train, config, steps=12)
    assert held.value and multiprocessing.active_children() == []


def test_another_run_is_never_gone_on_with(tmp_path):
    "Other pixels, head targets, augmentation, recipe, start or threads: a new run; other workers: the same run."
    def again(change):
        torch.set_num_threads(1)
        with pytest.raises(Killed):
            fit(*make_run(), work_dir=tmp_path, on_step=kill_at(4))
        model, train, valid, config = make_run()
        said = []
        stop = kill_at(1 if "anew" in change.__doc__ else 5)
        with pytest.raises(Killed):
            fit(*change(model, train, valid, config), progress=said.append, work_dir=tmp_path, on_step=stop)
        return said
    def pixels(model, train, valid, config):
        "anew"
        train.store.images["ISIC_0003"][0, 0, 0] ^= 1
        return model, train, valid, config
    def head(model, train, valid, config):
        "anew"
        train.targets_extra["urgent"][0] = 1
        return model, train, valid, config
    def augment(model, train, valid, config):
        "anew"
        return model, squares(augment="medium", heads=True), valid, config
    def recipe(model, train, valid, config):
        "anew"
        return model, train, valid, config.replace(clip_norm=2.)
    def start(model, train, valid, config):
        "anew"
        with torch.no_grad():
            next(model.parameters())[0] += 1e-3
        return model, train, valid, config
    def threads(model, train, valid, config):
        "anew"
        torch.set_num_threads(2)
        return model, train, valid, config
    def nothing(model, train, valid, config):
        "the same"
        return model, train, valid, config.replace(workers=1, checkpoint_minutes=.05)
    for change in (pixels, head, augment, recipe, start, threads):
        assert again(change)[0].endswith("starting anew"), change
    assert again(nothing)[0] == "↻ going on in epoch 2 after step 1 of 3 of an unfinished run"


def gradient(batch_size, accumulate, **changes):
    "The weights' change in one step of plain descent over all images: the gradient."
    found = {}
    class Stop(Exception):
        pass
    def look(done):
        found.update({k: v.detach().clone() for k, v in model.named_parameters()})
        raise Stop
    model, train, valid, config = make_run(
        backbone="test_vit", drop_rate=0.0, fusion="none", batch_size=batch_size, accumulate=accumulate, **changes
    )
    with pytest.raises(Stop):
        fit(model, train, valid, config, on_step=look)
    return found


def test_accumulated_gradients_are_those_of_the_whole(monkeypatch):
    "One batch of 24, or 3 of 9, 9 and 6: the same step, with class weights and missing targets, without batch norm."
    class Descent(torch.optim.SGD):
        def __init__(self, params, lr, fused):
            super().__init__(params, lr=lr)
    monkeypatch.setattr(torch.optim, "AdamW", Descent)
    options = dict(
        mix="none",
        freeze_epochs=0,
        warmup_epochs=0,
        clip_norm=1e6,
        learning_rate=1.0,
        sampler="shuffle",
        ema_decay=0.0,
        layer_decay=1.0,
    )
    for more in ({}, dict(loss="class_balanced"), dict(loss="cross_entropy", label_smoothing=.1)):
        whole = gradient(24, 1, **options, **more)
        parts = gradient(9, 3, **options, **more)
        assert max((whole[k] - parts[k]).abs().max() for k in whole) < 2e-5 * max(v.abs().max() for v in whole.values())


def test_frozen_means_still():
    "In a frozen epoch the backbone keeps its weights and norm statistics; afterwards it changes; flags are restored."
    model, train, valid, config = make_run(freeze_epochs=1, epochs=2, warmup_epochs=0, patience=9, ema_decay=0.)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    seen = []
    def look(done):
        seen.append(all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items()))
    fit(model, train, valid, config, on_step=look)
    assert seen == [True] * 3 + [False] * 3 and all(p.requires_grad for p in model.parameters())


def test_frozen_stages_keep_weights_and_norms():
    "The first stages are as they were to the bit, norm statistics too; the others learn; flags are restored."
    changes = dict(freeze_epochs=0, epochs=1, warmup_epochs=0, frozen_stages=2, pretrain_epochs=1, ema_decay=0.)
    model, train, valid, config = make_run(**changes)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    result = fit(model, train, valid, config)
    moved = {k.split('.')[0] for k, v in result.model.backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {'layer2', 'layer3', 'layer4'}
    assert all(p.requires_grad for p in model.parameters())


def test_stages_that_leave_nothing_to_train():
    "As many frozen stages as there are: refused before the first step, with the number that is allowed."
    model, train, valid, config = make_run(frozen_stages=5, pretrain_epochs=1)
    with pytest.raises(ValueError, match="frozen_stages is 5.* a number from 0 to 4"):
        fit(model, train, valid, config, on_step=lambda done: pytest.fail('a step was taken'))


def test_a_backbone_frozen_by_its_owner_stays_so():
    "Gradients switched off by hand: the backbone is as it was, in evaluation mode, and the rest learns."
    model, train, valid, config = make_run(freeze_epochs=0, epochs=2)
    model.backbone.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = fit(model, train, valid, config)
    moved = [k for k, v in result.model.state_dict().items() if not torch.equal(v, before[k])]
    assert (
        moved
        and not any(k.startswith("backbone.") for k in moved)
        and not any(p.requires_grad for p in model.backbone.parameters())
    )


def test_the_average_is_what_is_kept():
    "With a moving average the weights kept are those validated: the metric of the result is found again by hand."
    model, train, valid, config = make_run(ema_decay=.99, epochs=2, metric="loss", patience=9)
    result = fit(model, train, valid, config)
    raw = fit(*make_run(ema_decay=0., epochs=2, metric="loss", patience=9))
    batch = next(iter(make_loader(valid, 12)))
    with torch.no_grad():
        outputs = result.model.forward_heads(batch["image"], batch["metadata"])
    objective = training.Objective(model.head_specs, config, train.targets, 3, LABELS.codes)
    sums = objective.parts(outputs, batch["target"], batch["heads"])
    assert training._mean_loss(objective, sums) == pytest.approx(result.best_value, rel=1e-4)
    assert result.best_value == result.history.valid_loss.min() and result_bytes(result) != result_bytes(raw)


def test_history_names_every_head():
    "A column for each metric of each head; an undefined one is empty."
    model, train, valid, config = make_run(epochs=2)
    valid.targets_extra["urgent"][:] = -1
    history = fit(model, train, valid, config).history
    assert [c for c in history if "severe" in c or "urgent" in c] == [
        "valid_severe_quadratic_kappa", "valid_severe_mae", "valid_urgent_auroc", "valid_urgent_balanced_accuracy"]
    assert history.valid_urgent_auroc.isna().all() and history.valid_severe_mae.notna().all()


@pytest.mark.parametrize("change, said", [
    (lambda m, t, v, c: v.targets_extra.pop("urgent"), "head 'urgent' has no targets in the validation set (severe)"),
    (lambda m, t, v, c: t.targets_extra["urgent"].fill_(-1), "head 'urgent' has no known target in the training set"),
])
def test_heads_without_answers(change, said):
    "A head that nothing can be learned for stops the run before it begins."
    run = make_run()
    change(*run)
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        fit(*run)


def test_no_number_names_images_and_the_last_good_state(tmp_path):
    "A metadata value that is none: epoch, the batch's images, and where the state before lies."
    model, train, valid, config = make_run(mix="none", sampler="shuffle")
    train.metadata[7, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match="the loss is nan in epoch 1 on the batch of images .*ISIC_0007"
    ) as caught:
        fit(model, train, valid, config, work_dir=tmp_path)
    named = str(caught.value).split("images ")[1].split(";")[0].split(", ")
    path = tmp_path / "state.pt"
    assert len(named) == 5 and str(caught.value).endswith(f"the state before it lies in '{path}'") == path.exists()
    state = torch.load(path, weights_only=True)["model"] if path.exists() else {}
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_no_number_in_a_late_epoch_keeps_the_state_before(tmp_path):
    "The weights are made infinite after the fifth step: the message names the file, and what lies there is finite."
    model, train, valid, config = make_run()
    def spoil(done):
        if done == 5:
            next(model.parameters()).data.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="in epoch 2 .*; the state before it lies in '.*state.pt'"):
        fit(model, train, valid, config, work_dir=tmp_path, on_step=spoil)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["epoch"], state["done"]) == (1, 2) and all(
        torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point()
    )


def test_no_number_in_a_gradient_names_the_whole_step():
    "The first batch of two has a finite loss and an infinite gradient: its images are named, not only the second's."
    model, train, valid, config = make_run(mix="none", sampler="shuffle")
    seen = []
    def spoil(module, args, out):
        seen.append(len(out))
        if len(seen) == 1:
            out.register_hook(lambda grad: grad * float("nan"))
    model.drop.register_forward_hook(spoil)
    with pytest.raises(
        FloatingPointError, match="the norm of the gradient is nan in epoch 1 on the batch of images "
    ) as caught:
        fit(model, train, valid, config)
    step = [train.ids[i] for keys in training.epoch_batches(24, 0, 5, config.seed)[:2] for i, _ in keys]
    assert str(caught.value).split("images ")[1].split(";")[0].split(", ") == step and len(step) == 10


def test_rare_classes_count_once():
    "Drawn as often as the others they are not weighed besides; the class weights are there with the plain order."
    targets = torch.tensor([0] * 8 + [1] * 2 + [2] * 2)
    def weights(**more):
        return training.Objective((), Recipe(**more), targets, 3, "abc").loss.weights
    assert weights(sampler="balanced") is None and weights(sampler="balanced", loss="focal") is None
    assert weights().tolist() == weights(loss="focal").tolist() == pytest.approx([.75, 1.5, 1.5])


def test_margins_want_cosines():
    "LDAM on a head that gives no cosines is refused before anything is trained."
    _, train, valid, config = make_run(loss="ldam", weight_power=0., sampler="shuffle")
    model = make_run()[0]
    with pytest.raises(ValueError, match=r"the model's head is 'linear'; create_model\(..., head='cosine'\)"):
        fit(model, train, valid, config)
    with pytest.raises(ValueError, match="head='cosine'"):
        find_learning_rate(model, train, config)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_metadata_alone_ask_for_no_image(monkeypatch, mix):
    "No image is read where none is looked at, and the bytes are those of a run that reads them."
    def unreadable(image_id):
        raise OSError(image_id)
    def run():
        return make_run(backbone="", fusion="metadata", mix=mix, epochs=2)
    model, train, valid, config = run()
    train.store.image = valid.store.image = unreadable
    blind = result_bytes(fit(model, train, valid, config))
    monkeypatch.setattr(batches, "without_images", lambda dataset: dataset)
    assert result_bytes(fit(*run())) == blind


def test_each_process_validates_on_something():
    "Fewer images than processes are an error, not processes that wait for one another."
    model, train, valid, config = make_run()
    valid.ids = valid.ids[:2]
    with pytest.raises(ValueError, match="the validation set has 2 images for 3 processes; each needs one"):
        fit(model, train, valid, config, processes=3)


def test_out_of_memory_says_what_fits(monkeypatch):
    "Memory for three images and not for four: batch_size 2 is proposed, ten a step; the weights are unchanged."
    model, train, valid, config = make_run(heads=False, batch_size=20, accumulate=1, freeze_epochs=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    whole = model.forward_heads
    held = []
    def small(image, metadata=None):
        made = torch.zeros(len(image))
        assert all(ref() is None for ref in held)  # what a failed step had made is gone before the next is tried
        held.append(weakref.ref(made))
        if len(image) > 3:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."
            )
        return whole(image, metadata)
    monkeypatch.setattr(model, "forward_heads", small)
    with pytest.raises(
        MemoryError,
        match=r"batch_size 20 on cpu .*; what fits is batch_size 2: with accumulate 10 a step still takes 20 images",
    ):
        fit(model, train, valid, config)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    monkeypatch.setattr(model, "forward_heads", lambda image, metadata=None: small(torch.zeros(9)))
    with pytest.raises(MemoryError, match="not even two images fit"):
        fit(model, train, valid, config)


def read_folder(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_log_of_a_killed_run_is_that_of_a_whole_one(tmp_path):
    "DVCLive's files: deterministic, without dvc.yaml, and the same after a kill; the sums of results beside them."
    result = tmp_path / "weights.bin"
    result.write_bytes(b"12345")
    for name, kill in dict(whole=0, killed=7).items():
        def log():
            return make_logger(tmp_path / name, params=dict(epochs=5, heads=("severe", "urgent")))
        if kill:
            with pytest.raises(Killed):
                fit(*make_run(), work_dir=tmp_path / "work" / name, logger=log(), on_step=kill_at(kill))
        logger = log()
        history = fit(*make_run(), work_dir=tmp_path / "work" / name, logger=logger).history
        logger.done([result])
    files = read_folder(tmp_path / "whole")
    assert files == read_folder(tmp_path / "killed") and not any(
        name.endswith((".dvc", "dvc.yaml", ".html")) for name in files
    )
    assert {"metrics.json", "params.yaml", "artifacts.json", "plots/metrics/valid_auroc_macro.tsv"} <= set(files)
    assert len(files["plots/metrics/train_loss.tsv"].splitlines()) == len(history) + 1
    assert json.loads(files["artifacts.json"])["weights.bin"]["bytes"] == 5
    assert json.loads(files["metrics.json"])["valid_auroc_macro"] == pytest.approx(history.valid_auroc_macro.iloc[-1])


@pytest.mark.parametrize("around", ["no git", "git without a commit", "git without DVC", "DVC without git"])
def test_the_log_leaves_the_repository_alone(tmp_path, monkeypatch, around):
    "DVCLive needs a commit and by itself makes any git repository one of DVC; here it only writes its files."
    if around.startswith("git"):
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    if around == "git without DVC":
        name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(
            ["git", *name, "commit", "-q", "--allow-empty", "-m", "start"],
            cwd=tmp_path,
            check=True,
            env={**os.environ, **PLAIN_GIT},
        )
    if around == "DVC without git":
        (tmp_path / ".dvc").mkdir()
    before = read_folder(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    sent = []
    monkeypatch.setattr("dvc_studio_client.post_live_metrics.requests.post", lambda *args, **kwargs: sent.append(args))
    for key, value in dict(TOKEN="isat_x", REPO_URL="made/up").items():
        monkeypatch.setenv(f"DVC_STUDIO_{key}", value)
    logger = make_logger("live", params=dict(epochs=1))
    logger.epoch(dict(epoch=1, train_loss=.5))
    logger.done()
    assert json.loads(Path("live/metrics.json").read_text()) == dict(step=1, train_loss=.5) and not sent
    assert {name: data for name, data in read_folder(tmp_path).items() if not name.startswith("work/")} == before


class FakeWandb(types.ModuleType):
    "What is asked of Weights & Biases, written down."
    def __init__(self):
        super().__init__("wandb")
        self.calls = []
    def Settings(self, **options):
        return options
    def init(self, **options):
        self.calls.append(options)
        return types.SimpleNamespace(
            log=lambda row, step: self.calls.append((step, row)),
            finish=lambda: self.calls.append("finish"),
            log_artifact=lambda *a, **k: self.calls.append(a),
        )


class FakeWriter:
    "What is asked of TensorBoard, written down."
    calls = []
    def __init__(self, folder):
        self.calls.append(folder)
    def add_scalar(self, *args):
        self.calls.append(args)
    def add_text(self, *args):
        self.calls.append(args)
    def close(self):
        self.calls.append("close")


def test_other_logs(tmp_path, monkeypatch):
    "Offline by default; values of None are left out; a missing package is an error that says what to install."
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=FakeWriter))
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    logger = make_logger(tmp_path, ("tensorboard", "wandb"), dict(epochs=2))
    assert fake.calls == []  # nothing is opened before the first epoch
    logger.epoch(dict(epoch=1, train_loss=.5, valid_urgent_auroc=None))
    logger.done([])
    assert (fake.calls[0]["mode"], fake.calls[0]["config"], fake.calls[1:]) == (
        "offline",
        dict(epochs=2),
        [(1, dict(train_loss=0.5)), "finish"],
    )
    assert fake.calls[0]["settings"] == dict(
        silent=True
    ) # what it prints holds times, and would differ from run to run
    assert FakeWriter.calls[-2:] == [("train_loss", .5, 1), "close"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'skinlesion\[wandb\]'"):
        make_logger(tmp_path, ("wandb",))
    with pytest.raises(ValueError, match="log 'dvcliv' is not known .* Did you mean 'dvclive'"):
        make_logger(tmp_path, ("dvcliv",))


class Terminal(io.StringIO):
    "A stream that says it is a terminal."
    def isatty(self):
        return True


def test_a_line_is_written_over_on_a_terminal_alone(monkeypatch):
    "Step, speed and time left, wiped before each line of an epoch; elsewhere nothing but whole lines."
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(logs, "REFRESH_SECONDS", 0.)
        lines = []
        fit(*make_run(epochs=2), progress=lines.append)
        assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
        if isinstance(stream, Terminal):
            assert "epoch 1, step 2/3" in stream.getvalue() and stream.getvalue().endswith("\r\x1b[K")
        else:
            assert stream.getvalue() == ""


def test_rate_finder_leaves_the_model_alone():
    "Rates rise, the loss is there for each, the model is untouched, and twice gives the same."
    model, train, _, config = make_run(epochs=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    table = find_learning_rate(model, train, config, 1e-5, 1., steps=12)
    assert (
        list(table) == ["learning_rate", "loss", "smoothed"]
        and table.learning_rate.is_monotonic_increasing
        and len(table) > 5
    )
    assert table.equals(find_learning_rate(model, train, config, 1e-5, 1., steps=12))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(
        p.grad is None for p in model.parameters()
    )
    assert 1e-5 <= suggest_rate(table) <= 1.


def test_processes_want_torchrun():
    "More than one process without a launcher is refused before anything is done."
    with pytest.raises(ValueError, match="torch.distributed.run --standalone --nproc_per_node 2"):
        fit(*make_run(), processes=2)

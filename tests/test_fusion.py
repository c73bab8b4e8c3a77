"""Models of image and metadata: every fusion on every kind of backbone, further heads, two classes, hidden fields."""
import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from skinlesion.data.metadata import MetadataEncoder
from skinlesion.model.fusion import FUSIONS, cam_layers, create_model
from skinlesion.model.head_specs import HeadSpec
from skinlesion.model.heads import head_loss, head_metrics, head_probs
from skinlesion.taxonomy import SITES

ENCODER = MetadataEncoder(50.0, 15.0)
READING = tuple(f for f in FUSIONS if f != "none")
JOINT = tuple(f for f in READING if f != "metadata")
# Layouts and ways of pooling: maps (plain, squeeze-and-excite, no batch norm, attention in windows, layer norm behind
# the pooling), channels last
# (mambaout widens behind the pooling), tokens (class token, mean, attention pooling, relative positions).
FEW = ("test_resnet", "test_mambaout", "test_vit")
MANY = (
    "small_cnn_3",
    "small_cnn_4",
    "mobilenetv3_small_100",
    "test_byobnet",
    "test_coatnet",
    "test_convnext",
    "test_efficientnet",
    "test_maxvit",
    "test_nfnet",
    "test_vit2",
    "test_vit3",
    "test_vit_relpos",
)
NAMED = (
    "efficientnet_b0",
    "densenet121",
    "resnet50",
    "convnext_tiny",
    "seresnext50_32x4d",
    "tf_efficientnetv2_s",
    "mobilenetv2_100",
    "swinv2_tiny_window8_256",
    "vit_small_patch14_dinov2",
)
HEADS = (HeadSpec("urgent", "binary"), HeadSpec("severity", "ordinal", levels=("mild", "moderate", "severe")),
         HeadSpec("origin", "multiclass", levels=("a", "b", "c")))


pytestmark = pytest.mark.usefixtures("one_thread")


def made(fusion, backbone="test_resnet", classes=4, size=64, **options):
    "A model of one fusion, ready for images of `size` pixels."
    reads = fusion != "none"
    return create_model("" if fusion == "metadata" else backbone, classes, ENCODER.dim if reads else 0, fusion,
                        metadata_groups=ENCODER.groups() if reads else None, image_size=size, **{"seed": 0, **options})


def batch(n=4, size=64, seed=0):
    "Images of noise and encoded people, some of them unknown."
    rng = np.random.default_rng(seed)
    words = {"age": [20, 40, 60, 80, None], "sex": ["female", "male", ""], "site": [*SITES, ""]}
    table = pd.DataFrame({name: rng.choice(known, n) for name, known in words.items()})
    return torch.tensor(rng.normal(size=(n, 3, size, size)), dtype=torch.float32), torch.tensor(ENCODER.encode(table))


def silent_parts(model):
    "Parts of the model that a backward pass did not reach."
    reached = {}
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        reached[part] = reached.get(part, False) or (p.grad is not None and bool((p.grad != 0).any()))
    return [part for part, yes in reached.items() if not yes]


def check_fusion(fusion, backbone, size=64):
    "Gradient in both branches, an output that depends on both, single images as in a batch, maps with a gradient."
    model, (image, metadata) = made(fusion, backbone, size=size, heads=HEADS), batch(4, size)
    heads = model.forward_heads(image, metadata)
    assert [(k, tuple(v.shape)) for k, v in heads.items()] == [
        ("diagnosis", (4, 4)),
        ("urgent", (4, 1)),
        ("severity", (4, 2)),
        ("origin", (4, 3)),
    ]
    sum(v.square().sum() for v in heads.values()).backward()
    assert not silent_parts(model)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    F.cross_entropy(model(image, metadata), torch.arange(4)).backward()
    assert silent_parts(model) == [] and model.takes_metadata == (fusion != "none")

    model.eval()
    with torch.no_grad():
        logits = model(image, metadata)
        assert ((model(image, metadata.flip(0)) - logits).abs().max() > 1e-4) == (fusion != "none")
        assert ((model(image.flip(0), metadata) - logits).abs().max() > 1e-6) == (fusion != "metadata")
        alone = torch.cat([model(image[i:i + 1], metadata[i:i + 1]) for i in range(4)])
        assert torch.allclose(alone, logits, atol=1e-4)
        if fusion == "none":
            assert torch.equal(model(image), logits)
    if fusion == "metadata":
        return
    kept = []
    layer = cam_layers(model)[-1][1]
    handle = layer.register_forward_hook(lambda module, args, out: kept.append(out))
    logits = model(image, metadata)
    handle.remove()
    assert (torch.autograd.grad(logits[:, 1].sum(), kept[-1])[0] != 0).any()


@pytest.mark.parametrize("backbone", FEW)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusion(fusion, backbone):
    "Every fusion on the three layouts of a map."
    check_fusion(fusion, backbone)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", MANY)
@pytest.mark.parametrize("fusion", JOINT)
def test_fusion_on_more_backbones(fusion, backbone):
    "Other ways to pool, to normalise and to widen; windows that tile one size of image alone."
    check_fusion(fusion, backbone, 160 if backbone in ("test_coatnet", "test_maxvit") else 64)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", NAMED)
@pytest.mark.parametrize("fusion", JOINT)
def test_fusion_on_named_backbones(fusion, backbone):
    "The backbones of the field."
    check_fusion(fusion, backbone, 112 if "dinov2" in backbone else 64)


def train(model, cost, n, steps):
    "Steps of Adam on the `cost` of rows of the first half; new noise in each step, so that no row is memorised."
    order = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(steps):
        optimiser.zero_grad()
        cost(torch.randperm(n // 2, generator=order)[:48]).backward()
        optimiser.step()
    return model.eval()


def noisy(image):
    "The same pictures with noise."
    return image + .5 * torch.randn_like(image)


def two_questions(n=400, size=16, seed=0):
    "Light or dark pictures of people old or young; what each of the two says alone."
    rng = np.random.default_rng(seed)
    light = torch.tensor(rng.random(n) < .5)
    old = torch.tensor(rng.random(n) < .5)
    people = pd.DataFrame({"age": np.where(old, 75, 25), "sex": "", "site": ""})
    image = torch.where(light, .6, -.6)[:, None, None, None].expand(n, 3, size, size)
    return image, torch.tensor(ENCODER.encode(people)), light.long(), old.long()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_learns_from_what_it_reads(fusion):
    "A class that follows from picture and metadata together is learned by the fusions that read both, and by no other."
    image, metadata, light, old = two_questions()
    model = made(fusion, "test_efficientnet", 4, 16, drop_rate=0.0)
    targets = 2 * light + old
    train(model, lambda rows: F.cross_entropy(model(noisy(image[rows]), metadata[rows]), targets[rows]), 400, 25)
    with torch.no_grad():
        found = (model(noisy(image[200:]), metadata[200:]).argmax(1) == targets[200:]).float().mean().item()
    assert found > .9 if fusion in JOINT else .3 < found < .7, found


@pytest.mark.parametrize("fusion", READING)
def test_forgetting_is_seeded_and_for_training_only(fusion):
    "The same seed forgets the same fields; evaluation forgets none; the weights hold nothing of it."
    image, metadata = batch(16, 32)
    model = made(fusion, size=32, metadata_dropout=.5, drop_rate=0.0)
    plain = made(fusion, size=32, drop_rate=0.0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert list(model.state_dict()) == list(plain.state_dict())
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(copy.deepcopy(model)(image, metadata).detach())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    with torch.no_grad():
        assert torch.equal(model.eval()(image, metadata), plain.eval()(image, metadata))


def test_forgotten_rows_are_rows_of_the_encoder():
    "Whatever is forgotten, what is left is what the encoder writes of somebody of whom just that is unknown."
    model = made("concat", metadata_dropout=.5)
    known = {"age": 33, "sex": "male", "site": "ear"}
    written = {
        tuple(ENCODER.encode_one(**{k: v for k, v in known.items() if k in kept})): kept
        for kept in [
            (),
            ("age",),
            ("sex",),
            ("site",),
            ("age", "sex"),
            ("age", "site"),
            ("sex", "site"),
            ("age", "sex", "site"),
        ]
    }
    torch.manual_seed(0)
    rows = model.metadata_dropout(torch.tensor(ENCODER.encode_one(**known)).repeat(3000, 1))
    counts = pd.Series([written[tuple(r)] for r in rows.numpy()]).value_counts(normalize=True)
    nothing = counts.pop(())
    assert abs(nothing - (1 / 4 + 3 / 4 / 27)) < .04 # all at once, or each by itself with probability 1/3
    assert len(counts) == 7 and abs(counts[("age",)] - 3 / 4 * 2 / 27) < .03
    assert abs(counts[("age", "sex", "site")] - 3 / 4 * 8 / 27) < .04
    assert torch.equal(model.double().metadata_dropout.missing, torch.tensor(ENCODER.encode_one()).double())


@pytest.mark.parametrize("fusion", READING)
def test_everything_unknown_is_an_answer(fusion):
    "Nobody is refused for what is not known of them."
    image, _ = batch(2)
    model = made(fusion).eval()
    unknown = torch.tensor(ENCODER.encode_one()).repeat(2, 1)
    assert torch.isfinite(model(image, unknown)).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_rebuilt_from_its_config(fusion):
    "The config goes through JSON; with the weights it is the same model to the bit, in training too."
    image, metadata = batch()
    model = made(fusion, heads=HEADS, head="cosine", metadata_dropout=0.0 if fusion == "none" else .3)
    other = create_model(**json.loads(json.dumps(model.config)), seed=9)
    other.load_state_dict(model.state_dict())
    assert other.config == model.config and other.head_specs == HEADS
    answers = []
    for m in (model, other):
        torch.manual_seed(3)
        answers.append(torch.cat(list(m.train().forward_heads(image, metadata).values()), 1).detach())
    assert torch.equal(*answers)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_channels_last_is_the_same_model(fusion):
    "The layout in memory changes no result."
    image, metadata = batch()
    for backbone in ("test_resnet", "test_vit"):
        model = made(fusion, backbone).eval()
        with torch.no_grad():
            plain = model(image, metadata)
            turned = model.to(memory_format=torch.channels_last)(
                image.contiguous(memory_format=torch.channels_last), metadata
            )
            assert torch.allclose(turned, plain, atol=1e-5)


def test_a_seed_is_a_model():
    "The first weights follow from the seed alone, and a further head changes none that were there."
    for fusion in FUSIONS:
        torch.manual_seed(1)
        first = made(fusion).state_dict()
        torch.manual_seed(2)
        second = made(fusion).state_dict()
        more = made(fusion, heads=HEADS).state_dict()
        assert all(torch.equal(v, second[k]) and torch.equal(v, more[k]) for k, v in first.items())
        assert any(not torch.equal(v, first[k]) for k, v in made(fusion, seed=1).state_dict().items())


@pytest.mark.parametrize("head", ("linear", "cosine"))
def test_two_classes_have_one_unit(head):
    "Cross entropy of the two logits is the binary one of the unit, in value and gradient."
    image, _ = batch()
    model = made("none", classes=2, head=head, drop_rate=0.0).eval()
    targets = torch.tensor([0, 1, 1, 0])
    logits = model(image)
    assert model.heads["diagnosis"].weight.shape[0] == 1 and torch.allclose(logits[:, 0], -logits[:, 1])
    unit = logits[:, 1] - logits[:, 0]
    assert torch.allclose(
        F.cross_entropy(logits, targets), F.binary_cross_entropy_with_logits(unit, targets.float()), atol=1e-6
    )
    assert torch.allclose(logits.softmax(1)[:, 1], unit.sigmoid(), atol=1e-6)
    for target in (0, 1): # one map is the other's negative
        spatial = model.forward_features(image)
        logits = model.heads["diagnosis"](model.backbone.forward_head(spatial, pre_logits=True))
        grads = [torch.autograd.grad(logits[:, t].sum(), spatial, retain_graph=True)[0] for t in (target, 1 - target)]
        assert (grads[0] != 0).any() and torch.allclose(grads[0], -grads[1])


def test_a_missing_answer_leaves_no_trace():
    "With the answers of a head missing, the gradient of everything is as if the head were not there."
    image, metadata = batch()
    grads = {}
    for name, heads in (("with", HEADS), ("without", ())):
        model = made("concat", heads=heads, drop_rate=0.0)
        logits = model.forward_heads(image, metadata)
        loss = F.cross_entropy(logits["diagnosis"], torch.arange(4))
        for spec in heads:
            values, weights = head_loss(logits[spec.name], torch.full((4,), -1), spec)
            loss = loss + spec.weight * (values * weights).sum() / weights.sum().clamp(min=1)
        loss.backward()
        grads[name] = {k: p.grad for k, p in model.named_parameters() if k.split(".")[1] not in [s.name for s in HEADS]}
    assert grads["with"].keys() == grads["without"].keys()
    assert all(torch.equal(g, grads["without"][k]) for k, g in grads["with"].items())


def test_heads_learn_from_a_few_answers():
    "One backbone, three questions, most answers missing: each is learned from those that are there."
    image, metadata, light, old = two_questions(400)
    rng = np.random.default_rng(1) # not the seed of the pictures, or who is asked would depend on the answer
    truth = {"urgent": light & old, "severity": light + old, "origin": light + 2 * (1 - light) * old}
    asked = {k: torch.where(torch.tensor(rng.random(400) < .4), v, torch.full_like(v, -1)) for k, v in truth.items()}
    model = made("concat", "test_efficientnet", 2, 16, heads=HEADS, drop_rate=0.0)

    def cost(rows):
        logits = model.forward_heads(noisy(image[rows]), metadata[rows])
        loss = F.cross_entropy(logits["diagnosis"], light[rows])
        for spec in model.head_specs:
            values, weights = head_loss(logits[spec.name], asked[spec.name][rows], spec)
            loss = loss + (values * weights).sum() / weights.sum().clamp(min=1)
        return loss

    train(model, cost, 400, 40)
    with torch.no_grad():
        logits = model.forward_heads(noisy(image[200:]), metadata[200:])
    found = {s.name: head_metrics(truth[s.name][200:], head_probs(logits[s.name], s), s) for s in model.head_specs}
    assert found["urgent"]["auroc"]["value"] > .95 and found["severity"]["quadratic_kappa"]["value"] > .9, found
    assert found["origin"]["balanced_accuracy"]["value"] > .9 and found["severity"]["mae"]["value"] < .15, found


@pytest.mark.parametrize("n", (1, 2, 57, 300))
def test_head_metrics_against_scikit_learn(n):
    "The same figures as scikit-learn's, ties and missing answers included."
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(n)
    for spec in HEADS:
        probs = rng.dirichlet(np.ones(spec.n_levels), n).round(1)
        probs /= probs.sum(1, keepdims=True)
        targets = rng.integers(-1, spec.n_levels, n)
        found = head_metrics(targets, probs, spec)
        kept = targets >= 0
        y = targets[kept]
        p = probs[kept]
        above = p[:, ::-1].cumsum(1)[:, ::-1][:, 1:] > .5
        predicted = p.argmax(1) if spec.kind == "multiclass" else above.sum(1)
        wanted = {
            "balanced_accuracy": lambda: metrics.balanced_accuracy_score(y, predicted),
            "auroc": lambda: metrics.roc_auc_score(y, p[:, 1]),
            "quadratic_kappa": lambda: metrics.cohen_kappa_score(
                y, predicted, weights="quadratic", labels=range(spec.n_levels)
            ),
            "mae": lambda: metrics.mean_absolute_error(y, predicted),
        }
        for name, leaf in found.items():
            assert leaf["n"] == len(y) and ("reason" in leaf) == (leaf["value"] is None)
            if leaf["value"] is not None:
                assert math.isclose(leaf["value"], wanted[name](), abs_tol=1e-9), (name, spec.kind)
        if n == 300:
            assert all(leaf["value"] is not None for leaf in found.values())


def test_ordinal_probabilities_keep_their_order():
    "Whatever the logits, no probability is negative; a higher logit never makes a lower answer likelier."
    spec = HEADS[1]
    z = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)) * 20
    probs = head_probs(z, spec)
    assert probs.min() >= 0 and torch.allclose(probs.sum(1), torch.ones(2000), atol=1e-6)
    assert (head_probs(z + 1, spec)[:, 0] <= probs[:, 0] + 1e-6).all() and (
        head_probs(z + 1, spec)[:, 2] >= probs[:, 2] - 1e-6
    ).all()


BAD = [
    (dict(backbone="", fusion="metadata", metadata_dim=21, pretrained="timm"), "pretrained 'timm'"),
    (dict(backbone="test_resnet", drop_rate=-0.1), "drop_rate is -0.1"),
    (dict(backbone="test_resnet", fusion="concat", metadata_dim=21, metadata_dropout=1), "metadata_dropout is 1.0"),
    (dict(backbone="test_resnet", pretrained="/nowhere.safetensors"), "there is no file '/nowhere.safetensors'"),
]


@pytest.mark.parametrize("options, message", BAD, ids=[message for _, message in BAD])
def test_bad_arguments(options, message):
    "What the notebook does not refuse as an example."
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        create_model(**{"num_classes": 4, **options})
    assert message in str(caught.value)


def test_memory_is_not_mistaken_for_a_wrong_size():
    "Out of memory stays what it is, on a GPU and on the CPU, and so does all else at a size that the backbone takes."
    image, _ = batch()
    model = made("none").eval()
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        RuntimeError("Input type and weight type should be the same"),
    ):
        def fail(x, error=error):
            raise error
        model.backbone.forward_features = fail
        with pytest.raises(type(error)) as caught:
            model(image)
        assert caught.value is error

"""The service over a network: `skinlesion serve` in a process of its own, and its answers without a sound bundle."""
import contextlib
import http.client
import json
import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient

from skinlesion.apps.service import create_app
from skinlesion.evaluate.abstention import LockedOod
from skinlesion.evaluate.decisions import ConformalSets, LockedThreshold
from skinlesion.evaluate.policy import OutOfDistribution, Policy
from skinlesion.files import read_json, write_json, write_sums
from skinlesion.images import read_image
from skinlesion.model.bundle import Member, save_bundle
from skinlesion.model.fusion import create_model
from skinlesion.taxonomy import get_label_set
from skinlesion.pipeline.pictures import running
from skinlesion.use.predict import Predictor
from tiny import build_bundle, build_pictures


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    return build_bundle(folder / "bundle"), build_pictures(folder)


@pytest.fixture(scope="module")
def served(made):
    "The address of a running service, on a port that the system chose."
    command = [sys.executable, "-m", "skinlesion.pipeline.cli", "serve", "--bundle", str(made[0]), "--port", "0"]
    with running(command, r"running on (http://127\.0\.0\.1:\d+)") as address:
        urllib.request.urlopen(address + "/", timeout=60).close()
        yield address


def post(address, path, picture, **fields):
    "A multipart POST by hand, as curl sends it."
    parts = [f'--B\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode() for k, v in fields.items()]
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\nContent-Type: image/png\r\n\r\n'
    parts.append(head + picture + b"\r\n--B--\r\n")
    request = urllib.request.Request(
        address + path, b"".join(parts), {"Content-Type": "multipart/form-data; boundary=B"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


def test_infer_over_the_network(served, made):
    bundle, pictures = made
    status, answer = post(served, "/infer", pictures["a"].read_bytes(), age="61", sex="f", site="Back")
    direct = Predictor(bundle).predict(pictures["a"], 61, "female", "back")
    assert status == 200 and set(answer) == {"probs", "camPngUrl", "metadata"}
    assert answer["metadata"] == {"age": 61.0, "sex": "female", "site": "back"}
    assert answer["probs"]["malignant"] == direct.malignancy and abs(sum(answer["probs"].values()) - 1) < 1e-12
    assert re.fullmatch(r"/cams/[0-9a-f]{32}\.png", answer["camPngUrl"])
    with urllib.request.urlopen(served + answer["camPngUrl"], timeout=30) as png:
        assert png.headers["content-type"] == "image/png" and read_image(png.read()).shape == (60, 90, 3)


def test_predict_and_health_over_the_network(served, made):
    bundle, pictures = made
    status, answer = post(served, "/predict", pictures["b"].read_bytes())
    direct = Predictor(bundle).predict(pictures["b"])
    assert status == 200 and answer["probabilities"] == direct.probabilities and answer["class"] == direct.predicted
    assert "never for diagnosis" in answer["disclaimer"] and answer["heads"] == {}
    with urllib.request.urlopen(served + "/health", timeout=30) as health:
        assert json.load(health)["bundle_id"] == direct.bundle_id


def test_further_heads_and_folds_answer_over_http(tmp_path, made):
    ham = get_label_set("ham10000")
    urgent = dict(name="urgent", kind="binary", levels=["can wait", "today"])
    fits = [
        Member(f"image.fold_{i}", create_model("small_cnn_3", ham.num_classes, heads=[urgent], seed=i).eval(), {})
        for i in range(2)
    ]
    direct = Predictor(save_bundle(tmp_path / "bundle", fits, ham, None, 32, {})).predict(made[1]["a"])
    client = TestClient(create_app(tmp_path / "bundle"))
    with client:
        answer = client.post("/predict", files={"file": ("a.png", made[1]["a"].read_bytes())}).json()
    assert answer["heads"] == direct.heads and list(answer["heads"]["urgent"]) == ["can wait", "today"]
    assert answer["probabilities"] == direct.probabilities and abs(sum(answer["heads"]["urgent"].values()) - 1) < 1e-9


@pytest.mark.parametrize("bound, abstains", [(-1e9, True), (1e9, False)], ids=["ood", "in_distribution"])
def test_an_abstention_stands_before_everything_else(tmp_path, made, bound, abstains):
    "So it is read first; the numbers are those of the predictor."
    plain = Policy.plain(["image", "fused"], 7)
    policy = replace(
        plain,
        ood=OutOfDistribution("energy", "image", LockedOod(bound, 0.95, 60, 50)),
        threshold=LockedThreshold(0.2, 0.95, {}, 50, 40),
        conformal=ConformalSets("split", "lac", 0.9, (0.86,) * 7, (40,) * 7),
    )
    bundle = build_bundle(tmp_path / "bundle")
    write_json(bundle / "bundle.json", read_json(bundle / "bundle.json") | dict(policy=policy.to_dict()))
    write_sums(bundle)
    direct = Predictor(bundle).predict(made[1]["a"]).to_dict()
    client = TestClient(create_app(bundle))
    pair, answer = (
        client.post(path, files={"file": ("a.png", made[1]["a"].read_bytes())}).json()
        for path in ("/infer", "/predict")
    )
    assert list(pair) == [*(["abstain", "abstain_reason"] if abstains else []), "probs", "camPngUrl", "metadata"]
    assert list(answer)[:2] == ["abstain", "abstain_reason"]
    assert answer["abstain"] is abstains and bool(answer["abstain_reason"]) is abstains
    assert answer["class"] == direct["predicted"]
    same = set(direct) - {"image_id", "predicted"}
    assert {name: answer[name] for name in same} == {name: direct[name] for name in same}
    assert (answer["flagged"], answer["threshold"], answer["coverage"]) == (True, .2, .9)
    assert set(answer["prediction_set"]) < set(answer["probabilities"])


def test_many_at_once_get_each_their_own_answer(served, made):
    bundle, pictures = made
    predictor = Predictor(bundle)
    names = list(pictures) * 4
    paths = {"a": "/predict", "b": "/infer"}
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: post(served, paths.get(n, "/predict"), pictures[n].read_bytes()), names))
    for name, (status, answer) in zip(names, answers):
        direct = predictor.predict(pictures[name])
        assert status == 200
        if name == "b":
            assert answer["probs"]["malignant"] == direct.malignancy
        else:
            assert answer["probabilities"] == direct.probabilities


FAULTS = {  # name: picture (None for a sound one), form fields, status, part of the sentence
    "type": (b"hello", {}, 415, "no known image"),
    "damaged": (b"\xff\xd8\xff\xe0" + b"0" * 200, {}, 400, "damaged"),
    "large": (b"x" * ((20 << 20) + 1), {}, 413, "20,971,520 bytes allowed"),
    "word": (None, {"site": "bakc"}, 422, "Did you mean 'back'?"),
    "words": (None, {"age": "eighty", "sex": "fem", "site": "bak"}, 422, "site 'bak'"),
    "case": (None, {"Age": "80"}, 422, "form field 'Age' is not known; allowed are file, age, sex, site. Did you mean"),
    "field": (None, {"gender": "male"}, 422, "'gender' is not known; allowed are file, age, sex, site. Did you mean"),
}


@pytest.mark.parametrize("picture, fields, status, sentence", FAULTS.values(), ids=FAULTS)
def test_a_fault_has_a_status_and_a_sentence(served, made, picture, fields, status, sentence):
    code, answer = post(served, "/infer", made[1]["a"].read_bytes() if picture is None else picture, **fields)
    assert code == status and sentence in answer["detail"]
    assert "probs" not in answer and "class" not in answer


PICTURE = ("file", ("a.png", b"not read before the fields are checked"))
IGNORED = {  # name: what is sent beside a form, or in its place; the sentence
    "address": ({"params": {"age": 80}, "files": [PICTURE]}, "'age' stands in the address, which is not read"),
    "address, unknown": ({"params": {"localization": "back"}, "files": [PICTURE]}, "'localization' is not known; all"),
    "json": ({"json": {"Age": 80}}, "the body is application/json, which is not read; JSON field 'Age' is not known"),
    "nested": ({"content": b"[" * 200_000, "headers": {"content-type": "application/json"}}, "is not read. Send"),
    "no form": ({"content": b"x", "headers": {"content-type": "image/png"}}, "the body is image/png, which is not"),
    "two files": ({"files": [PICTURE, PICTURE]}, "form field 'file' is there 2 times; send it once"),
    "another file": ({"files": [PICTURE, ("mask", ("m.png", b"x"))]}, "form field 'mask' is not known; allowed are"),
    "two ages": ({"files": [PICTURE], "data": {"age": ["61", "16"]}}, "form field 'age' is there 2 times; send it"),
    "age as a file": ({"files": [PICTURE, ("age", ("a.txt", b"61"))]}, "age: input should be a valid string"),
}


@pytest.mark.parametrize("path", ["/predict", "/infer"])
@pytest.mark.parametrize("sent, sentence", IGNORED.values(), ids=IGNORED)
def test_nothing_that_is_sent_is_ignored(made, path, sent, sentence):
    answer = TestClient(create_app(made[0])).post(path, **sent)
    assert answer.status_code == 422 and sentence in answer.json()["detail"], answer.text
    assert "Send multipart/form-data with a picture as 'file'" in answer.json()["detail"]


@pytest.mark.parametrize("stated", [True, False], ids=["stated", "chunked"])
def test_too_long_a_body_is_refused_before_it_is_whole(served, stated):
    "By its stated length before its first byte; else at the first byte over the limit. Neither request is finished."
    connection = http.client.HTTPConnection(served.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/infer")
    connection.putheader("Content-Type", "multipart/form-data; boundary=B")
    if stated:
        connection.putheader("Content-Length", str(21 << 20))
    else:
        connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    limit = (20 << 20) + (64 << 10)  # of the picture, and of all around it
    head = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n'
    parts = [head, *[b"x" * (1 << 20)] * 20, b"x" * (limit + 1 - len(head) - (20 << 20))]
    for part in [] if stated else parts:
        connection.send(b"%x\r\n%b\r\n" % (len(part), part))
    with contextlib.closing(connection):
        answer = connection.getresponse()
        assert answer.status == 413 and "bytes allowed" in json.load(answer)["detail"]


def test_a_map_is_found_by_its_id_alone(served):
    for path in (
        "/cams/none.png",
        "/cams/%2e%2e%2fbundle.json",
        "/cams/..%2f..%2fetc%2fpasswd",
        "/cams/" + "0" * 32 + ".png",
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(served + path, timeout=30)
        assert caught.value.code == 404


def damage_bundle(bundle, damage):
    "Change one file of a bundle, or add one, without its hash."
    weights = bundle / "fused.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    if damage == "truncated":
        weights.write_bytes(data[:100])
    if damage == "extra":
        (bundle / "extra.pt").write_bytes(b"x")


@pytest.mark.parametrize("damage", ["flipped", "truncated", "extra"])
def test_without_a_sound_bundle_there_is_no_class(tmp_path, made, damage):
    bundle = build_bundle(tmp_path / "bundle")
    damage_bundle(bundle, damage)
    client = TestClient(create_app(bundle))
    files = {"file": ("a.png", made[1]["a"].read_bytes())}
    for response in (client.get("/health"), client.post("/infer", files=files), client.post("/predict", files=files)):
        assert response.status_code == 503
        answer = response.json()
        assert answer.get("detail", answer.get("reason")).startswith("no usable bundle: ")
        assert not {"class", "probs", "probabilities"} & set(answer)


def test_a_bundle_that_comes_later_is_used(tmp_path, made):
    client = TestClient(create_app(tmp_path / "bundle"))
    assert client.get("/health").status_code == 503
    build_bundle(tmp_path / "bundle")
    assert client.get("/health").status_code == 200

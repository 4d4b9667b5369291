"""`expnet serve` through HTTP: nothing is lost, and nothing that is dropped on it stops it."""
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="serve needs the extra serve")
pytest.importorskip("uvicorn", reason="serve needs the extra serve")
from expnet.cli.serve import Desk, Limits, address as address_of, application, listening, running, search_of
from expnet.data.vocabulary import Vocab
from expnet.data.shapes import record
from expnet.decode.search import Beam
from expnet.models.backbone import make_backbone
from expnet.models.expansionnet import ExpansionNet, ExpansionNetConfig
from expnet.tools import seed_all
from expnet.train.checkpoints import save_model


def tiny() -> ExpansionNet:
    """A model with random weights and twenty words."""
    seed_all(0)
    eye = make_backbone("shapes")
    return ExpansionNet(ExpansionNetConfig.preset("tiny", eye.dim), Vocab(["PAD", "SOS", "EOS", "UNK", *(f"word{i}" for i in range(16))]), eye).eval()


def as_file(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def picture(i: int) -> bytes:
    """The i-th drawn picture as a file."""
    return as_file(Image.fromarray(record("test", i).picture()))


def post(address: str, data: bytes) -> tuple[int, dict]:
    """Status and answer."""
    try:
        with urlopen(Request(address, data), timeout=120) as reply: return reply.status, json.load(reply)
    except HTTPError as error: return error.code, json.load(error)


@pytest.fixture(scope="module")
def model(): return tiny()


@pytest.fixture(scope="module")
def address(model):
    with running(application(Desk({"tiny": model}, Limits(megabytes=2)))) as address: yield address


@pytest.fixture(scope="module")
def expected(model):
    """What the model says about the first ten pictures without any server."""
    return [model.caption(Image.open(io.BytesIO(picture(i))).convert("RGB"), beam=2)[0].captions[0] for i in range(10)]


def test_a_hundred_one_after_the_other(address, expected):
    answers = [post(f"{address}/caption?beam=2", picture(i % 10)) for i in range(100)]
    assert [status for status, _ in answers] == [200] * 100
    assert [a["captions"][0]["text"] for _, a in answers] == expected * 10


def test_twenty_at_once(address, expected):
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda i: post(f"{address}/caption?beam=2", picture(i % 10)), range(20)))
    assert [a["captions"][0]["text"] for _, a in answers] == expected * 2


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG file whose header claims width x height pixels, all of them zero."""
    def chunk(kind: bytes, data: bytes) -> bytes: return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + (width + 7) // 8)) for _ in range(height)) + rows.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def zipped(megabytes: int) -> bytes:
    """A zip file of some kilobytes that unpacks to many megabytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("a.jpg", bytes(megabytes * 2**20))
    return file.getvalue()


BAD = {"50 megapixels": (lambda: as_file(Image.new("L", (8000, 6250)), "JPEG"), "at most 40 megapixels"),
       "text": (lambda: b"dear diary", "not a picture"),
       "empty": (lambda: b"", "empty file"),
       "zip bomb": (lambda: zipped(200), "not a picture"),
       "pixel bomb": (lambda: png_claiming(60_000, 20_000), "at most 40 megapixels"),
       "half a picture": (lambda: as_file(Image.new("RGB", (400, 400)), "JPEG")[:1500], "cannot be decoded"),
       "three megabytes": (lambda: bytes(3_000_000), "3.0 megabytes: at most 2")}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_gets_a_reason_and_the_next_is_captioned(address, expected, name):
    make, message = BAD[name]
    status, answer = post(f"{address}/caption", make())
    assert status == 422 and message in answer["error"]
    assert post(f"{address}/caption?beam=2", picture(0))[1]["captions"][0]["text"] == expected[0]


def test_settings_are_obeyed_and_wrong_ones_named(address, model):
    _, answer = post(f"{address}/caption?beam=4&n=3", picture(1))
    assert len({c["text"] for c in answer["captions"]}) == 3
    said = answer["captions"][0]
    assert len(said["maps"]) == len(said["words"]) and all(abs(sum(m) - 1) < 0.01 for m in said["maps"])
    sampled = [post(f"{address}/caption?n=2&temperature=2&seed={seed}", picture(1))[1]["captions"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    for query, message in (("beam=0", "beam '0'"), ("beam=ten", "beam 'ten'"), ("beam=2&n=5", "n_best"), ("model=x", "tiny"), ("temperature=-1", "temperature")):
        status, answer = post(f"{address}/caption?{query}", picture(1))
        assert status == 422 and message in answer["error"], answer


def test_the_page_and_the_limits(address):
    page = urlopen(address).read().decode()
    assert "Drop pictures here" in page and "http" not in page.replace("http-equiv", "")        # nothing is fetched from elsewhere
    assert json.load(urlopen(f"{address}/about")) == {"models": ["tiny"], "exported": [], "megabytes": 2, "megapixels": 40, "beam": 10}


def test_an_address_of_ipv6_has_brackets_and_a_small_limit_is_a_default():
    with listening("127.0.0.1", 0) as place: assert address_of("::1", place) == f"http://[::1]:{place.getsockname()[1]}"
    assert (search_of({}, Limits(beam=2)).size, search_of({}).size) == (2, 3)


def test_it_is_asked_from_this_computer_alone(address):
    with pytest.raises(HTTPError, match="400"): urlopen(Request(f"{address}/about", headers={"Host": "elsewhere.example"}))


def test_the_command_binds_to_loopback_and_says_where(tmp_path):
    save_model(tmp_path / "model", tiny())
    process = subprocess.Popen([sys.executable, "-c", "from expnet.cli.app import main; main()", "serve", tmp_path / "model", "--port", "0", "--device", "cpu"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[1]
        assert address.startswith("http://127.0.0.1:")
        assert post(f"{address}/caption", picture(0))[0] == 200
        port = address.rsplit(":", 1)[1]
        hexed = f":{int(port):04X}"
        bound = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if hexed in line.split()[1]] if Path("/proc/net/tcp").exists() else []
        assert all(place.startswith("0100007F") for place in bound)                              # 127.0.0.1 and nothing else
        again = subprocess.run([sys.executable, "-c", "from expnet.cli.app import main; main()", "serve", tmp_path / "model", "--port", port, "--device", "cpu"], capture_output=True, text=True)
        assert again.returncode == 2 and again.stderr.startswith("expnet: ") and again.stderr.count("\n") == 1
    finally:
        process.terminate()
        process.communicate()


def test_an_exported_model_answers_too():
    pytest.importorskip("onnxruntime", reason="exported models need the extra onnx")
    from exported import artefact
    from expnet.deploy.runtime import Runtime
    exported = Runtime(artefact())
    answer = Desk({"exported": exported}).answer(picture(0), {"n": "2", "beam": "3"})
    said = exported.caption([Image.open(io.BytesIO(picture(0))).convert("RGB")])[0]
    assert [c["text"] for c in answer["captions"]] == list(said.captions[:2]) and [c["maps"] for c in answer["captions"]] == [[], []]
    assert Desk({"exported": exported}).answer(picture(0), {"n": "2", "temperature": "9"}) == answer   # what it has no use for is no mistake
    assert Desk({"exported": exported, "tiny": tiny()}).about()["exported"] == ["exported"]

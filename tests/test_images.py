"""Every kind of picture file, and every way in which a file can be no picture."""
import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from expnet.data.augment import TwoSides
from expnet.data.images import MAX_PIXELS, BadImage, Preprocess, as_rgb, list_images, preprocess_from, read_image
from expnet.tools import UserError


def gradient(height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth colour picture [height, width, 3] with four different corners."""
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    return np.uint8(np.stack([255 * x, 255 * y, 120 + 0 * x], -1))


RGB = Image.fromarray(gradient())
GREY = np.asarray(RGB.convert("L"))


def saved(tmp_path, image: Image.Image, name: str, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def close(path, want: np.ndarray, levels: float) -> None:
    got = read_image(path)
    assert got.mode == "RGB" and not got.info
    if want.ndim == 2: want = np.stack([want] * 3, -1)
    difference = np.abs(np.asarray(got).astype(int) - want)
    assert got.size == want.shape[1::-1] and difference.max() <= levels, difference.max()


@pytest.mark.parametrize("mode, name, levels", [
    ("RGB", "a.png", 0), ("RGB", "a.jpg", 12), ("RGB", "a.webp", 40), ("RGB", "a.bmp", 0), ("RGB", "a.tif", 0),
    ("RGB", "a.jp2", 3), ("RGB", "a.ppm", 0), ("RGBA", "a.png", 0), ("RGBA", "a.tif", 0),
    ("RGBA", "a.webp", 40), ("CMYK", "a.jpg", 16),
    ("CMYK", "a.tif", 0), ("YCbCr", "a.tif", 3), ("P", "a.png", 70), ("P", "a.gif", 70), ("P", "a.bmp", 70)])
def test_colour_modes(tmp_path, mode, name, levels):
    image = RGB.convert(mode) if mode != "P" else RGB.quantize(64)
    close(saved(tmp_path, image, name), np.asarray(RGB), levels)


@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("L", "a.tif"), ("LA", "a.png"), ("LA", "a.tif")])
def test_grey_modes(tmp_path, mode, name): close(saved(tmp_path, Image.fromarray(GREY).convert(mode), name), GREY, 0)


def test_one_bit(tmp_path):
    bits = Image.fromarray(GREY > 100)
    for name in ("a.png", "a.tif", "a.bmp", "a.pbm"): close(saved(tmp_path, bits, name), 255 * np.uint8(GREY > 100), 0)


@pytest.mark.parametrize("name, stored", [("a.png", np.uint16), ("a.tif", np.uint16), ("i.tif", np.int32)])
def test_sixteen_bits(tmp_path, name, stored):
    close(saved(tmp_path, Image.fromarray((GREY.astype(np.int64) * 257).astype(stored)), name), GREY, 0)


def test_sixteen_bit_portable_and_big_endian(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 32 24 65535\n" + (GREY.astype(">u2") * 257).tobytes())
    close(tmp_path / "a.pgm", GREY, 0)
    wide = GREY.astype(">u2") * 257
    big = Image.frombytes("I;16B", (32, 24), wide.tobytes())
    assert (np.asarray(as_rgb(big))[..., 1] == GREY).all()


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float(tmp_path, white):
    values = np.float32(GREY / 255 * white)
    values[0, 0] = white
    want = GREY.copy(); want[0, 0] = 255
    close(saved(tmp_path, Image.fromarray(values), "f.tif"), want, 0)


@pytest.mark.parametrize("value", [-1.0, 1e6, float("nan"), float("inf")])
def test_values_that_are_no_brightness(tmp_path, value):
    values = np.float32(GREY); values[3, 4] = value
    with pytest.raises(BadImage, match="f.tif.*what is white"): read_image(saved(tmp_path, Image.fromarray(values), "f.tif"))


def test_transparency_is_over_white(tmp_path):
    alpha = np.uint8(np.tile(np.linspace(0, 255, 32), (24, 1)).round())
    clear = RGB.copy(); clear.putalpha(Image.fromarray(alpha))
    a = alpha[..., None] / 255.0
    want = np.asarray(RGB) * a + 255 * (1 - a)
    for name in ("a.png", "a.tif"): close(saved(tmp_path, clear, name), want, 1)
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    close(saved(tmp_path, grey, "g.png"), GREY[..., None] * a + 255 * (1 - a) + np.zeros(3), 1)


@pytest.mark.parametrize("name", ["p.png", "p.gif"])
def test_palette_transparency(tmp_path, name):
    index = np.uint8(np.tile([0, 1, 2, 1], (4, 1)))
    image = Image.frombytes("P", (4, 4), index.tobytes())
    image.putpalette([0, 0, 0, 200, 10, 10, 10, 10, 200])
    want = np.uint8([[[255] * 3, [200, 10, 10], [10, 10, 200], [200, 10, 10]]] * 4)
    close(saved(tmp_path, image, name, transparency=0), want, 0)


def test_half_transparent_palette_and_colour_keys(tmp_path):
    image = Image.frombytes("P", (2, 1), bytes([0, 1])); image.putpalette([0, 0, 0, 200, 10, 10])
    path = saved(tmp_path, image, "p.png", transparency=bytes([51, 255]))
    close(path, np.uint8([[[204] * 3, [200, 10, 10]]]), 0)
    close(saved(tmp_path, Image.fromarray(np.uint8([[[9, 9, 9], [1, 2, 3]]])), "k.png", transparency=(9, 9, 9)),
          np.uint8([[[255] * 3, [1, 2, 3]]]), 0)
    close(saved(tmp_path, Image.fromarray(np.uint8([[9, 7]])), "l.png", transparency=9), np.uint8([[255, 7]]), 0)


def test_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    close(path, np.asarray(frames[0]), 0)
    close(saved(tmp_path, frames[0], "a.tif", save_all=True, append_images=frames[1:]), np.asarray(frames[0]), 0)


@pytest.mark.parametrize("name, levels", [("a.jpg", 12), ("a.png", 0), ("a.tif", 0), ("a.webp", 40)])
@pytest.mark.parametrize("turn", range(1, 9))
def test_all_eight_turns(tmp_path, turn, name, levels):
    upright = np.asarray(RGB)
    flipped = upright.transpose(1, 0, 2)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: flipped, 6: flipped[::-1], 7: flipped[::-1, ::-1], 8: flipped[:, ::-1]}
    exif = Image.Exif(); exif[0x0112] = turn
    path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored[turn])), name, exif=exif)
    close(path, upright, levels)
    with Image.open(path) as lazy:  # not yet decoded, as a caller may hand it in; and twice is once
        assert (np.asarray(as_rgb(as_rgb(lazy))) == np.asarray(read_image(path))).all()


def test_broken_exif_keeps_the_picture(tmp_path):
    blocks = [b"", b"II*\0\xff\xff\xff\xff", b"nonsense", b"MM\0*\0\0\0\x08\0\x01\x01\x12"]
    for number, block in enumerate(b"Exif\0\0" + block for block in blocks):
        close(saved(tmp_path, RGB, f"{number}.jpg", exif=block), np.asarray(RGB), 12)
    exif = Image.Exif(); exif[0x0112] = 99
    close(saved(tmp_path, RGB, "n.jpg", exif=exif), np.asarray(RGB), 12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "PPM"])
def test_truncated_anywhere(tmp_path, kind):
    file = io.BytesIO(); RGB.save(file, kind)
    whole = file.getvalue()
    for part in (1, 5, 20, len(whole) // 3, len(whole) // 2, len(whole) * 9 // 10):
        (tmp_path / "t.img").write_bytes(whole[:part])
        for original in (False, True):
            with pytest.raises(BadImage, match="t.img: ."): read_image(tmp_path / "t.img", as_original=original)


def test_png_with_wrong_bytes(tmp_path):
    path = saved(tmp_path, RGB, "a.png")
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(BadImage): read_image(path)


def test_no_picture_at_all(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no picture here\n" * 99)
    (tmp_path / "zero.jpg").write_bytes(bytes(4096))
    (tmp_path / "page.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    for name, reason in [("empty.jpg", "empty file"), ("text.png", "not a picture"), ("zero.jpg", "not a picture"),
                         ("page.png", "EPS is not read"), ("none.jpg", "no such file"), ("", "is a folder")]:
        with pytest.raises(BadImage, match=reason) as caught: read_image(tmp_path / name)
        assert caught.value.path == str(tmp_path / name) and str(caught.value).startswith(str(tmp_path / name))
        assert isinstance(caught.value, UserError) and pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("limit", [89_478_485, None])
def test_bomb(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # notebooks on the web like to switch it off
    header = struct.pack(">IIBBBBB", 20_000, MAX_PIXELS // 20_000 + 1, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
                                        + chunk(b"IEND", b""))
    with pytest.raises(BadImage, match="too many pixels"): read_image(tmp_path / "bomb.png")


def test_the_original_rule(tmp_path):
    for mode, name in [("L", "a.jpg"), ("RGBA", "a.png"), ("CMYK", "b.jpg"), ("P", "b.png")]:
        black = read_image(saved(tmp_path, RGB.convert(mode), name), as_original=True)
        assert black.mode == "RGB" and black.size == RGB.size and not np.asarray(black).any()
    assert (np.asarray(read_image(saved(tmp_path, RGB, "c.png"), as_original=True)) == np.asarray(RGB)).all()


def test_preprocess_equals_torchvision():
    T = pytest.importorskip("torchvision.transforms")
    for size, (height, width) in [(17, (24, 32)), (64, (40, 33)), (224, (300, 500))]:
        image, ours = Image.fromarray(gradient(height, width)), Preprocess(size=size)
        theirs = T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize(ours.mean, ours.std)])
        assert (ours(image) == theirs(image)).all()
        assert (np.asarray(ours.undo(ours(image))) == np.asarray(image.resize((size, size), 2))).all()


def test_crop_keeps_the_middle():
    wide = np.zeros((20, 60, 3), np.uint8); wide[:, 20:40] = (10, 200, 30)
    got = np.asarray(Preprocess(size=20, resize="crop").undo(Preprocess(size=20, resize="crop")(Image.fromarray(wide))))
    assert (got == (10, 200, 30)).all()
    assert Preprocess(size=8, resize="crop")(Image.new("RGB", (1, 70_000))).shape == (3, 8, 8)  # no 4 GB on the way


def test_preprocess_says_what_is_wrong():
    with pytest.raises(ValueError, match="not mode L"): Preprocess()(RGB.convert("L"))
    for stored, words in [({"size": 0}, "size 0"), ({"size": "224"}, "size '224'"), ({"mean": [1, 2]}, "three numbers"),
                          ({"mean": "grey"}, "preprocessing"), ({"std": 4}, "preprocessing"),
                          ({"resize": None}, "squash or crop"),
                          ({"interpolation": "nearest"}, "bilinear or bicubic"),
                          ({"crop": 1}, "unknown field crop"), ([], "fields")]:
        with pytest.raises(UserError, match=words): preprocess_from(stored)


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpg", ".hidden.jpg", "c.txt", "sub/d.webp", "x[1].png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    names = lambda pattern: [str(p.relative_to(tmp_path)) for p in list_images(tmp_path / pattern)]
    assert names("") == ["a.jpg", "b.PNG", "x[1].png"]
    assert names("**/*") == ["a.jpg", "b.PNG", "sub/d.webp", "x[1].png"]
    assert names("x[1].png") == ["x[1].png"] and names("c.txt") == ["c.txt"]
    for empty in ("*.gif", "nowhere", "folder.png"):
        with pytest.raises(UserError, match="no picture files in it|no such file, folder"): list_images(tmp_path / empty)


def test_any_seed_chooses_sides():
    turned = {seed: [TwoSides({}, set(map(str, range(64))), seed).in_epoch(0).turned(str(i)) for i in range(64)] for seed in (-1, 2**32 - 1, 0)}
    assert turned[-1] == turned[2**32 - 1] != turned[0] and 16 < sum(turned[-1]) < 48

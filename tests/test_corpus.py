"Odd and broken input: every picture and table is read right or refused by name, and a failure leaves nothing behind."
import io
import shutil

import numpy as np
import pytest
from PIL import Image

from broken import (
    PRIVATE_TEXT,
    STORED,
    bad_archives,
    bad_pictures,
    bad_tables,
    encoded,
    exif_bytes,
    good_tables,
    with_metadata,
    modes,
    pixels,
    publisher,
    tarred,
    zipped,
)
from skinlesion.data.schema import read_dataset
from skinlesion.data.collections import import_ham10000
from skinlesion.images import ImageError, clean_image, read_image


@pytest.mark.parametrize("name", modes())
def test_every_kind_of_pixel_is_read_right(name, tmp_path):
    data, wanted, off = modes()[name]
    (tmp_path / name).write_bytes(data)
    for image in (read_image(tmp_path / name), read_image(clean_image(data, name)[0])):
        assert image.dtype == np.uint8 and image.shape == wanted.shape
        assert np.abs(image.astype(int) - wanted).max() <= off


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind, off", [("PNG", 0), ("TIFF", 0), ("WEBP", 0), ("JPEG", 6)])
def test_every_orientation_comes_out_upright(orientation, kind, off):
    how = dict(JPEG=dict(quality=98, subsampling=0), WEBP=dict(lossless=True)).get(kind, {})
    data = encoded(np.ascontiguousarray(STORED[orientation](pixels())), kind, exif=exif_bytes(orientation), **how)
    cleaned, _ = clean_image(data, "turned")
    for source in (data, cleaned):
        assert np.abs(read_image(source).astype(int) - pixels()).max() <= off
    assert not Image.open(io.BytesIO(cleaned)).getexif()


@pytest.mark.parametrize("name", with_metadata())
def test_no_metadata_reaches_an_output(name):
    data = with_metadata()[name]
    assert PRIVATE_TEXT.encode() in data or name.endswith("png")  # PNG may hold it compressed
    cleaned, suffix = clean_image(data, name)
    with Image.open(io.BytesIO(cleaned)) as image:
        image.load()
        harmless = {"jfif", "jfif_version", "jfif_unit", "jfif_density", "dpi", "progressive", "progression"}
        assert not image.getexif() and not set(image.info) - harmless
    assert PRIVATE_TEXT.encode() not in cleaned and b"xmpmeta" not in cleaned and b"Exif" not in cleaned
    assert np.array_equal(read_image(cleaned), read_image(data)) and suffix in (".jpg", ".png")


@pytest.mark.parametrize("name", bad_pictures())
def test_what_is_no_picture_is_refused_by_name(name, tmp_path):
    data, expected = bad_pictures()[name]
    (tmp_path / name).write_bytes(data)
    for refused in (lambda: read_image(tmp_path / name), lambda: clean_image(data, name)):
        with pytest.raises(ImageError) as e:
            refused()
        assert name in str(e.value) and expected in str(e.value)


def test_the_size_is_checked_before_a_pixel_is_decoded(monkeypatch):
    corpus = bad_pictures()
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    for name in ("hundred.png", "wide.png"):
        with pytest.raises(ImageError, match="pixels"):
            read_image(corpus[name][0], name)
    with pytest.raises(ImageError, match="bytes, more than the 100 allowed"):
        read_image(bytes(101), "long", max_bytes=100)


@pytest.mark.parametrize("kind, options", [
    ("JPEG", {}), ("JPEG", dict(progressive=True)), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("TIFF", {})])
def test_a_file_cut_anywhere_is_refused(kind, options):
    "Noise does not compress, so each twentieth of a file holds pixels, and none may be missing."
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    data = encoded(noise, kind, **options)
    for percent in range(0, 100, 5):
        cut = data[:len(data) * percent // 100]
        for gate in (read_image, clean_image):
            with pytest.raises(ImageError, match="^cut: .*;"):
                gate(cut, "cut")


@pytest.mark.parametrize("name", good_tables())
def test_an_odd_table_is_read_right(name, tmp_path):
    source = publisher(tmp_path / "HAM", {"HAM10000_metadata.csv": good_tables()[name]})
    report = import_ham10000(source, tmp_path / "data")
    got = read_dataset(tmp_path / "data").table
    assert got.image_id.tolist() == ["ISIC_1", "ISIC_2", "ISIC_3"] and got.diagnosis.tolist() == ["nv", "mel", "bkl"]
    assert got.age.tolist()[:2] == [45, 60] and np.isnan(got.age[2]) and got.sex.tolist() == ["female", "male", ""]
    assert got.site.tolist() == ["back", "scalp", ""] and (report.n_images, report.age_missing) == (3, 1)


@pytest.mark.parametrize("name", bad_tables())
def test_a_bad_table_is_refused_with_its_row(name, tmp_path):
    words, expected = bad_tables()[name]
    source = publisher(tmp_path / "HAM", {"HAM10000_metadata.csv": words})
    with pytest.raises(ValueError) as e:
        import_ham10000(source, tmp_path / "data")
    assert expected in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["HAM"]


@pytest.mark.parametrize("name", bad_archives())
def test_a_bad_archive_is_refused_by_name(name, tmp_path):
    data, expected = bad_archives()[name]
    source = publisher(tmp_path / "HAM", {"ISIC_2.jpg": None, name: data})
    with pytest.raises(ValueError) as e:
        import_ham10000(source, tmp_path / "data")
    assert expected in str(e.value) and name in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ["HAM"]


@pytest.mark.parametrize("make, name", [
    (zipped, "part.zip"), (tarred, "part.tar.gz"), (lambda files: tarred(files, mode="w"), "part.tar")])
def test_an_archive_cut_anywhere_is_whole_or_refused(make, name, tmp_path):
    rng = np.random.default_rng(0)
    source = publisher(tmp_path / "HAM", {f"ISIC_{i}.jpg": None for i in (1, 2, 3)})
    noise = {f"ISIC_{i}.jpg": encoded(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), "JPEG") for i in (1, 2, 3)}
    data = make(noise)
    whole = len(data)
    if name.endswith(".tar"):  # one block of zeros ends it, what follows is padding
        whole = -(-len(data.rstrip(b"\0")) // 512) * 512 + 512
    for percent in range(0, 105, 5):
        cut = data[:len(data) * percent // 100]
        (source / name).write_bytes(cut)
        if len(cut) < whole:
            with pytest.raises(ValueError, match=f"{name}|there is no image 'ISIC_"):
                import_ham10000(source, tmp_path / "data")
            assert [p.name for p in tmp_path.iterdir()] == ["HAM"]
            continue
        import_ham10000(source, tmp_path / "data")
        for i in noise:
            assert np.array_equal(read_image(tmp_path / "data" / "images" / i), read_image(noise[i]))
        shutil.rmtree(tmp_path / "data")


def test_links_are_read_as_what_they_point_to_and_dangling_ones_named(tmp_path):
    source = publisher(tmp_path / "HAM", {"ISIC_2.jpg": None})
    (tmp_path / "elsewhere.jpg").write_bytes(encoded(pixels(22, 30), "JPEG"))
    (source / "ISIC_2.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert (
        import_ham10000(source, tmp_path / "data").n_images == 3
        and not (tmp_path / "data" / "images" / "ISIC_2.jpg").is_symlink()
    )
    (tmp_path / "elsewhere.jpg").unlink()
    with pytest.raises(ValueError, match="ISIC_2.jpg: it is a link to nothing"):
        import_ham10000(source, tmp_path / "other")

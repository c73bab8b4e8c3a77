"Odd and broken pictures, tables and archives, made byte by byte: to be read right, or refused by name."
import io
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

PRIVATE_TEXT = "patient 4711 at 48.2 N"  # stands in every kind of metadata; no output may hold it


def pixels(height=24, width=32):
    "A smooth picture without any symmetry, (H,W,3) uint8."
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]]
    return np.stack([255 * x, 255 * y, 120 + 100 * np.sin(3 * x + 5 * y)], axis=2).round().astype(np.uint8)


def encoded(image, kind, **how):
    "A picture (array or Pillow image) in a format."
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def jpeg_segment(marker, body):
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width, height, depth=8, colour=2):
    "The first bytes of a PNG that claims a size."
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def big_png(width, height):
    "A whole, valid PNG of one bit a pixel: 100 megapixels in a few kilobytes."
    rows = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    data = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    return png_header(width, height, 1, 0) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def exif_bytes(orientation=None):
    "EXIF with a name, a place and, if given, an orientation."
    exif = Image.Exif()
    exif[0x010E] = exif[0x013B] = PRIVATE_TEXT
    if orientation:
        exif[0x0112] = orientation
    exif.get_ifd(0x8825)[1] = "N"
    return exif


def with_metadata():
    "Pictures of every allowed type that carry PRIVATE_TEXT wherever a picture can."
    image = pixels()
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{PRIVATE_TEXT}</x:xmpmeta>".encode()
    jpeg = encoded(image, "JPEG", quality=95, exif=exif_bytes(), comment=PRIVATE_TEXT.encode())
    extra = jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp) + jpeg_segment(
        0xED, b"Photoshop 3.0\0" + PRIVATE_TEXT.encode()
    )
    text = PngInfo()
    text.add_text("Author", PRIVATE_TEXT)
    text.add_text("Comment", PRIVATE_TEXT, zip=True)
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    tiff = Image.fromarray(image)
    return {
        "a.jpg": jpeg[:2] + extra + jpeg[2:] + PRIVATE_TEXT.encode(),
        "a.png": encoded(image, "PNG", pnginfo=text, exif=exif_bytes()) + PRIVATE_TEXT.encode(),
        "a.webp": encoded(image, "WEBP", lossless=True, exif=exif_bytes().tobytes(), xmp=xmp),
        "a.tif": encoded(tiff, "TIFF", tiffinfo={270: PRIVATE_TEXT, 315: PRIVATE_TEXT}),
        "turned.jpg": encoded(image, "JPEG", quality=95, exif=exif_bytes(6)),
        "turned.png": encoded(image, "PNG", pnginfo=text, exif=exif_bytes(3))}


# How a camera stored what was upright, by the EXIF orientation that undoes it (TIFF 6.0, tag 274).
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def modes():
    "name -> (bytes, the pixels that must come out, how far they may be off)."
    rgb = pixels()
    image = Image.fromarray(rgb)
    grey = Image.fromarray(rgb).convert("L")
    def as_rgb(picture):
        return np.asarray(picture.convert("RGB"))
    alpha = Image.merge(
        "RGBA",
        [*image.split(), Image.fromarray(np.where(np.arange(32) < 16, 0, 255).astype(np.uint8)[None].repeat(24, 0))],
    )
    white = np.where((np.arange(32) < 16)[None, :, None], 255, rgb)
    palette = image.quantize(16)
    see_through = palette.copy()
    see_through.info["transparency"] = 0
    behind = np.where((np.asarray(palette) == 0)[..., None], 255, as_rgb(palette))
    sixteen = (np.asarray(grey).astype(np.uint16) * 257)
    return {
        "rgb.png": (encoded(image, "PNG"), rgb, 0),
        "rgb.bmp": (encoded(image, "BMP"), rgb, 0),
        "rgb.tif": (encoded(image, "TIFF"), rgb, 0),
        "lzw.tif": (encoded(image, "TIFF", compression="tiff_lzw"), rgb, 0),
        "lossless.webp": (encoded(image, "WEBP", lossless=True), rgb, 0),
        "lossy.webp": (encoded(image, "WEBP", quality=95), rgb, 16),
        "rgb.jpg": (encoded(image, "JPEG", quality=98, subsampling=0), rgb, 6),
        "progressive.jpg": (encoded(image, "JPEG", quality=98, subsampling=0, progressive=True), rgb, 6),
        "grey.jpg": (encoded(grey, "JPEG", quality=98), as_rgb(grey), 6),
        "grey.png": (encoded(grey, "PNG"), as_rgb(grey), 0),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", quality=98), rgb, 8),
        "cmyk.tif": (encoded(image.convert("CMYK"), "TIFF"), rgb, 1),
        "bit.png": (encoded(grey.convert("1"), "PNG"), as_rgb(grey.convert("1")), 0),
        "alpha.png": (encoded(alpha, "PNG"), white, 0),
        "alpha.webp": (encoded(alpha, "WEBP", lossless=True, exact=True), white, 0),
        "grey_alpha.png": (
            encoded(alpha.convert("LA"), "PNG"),
            np.where((np.arange(32) < 16)[None, :, None], 255, as_rgb(grey)),
            0,
        ),
        "palette.png": (encoded(palette, "PNG"), as_rgb(palette), 0),
        "palette.bmp": (encoded(palette, "BMP"), as_rgb(palette), 0),
        "see_through.png": (encoded(see_through, "PNG", transparency=0), behind, 0),
        "sixteen.png": (encoded(Image.fromarray(sixteen), "PNG"), as_rgb(grey), 0),
        "sixteen.tif": (encoded(Image.fromarray(sixteen), "TIFF"), as_rgb(grey), 0),
        "smallest.png": (encoded(rgb[:8, :8], "PNG"), rgb[:8, :8], 0),
        "narrowest.png": (encoded(rgb[:8].repeat(3, 1)[:, :80], "PNG"), rgb[:8].repeat(3, 1)[:, :80], 0),
    }


def bad_pictures():
    "name -> (bytes, what the error must say)."
    image = Image.fromarray(pixels())
    float_tiff = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    return {
        "empty.jpg": (b"", "it is empty"),
        "text.jpg": (b"Dear colleague, please find the picture enclosed.\n", "its content is no known image"),
        "page.jpg": (b"<!DOCTYPE html><html>404</html>", "it is markup"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is markup"),
        "moving.jpg": (encoded(image, "GIF"), "it is gif"),
        "archive.png": (zipped({"a.png": encoded(image, "PNG")}), "it is zip"),
        "letter.jpg": (b"%PDF-1.7\n", "it is pdf"),
        "scan.jpg": (bytes(128) + b"DICM" + bytes(64), "it is dicom"),
        "phone.jpg": (struct.pack(">I", 24) + b"ftypheic" + bytes(40), "it is heic or avif"),
        "marker.jpg": (b"\xff\xd8\xff", "truncated or damaged JPEG (its header cannot be read)"),
        "no_pixels.png": (png_header(8, 8) + png_chunk(b"IEND", b""), "truncated or damaged PNG"),
        "zero.png": (png_header(0, 8) + png_chunk(b"IEND", b""), ""), # refused: how, the decoder decides
        "wide.png": (
            png_header(2**31 - 1, 2**31 - 1) + png_chunk(b"IDAT", b"x"),
            "more than the 64,000,000 pixels allowed",
        ),
        "hundred.png": (
            big_png(10_000, 10_000),
            "10000x10000 pixels, more than the 64,000,000 allowed; scale the image down",
        ),
        "one_pixel.png": (encoded(pixels()[:1, :1], "PNG"), "1x1 pixels, less than the 8 allowed for a side"),
        "one_pixel.jpg": (encoded(pixels()[:1, :1], "JPEG"), "1x1 pixels, less than the 8 allowed for a side"),
        "placeholder.webp": (encoded(pixels()[:7, :20], "WEBP"), "20x7 pixels, less than the 8 allowed"),
        "strip.png": (encoded(pixels()[:3].repeat(90, 1)[:, :2000], "PNG"), "2000x3 pixels, less than the 8 allowed"),
        "ribbon.jpg": (encoded(pixels()[:8].repeat(3, 1)[:, :81], "JPEG"), "one side more than 10 times the other"),
        "floats.tif": (float_tiff, "have no agreed range"),
        "frames.tif": (encoded(image, "TIFF", save_all=True, append_images=[image]), "it holds 2 frames"),
        "frames.png": (encoded(image, "PNG", save_all=True, append_images=[image.rotate(180)]), "frames"),
    }


def zipped(files):
    "A zip of name -> bytes."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(files, mode="w:gz"):
    "A tar of name -> bytes."
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


HEAD = "lesion_id,image_id,dx,dx_type,age,sex,localization"
ROWS = (
    "HAM_1,ISIC_1,nv,follow_up,45,female,back",
    "HAM_2,ISIC_2,mel,histo,60,male,scalp",
    "HAM_3,ISIC_3,bkl,consensus,,unknown,unknown",
)


def table(*rows, head=HEAD):
    return "\n".join([head, *rows, ""]).encode()


def second(row):
    return table(ROWS[0], row, ROWS[2])


def good_tables():
    "Tables in the layout of HAM10000 that are written oddly and hold what ROWS hold."
    plain = table(*ROWS)
    return {
        "byte order mark": b"\xef\xbb\xbf" + plain,
        "semicolons": plain.replace(b",", b";"),
        "tabs": plain.replace(b",", b"\t"),
        "carriage returns": plain.replace(b"\n", b"\r\n"),
        "blank lines": plain.replace(b"\n", b"\n\n"),
        "no last newline": plain[:-1],
        "spaces": plain.replace(b",", b" , "),
        "quotes": "\n".join(",".join(f'"{w}"' for w in row.split(",")) for row in (HEAD, *ROWS)).encode(),
        "mixed case": table(
            ROWS[0].replace("nv", "NV"),
            ROWS[1].replace("mel", "Melanoma").replace("male", "Male"),
            ROWS[2].replace("bkl", "Bkl"),
        ),
        "other order of columns": "\n".join(",".join(row.split(",")[::-1]) for row in (HEAD, *ROWS)).encode(),
        "another column": "\n".join(row + f',"a note,\nof two lines {i}"' for i, row in enumerate(ROWS))
        .join([HEAD + ",note\n", "\n"])
        .encode(),
        "words for unknown": table(*ROWS[:2], "HAM_3,ISIC_3,bkl,consensus,NaN,N/A,none"),
        "age in decimals": table(ROWS[0].replace("45", "45.0"), *ROWS[1:]),
    }


def bad_tables():
    """name -> (table, what the error must hold); the row is the line of the file.

    What cells may hold is tested with the schema; here are tables that are broken as files, and ids that are paths.
    """
    row = "HAM_2,{},mel,histo,60,male,scalp"
    outside = "' cannot be the name of a file"
    return {
        "bars for commas": (table(*ROWS).replace(b",", b"|"), "no metadata table"),
        "another encoding": (table(*ROWS).decode().encode("utf-16"), "UTF-8"),
        "a picture for a table": (encoded(pixels(), "PNG"), "no metadata table"),
        "empty": (b"", "no metadata table"),
        "zero byte": (second(row.format("ISIC_2\0")), "row 3: image_id 'ISIC_2\0' cannot"),
        "endless cell": (second(row.format("x" * 200_000)), "not readable as CSV (field larger than field limit"),
        "no image": (second(row.format("ISIC_4")), "row 3: there is no image 'ISIC_4'"),
        "absolute": (second(row.format("/etc/passwd")), "'/etc/passwd" + outside),
        "a drive": (second(row.format("C:\\ISIC_2")), "row 3: image_id 'C:\\ISIC_2" + outside),
    }


def publisher(folder, files=None):
    "Three pictures and their table as the publisher of HAM10000 lays them out; `files` come on top, None removes one."
    folder.mkdir(parents=True)
    content = (
        {f"ISIC_{i}.jpg": encoded(pixels(20 + i, 30), "JPEG") for i in (1, 2, 3)}
        | {"HAM10000_metadata.csv": table(*ROWS)}
        | (files or {})
    )
    for name, data in content.items():
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def bad_archives():
    "name of the archive -> (bytes, what the error must hold); hostile names and links are tested with the archives."
    image = encoded(pixels(22, 30), "JPEG")
    bomb = bytes(60 << 20)
    return {
        "nested.zip": (zipped({"inner.zip": zipped({"../ISIC_2.jpg": image})}), "outside"),
        "bomb.zip": (zipped({"ISIC_2.jpg": bomb}), "52,428,800 bytes allowed"),
        "bomb.tar.gz": (tarred({"ISIC_2.jpg": bomb}), "52,428,800 bytes allowed"),
        "empty.tar.gz": (b"", "empty.tar.gz"),
    }

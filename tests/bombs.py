"""Pictures that are meant to harm who decodes them, made here: small files that claim or expand to hundreds of MiB."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Final

from PIL import Image

PNG: Final = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, data: bytes | None = None) -> bytes:
    """A grey PNG; its pixels are all there, compressed a thousandfold, unless `data` says otherwise."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    if data is None:
        packer = zlib.compressobj(9)
        row = bytes(1 + (width + 7) // 8)
        data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return PNG + header + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(width: int, height: int) -> bytes:
    """A JPEG of 16 x 16 pixels whose frame header says another size."""
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_of_scans(scans: int) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    data = encoded("JPEG", size=(4096, 4096), progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + data[-2:]


def webp(width: int, height: int) -> bytes:
    """A WebP whose canvas is larger than its picture."""
    canvas = b"\x10\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    frames = encoded("WEBP")[12:]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def encoded(format: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, format, **options)
    return file.getvalue()


@cache
def corpus() -> dict[str, bytes]:
    """Every bomb by its name. All have to be refused, and none by decoding it."""
    text = zlib.compress(bytes(1 << 20), 9)
    whole_png, whole_jpeg, whole_webp = encoded("PNG"), encoded("JPEG"), encoded("WEBP")
    return {
        "png of 400 MP": png(20000, 20000),
        "png that claims 2^31 pixels a side": png(2**31 - 1, 2**31 - 1, data=b""),
        "png of no width": png(0, 16, data=b""),
        "png sliver": png(2**20, 1),
        "jpeg that claims 4 GP": jpeg(65500, 65500),
        "jpeg of no height": jpeg(16, 0),
        "jpeg of 2000 scans": jpeg_of_scans(2000),
        "webp canvas of 268 MP": webp(16384, 16384),
        "webp canvas of 2^48 pixels": webp(2**24, 2**24),
        "gif": encoded("GIF"),
        "bmp": encoded("BMP"),
        "tiff": encoded("TIFF"),
        "ppm of 10^10 pixels": b"P6 100000 100000 255\n",
        "fits, gzipped": b"SIMPLE  =                    T" + text,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='http://127.0.0.1/'/></svg>",
        "pdf": b"%PDF-1.7\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "nothing": b"",
        "one byte": b"\x89",
        "jpeg's first bytes": b"\xff\xd8\xff",
        "jpeg of fill bytes": b"\xff\xd8" + b"\xff" * 4096,
        "riff without a picture": b"RIFF\0\0\0\0WEBP",
        "png cut in its header": whole_png[:20],
        "jpeg cut in its header": whole_jpeg[:20],
        "webp cut in its header": whole_webp[:20],
    }


@cache
def damaged() -> dict[str, bytes]:
    """Right by their headers: these reach the decoder, and are refused by it or harmless."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes((1 << 20) - 1), 9))
    profile = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(1 << 26), 9))
    rows = zlib.compress(bytes(1 << 26), 9)  # 64 MiB behind a header of 16 x 16
    return {
        "png with 1000 texts of 1 MiB": png(16, 16, *[text] * 1000),
        "png with a profile of 64 MiB": png(16, 16, profile),
        "png with too much data": png(16, 16, data=rows),
        "png cut": encoded("PNG", size=(640, 640))[:-100],
        "jpeg cut": encoded("JPEG", size=(640, 640))[:-300],
        "webp cut": encoded("WEBP", size=(640, 640))[:-60],
        "webp canvas larger than its picture": webp(64, 64),
        "png with a zip behind it": encoded("PNG") + b"PK\3\4" + bytes(100),
    }

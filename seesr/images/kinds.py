"""The input formats that are supported, and detection of unsupported ones with a remedy for the error message."""

from __future__ import annotations

READABLE = {  # Pillow's name -> the common name
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "AVIF": "AVIF",
    "TIFF": "TIFF",
    "HEIF": "HEIC",
    "JXL": "JPEG XL",
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".heic", ".heif", ".jxl"}
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF = {b"avif", b"avis"}
STARTS = {  # the first bytes: media type
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"II*\0": "image/tiff",
    b"MM\0*": "image/tiff",
    b"II+\0": "image/tiff",  # BigTIFF
    b"MM\0+": "image/tiff",
    b"\xff\x0a": "image/jxl",
    b"\0\0\0\x0cJXL \r\n\x87\n": "image/jxl",
}
CONVERT = "convert it to PNG or TIFF first (for example: magick input{} output.png)"
RAW = "export it from the camera's or a raw developer's program as TIFF or JPEG first"
PAGE = "export the page or drawing as PNG first"
FRAME = "save one frame of it as PNG first"
OTHERS = {  # the first bytes: what it is, and what to do
    b"GIF8": ("a GIF", CONVERT.format("[0]")),
    b"BM": ("a BMP", CONVERT.format("")),
    b"\0\0\1\0": ("an ICO", CONVERT.format("[0]")),
    b"P1": ("a PBM", CONVERT.format("")),
    b"P2": ("a PGM", CONVERT.format("")),
    b"P3": ("a PPM", CONVERT.format("")),
    b"P4": ("a PBM", CONVERT.format("")),
    b"P5": ("a PGM", CONVERT.format("")),
    b"P6": ("a PPM", CONVERT.format("")),
    b"P7": ("a PAM", CONVERT.format("")),
    b"PF": ("a PFM", CONVERT.format("")),
    b"Pf": ("a PFM", CONVERT.format("")),
    b"\0\0\0\x0cjP  ": ("a JPEG 2000", CONVERT.format("")),
    b"\xff\x4f\xff\x51": ("a JPEG 2000 codestream", CONVERT.format("")),
    b"II\xbc": ("a JPEG XR", CONVERT.format("")),
    b"qoif": ("a QOI", CONVERT.format("")),
    b"\x0a\5\1": ("a PCX", CONVERT.format("")),
    b"DDS ": ("a DDS", CONVERT.format("")),
    b"\x76\x2f\x31\x01": ("an OpenEXR", "save it as 16-bit PNG or TIFF, with values from 0 to 1, first"),
    b"#?RADIANCE": ("a Radiance HDR", "save it as 16-bit PNG or TIFF, with values from 0 to 1, first"),
    b"8BPS": ("a Photoshop document", "save it as PNG or TIFF in one layer first"),
    b"8BPB": ("a Photoshop document", "save it as PNG or TIFF in one layer first"),
    b"gimp xcf": ("a GIMP document", "export it as PNG or TIFF first"),
    b"FUJIFILMCCD-RAW": ("a camera raw file (RAF)", RAW),
    b"IIU\0": ("a camera raw file (RW2)", RAW),
    b"IIRO": ("a camera raw file (ORF)", RAW),
    b"%PDF": ("a PDF document", PAGE),
    b"%!PS": ("a PostScript document", PAGE),
    b"<svg": ("an SVG drawing", PAGE),
    b"PK\x03\x04": ("a ZIP archive", "unpack it, and send the images in it one by one"),
    b"\x1aE\xdf\xa3": ("a video (WebM or Matroska)", FRAME),
    b"\0\0\1\xba": ("a video (MPEG)", FRAME),
}


def brands(data: bytes) -> set[bytes]:
    """The brands of an ISO media file (ISO/IEC 14496-12, 4.3); empty for any other."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12]} | {data[at : at + 4] for at in range(16, end, 4)}


def media_type(data: bytes) -> str | None:
    """The media type of a file of a kind that is read, by its first bytes; None: it is none."""
    for start, name in STARTS.items():
        if data.startswith(start):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    brand_codes = brands(data)
    return "image/avif" if brand_codes & AVIF else "image/heic" if brand_codes & HEIC else None


def recognise(data: bytes) -> tuple[str, str]:
    """What a file is that is not read, and what to do with it; ("", "") where its bytes say nothing."""
    brand_codes = brands(data)
    if b"crx " in brand_codes:
        return "a camera raw file (CR3)", RAW
    if brand_codes:
        return "a video (MP4 or QuickTime)", FRAME
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "a video (AVI)", FRAME
    if data[-18:-2] == b"TRUEVISION-XFILE":
        return "a TGA", CONVERT.format("")
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"<?xml") and b"<svg" in start:
        return OTHERS[b"<svg"]
    return next((description for first, description in OTHERS.items() if data.startswith(first)), ("", ""))


def refusal(data: bytes) -> ValueError:
    """The error for a file that is not read: what it is, and what would be accepted; one line."""
    kind, remedy = recognise(data)
    accepted = ", ".join(READABLE.values())
    if kind:
        return ValueError(f"this is {kind}, not an image that can be read: {remedy}; use {accepted}")
    return ValueError(f"this is not an image that can be read: use {accepted}")

"""Signs, checks and removes C2PA manifests ("Content Credentials") of output files; needs the package c2pa-python."""

from __future__ import annotations

import dataclasses
import io
import logging
import struct
from pathlib import Path
from typing import Any

from seesr.images import jpeg, png_chunks
from seesr.images.kinds import media_type
from seesr.version import __version__

ALGORITHMS = ("es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519")
JUMBF = 0xEB  # the JPEG marker APP11
LOCAL = {"builder": {"thumbnail": {"enabled": False}}, "verify": {"remote_manifest_fetch": False}}
MISSING = "needs a package: pip install -e '.[c2pa]'"
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Signer:
    """The operator's certificate.

    Attributes:
        certificate: the chain in PEM, the signer's own first.
        key: private key in PEM.
        algorithm: one of ALGORITHMS.
        timestamp_url: of a timestamp authority (RFC 3161), or None.
    """

    certificate: bytes
    key: bytes = dataclasses.field(repr=False)
    algorithm: str
    timestamp_url: str | None

    @classmethod
    def read(cls, certificate: Path, key: Path, algorithm: str, timestamp_url: str | None) -> Signer:
        """Reads the files and tries them.

        Raises:
            ValueError: the package is missing, or they cannot be used; one line that names the variables.
        """
        try:
            signer = cls(certificate.read_bytes(), key.read_bytes(), algorithm, timestamp_url)
        except OSError as error:
            raise ValueError(f"SEESR_C2PA_CERTIFICATE or SEESR_C2PA_KEY cannot be read: {error}") from error
        try:
            import c2pa
        except ImportError as error:
            raise ValueError(f"SEESR_C2PA_CERTIFICATE {MISSING}") from error
        try:
            signer.open().close()
        except c2pa.C2paError as error:
            raise ValueError(f"SEESR_C2PA_CERTIFICATE and SEESR_C2PA_KEY cannot sign: {error}") from error
        return signer

    def open(self) -> Any:
        """The package's signer."""
        import c2pa

        return c2pa.Signer.from_info(
            c2pa.C2paSignerInfo(self.algorithm, self.certificate, self.key, self.timestamp_url)
        )

    def sign(self, data: bytes, output_type: str, source_type: str, source: bytes | None) -> bytes:
        """A result with a manifest. A source of a kind that C2PA knows becomes its ingredient, with its own manifest.

        Args:
            data: the file.
            output_type: media type of the file.
            source_type: IPTC digital source type of the edit, a URI.
            source: the input's file; None: the input was no file.

        Raises:
            RuntimeError: the file cannot be signed, for example because the timestamp authority does not answer.
        """
        import c2pa

        agent = {"name": "seesr", "version": __version__}
        edit = {"action": "c2pa.edited", "digitalSourceType": source_type, "softwareAgent": agent}
        actions = {"label": "c2pa.actions.v2", "data": {"actions": [edit]}}
        manifest = {"claim_generator_info": [agent], "format": output_type, "assertions": [actions]}
        input_type = None if source is None else media_type(source)
        try:
            with self.open() as signer, c2pa.Context.from_dict(LOCAL) as context:
                builder = c2pa.Builder(manifest, context)
                if source is not None and input_type in c2pa.Builder.get_supported_mime_types():
                    builder.set_intent(c2pa.C2paBuilderIntent.EDIT)
                    parent = {"title": "input", "format": input_type, "relationship": "parentOf"}
                    builder.add_ingredient(parent, input_type, io.BytesIO(source))
                else:
                    created = c2pa.C2paDigitalSourceType.COMPOSITE_WITH_TRAINED_ALGORITHMIC_MEDIA
                    builder.set_intent(c2pa.C2paBuilderIntent.CREATE, created)
                signed = io.BytesIO()
                builder.sign(signer, output_type, io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise RuntimeError(f"the result cannot be signed: {error}") from error
        return signed.getvalue()


def state(data: bytes) -> str | None:
    """What the validation of a file's manifest gives: Trusted, Valid or Invalid; None: there is no manifest."""
    if without(data) == data:
        return None
    try:
        import c2pa
    except ImportError:
        return f"checking it {MISSING}"
    try:
        context = c2pa.Context.from_dict(LOCAL)
        with context, c2pa.Reader(media_type(data), io.BytesIO(data), context=context) as reader:
            return reader.get_validation_state()
    except c2pa.C2paError as error:
        log.warning("the C2PA manifest cannot be read: %s", error)
        return "Invalid"


def without(data: bytes) -> bytes:
    """An output file (PNG, JPEG, WebP) without its manifest; the bytes from before it was signed."""
    kind = media_type(data)
    if kind == "image/png":
        chunks = [raw for name, _, raw in png_chunks.chunks(data) if name != b"caBX"]
        return png_chunks.SIGNATURE + b"".join(chunks)
    if kind == "image/jpeg":
        for marker, start, body in reversed(list(jpeg.segments(data))):
            if marker == JUMBF and body.startswith(b"JP") and body[12:16] == b"jumb":
                data = data[: start - 4] + data[start + len(body) :]
    if kind == "image/webp":
        return webp_without(data)
    return data


def webp_without(data: bytes) -> bytes:
    """A WebP without its manifest."""
    chunks, place = b"", 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        end = place + 8 + length + length % 2
        if data[place : place + 4] != b"C2PA":
            chunks += data[place:end]
        place = end
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks

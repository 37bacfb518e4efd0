"""Marks in every output, `seesr verify`, and C2PA manifests."""

from __future__ import annotations

import datetime
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from seesr import Engine, Settings, cli
from seesr.cli import verify
from seesr.config import Configuration
from seesr.images import content_credentials, xmp
from seesr.images.record import read_source_type
from seesr.networks import weights

QUICK = Settings(num_inference_steps=1, seed=1, scale_factor=2, latent_tiled_size=16)
FLAGS = ["--num-inference-steps", "1", "--seed", "1", "--scale-factor", "2", "--latent-tiled-size", "16"]
BUNDLE = ["--bundle", str(weights.POCKET)]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def small(photo: Image.Image) -> Image.Image:
    return photo.crop((0, 0, 32, 24))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Image.Image, engine: Engine) -> Path:
    """The current folder, with a.png in it; commands use the engine of the other tests."""
    monkeypatch.chdir(tmp_path)
    small.save("a.png")
    monkeypatch.setattr(Engine, "load", lambda bundle, device, **more: engine)
    return tmp_path


def source_type(data: bytes) -> str:
    """What Pillow reads in the XMP of a file."""
    with Image.open(io.BytesIO(data)) as image:
        return image.getxmp()["xmpmeta"]["RDF"]["Description"]["DigitalSourceType"].removeprefix(xmp.SOURCE_TYPES)


def test_every_view_and_output_carries_provenance(engine: Engine, small: Image.Image, tmp_path: Path) -> None:
    output = engine.run(np.asarray(small), QUICK.replace(output_view="all", output_format="webp"))
    with zipfile.ZipFile(io.BytesIO(output.data)) as archive:
        files = [archive.read(name) for name in archive.namelist()]
    assert [source_type(data) for data in files] == ["compositeWithTrainedAlgorithmicMedia"] * len(files)
    one = engine.run(small, QUICK)
    one.save(tmp_path / "a.jpg")
    assert read_source_type(tmp_path / "a.jpg") == xmp.SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"


def test_results_without_generated_pixels_are_marked_as_resampled(engine: Engine, small: Image.Image) -> None:
    black = Image.new("L", small.size)
    for output in (engine.run(small, QUICK.replace(fidelity=1.0)), engine.run(small, QUICK, mask=black)):
        assert source_type(output.data) == "algorithmicallyEnhanced"


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments), *BUNDLE])


def test_a_file_is_verified_with_its_source(folder: Path, capsys: Capture, small: Image.Image) -> None:
    assert run("upscale", "a.png", *FLAGS) == 0
    capsys.readouterr()
    assert run("verify", "a-x2.png") == 0
    output = capsys.readouterr().out
    assert "bundle: ok" in output and '"seed": 1' in output and "source_sha256: " in output and "again" not in output
    assert run("verify", "a-x2.png", "a.png", "--json") == 0
    output = json.loads(capsys.readouterr().out)
    assert output["checks"]["again"] == {"state": "ok", "about": "the same bytes"}
    assert output["digital_source_type"].endswith("compositeWithTrainedAlgorithmicMedia")

    small.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("other.png")
    assert run("verify", "a-x2.png", "other.png") == 1
    assert "source: wrong: its sha256 is" in capsys.readouterr().err

    data = bytearray((folder / "a-x2.png").read_bytes())
    data[data.index(b"IDAT") + 60] ^= 1  # the file that is checked is damaged
    (folder / "b.png").write_bytes(data)
    assert run("verify", "b.png", "a.png") == 1
    assert "again: wrong: the bytes differ" in capsys.readouterr().err
    info = PngImagePlugin.PngInfo()
    with Image.open("a-x2.png") as image:  # written again by another program
        info.add_itxt("seesr", image.info["seesr"])
        info.add_itxt("XML:com.adobe.xmp", image.info["xmp"].decode())
        image.save("c.png", pnginfo=info)
    assert run("verify", "c.png", "a.png") == 1
    assert "again: wrong: the pixels are the same; other parts" in capsys.readouterr().err


def test_reasons_for_failed_verification(folder: Path, capsys: Capture) -> None:
    Image.new("L", (32, 24), 200).save("m.png")
    assert run("upscale", "a.png", *FLAGS, "--mask", "m.png", "-o", "m-x2.webp") == 0
    capsys.readouterr()
    assert run("verify", "m-x2.webp", "a.png") == 2
    assert "--mask FILE" in capsys.readouterr().err
    assert run("verify", "m-x2.webp", "a.png", "--mask", "a.png") == 1
    assert "another mask" in capsys.readouterr().err
    assert run("verify", "m-x2.webp", "a.png", "--mask", "m.png") == 0
    for arguments, message in (
        (["a.png"], "a.png: the file has no settings record"),
        (["nowhere.png"], "nowhere.png: no such file or directory"),
        (["m-x2.webp", "nowhere.png"], "nowhere.png: no such file or directory"),
        (["m-x2.webp", "--bundle", "."], "name the right one with --bundle"),
    ):
        capsys.readouterr()
        assert cli.main(["verify", *BUNDLE, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_file_made_in_bfloat16_is_verified_in_it(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, engine: Engine, tmp_path: Path
) -> None:
    small = [*FLAGS, "--latent-tiled-size", "16"]
    assert run("upscale", "a.png", *small, "-o", "float32.png") == 0
    configuration = Configuration(precision="bfloat16")
    half = Engine(weights.POCKET, "cpu", configuration, tmp_path)
    half.reload()
    monkeypatch.setattr(Engine, "load", lambda bundle, device, **more: half)
    assert run("upscale", "a.png", *small, "-o", "bfloat16.png") == 0
    assert run("verify", "bfloat16.png", "a.png") == 0
    capsys.readouterr()
    assert run("verify", "float32.png", "a.png") == 2
    assert "the file was made with SEESR_PRECISION=auto" in capsys.readouterr().err
    monkeypatch.setattr(Engine, "load", lambda bundle, device, **more: engine)
    assert run("verify", "bfloat16.png", "a.png") == 2
    assert "the file was made with SEESR_PRECISION=bfloat16" in capsys.readouterr().err
    first, second = (np.asarray(Image.open(name), np.float32) for name in ("float32.png", "bfloat16.png"))
    assert 0 < np.abs(first - second).mean() < 0.5, "levels of 255"
    assert half.about()["precision"] == "bfloat16" and half.machine.endswith("bfloat16")
    assert half.rates.path is not None and "-cpu-bfloat16-" in half.rates.path.name


def test_a_zip_is_verified(folder: Path, capsys: Capture) -> None:
    assert run("upscale", "a.png", *FLAGS, "--output-view", "all") == 0
    assert run("verify", "a-x2.zip", "a.png") == 0
    assert "again: ok: the same bytes" in capsys.readouterr().out


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for signing with its issuer, and its key, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, name)]) for name in ("Root", "Signer")]
    unused = "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"
    usage = dict.fromkeys((*unused, "encipher_only", "decipher_only"), False)

    def built(key: Any, name: x509.Name, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(names[0])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        )
        if not authority:
            purposes = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purposes, critical=False)
        return builder.sign(keys[0], hashes.SHA256())

    chain = built(keys[1], names[1], False), built(keys[0], names[0], True)
    pem = serialization.Encoding.PEM
    (folder / "chain.pem").write_bytes(b"".join(each.public_bytes(pem) for each in chain))
    private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(keys[1].private_bytes(pem, *private))
    return folder / "chain.pem", folder / "key.pem"


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> content_credentials.Signer:
    return content_credentials.Signer.read(*certificate(tmp_path_factory.mktemp("keys")), "es256", None)


def manifests(data: bytes) -> dict[str, Any]:
    """What the reference implementation reads in a file, without asking the network."""
    import c2pa

    kind = content_credentials.media_type(data)
    context = c2pa.Context.from_dict(content_credentials.LOCAL)
    with context, c2pa.Reader(kind, io.BytesIO(data), context=context) as reader:
        return json.loads(reader.json())


@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_a_signed_result_is_valid_and_names_its_source(
    engine: Engine, small: Image.Image, signer: content_credentials.Signer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    settings = QUICK.replace(output_format=kind)
    plain = engine.run(buffer.getvalue(), settings).data
    monkeypatch.setattr(engine, "signer", signer)
    signed = engine.run(buffer.getvalue(), settings).data
    assert content_credentials.state(plain) is None and content_credentials.state(signed) in ("Valid", "Trusted")
    assert content_credentials.without(signed) == plain
    result = manifests(signed)
    active = result["manifests"][result["active_manifest"]]
    actions = next(a for a in active["assertions"] if a["label"].startswith("c2pa.actions"))["data"]["actions"]
    assert [action["action"] for action in actions] == ["c2pa.opened", "c2pa.edited"]
    assert actions[1]["digitalSourceType"] == xmp.SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
    assert [each["relationship"] for each in active["ingredients"]] == ["parentOf"]
    place = signed.rindex(b"seesr")
    damaged = signed[:place] + b"sEesr" + signed[place + 5 :]
    assert content_credentials.state(damaged) == "Invalid"

    output = engine.run(signed, settings.replace(scale_factor=1))  # the manifest of the input goes along
    twice, result = output.data, manifests(output.data)
    assert "only signed outputs keep the C2PA manifest" in output.metrics["warnings"]
    assert len(result["manifests"]) == 2 and content_credentials.state(twice) in ("Valid", "Trusted")
    (parent,) = result["manifests"][result["active_manifest"]]["ingredients"]
    assert parent["active_manifest"] in result["manifests"]


def test_what_a_manifest_says_of_ai_survives(
    engine: Engine, small: Image.Image, signer: content_credentials.Signer
) -> None:
    import c2pa

    results = []
    for kind in (c2pa.C2paDigitalSourceType.TRAINED_ALGORITHMIC_MEDIA, c2pa.C2paDigitalSourceType.DIGITAL_CAPTURE):
        buffer, signed = io.BytesIO(), io.BytesIO()
        small.save(buffer, "PNG")
        with signer.open() as native, c2pa.Context.from_dict(content_credentials.LOCAL) as context:
            builder = c2pa.Builder({"claim_generator_info": [{"name": "test"}]}, context)
            builder.set_intent(c2pa.C2paBuilderIntent.CREATE, kind)
            builder.sign(native, "image/png", buffer, signed)
        results.append(source_type(engine.run(signed.getvalue(), QUICK).data))
    assert results == ["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]


def test_pixels_and_zips_are_signed_and_verified(
    folder: Path, signer: content_credentials.Signer, engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(engine, "signer", signer)
    assert content_credentials.state(engine.run(Image.open("a.png"), QUICK).data) in ("Valid", "Trusted")
    assert run("upscale", "a.png", *FLAGS, "--output-view", "all") == 0
    assert run("verify", "a-x2.zip", "a.png") == 0
    assert run("upscale", "a.png", *FLAGS) == 0
    capsys.readouterr()
    assert run("verify", "a-x2.png", "a.png") == 0
    assert "content credentials: ok: Valid" in capsys.readouterr().out


def test_a_certificate_that_cannot_sign_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    for variables, message in (
        ({"SEESR_C2PA_CERTIFICATE": "x.pem"}, "needs SEESR_C2PA_KEY"),
        ({"SEESR_C2PA_CERTIFICATE": "x.pem", "SEESR_C2PA_KEY": "y.pem"}, "cannot be read: .*y.pem"),
        ({"SEESR_C2PA_CERTIFICATE": "x.pem", "SEESR_C2PA_KEY": "x.pem"}, "cannot sign"),
    ):
        monkeypatch.chdir(tmp_path)
        with monkeypatch.context() as context:
            for name, value in variables.items():
                context.setenv(name, value)
            with pytest.raises(ValueError, match=message):
                Engine.load(weights.POCKET, "cpu")


def test_files_are_compared_without_their_metadata() -> None:
    assert verify.difference(b"no image", b"no image either") == "the bytes differ"

import struct

import pytest

from loader_svc.image import describe, strip_signature

MARKER = b"~Module signature appended~\n"
IMAGE = b"\x7fELF" + bytes(500)


def signed(signature=b"\x30\x82" + bytes(62), *, id_type=2, zeros=(0, 0, 0, 0, b"\0\0\0"), length=None, image=IMAGE):
    algo, digest, signer, key_id, pad = zeros
    size = len(signature) if length is None else length
    return image + signature + struct.pack(">BBBBB3sI", algo, digest, id_type, signer, key_id, pad, size) + MARKER


def test_an_image_without_the_marker_stays_whole():
    assert strip_signature(IMAGE)[0] == len(IMAGE)
    assert strip_signature(IMAGE)[1].kind == "unsigned"
    assert strip_signature(MARKER)[0] == len(MARKER)
    assert strip_signature(signed() + b"\n")[0] == len(signed()) + 1


def test_a_well_formed_trailer_is_cut_off_and_its_key_unknown():
    length, verdict = strip_signature(signed())
    assert length == len(IMAGE)
    assert (verdict.kind, verdict.errno, verdict.signature_bytes) == ("unknown key", None, 64)


def test_a_call_that_ignores_versions_keeps_the_signature_as_part_of_the_image():
    length, verdict = strip_signature(signed(), mangled=True)
    assert (length, verdict.kind) == (len(signed()), "unsigned")


def test_a_signature_that_is_not_pkcs7_loses_the_marker_only():
    image = signed(id_type=0)
    length, verdict = strip_signature(image)
    assert length == len(image) - len(MARKER)
    assert (verdict.kind, verdict.errno, verdict.check, verdict.value) == (
        "unsupported", None, "signature: id_type", "0"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("image", "check", "value"),
    [
        (b"x" * 12 + MARKER, "signature: length", "12"),
        (signed(length=0xFFFFFFFF), "signature: sig_len", "4294967295"),
        (signed(length=len(IMAGE) + 64), "signature: sig_len", str(len(IMAGE) + 64)),
        (signed(zeros=(1, 0, 0, 0, b"\0\0\0")), "signature: params", "01000000000000"),
        (signed(zeros=(0, 0, 0, 0, b"\0\0\1")), "signature: params", "00000000000001"),
        (signed(b"\x31garbage"), "signature: pkcs7", "31676172"),
        (signed(b""), "signature: pkcs7", ""),
    ],
)
def test_malformed_trailers_fail_the_call(image, check, value):
    length, verdict = strip_signature(image)
    assert (verdict.kind, verdict.errno, verdict.check, verdict.value) == ("malformed", "EBADMSG", check, value)
    assert length <= len(image) - len(MARKER)


def test_the_longest_signature_leaves_one_byte():
    length, verdict = strip_signature(signed(b"\x30" + bytes(63), image=b"i"))
    assert (length, verdict.kind) == (1, "unknown key")


def test_a_signed_module_is_described_without_its_signature(make_module):
    image = make_module("tiny").bytes()
    facts = describe(signed(image=image))
    assert (facts.name, facts.image_bytes, facts.signature_bytes) == ("tiny", len(signed(image=image)), 64 + 12 + 28)
    assert facts.problem is None
    assert str(describe(signed(b"junk", image=image)).problem).startswith("EBADMSG (signature: pkcs7")

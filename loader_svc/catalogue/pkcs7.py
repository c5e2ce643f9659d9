"""The signature at the end of a module file: well-formed, as long as the real one, and of a key that no kernel trusts.

A kernel that does not insist on signatures loads such a module (kernel/module/signing.c, 6.12: an unknown key is
accepted, a malformed signature is not), and cuts the signature off before anything else.
"""

from __future__ import annotations

import struct

from loader_svc.catalogue.fill import noise

_MAGIC = b"~Module signature appended~\n"  # include/linux/module_signature.h
_PKEY_ID_PKCS7 = 2

_INTEGER, _OCTETS, _SEQUENCE, _SET, _UTF8 = 0x02, 0x04, 0x30, 0x31, 0x0C
_CONTEXT_0 = 0xA0
_SIGNED_DATA = bytes.fromhex("06092a864886f70d010702")
_DATA = bytes.fromhex("06092a864886f70d010701")
_SHA256 = bytes.fromhex("0609608648016503040201")
_ECDSA_WITH_SHA256 = bytes.fromhex("06082a8648ce3d040302")
_COMMON_NAME = bytes.fromhex("0603550403")


def signature(numbers_bytes: tuple[int, int], signer: str, serial: bytes, *seed: str) -> bytes:
    """Make a signature with its trailer: a PKCS #7 SignedData (RFC 2315) of one ECDSA signer.

    ``numbers_bytes`` are the lengths of the signature's two numbers as they are encoded.
    """
    digest = _sequence(_SHA256)
    name = _sequence(_der(_SET, _sequence(_COMMON_NAME, _der(_UTF8, signer.encode()))))
    numbers = [_number(length, *seed, str(place)) for place, length in enumerate(numbers_bytes)]
    signer_info = _sequence(
        _der(_INTEGER, b"\x01"),
        _sequence(name, _der(_INTEGER, serial)),
        digest,
        _sequence(_ECDSA_WITH_SHA256),
        _der(_OCTETS, _sequence(*numbers)),
    )
    signed = _sequence(_der(_INTEGER, b"\x01"), _der(_SET, digest), _sequence(_DATA), _der(_SET, signer_info))
    message = _sequence(_SIGNED_DATA, _der(_CONTEXT_0, signed))
    return message + struct.pack(">5B3xI", 0, 0, _PKEY_ID_PKCS7, 0, 0, len(message)) + _MAGIC


def _number(length_bytes: int, *seed: str) -> bytes:
    """Make a positive number whose shortest encoding has that length."""
    value = bytearray(noise(length_bytes, "signature", *seed))
    # P-384 numbers have 48 bytes; a 49th in front is a zero that keeps one with its first bit set positive.
    if length_bytes == 49:
        value[:2] = bytes((0, value[1] | 0x80))
    else:
        value[0] = value[0] & 0x7F or 1
    return _der(_INTEGER, bytes(value))


def _sequence(*parts: bytes) -> bytes:
    return _der(_SEQUENCE, *parts)


def _der(tag: int, *parts: bytes) -> bytes:
    """Tag, length, value (X.690, distinguished encoding)."""
    value = b"".join(parts)
    if len(value) < 128:
        return bytes((tag, len(value))) + value
    length = len(value).to_bytes((len(value).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + value

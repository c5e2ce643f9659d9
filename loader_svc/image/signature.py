"""The signature that may follow a module's ELF image.

From the end backwards: a marker text, a 12-byte descriptor (struct module_signature), a PKCS#7 message. Kernels with
MODULE_SIG=y look for it, before anything else (kernel/module/signing.c and kernel/module_signature.c, Linux 6.12).
"""

import struct
from dataclasses import dataclass
from typing import Final, Literal

from loader_svc.image.buffers import Buffer, byte_view

MARKER: Final = b"~Module signature appended~\n"
PKEY_ID_PKCS7: Final = 2
_DESCRIPTOR: Final = struct.Struct(">BBBBB3sI")  # algo, hash, id_type, signer_len, key_id_len, pad, sig_len
_DER_SEQUENCE: Final = 0x30


@dataclass(frozen=True, slots=True)
class SignatureVerdict:
    """What the kernel makes of a trailer.

    `kind`: `unsigned` (no marker at the end), `unknown key` (well-formed; no keyring of ours can confirm it),
    `unsupported` (not PKCS#7) or `malformed`. The first three load unless signatures are enforced
    (then EKEYREJECTED); `errno` is set where the call fails in any case.
    """

    kind: Literal["unsigned", "unknown key", "unsupported", "malformed"]
    errno: str | None = None
    check: str = ""
    value: str = ""
    signature_bytes: int = 0


UNSIGNED: Final = SignatureVerdict("unsigned")


def strip_signature(image: Buffer, *, mangled: bool = False) -> tuple[int, SignatureVerdict]:
    """Return the length in bytes that remains for every later check, and the verdict.

    `mangled` says that the call ignores versions or vermagic (flags 1 or 2): then a signature would not match
    anyway and is not even cut off, so its bytes count as part of the image.

    The cut happens in two steps, and an error in between leaves only the marker cut: so a descriptor that is not PKCS#7
    loads with descriptor and signature still counted.
    """
    view = byte_view(image)
    length = len(view)
    if mangled or length <= len(MARKER) or bytes(view[length - len(MARKER) :]) != MARKER:
        return length, UNSIGNED
    length -= len(MARKER)
    if length <= _DESCRIPTOR.size:
        return length, _malformed("length", length)
    algo, digest, id_type, signer, key_id, pad, signature_bytes = _DESCRIPTOR.unpack_from(
        view, length - _DESCRIPTOR.size
    )
    if signature_bytes >= length - _DESCRIPTOR.size:
        return length, _malformed("sig_len", signature_bytes)
    if id_type != PKEY_ID_PKCS7:
        return length, SignatureVerdict("unsupported", None, "signature: id_type", str(id_type))
    if algo or digest or signer or key_id or any(pad):
        return length, _malformed("params", bytes((algo, digest, signer, key_id, *pad)).hex())
    length -= _DESCRIPTOR.size + signature_bytes
    # Everything in the message beyond its first tag needs the kernel's keys and crypto; what is no DER at all does not.
    if signature_bytes == 0 or view[length] != _DER_SEQUENCE:
        return length, _malformed("pkcs7", view[length : length + min(signature_bytes, 4)].hex())
    return length, SignatureVerdict("unknown key", None, "", "", signature_bytes)


def _malformed(field: str, value: object) -> SignatureVerdict:
    return SignatureVerdict("malformed", "EBADMSG", f"signature: {field}", str(value))

"""What is refused before there is an image: the caller, the descriptor, the read."""

import pytest

from loader_svc.checks.caller import copy_failure, file_failure, read_failure, refusal
from loader_svc.steps import Caller, CallSpec, Failure
from modpressure.kernel.outcome import Syscall
from modpressure.kernel.policy import V6_5

FINIT, INIT = Syscall.FINIT_MODULE, Syscall.INIT_MODULE


def spec(syscall: Syscall = FINIT, flags: int = 0, **caller: object) -> CallSpec:
    return CallSpec("m", "inode", V6_5, syscall, flags, caller=Caller(**caller))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "errno", "check"),
    [
        (spec(), None, ""),
        (spec(flags=7), None, ""),
        (spec(INIT, is_permitted=False), "EPERM", "permission"),
        (spec(flags=8, is_permitted=False, descriptor="none"), "EPERM", "permission"),
        (spec(flags=8, descriptor="none"), "EINVAL", "flags"),
        (spec(flags=16), "EINVAL", "flags"),
        (spec(descriptor="none"), "EBADF", "descriptor"),
        (spec(descriptor="path"), "EBADF", "descriptor"),
        (spec(descriptor="write-only"), "EBADF", "descriptor"),
        (spec(INIT, descriptor="none"), None, ""),
    ],
)
def test_a_call_is_refused_for_the_first_thing_that_is_wrong(call: CallSpec, errno: str | None, check: str) -> None:
    failure = refusal(call)
    assert (failure and failure.errno) == errno
    if failure:
        assert failure.check == check


@pytest.mark.parametrize(
    ("is_regular", "size_bytes", "errno"),
    [(True, 1, None), (False, 0, "EINVAL"), (True, 0, "EINVAL"), (True, 2**31 - 1, None), (True, 2**31, "EFBIG")],
)
def test_a_file_is_read_if_it_is_one_and_neither_empty_nor_too_long(
    is_regular: bool, size_bytes: int, errno: str | None
) -> None:
    failure = file_failure(is_regular=is_regular, size_bytes=size_bytes, path="f")
    assert (failure and failure.errno) == errno


def test_a_file_open_for_writing_is_busy_unless_it_is_no_file_at_all() -> None:
    empty, no_file = Failure("EINVAL", "kread: size", "0"), file_failure(is_regular=False, size_bytes=0, path="p")
    written = spec(is_written=True)
    for failure in (None, empty):
        busy = read_failure(written, failure)
        assert busy is not None
        assert busy.errno == "ETXTBSY"
    assert read_failure(written, no_file) == no_file
    assert read_failure(spec(), empty) == empty


@pytest.mark.parametrize(
    ("length_bytes", "unmapped", "errno"),
    [(63, True, "ENOEXEC"), (64, False, None), (64, True, "EFAULT"), (1 << 40, True, "ENOMEM"), (0, False, "ENOEXEC")],
)
def test_an_image_is_copied_if_it_is_long_enough_fits_and_is_there(
    length_bytes: int, unmapped: bool, errno: str | None
) -> None:
    failure = copy_failure(spec(INIT, is_image_unmapped=unmapped), length_bytes, 1 << 30)
    assert (failure and failure.errno) == errno

"""What may be called what in stats_svc."""

import pytest

from modpressure.errors import BadRequest
from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.names import check_hello, check_module_name, check_system_id, shown


@pytest.mark.parametrize("value", ["a", "default", "a-1", "x" * 63])
def test_a_system_id_is_accepted(value: str) -> None:
    assert check_system_id(value) == value


@pytest.mark.parametrize("value", ["", "A", "1a", "-a", "a_b", "a b", "a\n", "x" * 64, "ä", "a\0"])
def test_what_is_no_system_id_is_refused(value: str) -> None:
    with pytest.raises(BadRequest, match="is no system id"):
        check_system_id(value)


def test_the_kernels_module_names_are_accepted_and_others_are_not() -> None:
    for name in ("xfs", "snd-hda-intel", "nf_conntrack", "8021q", "x" * 64):
        assert check_module_name(name) == name
    for name in ("", "a b", "a\tb", "a\0", "ü", "x" * 65):
        with pytest.raises(BadRequest, match="is no name of a module"):
            check_module_name(name)


def test_a_loader_may_be_named_in_any_script_but_not_across_lines() -> None:
    check_hello(pb.Hello(instance_id="0123abc", loader="Lader Nr. 1 – 模块"))
    check_hello(pb.Hello(instance_id="x"))
    for instance_id, loader in (("", "a"), ("a b", "a"), ("a", "a\nb"), ("a", "ü" * 65)):
        with pytest.raises(BadRequest):
            check_hello(pb.Hello(instance_id=instance_id, loader=loader))


def test_long_values_are_shown_shortened_and_on_one_line() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 100_000).endswith("... (100000 characters)")
    assert len(shown("\0" * 100_000)) < 400

"""Policies: which kernel does what about duplicates."""

import dataclasses

import pytest

from modpressure.kernel.policy import DEFAULT_POLICY, POLICIES, V6_3, V6_4, V6_5, policy_named
from modpressure.v1 import call_pb2


def test_each_version_differs_from_the_one_before_by_one_switch() -> None:
    assert (V6_3.early_check, V6_3.share_in_flight) == (False, False)
    assert (V6_4.early_check, V6_4.share_in_flight) == (True, False)
    assert (V6_5.early_check, V6_5.share_in_flight) == (True, True)
    assert DEFAULT_POLICY is V6_4


def test_policies_are_found_by_name_and_an_unknown_one_is_named() -> None:
    assert [policy_named(name) for name in POLICIES] == [V6_3, V6_4, V6_5]
    with pytest.raises(ValueError, match=r"no policy 'v7'; there are v6\.3, v6\.4, v6\.5"):
        policy_named("v7")


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        V6_3.early_check = True  # type: ignore[misc]


def test_the_contract_has_the_same_policies() -> None:
    names = {
        name.removeprefix("POLICY_").lower().replace("_", ".") for name in call_pb2.Policy.DESCRIPTOR.values_by_name
    }
    assert names - {"unspecified"} == set(POLICIES)

"""Calls on one file that share one result: no race, but for who comes too late to share."""

from __future__ import annotations

from collections.abc import Mapping


def shared_differences(which: str, results: Mapping[str, int], duplicates: tuple[int, int], workers: int) -> list[str]:
    """Hold a storm whose calls share results against itself.

    Who comes after the call that all others shared finds the module live; others that come while that one works share
    its EEXIST without being counted.
    """
    ok, eexist, (becoming, late) = results["ok"], results["eexist"], duplicates
    if ok and ok + eexist == workers and (0 < becoming <= eexist or becoming == eexist == 0) and not late:
        return []
    return [f"{which} {ok} and {eexist} results of {workers} calls, {becoming} and {late} duplicates"]

"""``modpressure request-module``."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer

from modpressure.cli.load import call_row
from modpressure.cli.output import (
    CALL_COLUMNS,
    KMODS,
    POLICIES,
    KmodWord,
    PolicyWord,
    duration_text,
    errno_text,
    plain,
    print_json,
    print_table,
    say,
)
from modpressure.cli.session import Session, command, whole_number
from modpressure.client import Client
from modpressure.errors import BadRequest
from modpressure.v1.call_pb2 import Policy
from modpressure.v1.loader_service_pb2 import Kmod, RequestModuleResponse

MAX_WORKERS = 10_000
MAX_REQUESTS = 1_000_000


@command("loaders", "system", "timeout_seconds")
async def request_module(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or alias, such as fs-xfs.")],
    requester: Annotated[
        str, typer.Option("--requester", help="A label for what asks, kept in events and counters.", show_default=False)
    ] = "request-module",
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            "-w",
            parser=whole_number(1, MAX_WORKERS),
            metavar="N",
            help=f"Tasks that ask at the same time, spread over the loaders, 1 to {MAX_WORKERS}.",
        ),
    ] = 1,
    repeat: Annotated[
        int,
        typer.Option("--repeat", parser=whole_number(1), metavar="N", help="How often each of them asks."),
    ] = 1,
    policy: Annotated[
        PolicyWord | None,
        typer.Option(help="What the kernel does about duplicates.", show_default="the system's"),
    ] = None,
    kmod: Annotated[
        KmodWord | None,
        typer.Option(help="How libkmod hands over a compressed file.", show_default="the loader's"),
    ] = None,
) -> int:
    """Have the kernel itself ask for a module, as its request_module does.

    Each request runs modprobe, no more than 50 at once on the whole system; one that finds no place for 5 s fails with
    ETIME. Where the kernel of the loaders merges equal requests (MODULE_DEBUG_AUTOLOAD_DUPS), one modprobe serves all
    that ask for the name meanwhile and for 60 s after. The exit code is 1 if a request did not return 0.

    Examples:
      modpressure request-module fs-xfs --requester mount
      modpressure request-module crypto-sha512 --workers 200 && modpressure stats
    """
    if workers * repeat > MAX_REQUESTS:
        raise BadRequest(
            f"--workers {workers} --repeat {repeat} would be {workers * repeat} requests; the most is {MAX_REQUESTS}"
        )

    async def work(client: Client, number: int) -> list[RequestModuleResponse]:
        return [
            await client.request_module(
                name,
                system=session.settings.system,
                requester=requester,
                worker=f"worker-{number}" if workers > 1 else "",
                policy=POLICIES[policy] if policy else Policy.POLICY_UNSPECIFIED,
                kmod=KMODS[kmod] if kmod else Kmod.KMOD_UNSPECIFIED,
            )
            for _ in range(repeat)
        ]

    async with session.client() as client:
        answered = await asyncio.gather(*(work(client, number) for number in range(workers)))
    responses = [response for some in answered for response in some]
    failed = sum(response.return_value != 0 for response in responses)
    if session.json:
        print_json({"name": name, "requests": [plain(response) for response in responses]})
    else:
        _print(responses)
    if len(responses) == 1:
        say(f"modpressure request-module: {name}: {_result_text(responses[0])}")
    elif failed:
        say(f"modpressure request-module: {name}: {failed} of {len(responses)} requests did not return 0")
    return int(failed > 0)


def _print(responses: Sequence[RequestModuleResponse]) -> None:
    if len(responses) == 1:
        if responses[0].calls:
            print_table(CALL_COLUMNS, [call_row(call) for call in responses[0].calls])
        return
    kinds = Counter((_result_text(response), response.merged) for response in responses)
    rows = []
    for (result, merged), count in kinds.most_common():
        mine = [r for r in responses if (_result_text(r), r.merged) == (result, merged)]
        calls = [call for response in mine for call in response.calls]
        rows.append(
            (
                result,
                "merged" if merged else "",
                str(count),
                str(sum(response.wait_ns > 0 for response in mine)),
                duration_text(max(response.wait_ns for response in mine)),
                str(len(calls)),
                str(sum(bool(call.errno) for call in calls)),
            )
        )
    print_table(("Returned", "", ">Requests", ">Waited", ">Longest wait", ">Calls", ">Failed"), rows)


def _result_text(response: RequestModuleResponse) -> str:
    if response.errno:
        return f"{response.return_value} ({errno_text(response.errno)})"
    return f"{response.return_value} (modprobe exited with {response.exit_status})"

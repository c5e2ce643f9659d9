"""``modpressure load`` and ``unload``."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from modpressure.cli.output import (
    CALL_COLUMNS,
    KMODS,
    ORIGINS,
    OUTCOMES,
    POLICIES,
    KmodWord,
    OriginWord,
    PolicyWord,
    duration_text,
    errno_text,
    plain,
    print_json,
    print_table,
    say,
    word_of,
)
from modpressure.cli.session import Session, command, whole_number
from modpressure.errors import BadRequest, ModpressureError
from modpressure.kernel.outcome import MODULE_INIT_IGNORE_MODVERSIONS, MODULE_INIT_IGNORE_VERMAGIC
from modpressure.units import format_bytes
from modpressure.v1.call_pb2 import Call, Policy
from modpressure.v1.loader_service_pb2 import Kmod, LoadModuleResponse


@command("loaders", "system", "timeout_seconds")
async def load(
    session: Session,
    modules: Annotated[list[str], typer.Argument(metavar="MODULE...", help="Names or aliases; - and _ are one.")],
    no_deps: Annotated[
        bool, typer.Option("--no-deps", help="Load only the modules themselves, as insmod does.")
    ] = False,
    policy: Annotated[
        PolicyWord | None,
        typer.Option(help="What the kernel does about duplicates.", show_default="the system's"),
    ] = None,
    kmod: Annotated[
        KmodWord | None,
        typer.Option(help="How libkmod hands over a compressed file.", show_default="the loader's"),
    ] = None,
    copy: Annotated[
        int,
        typer.Option(
            parser=whole_number(0, 2**31 - 1),
            metavar="N",
            help="Which copy of the file, an inode of its own each; 0 is the file itself.",
        ),
    ] = 0,
    params: Annotated[
        str, typer.Option("--params", help='Parameters of the one module, such as "debug=1".', show_default=False)
    ] = "",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Fail if the module was already loaded (EEXIST), as modprobe --first-time does."),
    ] = False,
    force_vermagic: Annotated[
        bool, typer.Option("--force-vermagic", help="Let the kernel ignore the version magic (flag 2).")
    ] = False,
    force_modversion: Annotated[
        bool, typer.Option("--force-modversion", help="Let the kernel ignore the symbol versions (flag 1).")
    ] = False,
    origin: Annotated[OriginWord, typer.Option(help="Who asks: a process, or the kernel itself.")] = "userspace",
    requester: Annotated[
        str, typer.Option(help="A label for who asks, kept in the event.", show_default=False)
    ] = "modprobe",
    refuse_when_full: Annotated[
        bool,
        typer.Option("--refuse-when-full", help="Fail at once where the loader's memory limit leaves no room."),
    ] = False,
    request_id: Annotated[
        str,
        typer.Option(help="Your id of this request, of one module: asked again within a day it is not done again."),
    ] = "",
) -> int:
    """Load modules, what they depend on first, as modprobe does.

    A module that is already loaded is no failure, whether that shows before a call is made or by its EEXIST; --strict
    makes it one. Any other errno is printed with its words, and the exit code is 1. All modules are tried.

    Examples:
      modpressure load xfs
      modpressure load snd_hda_intel kvm_intel --policy v6.5
      modpressure load loop --params "max_loop=16" --no-deps --copy 1
      modpressure load nvme --request-id boot-17/nvme
    """
    if params and len(modules) > 1:
        raise BadRequest(f"--params {shlex.quote(params)} is for one module, but {len(modules)} are given")
    _check_request_id(request_id, modules)
    flags = MODULE_INIT_IGNORE_VERMAGIC * force_vermagic | MODULE_INIT_IGNORE_MODVERSIONS * force_modversion
    rows: list[tuple[str, ...]] = []
    documents: list[dict[str, Any]] = []
    sentences: list[str] = []
    code = 0
    async with session.client() as client:
        for module in modules:
            try:
                response = await client.load(
                    module,
                    system=session.settings.system,
                    parameters=params,
                    with_dependencies=not no_deps,
                    policy=POLICIES[policy] if policy else Policy.POLICY_UNSPECIFIED,
                    kmod=KMODS[kmod] if kmod else Kmod.KMOD_UNSPECIFIED,
                    flags=flags,
                    copy=copy,
                    origin=ORIGINS[origin],
                    requester=requester,
                    request_id=request_id,
                    refuse_when_full=refuse_when_full,
                )
            except ModpressureError as error:
                if len(modules) == 1:
                    raise
                code = max(code, 2 if isinstance(error, BadRequest) else 1)
                documents.append({"module": module, "error": error.sentence})
                sentences.append(error.sentence)
                continue
            failed, sentence = judge(module, response, strict=strict)
            code = max(code, int(failed))
            if sentence:
                sentences.append(sentence)
            documents.append({"module": module, **plain(response), "error": sentence if failed else ""})
            rows += [call_row(call) for call in response.dependency_calls]
            rows += [call_row(response.call)] if response.HasField("call") else []
    if session.json:
        print_json({"loads": documents})
    elif rows:
        print_table(CALL_COLUMNS, rows)
    for sentence in sentences:
        say(f"modpressure load: {sentence}")
    return code


def _check_request_id(request_id: str, modules: list[str]) -> None:
    if request_id and len(modules) > 1:
        raise BadRequest(f"--request-id {shlex.quote(request_id)} is for one module, but {len(modules)} are given")


def judge(module: str, response: LoadModuleResponse, *, strict: bool) -> tuple[bool, str]:
    """Return whether a load failed for its user, and a sentence if there is something to say."""
    for call in response.dependency_calls:
        # One that somebody else was faster to load serves as well.
        if call.errno and not _was_there(call):
            return True, f"{module} needs {call.module}: {_why(call)}"
    if not response.HasField("call"):
        return strict, f"{module} is already loaded or built in; no call was made"
    call = response.call
    if not call.errno:
        return False, ""
    if _was_there(call):
        return strict, f"{call.module} is already loaded: {_why(call)}"
    return True, f"{call.module}: {_why(call)}"


def _was_there(call: Call) -> bool:
    return call.duplicate and call.errno == "EEXIST"


def _why(call: Call) -> str:
    where = " ".join(part for part in (call.check, repr(call.value) if call.value else "") if part)
    stage = word_of(OUTCOMES, call.outcome)
    return f"{errno_text(call.errno)} ({', '.join(part for part in (stage, where) if part)})"


def call_row(call: Call) -> tuple[str, ...]:
    """Return what a table with ``CALL_COLUMNS`` says of a call."""
    return (
        call.module,
        word_of(OUTCOMES, call.outcome),
        call.errno,
        format_bytes(call.file_bytes),
        format_bytes(call.image_bytes),
        format_bytes(call.mod_bytes),
        format_bytes(call.peak_held_bytes),
        duration_text(call.duration_ns),
        duration_text(call.wait_ns) if call.wait_ns else "",
    )


@command("loaders", "system", "timeout_seconds")
async def unload(
    session: Session,
    modules: Annotated[list[str], typer.Argument(metavar="MODULE...", help="Names of loaded modules.")],
    force: Annotated[
        bool,
        typer.Option("--force", help="Unload also what has no exit function (O_TRUNC, rmmod --force); nothing in use."),
    ] = False,
    request_id: Annotated[
        str,
        typer.Option(help="Your id of this request, of one module: asked again within a day it is not done again."),
    ] = "",
) -> int:
    """Unload modules, in the order given, as rmmod does.

    A module that another one uses stays, forced or not (EWOULDBLOCK): unload its users first, which modpressure modules
    loaded shows. An errno is printed with its words, and the exit code is 1. All modules are tried.

    Example:
      modpressure unload xfs libcrc32c
    """
    _check_request_id(request_id, modules)
    documents: list[dict[str, Any]] = []
    sentences: list[str] = []
    code = 0
    async with session.client() as client:
        for module in modules:
            try:
                response = await client.unload(
                    module, system=session.settings.system, forced=force, request_id=request_id
                )
            except ModpressureError as error:
                if len(modules) == 1:
                    raise
                code = max(code, 2 if isinstance(error, BadRequest) else 1)
                documents.append({"module": module, "error": error.sentence})
                sentences.append(error.sentence)
                continue
            errno = response.unload.errno
            sentence = f"{module}: {errno_text(errno)}" if errno else ""
            if errno:
                code = max(code, 1)
                sentences.append(sentence)
            documents.append({"module": module, **plain(response), "error": sentence})
    if session.json:
        print_json({"unloads": documents})
    for sentence in sentences:
        say(f"modpressure unload: {sentence}")
    return code

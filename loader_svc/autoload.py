"""The kernel asks for a module: request_module() runs ``modprobe -q -- NAME`` (kernel/module/kmod.c, Linux 6.12).

stats_svc gives the place among the modprobes that may run at once, or another request's result. What modprobe does
then is that of kmod 30: ``insmod`` in tools/modprobe.c and ``kmod_module_probe_insert_module``. Blacklists keep aliases
from leading to a module, not the module's own name: the kernel gives no ``-b``.
"""

from __future__ import annotations

import time

from loader_svc import requests
from loader_svc.live import LiveCall, Request
from loader_svc.loader import Loader
from loader_svc.trees import LoadStep, ModuleRef
from modpressure.errors import BadRequest
from modpressure.kernel.autoload import EXIT_FAILURE, return_value
from modpressure.v1 import call_pb2, loader_service_pb2
from modpressure.v1 import ledger_service_pb2 as ledger

PROCEED = ledger.OperationResult.VERDICT_PROCEED
SHARED = ledger.OperationResult.VERDICT_SHARED

_LOADED = ("", "EEXIST")
"""Errnos after which a module is there, whoever loaded it."""


class ModuleRequest:
    """One request of the kernel, and the calls that its modprobe makes, one after another."""

    def __init__(self, loader: Loader, request: loader_service_pb2.RequestModuleRequest) -> None:
        """Check the request; BadRequest names the field and the value."""
        self._loader = loader
        self._system = requests.system_id(request.system)
        self._name = requests.label("name", request.name)
        if not self._name:
            raise BadRequest("the name of a module or alias must be given", field="name")
        self._requester = requests.label("requester", request.requester)
        self._worker = requests.label("worker", request.worker)
        self._claim = loader.claim(request, self._system)
        self._request_id = request.request_id
        self._policy = requests.policy_number(request.policy)
        self._kmod = requests.kmod_version(request.kmod, loader.kmod)
        # What can be no alias is the caller's mistake; what leads nowhere is modprobe's to find out.
        self._found = loader.tree.lookup(self._name)
        self._calls: list[call_pb2.Call] = []

    async def run(self) -> loader_service_pb2.RequestModuleResponse:
        """Wait for a place, run modprobe, and return what request_module returns, once every call is committed."""
        self._policy = await self._loader.policy(self._system, self._policy)
        if self._claim is None:
            return await self._request()
        # All but its calls, which are recorded one by one.
        return await self._claim.once(self._request, _result_of)

    def interrupt(self) -> None:
        """Wait no longer for whoever carries the same request out now; nothing else ends it."""
        if self._claim is not None:
            self._claim.interrupt()

    async def _request(self) -> loader_service_pb2.RequestModuleResponse:
        if self._claim is not None:
            self._calls = [part.call for part in self._claim.record.parts]
            if self._claim.is_complete:
                response = loader_service_pb2.RequestModuleResponse.FromString(self._claim.record.result)
                response.calls.extend(self._calls)
                return response
        client = self._loader.machine.ledger
        call_id = client.new_call_id()
        asked = ledger.RequestModule(name=self._name, merge=self._loader.machine.plans.identity.merges_autoloads)
        begun_ns = time.monotonic_ns()
        result = await client.ask(ledger.Operation(call_id=call_id, system=self._system, request_module=asked))
        response = loader_service_pb2.RequestModuleResponse(
            errno=result.errno,
            exit_status=result.exit_status,
            merged=result.verdict == SHARED,
            wait_ns=time.monotonic_ns() - begun_ns if result.waited else 0,
        )
        if result.verdict == PROCEED:
            # However it ends, others wait for the place.
            response.exit_status = EXIT_FAILURE
            try:
                response.exit_status = await self._modprobe()
            finally:
                ended = ledger.FinishRequest(exit_status=response.exit_status)
                await client.ask(ledger.Operation(call_id=call_id, system=self._system, finish_request=ended))
        response.return_value = return_value(response.errno, response.exit_status)
        response.calls.extend(self._calls)
        return response

    async def _modprobe(self) -> int:
        """Do what modprobe does; return its exit status: of all that an alias stands for the last one decides."""
        status = 0 if self._found else EXIT_FAILURE
        for ref in self._found:
            status = 0 if await self._insert(ref) else EXIT_FAILURE
        return status

    async def _insert(self, ref: ModuleRef) -> bool:
        """Load one module and what it brings with it; return whether that went well."""
        tree = self._loader.tree
        if ref.builtin or await self._loader.is_live(self._system, ref.name):
            return True
        if ref.alias is not None and tree.is_blacklisted(ref.name):
            return True
        steps = tree.steps(ref)
        for step in steps:
            # Commands of the configuration are passed over: a request must not be able to run anything.
            if step.kind == "insmod" and not await self._load(step) and step.required:
                return False
        return any(step.module == ref.name for step in steps)

    async def _load(self, step: LoadStep) -> bool:
        """Load one file, unless its module is live; return whether it is there in the end, whoever loaded it."""
        part = None
        if self._claim is not None:
            recorded = self._claim.recorded(step.module)
            if recorded is not None:
                return recorded.errno in _LOADED
            part = self._claim.part(step.module, settles=False)
        if await self._loader.is_live(self._system, step.module):
            return True
        spec, file = self._loader.spec(step.module, policy=self._policy, kmod=self._kmod, parameters=step.options)
        request = Request(
            spec,
            file,
            self._system,
            self._policy,  # type: ignore[arg-type]
            worker=self._worker,
            origin=call_pb2.ORIGIN_AUTOLOAD,
            requester=self._requester,
            request_id=self._request_id,
            part=part,
        )
        call = await LiveCall(self._loader.machine, request).run()
        self._calls.append(call)
        return call.errno in _LOADED


def _result_of(response: loader_service_pb2.RequestModuleResponse) -> bytes:
    result = loader_service_pb2.RequestModuleResponse()
    result.CopyFrom(response)
    result.ClearField("calls")
    return result.SerializeToString()

"""stats_svc with a fault of its own: a batch that was applied before is applied once more."""

from modpressure.v1 import ledger_service_pb2 as pb
from stats_svc.__main__ import main
from stats_svc.ledger import Ledger
from stats_svc.session import Session

_submit = Ledger.submit


async def _submit_as_new(self: Ledger, session: Session, batch: pb.OperationBatch) -> None:
    instance = session.instance
    instance.applied_sequence = min(instance.applied_sequence, batch.sequence - 1)
    await _submit(self, session, batch)


Ledger.submit = _submit_as_new  # type: ignore[method-assign]

if __name__ == "__main__":
    main()

"""stats_svc with a fault of its own: what is asked is answered before it is committed."""

from stats_svc.__main__ import main
from stats_svc.group import Group
from stats_svc.ledger import Ledger

_commit = Ledger._commit


async def _answer_and_commit(self: Ledger, group: Group) -> None:
    self._answer(group)
    group.results.clear()
    group.released.clear()
    await _commit(self, group)


Ledger._commit = _answer_and_commit  # type: ignore[method-assign]

if __name__ == "__main__":
    main()

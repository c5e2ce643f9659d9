"""``python -m loader_svc``: one loader."""

from __future__ import annotations

import sys

from loader_svc.server import serve
from modpressure import aio, log
from modpressure.errors import ModpressureError
from modpressure.settings import LoaderSettings, parse_settings


def main() -> None:
    """Serve until stopped; exit 0, or 1 with a sentence on standard error."""
    settings = parse_settings(LoaderSettings, sys.argv[1:], "loader_svc")
    log.configure(settings.log_level, settings.log_format)
    try:
        aio.run(serve(settings))
    except ModpressureError as error:
        raise SystemExit(f"loader_svc: {error}") from None


if __name__ == "__main__":
    main()

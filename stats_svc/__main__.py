"""``python -m stats_svc``: the ledger and its statistics."""

from __future__ import annotations

import sys

from modpressure.errors import ModpressureError
from modpressure.starting import starting


def main() -> None:
    """Serve until stopped; exit 0, 1 with a sentence on standard error, or 130 if interrupted before it served."""
    try:
        with starting():
            from modpressure import aio, log
            from modpressure.limits import raise_open_files
            from modpressure.settings import StatsSettings, parse_settings
            from stats_svc.server import serve

            settings = parse_settings(StatsSettings, sys.argv[1:], "stats_svc")
            log.configure(settings.log_level, settings.log_format, for_good=True)
            raise_open_files()
        aio.run(serve(settings))
    except ModpressureError as error:
        raise SystemExit(f"stats_svc: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

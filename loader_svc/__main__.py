"""``python -m loader_svc``: one loader."""

from __future__ import annotations

import sys

from modpressure.errors import ModpressureError
from modpressure.starting import starting


def main() -> None:
    """Serve until stopped; exit 0, 1 with a sentence on standard error, or 130 if interrupted before it served."""
    try:
        with starting():
            from loader_svc.server import serve
            from modpressure import aio, log
            from modpressure.limits import raise_open_files
            from modpressure.settings import LoaderSettings, parse_settings

            settings = parse_settings(LoaderSettings, sys.argv[1:], "loader_svc")
            log.configure(settings.log_level, settings.log_format, for_good=True)
            raise_open_files()
        aio.run(serve(settings))
    except ModpressureError as error:
        raise SystemExit(f"loader_svc: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

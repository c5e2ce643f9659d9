"""``python -m modpressure``, and where the command ``modpressure`` begins."""

from __future__ import annotations

from modpressure.starting import starting


def main() -> None:
    """Run the command line of this process; exit 130 if interrupted."""
    try:
        with starting():
            from modpressure.cli.main import run
        run()
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

"""The program `pagemill`: nothing but a place where Ctrl-C is quiet before the command line is even imported."""

import sys


def main() -> None:
    """Run the command line; see `pagemill.cli`."""
    try:
        from pagemill import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + SIGINT, as a shell reports it


if __name__ == "__main__":
    main()

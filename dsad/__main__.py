"""``python -m dsad``."""

from dsad.cli.main import entry

if __name__ == "__main__":
    entry()

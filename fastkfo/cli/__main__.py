"""Lets ``python -m fastkfo.cli`` stand for ``fastkfo``."""

from fastkfo.cli import main

if __name__ == "__main__":
    main()

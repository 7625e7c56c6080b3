"""``python -m kvloom.cli``: the command line without its script."""

from kvloom.cli import main

main()

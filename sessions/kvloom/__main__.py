"""``python -m kvloom``: the command line, where its script is not on the path."""

from kvloom.cli import main

main()

"""Run the command line as ``python -m clicktrain``."""

from clicktrain.cli import main

main()

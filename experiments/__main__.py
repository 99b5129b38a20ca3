"""Runs the experiments of this folder: `python -m experiments --help`."""

from jaxattn.claims.__main__ import main

if __name__ == "__main__":
    main()

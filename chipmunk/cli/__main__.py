"""`python -m chipmunk.cli`: the command line without an installed script."""

from chipmunk.cli import main

if __name__ == "__main__":
    main()

"""`python -m optrot_edge` is the command `optrot-edge`."""

from optrot_edge.cli import main

if __name__ == "__main__":
    main()

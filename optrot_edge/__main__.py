"""`python -m optrot_edge` is the command `optrot-edge`; under torchrun only rank 0 prints."""

import contextlib
import os

from optrot_edge.cli import main
from optrot_edge.processes import process_rank

if __name__ == "__main__":
    if process_rank():
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            main()
    main()

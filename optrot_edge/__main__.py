"""`python -m optrot_edge` is the command `optrot-edge`; under torchrun only rank 0 prints."""

import contextlib
import os
import time

from optrot_edge.cli import main
from optrot_edge.processes import process_rank

LAST_WORD = 30.0  # seconds for rank 0 to say what is wrong: a launcher ends all processes when the first one fails

if __name__ == "__main__":
    if process_rank():
        try:
            with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
                  contextlib.redirect_stderr(nowhere)):
                main()
        except SystemExit as end:
            if end.code:
                time.sleep(LAST_WORD)
            raise
    main()

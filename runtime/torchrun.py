"""torchrun without its noise: the same launcher, but a failed rank's own message is the last word.

Plain torchrun follows a failure with its own traceback and a summary of dozens of lines, and always ends
with 1. This ends with the exit code of the rank that failed first (128 + N when signal N ended it).
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main


def run(arguments: list[str]) -> int:
    """Launch as ``torchrun`` does and return the exit code of the group."""
    logging.disable(logging.ERROR)  # in this process only; what stops a launch is raised, and so still seen
    try:
        main(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except (RendezvousError, DistError) as error:
        sys.stderr.write(f"The machines did not find each other: {error or type(error).__name__}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))

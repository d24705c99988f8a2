"""torchrun without its noise: the same launcher, but a failed rank's own message comes last.

After a failure, plain torchrun prints its own traceback and a summary of dozens of lines, and always exits
with 1. This exits with the code of the rank that failed first (128 + N if signal N killed it).
"""

from __future__ import annotations

import logging
import sys

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main

from runtime.surroundings import guard_streams


def run(arguments: list[str]) -> int:
    """Launch as ``torchrun`` does and return the exit code of the group."""
    logging.disable(logging.ERROR)  # in this process only; errors that stop a launch are raised
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
    guard_streams()
    sys.exit(run(sys.argv[1:]))

"""How many threads share the members."""

import os


def num_threads() -> int:
    """What OMP_NUM_THREADS says, else every processor this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) > 0 else len(os.sched_getaffinity(0))

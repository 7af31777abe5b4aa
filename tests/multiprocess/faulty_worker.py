"""A worker, launch/processes/worker_process.py, with a fault in its third verification."""

from __future__ import annotations

import os
import sys
import time

from launch.processes import worker_process
from workers.target_verifier import TargetVerifier

verify = TargetVerifier.verify


def at_the_third(act):
    """A `verify` that first acts on the verifier when it is called for the third time."""

    def faulty(verifier, draft):
        verifier.num_verified = getattr(verifier, "num_verified", 0) + 1
        if verifier.num_verified == 3:
            act(verifier)
        return verify(verifier, draft)

    return faulty


def other_token(verifier: TargetVerifier) -> None:
    """Committed long ago, so that the verdict stays what it was: only the digest tells."""
    verifier.committed[0] ^= 1
    verifier._num_digested = 0


FAULTS = {
    "other_token": other_token,
    "stall": lambda verifier: time.sleep(3600),
}

if __name__ == "__main__":
    TargetVerifier.verify = at_the_third(FAULTS[os.environ["TEST_FAULT"]])
    sys.exit(worker_process.main())

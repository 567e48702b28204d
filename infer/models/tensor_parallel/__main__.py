"""The process of a rank that rank 0 started: `python -m draftsmith.infer.models.tensor_parallel JSON`."""

import sys

from draftsmith.infer.models.tensor_parallel.follower import main

if __name__ == "__main__":
    main(sys.argv[1])

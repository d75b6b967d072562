"""torchrun that passes SIGUSR1 on: `python -m kd.torchrun [torchrun's options] -m kd.run …`.

torchrun itself dies of that signal, and ends with 1 whatever its ranks ended with; here the exit
code is that of the rank that ended first. Where OMP_NUM_THREADS is not set, the machine's cores are
divided among its ranks; torchrun would give each of them one.
"""

from __future__ import annotations

import os
import sys

from kd.process import children_end_with_this
from kd.stop import pass_on_to_children


def main() -> None:
    """Start the ranks and wait for them."""
    pass_on_to_children()  # before torch starts threads, and takes its seconds to import

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from kd.launch import RanksFailed, set_up_messages
    from kd.parallel import num_cores

    set_up_messages()
    args = run.parse_args(sys.argv[1:])
    num_ranks = run.determine_local_world_size(args.nproc_per_node)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_cores() // num_ranks)))
    try:
        with children_end_with_this():
            run.run(args)
    except ChildFailedError as error:
        raise SystemExit(RanksFailed.of(error).exit_code) from None


if __name__ == "__main__":
    main()

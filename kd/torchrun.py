"""torchrun that passes SIGUSR1 on: `python -m kd.torchrun [torchrun's options] -m kd.run …`.

torchrun itself dies of that signal, and ends with 1 whatever its ranks ended with; here the exit
code is that of the rank that ended first.
"""

from __future__ import annotations

from kd.stop import pass_on_to_children


def main() -> None:
    """Start the ranks and wait for them."""
    pass_on_to_children()  # before torch starts threads, and takes its seconds to import

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from kd.launch import RanksFailed, set_up_messages

    set_up_messages()
    try:
        run.main()
    except ChildFailedError as error:
        raise SystemExit(RanksFailed.of(error).exit_code) from None


if __name__ == "__main__":
    main()

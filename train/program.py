"""How a program starts and ends. Nothing here is slow to import, so that `--help` and mistakes on the command line answer at once."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

from train.command_line import UsageError

PATIENCE = 2.0  # seconds; torchrun ends the others as soon as one has failed


def setup_console() -> None:
    """UTF-8 on every console, so that Chinese prints on Windows and in pipes."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


def run_main(main: Callable[[], int | None], several: bool = False) -> None:
    """Run a program and exit: 0 done, 1 failed run, 2 usage, 130 stopped by the user. Users' mistakes are one line, without a trace
    (HAOAI_DEBUG=1 shows it). several: whether torchrun may start it as one of several processes."""
    setup_console()
    threading.excepthook = _report_thread
    try:
        with _process_group(several):
            status = main() or 0
    except UsageError as error:
        status = _report(error, 2)
    except (ValueError, OSError) as error:
        status = _report(error, 1)
    except (MemoryError, RuntimeError) as error:
        from train.memory import out_of_memory, reason_of  # slow to import, and torch is there by now
        from train.parallel import LOST, lost_process

        if out_of_memory(error):
            status = _report(MemoryError(f"not enough memory ({reason_of(error)})"), 1)
        elif lost_process(error):
            status = _report(RuntimeError(LOST), 1)
        else:
            raise
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        status = 130
    if _one_of_several():
        # While Python ends, threads of torch's connections now and then abort the process (once in about 300). torchrun would take a
        # run that has saved everything for a failed one, and with --max-restarts begin anew.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def _one_of_several() -> bool:
    """Whether torchrun has started this process together with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def _process_group(several: bool) -> contextlib.AbstractContextManager[None]:
    """Together with the other processes that torchrun has started, if it has."""
    if not _one_of_several():
        return contextlib.nullcontext()
    if not several:
        raise UsageError("this program runs in one process: start it without torchrun")
    from train.parallel import process_group  # slow to import

    return process_group()


def _report(error: Exception, status: int) -> int:
    """Print an error; with several processes, whose it is. Those after the first leave it time to say the same."""
    if os.environ.get("HAOAI_DEBUG"):
        traceback.print_exc()
    number = int(os.environ.get("RANK", "0"))
    if number:
        time.sleep(PATIENCE)
    print(f"error (process {number}): {error}" if number else f"error: {error}", file=sys.stderr, flush=True)
    return status


def _report_thread(ended: threading.ExceptHookArgs) -> None:
    """A background thread that cannot write (TensorBoard's) is one line, too."""
    if isinstance(ended.exc_value, OSError) and not os.environ.get("HAOAI_DEBUG"):
        print(f"warning: in the background: {ended.exc_value}", file=sys.stderr)
    else:
        threading.__excepthook__(ended)

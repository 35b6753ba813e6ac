"""Signals that stop a program, and its exit codes."""

import os
import signal
from types import FrameType, TracebackType
from typing import Any, Self

REQUEUE = 75
"""Exit code of a preempted run that can be resumed: EX_TEMPFAIL of sysexits.h."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""
TERMINATED = 143
"""Exit code after SIGTERM, as in shells."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; sent by kill, torchrun and Slurm; sent by Slurm with ``--signal=USR1@300``."""
DRAW_SIGNAL = signal.SIGUSR2
"""Makes a run draw its samples now; ignored before the first step, which draws them too."""


class Exit(SystemExit):
    """Ends an interrupted program with a message and an exit code.

    As a ``SystemExit`` it passes through the ``except Exception`` of libraries.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(code)
        self.message = message


class StopSignals:
    """Handles the stop signals within a block, until something else handles them.

    A starting program has written nothing, so a signal ends its process at once: an exception
    during an import may be lost, as when torch imports numpy. A working program is interrupted by
    an exception, and cleans up.

    Args:
        resumable: the program is ``train``, which can be requeued, also stops at SIGUSR1, and
            ignores ``DRAW_SIGNAL`` until it can draw.
    """

    def __init__(self, *, resumable: bool = False) -> None:
        code = REQUEUE if resumable else TERMINATED
        self._codes = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: code}
        self._codes |= {signal.SIGUSR1: code} if resumable else {}
        self._ignored = (DRAW_SIGNAL,) if resumable else ()
        how_to_resume = "; the same command with ckpt=auto starts or resumes the run"
        self._advice = how_to_resume if resumable else ""
        self._working = False
        self._process = os.getpid()
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for signum in self._codes:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup and a shell's & set it
                self._previous_handlers[signum] = signal.signal(signum, self._receive)
        for signum in self._ignored:
            self._previous_handlers[signum] = signal.signal(signum, signal.SIG_IGN)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def begin_work(self) -> None:
        """From now on, a signal raises an exception."""
        self._working = True

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked worker, which has inherited the handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        received = signal.Signals(signum)
        message, code = f"stopped by {received.name}{self._advice}", self._codes[received]
        if self._working:
            raise KeyboardInterrupt if received == signal.SIGINT else Exit(message, code)
        if received != signal.SIGINT:
            os.write(2, f"{message}\n".encode())
        os._exit(code)

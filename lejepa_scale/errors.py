"""The one exception meant for the person at the keyboard: printed as a paragraph, without a traceback."""

from enum import IntEnum

from lejepa_scale.addresses import redacted


class Exit(IntEnum):
    """Statuses of `lejepa` that mean something to who started it. Whatever else ends a process (a traceback, a signal) is a
    fault too."""

    DONE = 0
    FAULT = 1  # of the machine or the numbers: the same command may go on from the newest checkpoint
    MISTAKE = 2  # on the command line or in the configuration: it will not go better the next time
    STOPPED = 75  # asked to, with everything saved: the same command goes on (EX_TEMPFAIL of sysexits.h)


class UserError(Exception):
    """Something the user can mend. The message names the key, file or number and says what to do; secrets of addresses
    are not in it.

    `everywhere` is set where every rank raises the same error, so that it is printed once. status: that of the command.
    """

    everywhere = False

    def __init__(self, message: str, status: Exit = Exit.MISTAKE) -> None:
        super().__init__(redacted(message))
        self.status = status

"""The one exception meant for the person at the keyboard: printed as a paragraph, without a traceback."""

from lejepa_scale.addresses import redacted


class UserError(Exception):
    """Something the user can mend. The message names the key, file or number and says what to do; secrets of addresses
    are not in it.

    `everywhere` is set where every rank raises the same error, so that it is printed once.
    """

    everywhere = False

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))

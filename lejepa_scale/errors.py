"""The one exception meant for the person at the keyboard: printed as a paragraph, without a traceback."""


class UserError(Exception):
    """Something the user can mend. The message names the key, file or number and says what to do.

    `everywhere` is set where every rank raises the same error, so that it is printed once.
    """

    everywhere = False

"""The one exception that stands for something a user can cause and can mend."""


class UserError(Exception):
    """Bad input: one sentence that names the field, file or record and says what to do.

    `main` prints the sentence on stderr and exits with code 1; nothing already on disk is touched.
    """


class Stopped(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM) and everything up to here is saved; the same command goes on."""

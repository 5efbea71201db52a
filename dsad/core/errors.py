"""Errors that a user can act on; the command line prints their message without a traceback."""


class DsadError(Exception):
    """A fault of input, data or configuration.

    The message names the file or key, what was expected, what was found and what to do.
    """

    #: Whether every process of a run raises it, so that nobody needs to be told.
    shared = False
    #: What the command exits with: 2 for input that has to be changed, 3 for what may be tried
    #: again, such as storage that failed during a run.
    code = 2


class ConfigError(DsadError):
    """A configuration value, key or file that cannot be used."""


class DataError(DsadError):
    """One or more faults in a data set; the message lists all of them."""


class WorkdirError(DsadError):
    """A work directory that holds another run, or not the run that was asked for."""

    #: Whether a checkpoint is damaged and there is an older one to go back to.
    older_one = False


class NonFiniteError(DsadError):
    """A loss or norm became NaN or infinite; the message names the step and the metric."""


class StoppedError(DsadError):
    """Work that was asked to stop, and how to go on with it."""

    code = 130  # what shells give to Ctrl-C


class MetricError(DsadError):
    """A metric that is undefined for the given labels, such as AUROC of a single class."""

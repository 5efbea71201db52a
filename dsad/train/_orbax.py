"""How checkpoints use orbax: without limits of time, quietly; its only importer."""

import functools
import logging
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

#: A century: its limits go by the wall clock, which may jump, and a slow disk is no failure.
_NO_LIMIT = 100 * 365 * 24 * 3600


def checkpointer(*, alone: bool, before_commit: Callable[[], None]) -> ocp.AsyncCheckpointer:
    """One for the items ``state`` and ``meta``; ``alone``: no other process takes part.

    ``before_commit`` is called in the background of process 0 when all files are written, before
    the checkpoint can be seen.
    """
    _quieten_writes()
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).addFilter(_is_news)
    processes = _this_process() if alone else ocp.options.MultiprocessingOptions()
    background = ocp.options.AsyncOptions(
        timeout_secs=_NO_LIMIT,
        # In the background, a directory that cannot be made leaves threads waiting for it, and
        # whoever waits for one has a limit of its own.
        create_directories_asynchronously=False,
        post_finalization_callback=before_commit,
    )
    return ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(multiprocessing_options=processes),
            meta=ocp.JsonCheckpointHandler(multiprocessing_options=processes),
            composite_options=ocp.CompositeOptions(
                multiprocessing_options=processes, async_options=background
            ),
        ),
        multiprocessing_options=processes,
        async_options=background,
        # Notes of its own, which nobody reads and which would be written after ``before_commit``.
        checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),
    )


def saved(state: Any, meta: Any) -> ocp.args.CheckpointArgs:
    """The arguments for writing both items."""
    return ocp.args.Composite(
        state=ocp.args.StandardSave(state),  # type: ignore[call-arg]
        meta=ocp.args.JsonSave(meta),  # type: ignore[call-arg]
    )


def restored(target: Any, *, meta: bool = False) -> ocp.args.CheckpointArgs:
    """The arguments for reading a state like ``target``, and the other item if asked for."""
    state = ocp.args.StandardRestore(target)  # type: ignore[call-arg]
    if not meta:
        return ocp.args.Composite(state=state)
    return ocp.args.Composite(state=state, meta=ocp.args.JsonRestore())


def shapes(path: epath.Path) -> Any:
    """Shapes and dtypes of the state in a folder, for this process alone."""
    # The handler itself: a checkpointer around it would hide why it could not read.
    reader = ocp.StandardCheckpointHandler(multiprocessing_options=_this_process())
    try:
        return reader.metadata(path).tree
    finally:
        reader.close()


def _this_process() -> ocp.options.MultiprocessingOptions:
    """No process waits for another one: orbax has barriers even around reading."""
    index = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"process{index}"
    )


@functools.cache
def _quieten_writes() -> None:
    """Keep out what goes on being written when a failed checkpoint has ended its event loop."""
    before = sys.unraisablehook

    def told(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            before(what)

    sys.unraisablehook = told


def _is_news(record: logging.LogRecord) -> bool:
    """Keep out tracebacks, four of a kind, of errors that are raised as well, and absent notes."""
    if record.exc_info:
        _, error, trace = record.exc_info
        frames = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
        return "OCDBT" not in str(error) and not any("orbax" in name for name in frames)
    return "orbax/checkpoint/_src/metadata" not in record.pathname

"""Leave the GPU as it was found: random states, caches, references that errors hold."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from types import FunctionType

import torch

from lightning_memplan.lightning.compat import isolated_random_state
from lightning_memplan.probe.out_of_memory import exception_chain
from lightning_memplan.step.compiled_regions import forget_compiled


@contextmanager
def as_found(device: torch.device) -> Iterator[None]:
    """Restore random states, and leave the GPU with the memory that was held before and no cache, whatever happens."""
    handled = sys.exc_info()[1]  # an error that is being handled now is no error of what runs inside
    with torch.cuda.device(device), _only_new_garbage():
        forget_compiled()
        give_back(device)
        try:
            with isolated_random_state(), cuda_random_state(device):
                yield
        except BaseException as error:
            release_frames(takewhile(lambda one: one is not handled, exception_chain(error)))
            raise
        finally:
            forget_compiled()
            give_back(device)


def release_frames(errors: Iterable[BaseException]) -> None:
    """Drop the local variables of calls that errors have ended, tensors among them. The errors keep their tracebacks.

    An error may be held for long: by a notebook (``sys.last_exc``), or on Ctrl+C by the SystemExit that Lightning
    raises from it.
    """
    ended = []
    for error in errors:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            with suppress(RuntimeError):  # it is still running
                frame.clear()
                ended.append(frame)
    for frame in ended:
        for function in gc.get_referents(frame):  # from Python 3.11 on a frame holds its function
            if isinstance(function, FunctionType) and sys.getrefcount(function) <= _IN_ITS_FRAME_ONLY:
                for cell in function.__closure__ or ():
                    with suppress(ValueError):  # it is empty
                        del cell.cell_contents


#: References to a function that only its frame holds: the frame, the list of referents, a name, getrefcount's argument
_IN_ITS_FRAME_ONLY = 4


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Collect garbage only on request, and only what was made inside: a whole process takes half a second."""
    collects, freeze = gc.isenabled(), not gc.get_freeze_count()
    gc.disable()
    if freeze:
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()
        if collects:
            gc.enable()


def give_back(device: torch.device) -> None:
    """Give memory that nothing holds back to the GPU."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # each run takes its own, as a new process does
    torch.cuda.empty_cache()


@contextmanager
def cuda_random_state(device: torch.device) -> Iterator[None]:
    """Restore the GPU's random state afterwards."""
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)

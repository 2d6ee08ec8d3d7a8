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
    """Whatever happens inside, random states are restored, and the card is left with what was on it, no cache more."""
    handled = sys.exc_info()[1]  # while this one is, all that follows happens
    with torch.cuda.device(device), _only_new_garbage():
        forget_compiled()
        give_back(device)
        try:
            with isolated_random_state(), cuda_random_state(device):
                yield
        except BaseException as error:
            _let_go(takewhile(lambda one: one is not handled, exception_chain(error)))
            raise
        finally:
            forget_compiled()
            give_back(device)


def _let_go(errors: Iterable[BaseException]) -> None:
    """Errors keep their lines, and no longer the tensors in the calls that they ended.

    Who catches one may hold it long: a notebook does (``sys.last_exc``), and on Ctrl+C so does the SystemExit that
    Lightning makes of it.
    """
    ended = []
    for error in errors:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            with suppress(RuntimeError):  # it runs yet
                frame.clear()
                ended.append(frame)
    for frame in ended:
        for function in gc.get_referents(frame):  # from Python 3.11 on a frame holds its function
            if isinstance(function, FunctionType) and sys.getrefcount(function) <= _IN_ITS_FRAME_ONLY:
                for cell in function.__closure__ or ():
                    with suppress(ValueError):  # it is empty
                        del cell.cell_contents


_IN_ITS_FRAME_ONLY = 4  #: the frame, the list of what it refers to, a name, and the argument of getrefcount


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Garbage is collected where it is asked for, and only what was made inside: all that a process holds takes half a
    second to go through."""
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
    """Give what no one holds of the card's memory back to it."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()  # each run takes its own, as a process does that has just begun
    torch.cuda.empty_cache()


@contextmanager
def cuda_random_state(device: torch.device) -> Iterator[None]:
    state = torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        torch.cuda.set_rng_state(state, device)

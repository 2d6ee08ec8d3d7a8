"""Read, set and put back the batch size where it is held."""

from __future__ import annotations

from typing import Any

import pytest
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightning_memplan.data.holders import Holder, holders_of
from lightning_memplan.data.loaders import batches_of_epoch
from lightning_memplan.errors import ApplyError


class Fixed:
    """Its batch size is computed."""

    @property
    def batch_size(self) -> int:
        return 4


def test_a_mapping_holds_it_under_its_key() -> None:
    held = {"batch_size": 4, "items": 3}
    holder = Holder(held, "batch_size")
    assert (holder.read(), str(holder)) == (4, "dict['batch_size']")
    holder.write(8)
    assert held == {"batch_size": 8, "items": 3}
    assert Holder({"keys": 5}, "keys").read() == 5  # and not the method


def test_a_holder_that_cannot_be_set_says_why_and_stays() -> None:
    holder = Holder(Fixed(), "batch_size")
    with pytest.raises(ApplyError, match=r"^Fixed\.batch_size cannot be set to 8 \(AttributeError: .*\): let it"):
        holder.write(8)
    holder.write(4)  # it reads what was asked for
    holder.restore(2)
    assert holder.read() == 4


def test_nested_holders_are_found_in_attributes_and_mappings() -> None:
    class Owner:
        def __init__(self) -> None:
            self.data: Any = {"loader": Fixed(), "batch_size": 6}

    owner = Owner()
    assert [holder.read() for holder in holders_of("data.batch_size", owner, None)] == [6]
    assert [holder.read() for holder in holders_of("data.loader.batch_size", owner)] == [4]
    assert holders_of("data.none", owner) == holders_of("other.batch_size", owner) == []


@pytest.mark.parametrize(("mode", "count"), [("min_size", 2), ("max_size", 5), ("max_size_cycle", 5)])
def test_an_epoch_of_several_loaders_is_as_long_as_its_mode_says(mode: Any, count: int) -> None:
    # 20 and 8 samples are five and two batches of four
    loaders = [DataLoader(range(20), batch_size=4), DataLoader(range(8), batch_size=4)]
    assert batches_of_epoch(CombinedLoader(loaders, mode), 4) == count

"""Hooks with effects, and training steps of every signature and return value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.robustness.job import WIDTH, Bare, Net, Rows, Training, job, loader

EFFECTS = "hooks that write files, count calls, load weights"
COUNTS = "class attributes and globals that count"
TWICE = "what a hook does outside the module cannot be done twice"
TRANSFERS = "overridden transfer of batches"


@job(EFFECTS)
def setup_writes_a_file_once() -> Any:
    class Writes(Net):
        def setup(self, stage: str) -> None:
            Path("cache").mkdir(exist_ok=True)
            with Path("cache/vocabulary.json").open("w") as file:
                json.dump([1, 2], file)

        def on_train_start(self) -> None:
            assert json.loads(Path("cache/vocabulary.json").read_text())

    return Writes()


@job(EFFECTS, limit=TWICE)
def fit_start_makes_a_folder() -> Any:
    """A folder that exists is the mark of a run before: refused."""

    class Makes(Net):
        def on_fit_start(self) -> None:
            Path("run").mkdir()

    return Makes()


@job(EFFECTS, limit=TWICE)
def setup_makes_a_folder() -> Any:
    class Makes(Net):
        def setup(self, stage: str) -> None:
            Path("run").mkdir(exist_ok=False)

    return Makes()


@job(EFFECTS)
def setup_loads_weights() -> Any:
    class Loads(Net):
        def setup(self, stage: str) -> None:
            torch.save(nn.Linear(WIDTH, WIDTH).state_dict(), "weights.pt")
            self.body.load_state_dict(torch.load("weights.pt"))

    return Loads()


@job(EFFECTS)
def setup_may_be_called_once() -> Any:
    class Once(Net):
        ready = False

        def setup(self, stage: str) -> None:
            if self.ready:
                raise RuntimeError("setup was called twice")
            self.ready = True
            self.extra = nn.Linear(WIDTH, WIDTH)

    return Once()


@job(EFFECTS)
def configure_model_may_be_called_once() -> Any:
    class Once(Net):
        def __init__(self) -> None:
            super().__init__()
            self.trunk: Any = None

        def configure_model(self) -> None:
            if self.trunk is not None:
                return
            self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(self.trunk(batch)).mean()

    return Once()


@job(EFFECTS)
def configure_optimizers_may_be_called_once() -> Any:
    class Once(Net):
        made = 0

        def configure_optimizers(self) -> Any:
            self.made += 1
            assert self.made == 1
            return super().configure_optimizers()

    return Once()


@job(EFFECTS, limit=TWICE)
def start_removes_a_file() -> Any:
    class Removes(Net):
        def __init__(self) -> None:
            super().__init__()
            Path("todo.txt").write_text("train")

        def on_train_start(self) -> None:
            Path("todo.txt").unlink()

    return Removes()


@job(EFFECTS)
def every_hook_appends_to_a_file() -> Any:
    class Appends(Net):
        def note(self, *_: Any, **__: Any) -> None:
            with Path("hooks.txt").open("a") as file:
                file.write("called\n")

        on_train_start = on_train_epoch_start = on_train_batch_end = on_before_backward = note
        on_after_backward = on_before_zero_grad = on_train_epoch_end = on_train_end = on_fit_end = teardown = note

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.note()

    return Appends()


@job(EFFECTS)
def saves_predictions_at_the_end_of_epochs() -> Any:
    class Saves(Net):
        def on_train_epoch_start(self) -> None:
            self.outputs: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            out = self(batch)
            self.outputs.append(out.detach().cpu())
            return out.mean()

        def on_train_epoch_end(self) -> None:
            assert len(torch.cat(self.outputs)) == 24
            torch.save(self.outputs, f"epoch{self.current_epoch}.pt")
            self.outputs.clear()

    return Saves()


@job(EFFECTS)
def teardown_closes_what_setup_opened() -> Any:
    class Closes(Net):
        def setup(self, stage: str) -> None:
            self.file = open("steps.txt", "a")  # noqa: SIM115 - teardown closes it

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.file.write("step\n")
            return super().training_step(batch, batch_idx)

        def teardown(self, stage: str) -> None:
            self.file.close()

    return Closes()


# -------------------------------------------------------------------------------------------------------- counts


@job(COUNTS)
def class_attribute_counts() -> Any:
    class Counting(Net):
        steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            Counting.steps += 1
            return super().training_step(batch, batch_idx)

    return Counting()


@job(COUNTS)
def class_attribute_ends_the_data() -> Any:
    """A module-wide budget of steps that training alone may spend."""

    class Budget(Net):
        left = 6 * 2

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            assert Budget.left > 0, "the budget is spent"

        def on_train_batch_end(self, *_: Any) -> None:
            Budget.left -= 1

    return Budget()


@job(COUNTS)
def registry_of_instances() -> Any:
    known: list[Any] = []

    class Registered(Net):
        def __init__(self) -> None:
            super().__init__()
            known.append(self)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert len(known) == 1
            return super().training_step(batch, batch_idx)

    return Registered()


@job(COUNTS)
def step_counter_of_its_own() -> Any:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0
            self.register_buffer("total", torch.zeros((), dtype=torch.long))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            self.total += 1
            assert self.seen == self.global_step + 1
            return super().training_step(batch, batch_idx)

    return Own()


@job(COUNTS)
def expects_steps_in_order() -> Any:
    class Order(Net):
        last = -1

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch_idx in (0, self.last + 1), (batch_idx, self.last)
            self.last = batch_idx
            return super().training_step(batch, batch_idx)

    return Order()


@job(COUNTS)
def environment_variable_is_set_by_setup() -> Any:
    import os

    class Sets(Net):
        def setup(self, stage: str) -> None:
            os.environ["ROBUST_TOKEN"] = "1"

        def teardown(self, stage: str) -> None:
            del os.environ["ROBUST_TOKEN"]

    return Sets()


# ----------------------------------------------------------------------------------------------------- transfers


@job(TRANSFERS)
def own_transfer_to_device() -> Any:
    class Own(Bare):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return {name: value.to(device) if name == "x" else value for name, value in batch.items()}

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch["where"].device.type == "cpu"
            return self(batch["x"]).mean()

    class Dicts(Rows):
        def __getitem__(self, index: int) -> Any:
            return {"x": torch.ones(WIDTH), "where": index}

    return Training(Own(), loader(Dicts()), count=lambda batch: len(batch["x"]))


@job(TRANSFERS)
def augments_after_transfer() -> Any:
    class Augments(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch + torch.rand_like(batch) if self.trainer.training else batch

    return Augments()


@job(TRANSFERS)
def makes_tensors_before_transfer() -> Any:
    class Makes(Bare):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return torch.tensor(batch)

    class Lists(Rows):
        def __getitem__(self, index: int) -> Any:
            return [1.0] * WIDTH

    return Training(Makes(), loader(Lists(), collate_fn=list))


@job(TRANSFERS)
def moves_in_the_step() -> Any:
    class Moves(Net):
        def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert batch.device.type == "cpu"
            return super().training_step(batch.to(self.device, non_blocking=True), batch_idx)

    return Moves()


@job(TRANSFERS)
def batch_with_a_to_method() -> Any:
    class Item:
        def __init__(self, x: Any) -> None:
            self.x = x

        def to(self, device: Any, *_: Any, **__: Any) -> Any:
            return Item(self.x.to(device))

        def pin_memory(self) -> Any:
            return Item(self.x.pin_memory())

    class Takes(Bare):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.x).mean()

    data = DataLoader(Rows(), batch_size=4, collate_fn=lambda rows: Item(torch.stack(rows)), pin_memory=True)
    return Training(Takes(), data, count=lambda batch: len(batch.x))

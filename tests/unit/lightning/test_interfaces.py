"""The parts of Lightning's inside that are leaned on, a test each that fails where one moves; and two ranks."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import operator
import os
import random
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_memplan as mp
from lightning_memplan.lightning import compat, data_source, loggers, trainer

NAMES = [name for name in ("pytorch_lightning", "lightning.pytorch") if importlib.util.find_spec(name.split(".")[0])]
FLAVOURS = pytest.mark.parametrize("flavour", [importlib.import_module(name) for name in NAMES], ids=NAMES)


def quiet(flavour=pl, **kwargs):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return flavour.Trainer(**{**settings, **kwargs})


def module_of(flavour=pl, **overrides):
    class Module(flavour.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for name, value in overrides.items():
        setattr(Module, name, value)
    return Module()


def loader():
    return DataLoader(torch.zeros(8, 4), batch_size=2)


# ------------------------------------------------------------------------------------------------- under both its names


@FLAVOURS
def test_modules_and_datamodules_of_either_distribution_are_known(flavour):
    module, data = module_of(flavour), flavour.LightningDataModule()
    assert compat.is_lightning_module(module)
    assert not compat.is_lightning_module(data)
    assert compat.is_datamodule(data)
    assert not compat.is_datamodule(module)
    assert isinstance(mp.MemoryPlanner(), flavour.Callback)
    assert issubclass(mp.MemoryPlanner, flavour.Callback)


def test_a_spawned_process_has_the_planner():
    """It is pickled by its class's name, and the process imports that."""
    planner = mp.MemoryPlanner(margin=0.1, device="RTX 3090")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(operator.attrgetter("__class__", "margin", "device", "plan"), (planner,))
    assert found == (mp.MemoryPlanner, 0.1, mp.gpu("RTX 3090"), None)


@FLAVOURS
@pytest.mark.parametrize("name", ["lightning_memplan.MemoryPlanner", "MemoryPlanner"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI calls what a newer jsonargparse deprecates
def test_lightning_cli_makes_the_planner(flavour, name, monkeypatch):
    """By its class's path, and where the script has imported it by its name alone."""
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    words = [f"--trainer.callbacks={name}", "--trainer.callbacks.margin=0.1", "--trainer.logger=false"]
    cli = importlib.import_module(f"{flavour.__name__}.cli").LightningCLI(
        flavour.LightningModule, run=False, seed_everything_default=False, args=words, save_config_callback=None
    )
    (made,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, mp.MemoryPlanner))
    assert made.margin == 0.1


@FLAVOURS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lightning_cli_offers_the_planner_alone(flavour, monkeypatch, capsys):
    """The class in between, which makes it a callback of either distribution, is none to choose."""
    pytest.importorskip("jsonargparse")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert mp.MemoryPlanner.__mro__[1].__name__.startswith("_")
    with pytest.raises(SystemExit):
        importlib.import_module(f"{flavour.__name__}.cli").LightningCLI(
            flavour.LightningModule, run=False, args=["--help"], save_config_callback=None
        )
    printed = "".join(capsys.readouterr().out.split())  # without the breaks of lines
    offered = re.findall(r"lightning_memplan[\w.]*", printed[printed.index("--trainer.callbacks") :])
    assert set(offered) == {"lightning_memplan.MemoryPlanner"}


@FLAVOURS
def test_an_overridden_hook_is_known(flavour):
    module = module_of(flavour, on_train_batch_start=lambda self, batch, batch_idx: None)
    assert compat.is_overridden("on_train_batch_start", module)
    assert not compat.is_overridden("on_train_batch_end", module)
    assert compat.is_overridden("configure_optimizers", module)
    assert not compat.is_overridden("train_dataloader", flavour.LightningDataModule())
    assert not compat.is_overridden("training_step", nn.Linear(2, 2))


@pytest.mark.parametrize("absent", ["pytorch_lightning", "lightning", "pytorch_lightning lightning"])
def test_one_of_the_two_is_enough(absent):
    if len(NAMES) < 2 and " " not in absent:
        pytest.skip("only one of the two is installed")
    code = """
        import sys
        for name in sys.argv[1].split():
            sys.modules[name] = None
        import lightning_memplan as mp
        print([base.__module__.split(".")[0] for base in mp.MemoryPlanner.__mro__ if base.__name__ == "Callback"])
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), absent],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])},
    )
    if " " in absent:
        assert "lightning-memplan needs Lightning: pip install pytorch-lightning (or lightning)" in done.stderr
    else:
        left = {"pytorch_lightning": "lightning", "lightning": "pytorch_lightning"}[absent]
        assert done.stdout.strip() == f"['{left}']", done.stderr[-3000:]


# ------------------------------------------------------------------------------------------------- its inside


@FLAVOURS
def test_how_optimizers_are_parsed(flavour):
    parse = importlib.import_module(f"{flavour.__name__}.core.optimizer")._configure_optimizers
    module = module_of(flavour)
    optimizer = module.configure_optimizers()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert parse(optimizer) == ([optimizer], [], None)
    assert parse(([optimizer], [schedule]))[:2] == ([optimizer], [schedule])
    module.configure_optimizers = lambda: {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}
    optimizers, configs = compat.configured_optimizers(module)
    assert (optimizers, [config.scheduler for config in configs]) == ([optimizer], [schedule])
    assert (configs[0].interval, configs[0].frequency) == ("epoch", 1)
    module.configure_optimizers = lambda: None
    assert compat.configured_optimizers(module) == ([], [])


@FLAVOURS
def test_where_the_trainers_loaders_are(flavour):
    """``trainer.fit_loop._data_source.instance`` is what was passed, or whose hook makes them."""
    own, passed = loader(), loader()

    class Data(flavour.LightningDataModule):
        def train_dataloader(self):
            return own

    found = {}

    class Looks(flavour.Callback):
        def setup(self, trainer, pl_module, stage):
            found["made"] = data_source.loaders_are_made(trainer)
            found["source"] = data_source.loader_source(trainer, lambda: pl_module, trainer.datamodule)

    def after(*args, **kwargs):
        quiet(flavour, callbacks=[Looks()]).fit(*args, **kwargs)
        return found["made"], found["source"]

    assert after(module_of(flavour), passed) == (False, passed)
    assert after(module_of(flavour), datamodule=Data()) == (True, own)
    assert after(module_of(flavour, train_dataloader=lambda self: own)) == (True, own)


@FLAVOURS
@pytest.mark.parametrize("how", ["passed", "made"])
def test_the_trainer_trains_with_changed_loaders(flavour, how):
    """``_data_source`` has an ``instance`` and a method ``dataloader``; ``_combined_loader`` is what came of it."""
    own, other, found = loader(), loader(), []

    class Changes(flavour.Callback):
        def setup(self, trainer, pl_module, stage):
            data_source.change_loaders(trainer, lambda loaders: found.append(loaders) or {"a": other})

        def on_train_start(self, trainer, pl_module):
            found.append(data_source.train_loaders(trainer))

        def teardown(self, trainer, pl_module, stage):
            data_source.release_loaders(trainer)

    step = {"training_step": lambda self, batch, batch_idx: self.layer(batch["a"]).sum()}
    module = module_of(flavour, **step, **({"train_dataloader": lambda self: own} if how == "made" else {}))
    trainer = quiet(flavour, callbacks=[Changes()])
    trainer.fit(module, own if how == "passed" else None)
    assert found[0] is own
    assert compat.is_combined_loader(found[1])
    assert found[1].flattened == [other]
    assert list(vars(trainer.fit_loop._data_source)) == ["instance", "name"]


@FLAVOURS
def test_the_step_of_a_batch_is_lightnings_own(flavour, tmp_path):
    """``fit_loop.epoch_loop._batches_that_stepped`` is under what Lightning logs a batch's metrics."""
    logged = []

    class Keeps(flavour.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics.get("loss")))

    steps = []

    class Asks(flavour.Callback):
        def on_train_batch_end(self, trainer, *args):
            steps.append(loggers.logged_step(trainer))

    def training_step(self, batch, batch_idx):
        self.log("loss", float(batch_idx))
        return self.layer(batch).sum()

    module = module_of(flavour, training_step=training_step)
    quiet(flavour, callbacks=[Asks()], logger=Keeps(tmp_path), log_every_n_steps=1).fit(module, loader())
    assert steps == [0, 1, 2, 3]
    assert [(step, float(step)) for step in steps] == [row for row in logged if row[1] is not None]


def test_random_states_are_restored_even_after_an_error():
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with contextlib.suppress(KeyError), compat.isolated_random_state():
        random.random()
        np.random.rand()
        torch.rand(1)
        raise KeyError
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@FLAVOURS
@pytest.mark.parametrize("phase", ["val", "test"])
def test_where_the_loaders_of_validation_and_tests_are(flavour, phase):
    """Each loop has a ``_data_source``; its loaders are read one after the other."""
    own, found = loader(), []

    class Looks(flavour.Callback):
        def setup(self, trainer, pl_module, stage):
            found.append(data_source.loader_source(trainer, lambda: pl_module, None, phase))

    hooks = {f"{phase}_dataloader": lambda self: own, "validation_step": lambda *_: None, "test_step": lambda *_: None}
    module, trained = module_of(flavour, **hooks), quiet(flavour, callbacks=[Looks()])
    if phase == "val":
        trained.fit(module, loader())
    else:
        trained.test(module)
    assert compat.is_combined_loader(found[0])
    assert (found[0].flattened, data_source.combined_mode(found[0])) == ([own], "sequential")


@FLAVOURS
def test_a_copied_module_has_no_trainer(flavour):
    """``LightningModule.__getstate__`` leaves ``_trainer`` out of a copy; a hook that makes loaders may ask for it."""
    module = module_of(flavour)
    module.trainer = quiet(flavour)
    assert module.__dict__["_trainer"] is module.trainer
    assert copy.copy(module).__dict__["_trainer"] is None


@FLAVOURS
def test_what_a_combined_loader_keeps(flavour):
    """``_mode``, an ``_iterator`` once it has begun, and ``flattened``, which can be set."""
    kind = importlib.import_module(f"{flavour.__name__}.utilities.combined_loader").CombinedLoader
    own, other = loader(), loader()
    combined = kind({"a": own}, "max_size_cycle")
    assert data_source.combined_mode(combined) == "max_size_cycle"
    assert data_source.combined_mode({"a": own}) == ""
    iter(combined)
    assert combined._iterator is not None
    copied = data_source.copy_combined(combined, lambda _: other)
    assert (copied.flattened, copied._iterator, copied._mode) == ([other], None, "max_size_cycle")
    assert (combined.flattened, combined.iterables) == ([own], {"a": own})
    assert combined._iterator is not None


@FLAVOURS
def test_how_a_compiled_module_is_unwrapped(flavour):
    """``from_compiled`` sets five compiled steps and ``_compiler_ctx`` on the module; we set them on a copy."""
    from_compiled = importlib.import_module(f"{flavour.__name__}.utilities.compile").from_compiled
    steps = {"forward", "training_step", "validation_step", "test_step", "predict_step"}
    module = module_of(flavour)
    unwrapped = compat.as_lightning_module(torch.compile(module))
    assert not steps & vars(module).keys()
    assert vars(from_compiled(torch.compile(module))).keys() == vars(unwrapped).keys()
    assert vars(unwrapped).keys() >= {*steps, "_compiler_ctx"}
    assert callable(unwrapped._compiler_ctx["dynamo_ctx"])
    assert compat.as_lightning_module(module) is module


@FLAVOURS
def test_which_hyperparameters_lightning_logs(flavour, tmp_path):
    """Those of ``hparams_initial``, where ``_log_hyperparams`` says so, and not ``_class_path``."""

    class Keeps(flavour.loggers.TensorBoardLogger):
        def log_hyperparams(self, params, *args, **kwargs):
            logged.append(dict(params))

    class Module(flavour.LightningModule):
        def __init__(self, width, _class_path="of LightningCLI"):
            super().__init__()
            self.save_hyperparameters()

    class Data(flavour.LightningDataModule):
        def __init__(self, folder):
            super().__init__()
            self.save_hyperparameters(logger=False)

    logged: list[dict[str, object]] = []
    module, data = Module(3), Data("a folder")
    assert (module._log_hyperparams, data._log_hyperparams) == (True, False)
    whole = SimpleNamespace(loggers=[Keeps(tmp_path)], datamodule=data, lightning_module=module)
    module.hparams.width = 4  # changed since, as a batch size is
    loggers.log_first_hyperparams(whole, module, {"memplan/batch_size": 8})
    importlib.import_module(f"{flavour.__name__}.loggers.utilities")._log_hyperparams(
        SimpleNamespace(**vars(whole), log_graph=None)
    )
    assert logged == [{"width": 3, "memplan/batch_size": 8}, {"width": 3}]


def test_a_logger_that_keeps_nothing():
    logger = loggers.silent_logger()
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.log_hyperparams({"lr": 0.1})
    assert isinstance(logger, pl.loggers.Logger)
    assert logger.experiment.add_scalar("loss", 1.0, 0) is None


def test_random_states_can_be_compared():
    before = compat.random_states()
    assert compat.random_states() == before
    with compat.isolated_random_state():
        random.random()
        assert compat.random_states() != before
    assert compat.random_states() == before
    with compat.isolated_random_state():
        np.random.rand()
        assert compat.random_states() != before


@FLAVOURS
def test_what_a_strategy_wraps(flavour):
    """Private attributes of the strategies, as their own ``setup`` reads them."""
    strategies = flavour.strategies
    wrapped = {"ddp_comm_state": "state", "ddp_comm_hook": list, "ddp_comm_wrapper": lambda hook: (hook, "wrapped")}
    found = trainer.parallel_named(strategies.DDPStrategy(bucket_cap_mb=1, **wrapped), 2)
    assert (found.kind, found.ranks, found.backend) == ("ddp", 2, "nccl")
    assert (found.arguments, found.hook) == ({"bucket_cap_mb": 1}, ("state", (list, "wrapped")))
    assert trainer.parallel_named(strategies.DDPStrategy(process_group_backend="gloo"), 2).backend == "gloo"

    sharded = strategies.FSDPStrategy(cpu_offload=True, activation_checkpointing_policy={nn.Linear})
    found = trainer.parallel_named(sharded, 4)
    assert (found.kind, found.shard_ranks) == ("fsdp", 4)
    assert found.arguments["cpu_offload"].offload_params
    assert found.arguments.keys() >= {"mixed_precision", "sharding_strategy", "use_orig_params"}
    assert found.checkpointing.keys() == {"auto_wrap_policy"}
    hybrid = strategies.FSDPStrategy(sharding_strategy="HYBRID_SHARD", device_mesh=(2, 3))
    assert trainer.parallel_named(hybrid, 6).shard_ranks == 3

    parts = {"data_parallel_size": "auto", "tensor_parallel_size": 2}
    assert trainer.parallel_named(strategies.ModelParallelStrategy(**parts), 8).tensor_parallel == 2
    assert trainer.parallel_named("fsdp2", 8).tensor_parallel == 1
    assert trainer.parallel_named("ddp", 1).ranks == 1
    assert trainer.parallel_named(None, 1) is None


@FLAVOURS
def test_what_the_trainers_own_strategy_wraps(flavour):
    """``_get_process_group_backend`` and ``_layer_sync`` are the Trainer's choices."""
    whole = quiet(flavour, devices=2, strategy="ddp", sync_batchnorm=True)
    found = trainer.parallel_of(whole)
    assert (found.kind, found.ranks, found.rank, found.backend) == ("ddp", 2, 0, "gloo")  # gloo: on the CPU
    assert found.hook is None
    assert found.layer_sync is whole.strategy._layer_sync is not None
    assert hasattr(found.layer_sync, "apply")
    assert trainer.parallel_of(quiet(flavour)) is None


@FLAVOURS
def test_callbacks_that_average_weights(flavour):
    """Both keep their device as ``_device``; WeightAveraging makes its ``_average_model`` at ``setup``."""
    weights = nn.Linear(3, 2)  # 3 · 2 weights and 2 biases, 4 bytes each

    def bytes_of(callback):
        return trainer.averaging_bytes(SimpleNamespace(callbacks=[callback]), lambda: weights)

    averaging = flavour.callbacks.WeightAveraging
    assert bytes_of(averaging()) == bytes_of(averaging("cuda")) == 32
    assert bytes_of(averaging("cpu")) == 0
    made = averaging(device="cpu")
    made.setup(quiet(flavour), module_of(flavour), "fit")
    assert made._average_model is not None
    made._device = torch.device("cuda")
    assert bytes_of(made) == 0  # it is among the bytes that are allocated
    stochastic = flavour.callbacks.StochasticWeightAveraging
    assert (bytes_of(stochastic(0.1, device="cuda")), bytes_of(stochastic(0.1, device="cpu"))) == (32, 0)


@FLAVOURS
def test_how_a_callback_unfreezes(flavour):
    """``on_train_epoch_start`` calls ``finetune_function(module, epoch, optimizer)``; 1000 epochs are the default."""
    calls = []

    class Unfreezes(flavour.callbacks.BaseFinetuning):
        def freeze_before_training(self, pl_module):
            pass

        def finetune_function(self, pl_module, epoch, optimizer):
            calls.append((pl_module, epoch, optimizer))

    module, optimizer, callback = module_of(flavour), object(), Unfreezes()
    module.trainer = quiet(flavour, max_epochs=3)
    trainer.unfreeze([callback], module, [optimizer])
    assert calls == [(module, epoch, optimizer) for epoch in range(3)]
    calls.clear()
    actual = torch.optim.SGD(module.parameters(), 0.1)
    callback.on_fit_start(SimpleNamespace(optimizers=[actual]), module)
    callback.on_train_epoch_start(SimpleNamespace(optimizers=[actual], current_epoch=5), module)
    assert calls == [(module, 5, actual)]
    assert trainer._EPOCHS == 1000
    limits = importlib.import_module(f"{flavour.__name__}.loops.utilities")._parse_loop_limits
    with pytest.warns(match="`max_epochs` was not set. Setting it to 1000 epochs"):
        assert limits(None, -1, None, None, quiet(flavour))[1] == 1000


@FLAVOURS
def test_how_far_into_its_epoch_a_checkpoint_is(flavour, tmp_path):
    whole = quiet(flavour, max_steps=3)
    whole.fit(module_of(flavour), loader())  # an epoch has four batches
    whole.save_checkpoint(tmp_path / "within.ckpt")
    assert trainer.batches_into_epoch(torch.load(tmp_path / "within.ckpt", weights_only=False)) == 3
    whole = quiet(flavour)
    whole.fit(module_of(flavour), loader())
    whole.save_checkpoint(tmp_path / "between.ckpt")
    assert trainer.batches_into_epoch(torch.load(tmp_path / "between.ckpt", weights_only=False)) == 0


@FLAVOURS
def test_what_the_command_line_calls(flavour):
    """``LightningCLI`` makes the Trainer in ``instantiate_trainer`` and fits in ``_run_subcommand``."""
    cli = importlib.import_module(f"{flavour.__name__}.cli").LightningCLI
    assert list(inspect.signature(cli._run_subcommand).parameters) == ["self", "subcommand"]
    assert "instantiate_trainer(" in inspect.getsource(cli.__init__) + inspect.getsource(cli.instantiate_classes)
    assert "config_init" in inspect.getsource(cli.instantiate_classes)


def test_how_a_batch_is_moved():
    class Movable:
        def to(self, device, **kwargs):
            return f"moved to {device}"

    assert compat.move_to_device({"a": [Movable()], "b": 1}, torch.device("cpu")) == {"a": ["moved to cpu"], "b": 1}


def test_a_misconfiguration_is_lightnings_own_exception():
    assert isinstance(compat.misconfiguration("text"), pl.utilities.exceptions.MisconfigurationException)


@FLAVOURS
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_the_trainers_settings_are_read(flavour, precision):
    whole = quiet(
        flavour, precision=precision, gradient_clip_val=0.5, gradient_clip_algorithm="value", accumulate_grad_batches=3
    )
    settings = trainer.trainer_settings(whole, (8, 0))
    assert (settings.precision, settings.gradient_clip_val, settings.gradient_clip_algorithm) == (
        precision,
        0.5,
        "value",
    )
    assert (settings.accumulate_grad_batches, settings.capability) == (3, (8, 0))
    assert trainer.cuda_index(whole) is None


@FLAVOURS
def test_every_hook_of_the_callback_is_one_of_lightnings(flavour):
    hooks = vars(mp.MemoryPlanner).keys() & vars(flavour.Callback).keys() - {"__doc__", "__module__"}
    assert hooks >= {"setup", "teardown", "on_train_batch_start", "on_train_batch_end", "on_exception", "state_dict"}
    for name in hooks:
        ours = inspect.signature(getattr(mp.MemoryPlanner, name))
        theirs = inspect.signature(getattr(flavour.Callback, name))
        assert list(ours.parameters) == list(theirs.parameters)


# ------------------------------------------------------------------------------------------------- two ranks

RANKS = """
import json, os, sys, warnings
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
import lightning_memplan as mp

warnings.filterwarnings("ignore")
RANK = int(os.environ.get("LOCAL_RANK", "0"))

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 1))
        self.seen = []
    def training_step(self, batch, batch_idx):
        self.seen.append(len(batch))
        return self.layers(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(pl.LightningDataModule):
    batch_size = 2
    def train_dataloader(self):
        return DataLoader(torch.zeros(1, 256).expand(100000, 256), batch_size=self.batch_size)

# two cards: 256 and 128 MiB; the second rank's is the smaller one
planner = mp.MemoryPlanner(device=mp.Device("card", total=[2**28, 2**27][RANK]), method="trace", apply=True)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False, callbacks=planner,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
data, module = Data(), Net()
trainer.fit(module, data)
from lightning_memplan.planning.limits import Limits
from lightning_memplan.planning.plan import largest_batch_size
own = largest_batch_size(planner.estimate, planner.plan.device, Limits())
open(os.path.join(sys.argv[1], f"{RANK}.json"), "w").write(json.dumps({
    "own": own, "agreed": planner.plan.batch_size, "set": data.batch_size, "seen": module.seen,
    "peak": planner.plan.peak_reserved, "total": planner.plan.device.total}))
"""


def run_ranks(folder, code):
    script = folder / "ranks.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])},
    )


@pytest.mark.slow
def test_ranks_agree_on_the_smallest(tmp_path):
    done = run_ranks(tmp_path, RANKS)
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["own"] > second["own"] > 2  # each by itself
    for rank in (first, second):
        assert rank["agreed"] == rank["set"] == second["own"]
        assert rank["seen"] == [second["own"]]
        assert rank["peak"] <= rank["total"]


TOO_SMALL = RANKS.replace("[2**28, 2**27][RANK]", "[2**28, 2**21][RANK]")  # 2 MiB: not one sample


@pytest.mark.slow
def test_a_rank_that_cannot_plan_does_not_leave_the_others_waiting(tmp_path):
    done = run_ranks(tmp_path, TOO_SMALL.replace("apply=True)", 'apply=True, on_error="raise")'))
    assert done.returncode != 0
    assert "StoppedByRankError: there is no batch size for all 2 ranks; rank 1: Net does not fit" in done.stderr


@pytest.mark.slow
def test_where_one_rank_cannot_plan_all_train_with_the_users_size(tmp_path):
    planned = TOO_SMALL[: TOO_SMALL.index("from lightning_memplan.planning")].replace(
        'filterwarnings("ignore"', 'filterwarnings("default"'
    )
    shown = 'open(os.path.join(sys.argv[1], f"{RANK}.json"), "w").write(json.dumps([data.batch_size, planner.plan]))\n'
    done = run_ranks(tmp_path, planned + shown)
    assert done.returncode == 0, done.stderr[-5000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second == [2, None]
    assert done.stderr.count("the batch size is not planned: rank 1: Net does not fit on card") == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_in_planning_leaves_no_other(tmp_path):
    step = "        self.seen.append(len(batch))\n"
    killed = "        if RANK == 0:\n            os.kill(os.getpid(), 9)\n"  # rank 0 began the other one
    assert step in RANKS
    (tmp_path / "ranks.py").write_text(RANKS.replace(step, killed + step))
    environment = {**os.environ, "PYTHONPATH": str(Path(mp.__file__).parents[1])}
    command = [sys.executable, "ranks.py", str(tmp_path)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **quiet) as first:
        assert first.wait(200) == -9
        for _ in range(600):  # the other one notices as it waits for the word of the first
            try:
                os.killpg(first.pid, 0)
            except ProcessLookupError:
                break
            time.sleep(0.1)
        else:
            os.killpg(first.pid, 9)
            pytest.fail("the other rank waits")
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.py"]

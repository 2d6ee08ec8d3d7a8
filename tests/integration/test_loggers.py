"""What a fit with every logger at once has logged (``logger_cases.py``), read back with each one's own reader."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

import lightning_memplan as mp
from lightning_memplan.lightning.loggers import tensorboard_writers
from lightning_memplan.report.metrics import scalars_layout, step_metrics
from tests.paths import PROGRAMS, ROOT

CASES = PROGRAMS / "logger_cases.py"
STEPS = 5


@pytest.fixture(scope="module")
def logged(nullgpu, tmp_path_factory):
    """The folder, the loggers' names, and what each is to have: the metrics of each step by name."""
    folder, source = tmp_path_factory.mktemp("loggers"), Path(mp.__file__).parents[1]
    quiet = {"WANDB_ERROR_REPORTING": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    result = json.loads(nullgpu([sys.executable, CASES, folder], PYTHONPATH=source, **quiet).stdout.splitlines()[-1])
    steps = [mp.Measurement(**step) for step in result["steps"]]
    assert len(steps) == STEPS
    strict = json.loads((folder / "strict" / "strict.json").read_text())
    formula = round(strict["hparams"]["memplan/formula_gib"] * 2**30)
    return folder, result["loggers"], [step_metrics(step, formula) for step in steps]


def has(logged, name):
    if name not in logged[1]:
        pytest.skip(f"{name} is not installed: pip install 'lightning-memplan[loggers]'")


# ------------------------------------------------------------------------------------------------------- TensorBoard


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.mark.parametrize(("name", "prefix"), [("tensorboard", ""), ("prefixed", "mine-")])
def test_tensorboard_has_every_metric_of_every_step(logged, name, prefix):
    folder, _, steps = logged
    events = tensorboard(folder / name)
    for metric in steps[0]:  # phases among them, which are measured in the first three
        read = [(event.step, event.value) for event in events.Scalars(prefix + metric)]
        assert read == [(k, pytest.approx(m[metric], rel=1e-6, abs=1e-6)) for k, m in enumerate(steps) if metric in m]


@pytest.mark.parametrize(("name", "prefix"), [("tensorboard", ""), ("prefixed", "mine-")])
def test_its_charts_show_predicted_and_actual_together(logged, name, prefix):
    """One layout, whose regular expressions find what was logged as TensorBoard's plugin does: by ``match``."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    events = tensorboard(logged[0] / name)
    (written,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {
        chart.title: [tag for regex in chart.multiline.tag for tag in events.Tags()["scalars"] if re.match(regex, tag)]
        for chart in category.chart
    }
    assert category.title == "memplan"
    both = {
        "peak reserved (GiB)": "reserved",
        "peak allocated (GiB)": "allocated",
        **{f"{phase}: peak allocated (GiB)": phase for phase in ("forward", "backward", "optimizer")},
    }
    shown = {
        title: [f"{prefix}memplan/{m}_{kind}_gib" for m in ("predicted", "actual")] for title, kind in both.items()
    }
    assert charts == {**shown, "error (%)": [f"{prefix}memplan/error_percent"]}


@pytest.fixture
def page():
    """``docs/screenshot.py``, which makes what the documentation shows."""
    path = ROOT / "docs" / "screenshot.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.chromium() is None:
        pytest.skip("Chromium is not installed: apt install chromium")
    return module


@pytest.mark.slow
def test_a_browser_shows_the_charts(logged, page, tmp_path):
    """Curves have the colour of their run, and all charts are right of the panel of 250 pixels and below the bars."""
    image = pytest.importorskip("matplotlib.image")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run").symlink_to(logged[0] / "tensorboard")
    page.screenshot(tmp_path / "logs", tmp_path / "page.png")
    charts = image.imread(tmp_path / "page.png")[120:, 300:, :3]
    assert charts.shape == (page.HEIGHT - 120, page.WIDTH - 300, 3)
    red, green, blue = charts.transpose(2, 0, 1)
    assert ((red > 0.9) & (green < 0.6) & (blue < 0.4)).sum() > 500  # two curves at least of 250 pixels


def test_it_has_the_figure_of_the_planned_step(logged):
    events = tensorboard(logged[0] / "tensorboard")
    (image,) = events.Images("memplan/timeline")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > image.height > 400


def test_its_page_of_hyperparameters_has_the_batch_size_that_was_set(logged):
    """TensorBoard keeps the first that are written, and Lightning writes what the module had before."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = tensorboard(logged[0] / "tensorboard").SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["batch_size"].number_value == shown["memplan/batch_size"].number_value == 64
    assert shown["memplan/limited_by"].string_value == "max_batch_size"


def test_other_ranks_and_other_loggers_have_no_writer(tmp_path):
    class Elsewhere:
        is_global_zero = False
        loggers = (TensorBoardLogger(tmp_path),)

    assert tensorboard_writers(Elsewhere()) == []
    trainer = pl.Trainer(logger=pl.loggers.CSVLogger(tmp_path), accelerator="cpu", enable_checkpointing=False)
    assert tensorboard_writers(trainer) == []
    trainer.loggers = [pl.loggers.logger.DummyLogger()]
    assert tensorboard_writers(trainer) == []
    assert not list(tmp_path.iterdir())  # no file was begun


def test_without_phases_no_chart_of_them():
    assert [title for title in scalars_layout(())["memplan"] if ":" in title] == []


# ------------------------------------------------------------------------------------------------------------- others


def test_the_csv_file_has_exactly_the_metrics_of_every_step(logged):
    folder, _, steps = logged
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    read = [{k: v for k, v in row.items() if k.startswith("memplan/")} for row in rows]
    assert [row for row in read if row] == steps


def test_a_logger_that_takes_only_flat_short_and_finite_values(logged):
    folder, _, steps = logged
    read = json.loads((folder / "strict" / "strict.json").read_text())
    assert read["status"] == "success"
    ours = [(k, {n: v for n, v in m.items() if "memplan" in n}) for k, m in read["metrics"]]
    assert [(k, m) for k, m in ours if m] == [
        (k, {f"strict-{name}": value for name, value in m.items()}) for k, m in enumerate(steps)
    ]
    assert read["hparams"]["batch_size"] == read["hparams"]["memplan/batch_size"] == 64


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what MLflow calls
def test_mlflow_has_every_metric_and_no_second_value_of_a_parameter(logged):
    """MLflow takes no name with other characters than its own, and no second value of a parameter."""
    has(logged, "mlflow")
    from mlflow.tracking import MlflowClient

    folder, _, steps = logged
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    # the module's own parameter stays as Lightning logged it, before it was set
    assert run.data.params["memplan/batch_size"] == "64"
    assert run.data.params["batch_size"] == "2"
    for name in steps[0]:
        read = sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name))
        assert read == [(k, m[name]) for k, m in enumerate(steps) if name in m]


def wandb_records(path):
    """The records of a .wandb file: W&B's own messages, framed as LevelDB frames its log.

    A file is 7 bytes, then blocks of 32 KiB that hold pieces: a checksum (4 bytes), a length (2), a kind (1: whole,
    first, middle or last), and so many bytes. Less than 7 bytes at the end of a block are empty.
    """
    from wandb.proto import wandb_internal_pb2 as messages

    data, at, piece = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = (b"" if kind in (1, 2) else piece) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield messages.Record.FromString(piece)


def test_wandb_has_every_metric_of_every_step(logged):
    has(logged, "wandb")
    folder, _, steps = logged
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = list(wandb_records(path))
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    ours = [row for row in rows if "memplan/error_percent" in row]
    assert [row["trainer/global_step"] for row in ours] == list(range(STEPS))
    for row, step in zip(ours, steps, strict=True):
        assert {name: row[name] for name in step} == step
    config = {}
    for record in records:
        for update in (record.run.config.update, record.config.update):
            config |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in update}
    assert (config["batch_size"], config["memplan/batch_size"], config["memplan/limited_by"]) == (
        64,
        64,
        "max_batch_size",
    )

"""Parts that ``torch.compile`` compiles, by either bound; nothing of the user's is compiled or changed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.compile import from_compiled
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import lightning_memplan as mp
from lightning_memplan.memory.events import Stream
from lightning_memplan.step.setup import TrainingSetup
from lightning_memplan.trace.compiled import BROKEN, CUDA_GRAPHS, FUSED, OTHER, WRITTEN
from lightning_memplan.trace.fusion import kept_nodes, laid_out_anew
from lightning_memplan.trace.tracer import trace_steps
from lightning_memplan.units import format_bytes

WIDTH = 1024
BATCH = torch.zeros(4, WIDTH)


class Chain(nn.Module):
    """Five operators on a batch, one after the other, after a product with one weight a column."""

    def __init__(self, reads=False):
        super().__init__()
        self.weight, self.reads = nn.Parameter(torch.ones(WIDTH)), reads

    def forward(self, x):
        x = (self.weight * x).sin().cos().exp().tanh()
        if self.reads and x.sum().item() > 0:
            return x * 2
        return x.sigmoid()


class Net(pl.LightningModule):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def training_step(self, batch, batch_idx):
        loss = self.chain(batch).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(scope="module")
def compiled():
    return mp.estimate(Net(torch.compile(Chain())), BATCH, method="trace")


def test_what_is_saved_is_what_inductor_saves(compiled):
    written = mp.estimate(Net(Chain()), BATCH, method="trace")
    one = 1000 * WIDTH * 4  # bytes of a tensor of 1,000 samples in float32
    # the batch; operands of sin, cos, and results of exp, tanh, sigmoid; one more in the backward pass
    assert written.peak_allocated(1000) >= 7 * one
    low, high = compiled.allocated_range(1000)
    # the batch, from which all is computed again, the chain's result and its gradient
    assert 3 * one < low < 3.01 * one
    assert low <= compiled.peak_allocated(1000) <= high < 7 * one
    assert compiled.reserved_range(1000).low <= compiled.peak(1000)
    assert compiled.notes == (FUSED,)


def test_nothing_of_the_users_is_compiled_or_changed():
    module = Net(torch.compile(Chain()))
    before = dict(module.chain.__dict__)
    torch._dynamo.utils.counters.clear()
    mp.estimate(module, BATCH, method="trace")
    assert module.chain.__dict__ == before
    assert not torch._dynamo.utils.counters["frames"]


def in_place(module, **how):
    module.compile(**how)
    return module


def chain(x):
    return x.sin().cos().exp().tanh().sigmoid()


compiled_chain = torch.compile(chain)
others = SimpleNamespace(chain=compiled_chain)  # as another module's


class Weighted(Net):
    """Its one weight a column, and what is written in a subclass."""

    def __init__(self):
        super().__init__(None)
        self.weight = nn.Parameter(torch.ones(WIDTH))


class Weighting(Weighted):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain

    def training_step(self, batch, batch_idx):
        return self.chain(self.weight * batch).sum()


class ByName(Weighted):
    def training_step(self, batch, batch_idx):
        return compiled_chain(self.weight * batch).sum()


class OfAnother(Weighted):
    def training_step(self, batch, batch_idx):
        return others.chain(self.weight * batch).sum()


class Attribute(Weighted):
    def __init__(self):
        super().__init__()
        self.run = torch.compile(chain)

    def training_step(self, batch, batch_idx):
        return self.run(self.weight * batch).sum()


class Closure(Weighted):
    def __init__(self):
        super().__init__()
        self.run = torch.compile(lambda x: chain(self.weight * x))

    def training_step(self, batch, batch_idx):
        return self.run(batch).sum()


class OwnForward(Weighted):
    def __init__(self):
        super().__init__()
        self.forward = torch.compile(self.forward)

    def forward(self, x):
        return chain(self.weight * x)

    def training_step(self, batch, batch_idx):
        return self(batch).sum()


class Decorated(Weighted):
    @torch.compile
    def training_step(self, batch, batch_idx):
        return chain(self.weight * batch).sum()


class ConfiguresModel(Net):
    def configure_model(self):
        self.chain = torch.compile(Chain())


@pytest.mark.parametrize(
    ("module", "tensors"),
    [
        # the batch, the product, the chain's result and its gradient
        pytest.param(ByName, 4, id="a function, called by its name"),
        pytest.param(Attribute, 4, id="a function, an attribute"),
        pytest.param(Closure, 3, id="a function that closes over the module"),
        pytest.param(OwnForward, 3, id="forward, of one module"),
        pytest.param(Decorated, 1, id="a decorated step"),
        pytest.param(lambda: ConfiguresModel(None), 3, id="in configure_model"),
        pytest.param(lambda: Net(in_place(Chain())), 3, id="Module.compile"),
        pytest.param(lambda: torch.compile(Chain()), 3, id="a module without a step"),
        # the sum is in the same kernel: the batch alone
        pytest.param(lambda: torch.compile(Net(Chain())), 1, id="a LightningModule"),
        pytest.param(lambda: from_compiled(torch.compile(Net(Chain()))), 1, id="as a Trainer unwraps it"),
    ],
)
def test_every_way_of_compiling(module, tensors):
    found = mp.estimate(module(), BATCH, method="trace")
    assert found.notes == (FUSED,)
    assert found.allocated_range(1000)[0] == pytest.approx(tensors * 1000 * WIDTH * 4, rel=0.01)


def test_a_function_of_another_module_is_planned_as_it_is_written():
    found = mp.estimate(OfAnother(), BATCH, method="trace")
    assert found.notes == (f"{WRITTEN}: chain",)
    # the batch, the product, results of sin, cos, exp, tanh and sigmoid, one more in the backward pass
    assert found.peak_allocated(1000) >= 7 * 1000 * WIDTH * 4


class Caches(nn.Module):
    """Makes a tensor of Python's numbers on the device, as transformers' caches do."""

    def forward(self, x):
        return torch.cat([torch.tensor([], dtype=x.dtype, device=x.device).view(0, WIDTH), x.sin()]).cos()


def test_a_tensor_that_is_made_of_numbers_is_in_the_graph():
    found = mp.estimate(Weighting(torch.compile(Caches())), BATCH, method="trace")
    assert found.notes == (FUSED,)


def test_a_copy_has_functions_of_its_own():
    module = Closure()
    before = copy.copy(module.run.__dict__)
    mp.estimate(module, BATCH, method="trace")
    assert module.run.__dict__ == before
    assert others.chain is compiled_chain is ByName.training_step.__globals__["compiled_chain"]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_planned_as_compiled_without_them(compiled, mode):
    found = mp.estimate(Net(torch.compile(Chain(), mode=mode)), BATCH, method="trace")
    assert set(found.notes) == {CUDA_GRAPHS, FUSED}
    assert found.program.events == compiled.program.events
    assert found.least.events == compiled.least.events


def test_kernels_are_tried_out_in_the_first_step_with_the_l2_cache_filled(compiled):
    trials = [event for event in compiled.program.events if event.stream == Stream.TRIALS and not event.is_free]
    assert {(event.step, event.category) for event in trials} == {(1, "workspaces")}
    assert 6 * 2**20 in {event.size for event in trials}  # compute capability 8.6 has 6 MiB of L2 cache


def test_what_is_no_graph_is_planned_as_it_is_written():
    written = mp.estimate(Net(Chain(reads=True)), BATCH, method="trace")
    found = mp.estimate(Net(torch.compile(Chain(reads=True))), BATCH, method="trace")
    assert any(note.startswith(BROKEN) for note in found.notes)
    assert found.peak_allocated(1000) == written.peak_allocated(1000)
    assert found.allocated_range(1000) == (written.peak_allocated(1000),) * 2


def test_another_backend_is_planned_as_it_is_written():
    written = mp.estimate(Net(Chain()), BATCH, method="trace")
    found = mp.estimate(Net(torch.compile(Chain(), backend="aot_eager")), BATCH, method="trace")
    assert found.notes == (OTHER,)
    assert found.peak_allocated(1000) == written.peak_allocated(1000)


def test_a_plan_leaves_room_for_the_upper_end_and_names_the_lower(compiled):
    card = mp.Device("a card", total=2**30)
    found = mp.plan(Net(torch.compile(Chain())), BATCH, device=card, method="trace", max_batch_size=60_000)
    assert found.peak_reserved == compiled.peak(found.batch_size, found.budget) <= found.budget
    low = compiled.reserved_range(found.batch_size, found.budget).low
    assert found.reserved_range.low == low < found.peak_reserved
    assert f"at least {format_bytes(low):>15}" in mp.plan_table(found)


def test_a_trace_of_graphs_is_fused_and_one_of_code_as_written_is_not():
    batches = [(16, torch.zeros(16, WIDTH))]
    chains = (torch.compile(Chain()), Chain(), torch.compile(Chain(reads=True)))
    results = [trace_steps(TrainingSetup(Net(chain)), batches) for chain in chains]
    assert [result.fused for result in results] == [True, False, False]
    assert results[0].notes == (FUSED,)
    assert results[2].notes[0].startswith(BROKEN)


class Elementwise(nn.Module):
    """A product, and three operators on its result: inductor makes one kernel of these."""

    def forward(self, x, weight):
        return (x @ weight).relu().exp().sum()


def test_what_is_kept_of_a_graph_by_either_bound():
    graph = make_fx(Elementwise())(torch.zeros(8, 8), torch.zeros(8, 8)).graph
    names = {node: str(node.target) for node in graph.nodes}
    kept = [{names[node] for node in kept_nodes(graph, lower_bound=lower)} for lower in (True, False)]
    # the graph returns the sum; by the upper bound a library's product reads its operands, and its result is a block
    # whatever reads it
    assert kept[0] == {"aten.sum.default"}
    assert kept[1] == {"arg0_1", "arg1_1", "aten.sum.default"}


@pytest.mark.parametrize(("rows", "copied"), [(8, []), (9, ["x_1"])])
def test_a_product_copies_an_operand_whose_rows_are_filled_up(rows, copied):
    """To multiples of 8: 9 rows of 16 are 144 numbers, more than the 16 * 8 of the other operand."""
    graph = make_fx(lambda x, weight: x @ weight, tracing_mode="fake")(torch.zeros(rows, 16), torch.zeros(16, 8)).graph
    (product,) = (node for node in graph.nodes if node.op == "call_function")
    assert [str(node) for node in laid_out_anew(product)] == copied

"""Steps with tensors and operators off the beaten track: layouts, dtypes, torch.cuda, own autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, Dataset

from benchmarks.robustness.job import WIDTH, Net, Rows, Training, job

LAYOUTS = "nested, sparse, quantized, TorchScript, dlpack"
CUDA = "code that asks torch.cuda"
AUTOGRAD = "own autograd: functions, checkpoints, hooks"
DTYPES = "odd dtypes and inputs"

Step = Callable[[Any, Any], Any]


class Of(Net):
    """A network with the step given."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)


def step(kind: str, **training: Any) -> Callable[[Step], Step]:
    """Register a function of module and batch as the step of a job of its name."""

    def register(function: Step) -> Step:
        job(kind, name=function.__name__)(lambda: Training(Of(function), **training))
        return function

    return register


# ------------------------------------------------------------------------------------------------------- layouts


@step(LAYOUTS)
def nested_tensor(net: Any, batch: Any) -> Any:
    nested = torch.nested.nested_tensor([row.expand(2, WIDTH) for row in batch], layout=torch.jagged)
    return net.head(net.body(nested)).values().mean()


@step(LAYOUTS)
def nested_tensor_padded(net: Any, batch: Any) -> Any:
    nested = torch.nested.as_nested_tensor([row.expand(1 + k % 3, WIDTH) for k, row in enumerate(batch)])
    return net(torch.nested.to_padded_tensor(nested, 0.0)).mean()


@step(LAYOUTS)
def sparse_coordinates(net: Any, batch: Any) -> Any:
    diagonal = torch.arange(WIDTH, device=batch.device).expand(2, -1)
    ones = torch.ones(WIDTH, device=batch.device)
    eye = torch.sparse_coo_tensor(diagonal, ones, (WIDTH, WIDTH), check_invariants=False, is_coalesced=True)
    return net(batch @ eye.to_dense()).mean() + eye.values().sum()


@step(LAYOUTS)
def sparse_rows(net: Any, batch: Any) -> Any:
    indices = torch.arange(WIDTH + 1, device=batch.device)
    eye = torch.sparse_csr_tensor(indices, indices[:-1], torch.ones(WIDTH, device=batch.device), (WIDTH, WIDTH))
    return net(batch).mean() + eye.values().sum()


@step(LAYOUTS)
def dlpack(net: Any, batch: Any) -> Any:
    return net(torch.from_dlpack(batch.detach().clone())).mean()


@step(LAYOUTS)
def numpy_in_the_step(net: Any, batch: Any) -> Any:
    weights = np.abs(batch.detach().cpu().numpy()).mean(1) + 1.0
    return (net(batch).mean(1) * torch.from_numpy(weights).to(batch)).mean()


@step(LAYOUTS)
def mkldnn_and_channels_last(net: Any, batch: Any) -> Any:
    images = batch.view(-1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    return net(F.avg_pool2d(images, 1).flatten(1)).mean()


@job(LAYOUTS)
def scripted_submodule() -> Any:
    net = Net()
    net.body = torch.jit.script(nn.Linear(WIDTH, WIDTH))
    return net


@job(LAYOUTS)
def traced_submodule() -> Any:
    net = Net()
    net.body = torch.jit.trace(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), torch.ones(2, WIDTH))
    return net


@job(LAYOUTS)
def scripted_function() -> Any:
    @torch.jit.script
    def scale(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    return Of(lambda net, batch: net(scale(batch)).mean())


@job(LAYOUTS)
def script_as_teacher() -> Any:
    teacher = torch.jit.script(nn.Linear(WIDTH, 3).eval())

    class Student(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = teacher

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).square().mean()

    return Student()


@job(LAYOUTS)
def sparse_gradients() -> Any:
    class Sparse(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, WIDTH, sparse=True)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self(self.table(batch.long().sum(1) % 50)).mean()
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            dense = [*self.body.parameters(), *self.head.parameters()]
            return torch.optim.SparseAdam(self.table.parameters()), torch.optim.Adam(dense)

    return Sparse()


# ---------------------------------------------------------------------------------------------------- torch.cuda


@step(CUDA)
def asks_free_memory(net: Any, batch: Any) -> Any:
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
    return net(batch).mean() * (free / total)


@step(CUDA)
def asks_capability(net: Any, batch: Any) -> Any:
    major, _ = torch.cuda.get_device_capability(batch.device)
    return net(batch.float() if major < 8 else batch).mean()


@step(CUDA)
def asks_name_and_count(net: Any, batch: Any) -> Any:
    properties = torch.cuda.get_device_properties(batch.device)
    assert torch.cuda.device_count() > batch.device.index, properties.name
    return net(batch).mean()


@step(CUDA)
def synchronizes_and_times(net: Any, batch: Any) -> Any:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    loss = net(batch).mean()
    end.record()
    torch.cuda.synchronize()
    net.elapsed = start.elapsed_time(end)
    return loss


@step(CUDA)
def empties_the_cache(net: Any, batch: Any) -> Any:
    loss = net(batch).mean()
    torch.cuda.empty_cache()
    torch.cuda.ipc_collect()
    return loss


@step(CUDA)
def logs_allocated_memory(net: Any, batch: Any) -> Any:
    torch.cuda.reset_peak_memory_stats()
    loss = net(batch).mean()
    net.log("memory", torch.cuda.max_memory_allocated() / 2**20)
    assert torch.cuda.memory_allocated() > 0
    return loss


@step(CUDA)
def asserts_on_cuda(net: Any, batch: Any) -> Any:
    assert batch.is_cuda
    assert next(net.parameters()).is_cuda
    assert batch.get_device() >= 0
    return net(batch).mean()


@step(CUDA)
def pins_and_copies(net: Any, batch: Any) -> Any:
    noise = torch.ones(batch.shape).pin_memory().to(batch.device, non_blocking=True)
    return net(batch + noise.cuda()).mean()


@step(CUDA)
def keeps_random_state(net: Any, batch: Any) -> Any:
    with torch.random.fork_rng(devices=[batch.device]):
        torch.manual_seed(3)
        noise = torch.rand_like(batch)
    state = torch.cuda.get_rng_state(batch.device)
    torch.cuda.set_rng_state(state, batch.device)
    return net(batch + noise).mean()


@step(CUDA)
def offloads_to_the_host(net: Any, batch: Any) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return net(batch).mean()


@step(CUDA)
def stops_when_memory_is_short(net: Any, batch: Any) -> Any:
    if torch.cuda.memory_reserved() > torch.cuda.get_device_properties(0).total_memory:
        raise RuntimeError("too much is reserved")
    return net(batch).mean()


@step(CUDA)
def uses_autocast_itself(net: Any, batch: Any) -> Any:
    with torch.autocast("cuda", dtype=torch.float16):
        out = net(batch)
    assert not torch.is_autocast_enabled("cuda")
    return out.float().mean()


# ------------------------------------------------------------------------------------------------------ autograd


class Double(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Any) -> Any:
        context.save_for_backward(x)
        context.shape = x.shape
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: Any) -> Any:
        (x,) = context.saved_tensors
        assert x.shape == context.shape
        return gradient * 2


@step(AUTOGRAD)
def own_autograd_function(net: Any, batch: Any) -> Any:
    return net.head(Double.apply(net.body(batch))).mean()


@step(AUTOGRAD)
def checkpointed(net: Any, batch: Any) -> Any:
    return net.head(checkpoint(net.body, batch, use_reentrant=False)).mean()


@step(AUTOGRAD)
def checkpointed_reentrant(net: Any, batch: Any) -> Any:
    return net.head(checkpoint(net.body, batch.requires_grad_(), use_reentrant=True)).mean()


@step(AUTOGRAD)
def checkpointed_sequence(net: Any, batch: Any) -> Any:
    return checkpoint_sequential([net.body, nn.ReLU(), net.head], 2, batch, use_reentrant=False).mean()


@step(AUTOGRAD)
def tensor_hooks(net: Any, batch: Any) -> Any:
    hidden = net.body(batch)
    hidden.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return net.head(hidden).mean()


@step(AUTOGRAD)
def gradient_penalty(net: Any, batch: Any) -> Any:
    x = batch.detach().requires_grad_()
    out = net(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return out.mean() + ((gradient.norm(2, 1) - 1) ** 2).mean()


@step(AUTOGRAD)
def per_sample_gradients(net: Any, batch: Any) -> Any:
    weights = {name: p.detach() for name, p in net.body.named_parameters()}

    def loss(own: Any, row: Any) -> Any:
        return functional_call(net.body, own, (row,)).square().mean()

    norms = vmap(grad(loss), (None, 0))(weights, batch)["weight"].flatten(1).norm(dim=1)
    return (net(batch).mean(1) / (norms + 1)).mean()


@step(AUTOGRAD)
def anomaly_and_no_grad(net: Any, batch: Any) -> Any:
    with torch.no_grad(), torch.inference_mode():
        net(batch)
    with torch.autograd.set_detect_anomaly(True), torch.enable_grad():
        return net(batch).mean()


@step(AUTOGRAD)
def saved_tensor_hooks(net: Any, batch: Any) -> Any:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        return net(batch).mean()


@job(AUTOGRAD)
def module_hooks() -> Any:
    net = Net()
    net.body.register_forward_hook(lambda module, args, out: out * 1.0)
    net.body.register_forward_pre_hook(lambda module, args: (args[0] + 0.0,))
    net.head.register_full_backward_hook(lambda module, gin, gout: None)
    net.head.weight.register_hook(lambda gradient: gradient * 0.5)
    net.body.weight.register_post_accumulate_grad_hook(lambda p: None)
    return net


@job(AUTOGRAD)
def features_by_hooks() -> Any:
    class Features(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[str, Any] = {}
            self.body.register_forward_hook(self.keep)

        def keep(self, module: Any, args: Any, out: Any) -> None:
            self.kept["body"] = out

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch).mean() + self.kept["body"].square().mean()

    return Features()


# -------------------------------------------------------------------------------------------------------- dtypes


class Typed(Dataset):
    """Rows of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return torch.ones(WIDTH, dtype=self.dtype)


def typed(name: str, dtype: torch.dtype, step: Step, **settings: Any) -> None:
    def make() -> Training:
        class OfType(Of):
            def train_dataloader(self) -> Any:
                return DataLoader(Typed(dtype), batch_size=self.batch_size)

        return Training(OfType(step), settings=settings)

    job(DTYPES, name=name)(make)


typed("bytes", torch.uint8, lambda net, batch: net(batch.float() / 255).mean())
typed("booleans", torch.bool, lambda net, batch: net(batch.to(net.dtype)).mean())
typed("small_integers", torch.int8, lambda net, batch: net(batch.to(torch.float32)).mean())
typed("complex_numbers", torch.complex64, lambda net, batch: net(batch.abs()).mean())
typed("double_inputs", torch.float64, lambda net, batch: net(batch.to(net.dtype)).mean())
typed("bfloat16_inputs", torch.bfloat16, lambda net, batch: net(batch.float()).mean())
typed("float8_inputs", torch.float8_e4m3fn, lambda net, batch: net(batch.float()).mean())
typed("double_precision", torch.float64, lambda net, batch: net(batch).mean(), precision="64-true")


@job(DTYPES, alone=True)
def default_dtype_is_double() -> Any:
    torch.set_default_dtype(torch.float64)
    return Of(lambda net, batch: net(batch.double()).mean())


@job(DTYPES)
def tensor_subclass_as_batch() -> Any:
    from torchvision import tv_tensors

    class Images(Rows):
        def __getitem__(self, index: int) -> Any:
            return tv_tensors.Image(torch.ones(1, 4, 4))

    class Vision(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self(batch.flatten(1)).mean()

        def train_dataloader(self) -> Any:
            stack = lambda rows: tv_tensors.Image(torch.stack(rows))  # noqa: E731
            return DataLoader(Images(), batch_size=self.batch_size, collate_fn=stack)

    return Vision()

"""The rest of torch with the layers: what it does to torch.nn's modules it does to ours, with the same numbers."""

import copy
import io

import pytest
import torch
from helpers import Case, check, compare, cotangents, outputs, record
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import prune

import fastcells
from fastcells import cells

pytestmark = pytest.mark.filterwarnings("ignore:.*(TorchScript|jit).* deprecated", "ignore::FutureWarning")

KINDS = ["lstm", "gru"]


class Net(torch.nn.Module):
    """Layers of two kinds with dense ones around them: x [T, N, 3] -> [T, N, 1]."""

    def __init__(self, nn):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = torch.nn.Linear(3, 4), torch.nn.Linear(6, 1)
        self.lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True)
        self.gru = nn.GRU(12, 6)
        self.double()

    def forward(self, x):
        return self.after(self.gru(self.lstm(self.before(x))[0])[0])


def batch():
    """Input and target."""
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(5, 4, n, generator=generator, dtype=torch.float64) for n in (3, 1))
    return x, target


def step(model, optimizer, x, target):
    optimizer.zero_grad()
    (model(x) - target).square().mean().backward()
    optimizer.step()


def train(model, x, target, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **options)
    for _ in range(3):
        step(model, optimizer, x, target)
    return model


def weights(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def both(case):
    return case.module(fastcells.nn), case.module(torch.nn), *case.data()


# Several processes


def _worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, target = (t[:, rank::2] for t in batch())
    trained = {}
    model = Net(fastcells.nn)
    train(torch.nn.parallel.DistributedDataParallel(model), x, target)
    trained["distributed"] = weights(model)

    model, mesh = Net(fastcells.nn), torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for part in (model.lstm, model.gru, model):
        fully_shard(part, mesh=mesh)
    assert all(len(p.to_local()) <= (len(p) + 1) // 2 for p in model.parameters())
    train(model, x, target)
    trained["fully_shard"] = {name: p.full_tensor() for name, p in weights(model).items()}

    model = FullyShardedDataParallel(Net(fastcells.nn), use_orig_params=True, device_id=torch.device("cpu"))
    train(model, x, target)
    with FullyShardedDataParallel.summon_full_params(model):
        names = {name: name.replace("_fsdp_wrapped_module.", "") for name in weights(model)}
        trained["fsdp"] = {names[name]: p.clone() for name, p in weights(model).items()}
    if rank == 0:
        torch.save(trained, f"{folder}/trained")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The weights after training by two processes, each with half of the batch."""
    train(Net(fastcells.nn), *batch())  # so that the kernels are there, and two processes do not compile them twice
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return torch.load(f"{folder}/trained", weights_only=True)


def test_distributed_data_parallel(trained):
    check(trained["distributed"], weights(train(Net(torch.nn), *batch())))


@pytest.mark.parametrize("version", ["fully_shard", "fsdp"])
def test_fsdp(trained, version):
    """The second version, `fully_shard`, and the first."""
    check(trained[version], weights(train(Net(torch.nn), *batch())))


def _hogwild(model, queue):
    torch.set_num_threads(1)
    x, _ = batch()
    queue.put(model(x).detach().clone())
    train(model, *batch())
    queue.put(None)


def test_shared_memory():
    """A process of torch.multiprocessing trains the parent's weights in place."""
    context = torch.multiprocessing.get_context("spawn")
    model, queue = Net(fastcells.nn).share_memory(), context.SimpleQueue()
    before = model(batch()[0]).detach()
    process = context.Process(target=_hogwild, args=(model, queue))
    process.start()
    check({"y": queue.get()}, {"y": before})
    queue.get()
    process.join()
    assert process.exitcode == 0
    check(weights(model), weights(train(Net(torch.nn), *batch())))


# Gradients by other means


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind, dropout, reentrant):
    """Computed again in the backward pass, with the same draws."""
    ours, theirs, x, hx = both(Case(kind, num_layers=2, bidirectional=True, states=True, dropout=dropout))
    calls = []
    ours.register_forward_pre_hook(lambda *_: calls.append(1))

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(lambda x: ours(x, hx)[0], x, use_reentrant=reentrant)

    results = []
    for module, run in ((ours, checkpointed), (theirs, lambda x: theirs(x, hx)[0])):
        torch.manual_seed(4)
        given = x.clone().requires_grad_()
        y = run(given)
        y.backward(cotangents({"y": y})["y"])
        results.append({"y": y.detach(), "x": given.grad, **{n: p.grad for n, p in module.named_parameters()}})
    assert len(calls) == 2
    check(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_hooks(kind):
    """What is kept for the backward pass may be put elsewhere in between."""
    ours, theirs, x, hx = both(Case(kind, num_layers=2, states=True))
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    def away(tensor):
        return tensor * 1

    with torch.autograd.graph.saved_tensors_hooks(pack, away):
        got = record(ours, x, hx)
    assert packed
    check(got, record(theirs, x, hx))
    with torch.autograd.graph.save_on_cpu():
        check(record(ours, x, hx), record(theirs, x, hx))


@pytest.mark.filterwarnings("ignore:Error detected in _LayerBackward")
@pytest.mark.parametrize("kind", KINDS)
def test_anomaly_mode(kind):
    ours, theirs, x, hx = both(Case(kind, states=True))
    with torch.autograd.set_detect_anomaly(True):
        check(record(ours, x, hx), record(theirs, x, hx))
        y, _ = ours(x, hx)
        with pytest.raises(RuntimeError, match="returned nan values"):
            y.backward(torch.full_like(y, torch.nan))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_in_place(kind):
    """Into the very tensors that are there, which may be views of one buffer."""
    ours, theirs, x, _ = both(Case(kind, bidirectional=True))
    for module in (ours, theirs):
        parameters = list(module.parameters())
        buffer = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
        for p, part in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p)
        for _ in range(2):
            module(x)[0].square().sum().backward()
        module.buffer = buffer
        assert all(p.grad.untyped_storage().data_ptr() == buffer.data_ptr() for p in parameters)
    check({"gradients": ours.buffer}, {"gradients": theirs.buffer})


def penalised(critic, parameters, x):
    """The gradient penalty of a critic's score (Gulrajani et al. 2017), differentiated by the weights."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x)[0][-1].sum(), x, create_graph=True)
    penalty = (gradient.norm(dim=(0, 2)) - 1).square().mean()
    return torch.autograd.grad(penalty, parameters, allow_unused=True)


@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru", "rnn_tanh"])
def test_gradient_penalty(kind):
    ours, theirs, x, _ = both(Case(kind, num_layers=2, bidirectional=True))
    results = []
    for module in (ours, theirs):
        named = dict(module.named_parameters())
        found = penalised(module, list(named.values()), x)
        results.append({n: g for n, g in zip(named, found, strict=True) if g is not None and g.any()})
    check(*results)


@pytest.mark.parametrize("kind", ["lstm", "lstm_proj", "gru", "rnn_tanh"])
def test_hessian_vector_product(kind):
    """By reverse over reverse, and forward over reverse."""
    ours, theirs, x, _ = both(Case(kind, bidirectional=True))
    names, values = zip(*weights(theirs).items(), strict=True)
    vectors = tuple(torch.randn(v.shape, generator=torch.Generator().manual_seed(3)).double() for v in values)

    def loss(module):
        return lambda *w: torch.func.functional_call(module, dict(zip(names, w, strict=True)), (x,))[0].square().sum()

    expected = dict(zip(names, torch.autograd.functional.hvp(loss(theirs), values, vectors)[1], strict=True))
    found = torch.autograd.functional.hvp(loss(ours), values, vectors)[1]
    check(dict(zip(names, found, strict=True)), expected)
    every = tuple(range(len(names)))
    _, found = torch.func.jvp(torch.func.grad(loss(ours), argnums=every), values, vectors)
    check(dict(zip(names, found, strict=True)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_algorithms(kind):
    """Where fresh memory is filled with NaN, too."""
    ours, theirs, x, hx = both(Case(kind, num_layers=2, bidirectional=True, states=True))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = record(ours, x, hx), record(ours, x, hx)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)
    check(first, record(theirs, x, hx))


# Optimizers, averages


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers(optimizer, options):
    """With clipping by norm and by value."""
    ends = []
    for nn in (fastcells.nn, torch.nn):
        model = Net(nn)
        stepper = optimizer(model.parameters(), lr=0.01, **options)
        for _ in range(3):
            stepper.zero_grad()
            (model(batch()[0]) - batch()[1]).square().mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=options.get("foreach"))
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
            stepper.step()
        ends.append({**weights(model), "norm": norm})
    check(*ends)


@pytest.mark.parametrize("average", [None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.7)], ids=["swa", "ema"])
def test_averaged_model(average):
    x, target = batch()
    ends = []
    for nn in (fastcells.nn, torch.nn):
        model = Net(nn)
        averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            step(model, optimizer, x, target)
            averaged.update_parameters(model)
        ends.append({**weights(averaged), "y": averaged(x).detach()})
    check(*ends)


def test_weights_as_one_vector():
    x, hx = Case("gru", states=True).data()
    ours, theirs = (Case("gru").module(nn) for nn in (fastcells.nn, torch.nn))
    for module in (ours, theirs):
        vector = torch.nn.utils.parameters_to_vector(module.parameters())
        torch.nn.utils.vector_to_parameters(vector.detach() * 0.5, module.parameters())  # views of the vector
    compare(ours, theirs, x, hx)


# What is done to modules


@pytest.mark.parametrize("kind", KINDS)
def test_pruning(kind):
    ours, theirs, x, hx = both(Case(kind, num_layers=2, states=True))
    for module in (ours, theirs):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.3)
        prune.ln_structured(module, "weight_ih_l1", amount=0.2, n=2, dim=0)
        everything = [(module, "weight_hh_l1"), (module, "bias_ih_l0")]
        prune.global_unstructured(everything, pruning_method=prune.L1Unstructured, amount=0.4)
    for module in (ours, theirs):
        assert (module.weight_hh_l0 == 0).sum() == round(0.3 * module.weight_hh_l0.numel())
    compare(ours, theirs, x, hx)
    for module in (ours, theirs):
        prune.remove(module, "weight_hh_l0")
    compare(ours, theirs, x, hx)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_that_change_values(kind):
    ours, theirs, x, hx = both(Case(kind, states=True))
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda m, args, result: (result[0] * 3, result[1]))
        module.register_full_backward_pre_hook(lambda m, grads: tuple(None if g is None else g * 0.5 for g in grads))
        module.register_full_backward_hook(lambda m, grads, _: tuple(None if g is None else g * 7 for g in grads))
        module.weight_hh_l0.register_hook(lambda g: g.clamp(-0.1, 0.1))
        module.seen = []
        module.weight_ih_l0.register_post_accumulate_grad_hook(lambda p, m=module: m.seen.append(p.grad.clone()))
        module(x.clone().requires_grad_(), hx)[0].sum().backward()
    check({"gradient": ours.seen[0]}, {"gradient": theirs.seen[0]})
    check(record(ours, x, hx), record(theirs, x, hx))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given",
    [
        lambda x, hx: ((x,), {}),
        lambda x, hx: ((x, None), {}),
        lambda x, hx: ((x, hx), {}),
        lambda x, hx: ((x,), {"hx": hx}),
        lambda x, hx: ((), {"input": x}),
        lambda x, hx: ((), {"input": x, "hx": hx}),
    ],
)
def test_hooks_see_arguments_as_they_were_given(kind, given):
    ours, theirs, x, hx = both(Case(kind, states=True))
    args, kwargs = given(x, hx)
    seen: list = []

    def calls():
        for _ in range(3):  # also as a call made again
            check({"y": ours(*args, **kwargs)[0]}, {"y": theirs(*args, **kwargs)[0]})

    calls()
    for module in (ours, theirs):
        module.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    calls()
    assert len(seen) == 6
    for a, k in seen:
        assert [id(v) for v in a] == [id(v) for v in args]
        assert {name: id(v) for name, v in k.items()} == {name: id(v) for name, v in kwargs.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_needs_an_input(kind):
    ours, theirs, *_ = both(Case(kind))
    for module in (ours, theirs):
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
            module()


def test_state_dict_hooks():
    ours, theirs, _, _ = both(Case("lstm"))
    for module in (ours, theirs):
        module.seen = []
        module.register_state_dict_pre_hook(lambda m, prefix, keep: m.seen.append(prefix))
        module.register_state_dict_post_hook(lambda m, state, prefix, _: state.update({prefix + "version": 2}))
        module.register_load_state_dict_pre_hook(
            lambda m, state, prefix, *_: m.seen.append(state.pop(prefix + "version"))
        )
        module.register_load_state_dict_post_hook(lambda m, keys: m.seen.append(tuple(keys.missing_keys)))
        model = torch.nn.Sequential(module)
        model.load_state_dict(model.state_dict())
    assert ours.seen == theirs.seen == ["0.", 2, ()]
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_meta_device():
    """Sizes without numbers; then with empty memory, or with the very tensors that are loaded."""
    case = Case("lstm", num_layers=2, bidirectional=True, states=True)
    theirs, (x, hx) = case.module(torch.nn), case.data()
    with torch.device("meta"):
        layer = fastcells.nn.LSTM(4, 6, num_layers=2, bidirectional=True, dtype=torch.float64)
        assert layer(torch.empty(5, 3, 4, dtype=torch.float64))[0].shape == (5, 3, 12)
    emptied, assigned = copy.deepcopy(layer).to_empty(device="cpu"), copy.deepcopy(layer)
    emptied.load_state_dict(theirs.state_dict())
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    compare(emptied, theirs, x, hx)
    compare(assigned, theirs, x, hx)


def test_skip_init():
    """Of layers of any cell; torch's says of torch.nn's LSTM, too, that it names no device among its arguments."""
    for nn in (fastcells.nn, torch.nn):
        with pytest.raises(RuntimeError, match="must support a 'device' arg"):
            torch.nn.utils.skip_init(nn.LSTM, 4, 6)
    case = Case("gru", states=True)
    layer = torch.nn.utils.skip_init(fastcells.nn.Recurrent, cells.gru, 4, 6, dtype=torch.float64)
    layer.load_state_dict(case.module(torch.nn).state_dict())
    compare(layer, case.module(torch.nn), *case.data())


def test_save_and_load(tmp_path):
    """Weights and the state of an optimizer, by torch.save and load with weights_only=True; training goes on."""
    x, target = batch()
    ends = []
    for nn, options in ((fastcells.nn, {}), (fastcells.nn, {"mmap": True}), (torch.nn, {})):
        model = Net(nn)
        optimizer = torch.optim.Adam(model.parameters())
        step(model, optimizer, x, target)
        file = tmp_path / str(len(ends))
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        state = torch.load(file, weights_only=True, **options)
        model = Net(nn)
        model.load_state_dict(state["model"], assign=bool(options))
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.load_state_dict(state["optimizer"])
        step(model, optimizer, x, target)
        ends.append(weights(model))
    check(ends[0], ends[2])
    check(ends[1], ends[2])


def test_whole_module_with_weights_only():
    """torch.load asks for the classes that it may make, as it does for torch.nn's."""
    module, x = fastcells.nn.GRU(3, 4), torch.randn(5, 2, 3)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    with torch.serialization.safe_globals([fastcells.nn.GRU, set]):
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)
    assert torch.equal(loaded(x)[0], module(x)[0])
    buffer.seek(0)
    with pytest.raises(Exception, match=r"fastcells\.nn\.GRU"):
        torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_tensors(kind):
    """In inference mode, and afterwards: what was made there takes part in no gradient, as with torch.nn."""
    ours, theirs, x, _ = both(Case(kind))
    with torch.inference_mode():
        got, expected = ours(x), theirs(x)
        check(outputs(ours, got), outputs(theirs, expected))
        inside = x.clone()
    assert got[0].is_inference()
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            module(inside)
    with torch.no_grad():
        check(outputs(ours, ours(inside)), outputs(theirs, expected))


# Tracers


class Traced(torch.nn.Module):
    """Layers with everything that they take besides what torch.nn's do."""

    def __init__(self):
        super().__init__()
        self.lstm, self.own = fastcells.nn.LSTM(3, 4), fastcells.nn.Recurrent(cells.gru, 4, 4)
        self.step = fastcells.nn.GRUCell(4, 4)

    def forward(self, x, lengths):
        y, (_, c), series = self.lstm(x, lengths=lengths, return_cell_states=True)
        z, h = self.own(y + series, c)
        return self.step(z.sum(0), h[0])


def test_fx():
    """The layers are leaves, as torch.nn's are."""
    model, x, lengths = Traced(), torch.randn(5, 2, 3), torch.tensor([5, 2])
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["lstm", "own", "step"]
    assert torch.equal(traced(x, lengths), model(x, lengths))
    assert torch.equal(copy.deepcopy(traced)(x, lengths), model(x, lengths))


@pytest.mark.parametrize("module", [fastcells.nn.LSTM(3, 4), fastcells.nn.GRUCell(3, 4)], ids=["LSTM", "GRUCell"])
def test_torchscript(module):
    """Says what to do; after `revert` it is torch's own."""
    model = torch.nn.Sequential(copy.deepcopy(module))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot compile fastcells.*fastcells\.revert"):
        torch.jit.script(model)
    x = torch.randn(5, 3)
    expected = model(x)
    fastcells.revert(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dynamic_quantization(kind):
    """Looks at torch's exact classes: leaves ours as they are; after `revert` it does what it does."""
    model, x = torch.nn.Sequential(getattr(fastcells.nn, kind)(8, 8)), torch.randn(5, 2, 8)
    quantize = torch.ao.quantization.quantize_dynamic
    assert torch.equal(quantize(model)(x)[0], model(x)[0])
    fastcells.revert(model)
    quantized = quantize(model)
    assert "quantized" in type(quantized[0]).__module__
    torch.testing.assert_close(quantized(x)[0], model(x)[0], rtol=0.1, atol=0.1)

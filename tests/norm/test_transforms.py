"""The layer under what wraps layers: compilers, exporters, scripts, checkpointing, copying."""

import copy
import io
import pickle

import pytest
import torch
from oracle import assert_close, batch_norm
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.norm import backends as kernels

pytestmark = pytest.mark.untraced


def twins(**arguments):
    """Our layer and torch's, in the same state."""
    ours = syncbn.SyncBatchNorm(3, **arguments)
    theirs = batch_norm(3, 4)
    with torch.no_grad():
        theirs.weight.uniform_()
        theirs.bias.uniform_()
        theirs.running_mean.normal_()
        theirs.running_var.uniform_(1, 2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_every_batch_once(reentrant):
    torch.manual_seed(0)
    # no bias before a batch norm: its gradient is 0, and rounding alone would be compared
    convolutions = (nn.Conv2d(2, 3, 1, bias=False) for _ in "ab")
    ours, theirs = (
        nn.Sequential(c, n, nn.ReLU()) for c, n in zip(convolutions, twins(), strict=True)
    )
    ours[0].load_state_dict(theirs[0].state_dict())
    batches = [torch.randn(4, 2, 3, 3, requires_grad=True) for _ in range(3)]
    # several graphs alive at once, replayed first to last and last to first
    losses = [
        checkpoint(ours, x, use_reentrant=reentrant).square().sum() for x in batches for _ in "ab"
    ]
    for loss in (*losses[::2], *losses[:0:-2]):
        loss.backward()
    for x in batches:
        for _ in "ab":
            theirs(x).square().sum().backward()
    for (name, a), b in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        assert_close(a, b, 1e-6, name)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-4, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", [None, "relu"])
def test_compiles_without_a_graph_break(act, training):
    ours, _ = twins(act=act)
    plain = copy.deepcopy(ours).train(training)
    compiled = torch.compile(ours.train(training), fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(4, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 5, 5)
    residual = torch.randn_like(x) if act else None
    outputs = [layer(x, residual=residual) for layer in (compiled, plain)]
    assert_close(outputs[0], outputs[1], 1e-5, "output")
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in outputs]
    assert_close(gradients[0], gradients[1], 1e-4, "gradient")
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert_close(a, b, 1e-6, name)


def test_exports_in_evaluation_as_batch_norm_does():
    ours, theirs = twins()
    x = torch.randn(4, 3, 5, 5)
    exported = torch.export.export(ours.eval(), (x,))
    assert_close(exported.module()(x), theirs.eval()(x), 1e-6)
    names = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not any("syncbn" in name for name in names)


def test_exports_to_onnx_as_batch_norm_does():
    pytest.importorskip("onnxscript")
    x = torch.randn(4, 3, 5, 5)
    programs = [
        torch.onnx.export(layer.eval(), (x,), dynamo=True, verbose=False) for layer in twins()
    ]
    operators = [[node.op_type for node in p.model_proto.graph.node] for p in programs]
    assert operators[0] == operators[1] == ["BatchNormalization"]
    weights = [[w.raw_data for w in p.model_proto.graph.initializer] for p in programs]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("act", [None, "relu"])
def test_scripts_in_evaluation(act):
    ours, theirs = twins(act=act)
    x = torch.randn(4, 3, 5, 5)
    expected = theirs.eval()(x)
    expected = expected if act is None else torch.relu(expected)
    scripted = torch.jit.script(ours.eval())
    assert torch.equal(scripted(x), expected)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), expected)


def test_traces_in_evaluation_and_in_training():
    ours, theirs = twins()
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(torch.jit.trace(ours.eval(), x)(x), theirs.eval()(x))
    assert torch.equal(torch.jit.trace(ours.train(), x, check_trace=False)(x), theirs.train()(x))


def test_function_transforms_see_torchs_own_operation():
    ours, theirs = twins()
    x, tangent = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    for layer in (ours, theirs):
        layer.track_running_stats = False
        layer.running_mean = layer.running_var = None
    mine, expected = (torch.func.jvp(layer, (x,), (tangent,)) for layer in (ours, theirs))
    assert torch.equal(mine[1], expected[1])


def test_copies_and_pickles_are_equal_and_apart():
    ours, _ = twins(act="relu")
    loss = ours(torch.randn(4, 3, 2, 2)).sum()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.act == "relu"
        assert twin.state_dict().keys() == ours.state_dict().keys()
        twin.weight.data.zero_()
        assert ours.weight.any()
    loss.backward()


def test_torchs_operation_serves_alone_where_no_kernel_is_faster(monkeypatch):
    monkeypatch.setattr(kernels, "faster_alone", lambda x: False)
    ours, theirs = twins()
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def test_an_average_over_all_batches_needs_their_number():
    with pytest.raises(ValueError, match="momentum=None needs num_batches_tracked"):
        syncbn.sync_batch_norm(torch.randn(4, 3), torch.zeros(3), torch.ones(3), momentum=None)


def test_tensors_elsewhere_are_left_to_torch():
    assert not kernels.faster_alone(torch.empty(2**10, 2**10, device="meta"))

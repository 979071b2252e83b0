"""The memory of a step, counted on shapes: by hand, beside torch's own allocator and autocast, and beside an H100's."""

import json
from itertools import accumulate

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vit_rsst.assembly.data import Rows, evaluation_batch
from vit_rsst.assembly.needs import Needs, needs
from vit_rsst.assembly.parts import Sizes, prepare
from vit_rsst.models import zoo
from vit_rsst.models.footprint import IN_BF16, Footprint, Functions, evaluation_bytes, training_bytes
from vit_rsst.recipe.loading import load
from vit_rsst.recipe.schema import Train

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def build(name: str, **args: object) -> nn.Module:
    return zoo.create(*zoo.describe(name, args, 10), device="meta")


def test_what_is_alive_at_once_counts_and_views_and_known_tensors_do_not():
    known = torch.zeros(1000, device="meta")
    with Footprint([known]) as footprint:
        known.add_(1)
        a = torch.zeros(1000, device="meta")
        b = a.view(10, 100) + 1
        assert footprint.now == 8000
        del a, b
        assert footprint.now == 0
        torch.zeros(1500, device="meta")
    assert footprint.peak == 8000


class Mlp(nn.Module):
    """Of 16 values, in the corner of an image, to 8 and to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(8, 10, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.second(F.relu(self.first(images[:, 0, 0])))


def test_a_small_network_takes_what_it_takes_by_hand():
    images, labels, hidden, logits = 4 * 3 * 16 * 16 * 4, 4 * 8, 4 * 8 * 4, 4 * 10 * 4
    with torch.device("meta"):
        net = Mlp()
    # In the last operation, with the logits, the loss and its gradient that the step still holds: the gradients of the
    # hidden layer and of both weights; all that was saved has left.
    at_the_end = images + labels + logits + 2 * 4 + hidden + 4 * (16 * 8 + 8 * 10)
    assert training_bytes(net, 16, 4) == at_the_end
    # The peak is earlier if the second weight's gradient leaves: when it comes, beside that of the logits.
    assert training_bytes(net, 16, 4, False, None, False) == images + labels + 2 * (logits + 4 + hidden) + 4 * 8 * 10
    assert evaluation_bytes(net, 16, 4) == images + hidden + logits  # more than the ReLU's input and output


def allocated(net: nn.Module) -> int:
    """Peak of a forward and a backward pass of 16 images of 32 px, as torch's CPU allocator reports it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        images, labels = torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.int64)
        F.cross_entropy(net(images), labels).backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize(("name", "args"), [("vit_tiny", {"depth": 2}), ("resnet20", {})])
def test_the_peak_is_that_of_torchs_allocator(name, args):
    measured = allocated(zoo.create(*zoo.describe(name, args, 10)).train())
    assert training_bytes(build(name, **args), 32, 16) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("case", ["vit_tiny, 32 px", "vit_small, 32 px", "vit_small_patch16_224, 224 px"])
def test_in_bf16_the_peak_is_that_measured_on_an_h100(case):
    rows = json.loads((tiny.SCRIPTS / "benchmarks" / "results" / "gpu_b_h100.json").read_text())["rows"]
    measured = rows[f"{case}, batch 256: bare loop"]["peak_gib"] * 2**30
    name, size = case.removesuffix(" px").split(", ")
    assert training_bytes(build(name), int(size), 256, bf16=True) == pytest.approx(measured, rel=0.03)


OPERATIONS = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: torch.matmul(x, x),
    "__matmul__": lambda x: x @ x,
    "mm": lambda x: torch.mm(x, x),
    "mv": lambda x: torch.mv(x, x[0]),
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None]),
    "addmm": lambda x: torch.addmm(x, x, x),
    "addbmm": lambda x: torch.addbmm(x, x[None], x[None]),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
    "conv1d": lambda x: F.conv1d(x[None], x[:, :, None]),
    "conv2d": lambda x: F.conv2d(x[None, :, None], x[:, :, None, None]),
    "conv3d": lambda x: F.conv3d(x[None, :, None, None], x[:, :, None, None, None]),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x[None, :, None], x[:, :, None, None]),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: F.log_softmax(x, 1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x),
    "logsumexp": lambda x: x.logsumexp(1),
    "softplus": F.softplus,
    "pow": lambda x: x.pow(2),
    "__pow__": lambda x: x**2,
    "exp": torch.exp,
    "log": torch.log,
    "rsqrt": torch.rsqrt,
    "gelu": F.gelu,
    "relu": F.relu,
    "mean": torch.mean,
    "add": lambda x: x + x,
    "cat": lambda x: torch.cat([x, x.float()]),
}


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA")
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_those_of_torchs_autocast_on_cuda(name, dtype):
    enabled, default = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode():
            theirs = OPERATIONS[name](torch.empty(8, 8, device="cuda", dtype=dtype)).dtype
    finally:
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", default)
    with Functions(bf16=True):
        assert OPERATIONS[name](torch.empty(8, 8, device="meta", dtype=dtype)).dtype == theirs


def test_a_weight_is_copied_once_and_by_a_recomputed_block_again():
    weight = nn.Parameter(torch.empty(64, 64, device="meta"))
    for has_cache, copies in ((True, 1), (False, 2)):
        seen = torch.empty(1, 64, device="meta", dtype=torch.bfloat16)
        with Footprint([weight, seen]) as footprint, Functions(True, has_cache):
            [F.linear(seen, weight) for _ in range(2)]
            kept = footprint.peak
        assert kept // (64 * 64 * 2) == (copies if has_cache else 1)
    assert "linear" in IN_BF16


def test_attention_with_dropout_or_a_mask_is_counted_too():
    query = torch.empty(2, 3, 5, 8, device="meta", requires_grad=True)
    with Functions(bf16=False):
        mask = torch.zeros(5, 5, device="meta")
        assert F.scaled_dot_product_attention(query, query, query, mask, 0.1).shape == query.shape
        wide = torch.empty(2, 3, 5, 16, device="meta")
        assert F.scaled_dot_product_attention(query, query, wide).shape == wide.shape


@pytest.mark.parametrize("name", ["vit_tiny", "vit_base", "resnet20", "dynamic_vit", "lightweight_vit"])
def test_an_evaluation_takes_less_than_a_step_or_of_a_resnet_twice_as_much(name):
    """Where activations are what fills the memory: at few images the weights' copies in bf16 do."""
    net, train = build(name), Train(global_batch=64)
    images = evaluation_batch(GPU, train)
    assert images == 500
    for bf16 in (False, True):
        most = 2.1 if name == "resnet20" else 1.05  # the first of its stages holds most of its activations
        assert evaluation_bytes(net, 32, images, bf16) < most * training_bytes(net, 32, 64, bf16)


@pytest.mark.parametrize(
    ("on_gpu", "on_cpu", "of"),
    [
        (500, 128, None),
        (500, 128, Train(global_batch=64)),
        (500, 128, Train(global_batch=4096)),
        (128, 128, Train(global_batch=4096, batch_per_device=16)),
        (64, 64, Train(global_batch=8)),
    ],
)
def test_an_evaluation_takes_few_images_at_once_on_a_cpu(on_gpu, on_cpu, of):
    assert (evaluation_batch(GPU, of), evaluation_batch(CPU, of)) == (on_gpu, on_cpu)


class Looking(nn.Module):
    """Its forward pass depends on values, so that it has none on `meta`."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert not bool(images.any())
        return self.head(images.flatten(1))


@pytest.mark.parametrize("batch", [1, 3, 1000])
def test_a_network_that_looks_at_values_is_extrapolated(batch):
    images, linear = batch * 3 * 8 * 8 * 4, (3 * 8 * 8 * 10 + 10) * 4
    found = training_bytes(Looking(), 8, batch)
    assert images + linear < found < images + linear + batch * 200 + 100


def of(tmp_path, *overrides: str, processes: int = 1, shards: int = 1, on_gpu: bool = True) -> Needs:
    recipe = load(tiny.write_recipe(tmp_path), ["train.global_batch=32", *overrides])
    sizes = Sizes.of(recipe, Rows(1293, 144, 360, 10, True), processes)
    parts = prepare(recipe, sizes, torch.device("meta"))
    return needs(parts, parts.preview(sizes.progress), sizes.dealing, (144, 360), shards, on_gpu)


def test_every_part_of_a_run_is_counted(tmp_path):
    dense = of(tmp_path, "pruning.method=dense")
    weights = dense.device["weights and moments"] // 3
    prunable = tiny.NUM_PRUNABLE
    assert dense.device["masks"] == prunable
    assert of(tmp_path).device["masks"] == 2 * prunable
    assert "gradients" not in {use for use, n in dense.device.items() if n}
    for more in ({"processes": 2}, {}):
        overrides = [] if more else ["train.batch_per_device=16"]
        found = of(tmp_path, "pruning.method=dense", *overrides, **more)
        assert found.device["gradients"] == weights
    assert of(tmp_path, "pruning.method=dense", "train.ema_decay=0.9").device["moving average"] == weights
    deep = ("pruning.method=imp", "model.args={depth: 16, embed_dim: 24, patch_size: 8, num_heads: 3}")
    imp, taught = of(tmp_path, *deep), of(tmp_path, *deep, "train.distill.teacher=dense")
    assert taught.device["teacher"] == imp.device["weights and moments"] // 3
    assert taught.device["activations and gradients"] > imp.device["activations and gradients"]
    assert of(tmp_path, "pruning.method={name: ste, interval: 1}").device["dense weights"] == 4 * prunable
    assert of(tmp_path, "pruning.method=dense", on_gpu=False).device["cuBLAS"] == 0
    kept = of(tmp_path, "train.keep_best=true", "pruning.rewind=epoch:1")
    assert kept.host["best epoch"] == kept.host["rewind point"] == weights
    assert kept.peak == sum(kept.device.values())


def test_of_a_tiny_batch_the_update_is_the_peak(tmp_path):
    """Gradients of all weights beside the factors of the masks, of which a GPU needs copies in the weights' type."""
    large = ("model.args={embed_dim: 384, depth: 2, num_heads: 6, patch_size: 16}", "train.global_batch=2")
    gpu, cpu = (of(tmp_path, *large, on_gpu=on_gpu).device for on_gpu in (True, False))
    weights = gpu["weights and moments"] // 3
    assert gpu["activations and gradients"] >= weights + 4 * gpu["masks"] // 2
    assert gpu["activations and gradients"] > cpu["activations and gradients"]


def test_matrices_of_the_inputs_are_counted_where_they_are_the_peak(tmp_path):
    wide = ("pruning.method=imp", "model.args={embed_dim: 384, depth: 2, num_heads: 6, patch_size: 16}")
    wide += ("train.global_batch=2", "pruning.calibration_images=8", "pruning.criterion=obs")
    for granularity, widths in {"element": 2 * (3 * [384] + [768]), "neuron": 2 * [768]}.items():
        found = of(tmp_path, *wide, f"pruning.granularity={granularity}").device
        assert found["activations and gradients"] >= 8 * (sum(n * n for n in widths) + 3 * 768**2)


def test_sharded_weights_leave_their_gradients_and_copies(tmp_path):
    overrides = ("train.precision=bf16", "train.batch_per_device=16", "pruning.method=imp")
    whole, shard = (of(tmp_path, *overrides, processes=2, shards=shards) for shards in (1, 2))
    assert shard.device["weights and moments"] == whole.device["weights and moments"] // 2
    assert shard.device["gathered weights and gradients"] > 0
    assert shard.device["activations"] < whole.device["activations"]

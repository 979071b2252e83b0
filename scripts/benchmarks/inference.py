"""Inference speed-up of a vit_small with half of its heads and neurons removed, compared with the usual alternatives.

Structured pruning pays off only if the smaller network is proportionally faster. The network with half of the heads and
neurons removed (`models/slim.py`) is compared with the dense one at 32 px (patch 4) and at 224 px (patch 16), at batch
sizes 1 and 64, in fp32 on two threads. Masking alone is no faster: stored zeros are multiplied like any number. The
peers are other ways to speed up inference: torch.compile, bf16 weights, onnxruntime in fp32 and with int8 weights, and
Torch-Pruning's removal of the same heads and neurons; each for dense and slim, to show which combine. Before any
timing, the fp32 contenders must return the masked network's logits.

The contenders alternate in one process, in random order. A ratio compares two runs of one alternation, dense over
contender, so that 2 is twice as fast; its median and 95 % interval are printed, and `dense, again` shows the noise. A
bound is missed if the whole interval is below it. --quick skips compilation and uses 4 images instead of 64; its
intervals are too wide to be meaningful.
"""

import copy
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _common import Interval, alternate, environment, interval, parse_args, report
from torch import Tensor, nn

from vit_rsst.models import zoo
from vit_rsst.models.anatomy import unit_groups
from vit_rsst.models.complexity import flops
from vit_rsst.models.slim import Kept, shrink_
from vit_rsst.pruning.granularity import expand

SPEED_BOUNDS = {1: 1.6, 64: 1.85}
"""Batch size → minimum speed-up of the slim network over dense."""

MODELS = {32: "vit_small", 224: "vit_small_patch16_224"}
"""Image size → model: width 384, 12 blocks of 6 heads and 1,536 neurons."""
THREADS, QUICK_BATCH = 2, 4
ALTERNATIONS = {(32, 1): 20, (32, 64): 12, (224, 1): 15, (224, 64): 6}
QUICK_ALTERNATIONS = 3
CALLS = {1: 10}
"""Batch size → forward passes per block, else one: enough to outlast the spinning idle threads of the previous
contender."""
DENSE, SLIM, MASKED = "dense", "slim", "masked dense"

Contender = Callable[[Tensor], Tensor]
Networks = dict[str, nn.Module]


@dataclass(frozen=True)
class Case:
    """One comparison."""

    image_size: int
    batch: int

    def __str__(self) -> str:
        return f"{self.image_size} px, batch {self.batch}"


def make_networks(image_size: int) -> tuple[Networks, Kept]:
    """The dense network, one with half of its units masked and one with them removed; and the kept units."""
    torch.manual_seed(0)
    dense = zoo.create(*zoo.describe(MODELS[image_size], {}, 10)).eval()
    groups = unit_groups(dense, ("head", "neuron"))
    order = {group.name: torch.randperm(group.units) for group in groups}
    kept = {group.name: order[group.name][: group.units // 2].sort().values for group in groups}
    stays = [torch.zeros(group.units, dtype=torch.bool).index_fill_(0, kept[group.name], True) for group in groups]
    masked, slim = copy.deepcopy(dense), copy.deepcopy(dense)
    weights = dict(masked.named_parameters())
    owned = {member.name: weights[member.name].detach() for group in groups for member in group.members}
    for name, mask in expand(groups, stays, owned).masks.items():
        weights[name].data.mul_(mask)
    shrink_(slim, kept)
    return {DENSE: dense, MASKED: masked, SLIM: slim}, kept


def by_torch_pruning(dense: nn.Module, kept: Kept, image_size: int) -> nn.Module:
    """Torch-Pruning's result for the same units; it leaves updating the number of heads to its caller.

    Raises:
        ImportError: it is not installed.
    """
    import torch_pruning

    net = copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about parameters outside of modules
        graph = torch_pruning.DependencyGraph().build_dependency(net, torch.randn(2, 3, image_size, image_size))
    for group in unit_groups(net, ("head", "neuron")):
        producer = group.members[0]
        gone = torch.ones(group.units, dtype=torch.bool).index_fill_(0, kept[group.name], False)
        layer = net.get_submodule(producer.name.removesuffix(".weight"))
        rows = producer.index[gone].flatten().tolist()
        graph.get_pruning_group(layer, torch_pruning.prune_linear_out_channels, idxs=rows).prune()
        if group.kind == "head":
            attention = net.get_submodule(group.name)
            attention.num_heads = len(kept[group.name])
            attention.attn_dim = attention.num_heads * attention.head_dim
    return net


def compiled(net: nn.Module) -> nn.Module:
    """Compiles block by block: the blocks are identical and share one compilation."""
    net = copy.deepcopy(net)
    for block in net.blocks:
        block.compile(dynamic=False)
    return net


def in_bf16(net: nn.Module) -> Contender:
    net = copy.deepcopy(net).bfloat16()
    return lambda images: net(images.bfloat16()).float()


def in_onnxruntime(net: nn.Module, image_size: int) -> dict[str, Contender]:
    """The network in onnxruntime, with fp32 and int8 weights (dynamic quantisation of activations).

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
    """
    import onnx
    import onnxscript  # noqa: F401 - required by torch's exporter, whose own error is less clear
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger("root").setLevel(logging.ERROR)  # quantize_dynamic advises on pre-processing
    images = torch.randn(2, 3, image_size, image_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(net, (images,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    model = program.model_proto
    del model.graph.value_info[:]  # shapes from before constant folding, which quantize_dynamic rejects
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, fp32)
        quantize_dynamic(fp32, int8, weight_type=QuantType.QInt8)
        return {"onnxruntime": session(fp32), "onnxruntime int8": session(int8)}


def session(path: Path) -> Contender:
    """A network from an ONNX file, on as many threads as the others."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda images: torch.from_numpy(opened.run(None, {name: images.numpy()})[0])


def make_contenders(networks: Networks, kept: Kept, image_size: int) -> tuple[dict[str, Contender], list[str]]:
    """Contenders that need no compilation per batch size, and a line for each that cannot run here."""
    contenders: dict[str, Contender] = {DENSE: networks[DENSE], "dense, again": networks[DENSE]}
    contenders |= {MASKED: networks[MASKED], SLIM: networks[SLIM]}
    contenders |= {f"{name}, bf16": in_bf16(networks[name]) for name in (DENSE, SLIM)}
    optional: dict[str, Callable[[], dict[str, Contender]]] = {
        "onnxruntime": lambda: {
            f"{name}, {way}": run
            for name in (DENSE, SLIM)
            for way, run in in_onnxruntime(networks[name], image_size).items()
        },
        "Torch-Pruning": lambda: {"Torch-Pruning": by_torch_pruning(networks[DENSE], kept, image_size)},
    }
    skipped = []
    for name, make in optional.items():
        try:
            contenders |= make()
        except ImportError as error:
            skipped.append(f"{image_size} px: skipped {name}, {error.name} is not installed")
    return contenders, skipped


def make_compiled(networks: Networks) -> dict[str, Contender]:
    """Contenders that are recompiled for every shape."""
    torch.compiler.reset()  # torch falls back to eager after eight shapes of one function
    ways = {"torch.compile": compiled, "bf16, torch.compile": lambda net: in_bf16(compiled(net))}
    return {f"{name}, {way}": make(networks[name]) for way, make in ways.items() for name in (DENSE, SLIM)}


@torch.inference_mode()
def check_logits(contenders: dict[str, Contender], case: Case) -> None:
    """Checks that contenders return the dense or masked network's logits; also warms them up."""
    random = torch.Generator().manual_seed(1)
    images = torch.randn(case.batch, 3, case.image_size, case.image_size, generator=random)
    expected = {name: contenders[name](images) for name in (DENSE, MASKED)}
    for name, run in contenders.items():
        like = expected[DENSE if name.startswith(DENSE) else MASKED]
        error = float((run(images) - like).abs().max() / like.abs().max().clamp(min=1.0))
        allowed = 0.2 if "int8" in name else 0.1 if "bf16" in name else 1e-4
        assert error <= allowed, f"{case}: {name}: logits differ by {error:.2g} of the largest"


def measure(case: Case, contenders: dict[str, Contender], num_alternations: int) -> dict:
    """Times of all contenders and their speed-up over dense."""
    images = torch.randn(case.batch, 3, case.image_size, case.image_size)
    calls = CALLS.get(case.batch, 1)

    def block(run: Contender) -> Callable[[], None]:
        def forward() -> None:
            with torch.inference_mode():
                for _ in range(calls):
                    run(images)

        return forward

    blocks = {name: block(run) for name, run in contenders.items()}
    check_logits(contenders, case)
    seconds = alternate(blocks, num_alternations, 0, torch.device("cpu"))
    timings = {
        name: {
            "ms": round(1000 * float(np.median(values)) / calls, 3),
            "images_per_s": round(case.batch * calls / float(np.median(values)), 1),
            "speed": asdict(interval(seconds[DENSE] / values)),
            "bound": SPEED_BOUNDS.get(case.batch) if name == SLIM else None,
        }
        for name, values in seconds.items()
    }
    return asdict(case) | {"case": str(case), "alternations": num_alternations, "contenders": timings}


def judge(case: dict) -> tuple[list[tuple[str, ...]], list[str]]:
    """Table rows of the case, and a sentence for each missed bound."""
    rows, missed = [], []
    for name, timing in case["contenders"].items():
        speed, bound = Interval(**timing["speed"]), timing["bound"]
        cells = (f"{timing['ms']:.2f}", f"{timing['images_per_s']:.1f}", str(speed), str(bound or ""))
        rows.append((f"{case['case']}: {name}", *cells))
        if bound is not None and speed.high < bound:
            missed.append(f"{case['case']}: {name} is {speed} times as fast as dense, bound {bound}")
    return rows, missed


def main() -> int:
    args = parse_args(__doc__)
    torch.set_num_threads(THREADS)
    load_before, cases, notes, counted = os.getloadavg()[0], [], [], {}
    for image_size in MODELS:
        networks, kept = make_networks(image_size)
        counted[image_size] = {name: flops(net, image_size) for name, net in networks.items()}
        contenders, skipped = make_contenders(networks, kept, image_size)
        notes += skipped
        for batch in (1, QUICK_BATCH if args.quick else 64):
            number = QUICK_ALTERNATIONS if args.quick else ALTERNATIONS[image_size, batch]
            extra = {} if args.quick else make_compiled(networks)
            cases.append(measure(Case(image_size, batch), contenders | extra, number))
    for case in cases:
        speed = Interval(**case["contenders"][MASKED]["speed"])
        notes.append(
            f"{case['case']}: with half of its units masked it is {speed} times as fast: stored zeros save nothing"
        )
    for image_size, by_network in counted.items():
        share = by_network[SLIM] / by_network[DENSE]
        notes.append(f"{image_size} px: slim has {share:.3f} of the FLOPs, so the ideal speed-up is {1 / share:.2f}")
    result = {
        "environment": environment(torch.device("cpu")),
        "load": {"before": load_before, "after": os.getloadavg()[0]},
        "flops": counted,
        "notes": notes,
        "missed": [sentence for case in cases for sentence in judge(case)[1]],
        "cases": cases,
    }
    print("\n".join(notes))
    rows = [row for case in cases for row in judge(case)[0]]
    return report(args, result, ("inference", "ms", "images/s", "times as fast as dense  [95 %]", "bound"), rows)


if __name__ == "__main__":
    sys.exit(main())

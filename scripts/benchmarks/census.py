"""Which model families support exact removal of heads, neurons and channels: a small variant of each family.

Half of the units of each kind are masked, and the same units are removed from a copy; in float64 both must return the
same logits, unless the family has no such units. Norms, biases and zero-initialized tensors get noise first, so that
differences show. Every family runs in its own process. `census.py FAMILY…` tests only these.
"""

import copy
import multiprocessing
import sys
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import torch
from _common import environment, parse_args, report, show_progress
from torch import nn

from vit_rsst.errors import RunError
from vit_rsst.models import slim, zoo
from vit_rsst.models.anatomy import prunable_weights, unit_groups
from vit_rsst.pruning.granularity import expand
from vit_rsst.pruning.patterns import UNIT_KINDS
from vit_rsst.pruning.units import UnitGroup

LEAST_CUT = 110
"""Minimum number of families with removable units."""
TOLERANCE = 1e-9
"""Maximum difference of float64 logits, relative to the largest logit."""
SECONDS = 240
"""Time limit per family."""
KINDS = ("head", "neuron", "channel")

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
HF = {
    "image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 48,
}  # fmt: skip
HF_DINO = {key: HF[key] for key in HF if key != "intermediate_size"}
HF_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
HF_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
HF_PYRAMID = {
    "image_size": 64, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4],
}  # fmt: skip
SMALL: tuple[tuple[dict, int], ...] = (
    (VIT, 32),
    ({"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}, 32),
    ({"img_size": 32}, 32),
    ({"img_size": 64}, 64),
    ({}, 64),
    ({"img_size": 128}, 128),
    ({}, 128),
    ({}, 0),
)
"""Arguments and image size (0: the model's own), tried in this order until one returns logits."""

NAMES = """
    vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224
    vit_small_patch14_dinov2 vit_small_patch14_reg4_dinov2 vit_base_patch16_siglip_224 vit_base_patch16_clip_224
    vit_small_patch16_18x2_224 vit_base_patch16_xp_224 vit_base_patch16_rpn_224 aimv2_large_patch14_224
    vit_intern300m_patch14_448 beit3_base_patch16_224 vit_dlittle_patch16_reg1_gap_256 vit_pwee_patch16_reg1_gap_256
    vit_so150m_patch16_reg4_map_256 flexivit_small test_vit samvit_base_patch16_224 vit_tiny_r_s16_p8_224
    vit_base_r50_s16_224 vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 beit_base_patch16_224
    beitv2_base_patch16_224 eva_giant_patch14_224 eva02_tiny_patch14_224 eva02_base_patch14_224
    vit_small_patch16_dinov3 vit_small_patch16_dinov3_qkvb vit_small_plus_patch16_dinov3 vit_small_patch16_rope_224
    vit_small_patch16_rope_mixed_224 vit_medium_patch16_rope_reg1_gap_256 vit_pe_core_tiny_patch16_384
    vit_pe_spatial_tiny_patch16_512 naflexvit_base_patch16_gap swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
    swinv2_cr_tiny_224 cait_xxs24_224 xcit_nano_12_p8_224 levit_128s levit_conv_128s pit_ti_224 tnt_s_patch16_224
    twins_svt_small twins_pcpvt_small pvt_v2_b0 pvt_v2_b2_li crossvit_tiny_240 coat_tiny coat_lite_tiny convit_tiny
    volo_d1_224 visformer_tiny mvitv2_tiny hiera_tiny_224 sam2_hiera_tiny fastvit_t8 fastvit_sa12 poolformer_s12
    poolformerv2_s12 caformer_s18 convformer_s18 efficientformer_l1 efficientformerv2_s0 efficientvit_b0
    efficientvit_m0 efficientvim_m1 edgenext_xx_small repvit_m1 tiny_vit_5m_224 gcvit_xxtiny coatnet_pico_rw_224
    coatnet_rmlp_nano_rw_224 test_maxvit maxxvitv2_nano_rw_256 mobilevit_xxs mobilevitv2_050 nextvit_small
    davit_tiny focalnet_tiny_srf vitamin_small_224 nest_tiny sequencer2d_s mixer_s32_224 gmlp_ti16_224 gmixer_12_224
    resmlp_12_224 swiftformer_xs shvit_s1 mambaout_femto test_mambaout botnet26t_256 halonet_h1 lambda_resnet26t
    test_byobnet repvgg_a0 gernet_s test_convnext convnext_atto convnextv2_atto convmixer_768_32 inception_next_atto
    resnet10t resnet26 ecaresnet26t seresnet18 resnetv2_18 resnetv2_50x1_bit nf_resnet26 test_nfnet nf_regnet_b0
    regnety_002 res2net50_14w_8s resnest14d skresnet18 legacy_seresnet18 tresnet_m densenet121 dla46_c dpn48b
    mnasnet_small mobilenetv2_035 efficientnet_lite0 tf_efficientnet_cc_b0_4e mobilenetv3_small_050
    mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium fasternet_t0 ghostnet_050 hgnetv2_b0 hrnet_w18_small
    cs3darknet_s rdnet_tiny repghostnet_050 rexnet_100 selecsls42 starnet_s050 ese_vovnet19b_slim_dw xception41
    vit_t16 dynamic_vit lightweight_vit resnet20
"""
TIMM = NAMES.split()
TRANSFORMERS: dict[str, tuple[str, dict, int]] = {
    "hf:vit": ("hf:vit", HF, 32),
    "hf:deit": ("hf:deit", HF, 32),
    "hf:beit": ("hf:beit", HF, 32),
    "hf:beit, own biases": ("hf:beit", HF | {"use_relative_position_bias": True}, 32),
    "hf:beit, shared biases": ("hf:beit", HF | {"use_shared_relative_position_bias": True}, 32),
    "hf:data2vec-vision": ("hf:data2vec-vision", HF | {"use_relative_position_bias": True}, 32),
    "hf:dinov2": ("hf:dinov2", HF_DINO, 32),
    "hf:dinov2, SwiGLU": ("hf:dinov2", HF_DINO | {"use_swiglu_ffn": True}, 32),
    "hf:dinov2_with_registers": ("hf:dinov2_with_registers", HF_DINO, 32),
    "hf:dinov3_vit": ("hf:dinov3_vit", HF, 32),
    "hf:dinov3_convnext": ("hf:dinov3_convnext", HF_STAGES, 64),
    "hf:swin": ("hf:swin", HF_SWIN, 32),
    "hf:swinv2": ("hf:swinv2", HF_SWIN, 32),
    "hf:donut-swin": ("hf:donut-swin", HF_SWIN, 32),
    "hf:siglip": ("hf:siglip", {"vision_config": HF}, 32),
    "hf:clip": ("hf:clip", {"vision_config": HF, "projection_dim": 24}, 32),
    "hf:metaclip_2": ("hf:metaclip_2", {"vision_config": HF, "projection_dim": 24}, 32),
    "hf:vit_msn": ("hf:vit_msn", HF, 32),
    "hf:ijepa": ("hf:ijepa", HF, 32),
    "hf:levit": (
        "hf:levit",
        {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2] * 3, "depths": [1] * 3},
        64,
    ),
    "hf:pvt": ("hf:pvt", HF_PYRAMID, 64),
    "hf:pvt_v2": ("hf:pvt_v2", HF_PYRAMID, 64),
    "hf:convnext": ("hf:convnext", HF_STAGES, 64),
    "hf:convnextv2": ("hf:convnextv2", HF_STAGES, 64),
    "hf:poolformer": ("hf:poolformer", HF_STAGES, 64),
    "hf:cvt": ("hf:cvt", {}, 64),
    "hf:segformer": ("hf:segformer", {key: HF_PYRAMID[key] for key in HF_PYRAMID if key != "image_size"}, 64),
    "hf:hiera": ("hf:hiera", {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 2, 2, 1]}, 64),
    "hf:focalnet": (
        "hf:focalnet",
        {"image_size": 32, "embed_dim": 12, "depths": [2, 2], "focal_levels": [2, 2], "focal_windows": [3, 3]},
        32,
    ),
    "hf:mobilevit": ("hf:mobilevit", {"image_size": 64}, 64),
    "hf:mobilevitv2": ("hf:mobilevitv2", {"image_size": 64}, 64),
    "hf:swiftformer": ("hf:swiftformer", {"image_size": 64}, 64),
    "hf:bit": ("hf:bit", {}, 64),
    "hf:resnet": ("hf:resnet", {"depths": [1] * 4, "embedding_size": 16, "hidden_sizes": [32, 64, 96, 128]}, 64),
    "hf:regnet": ("hf:regnet", {"depths": [1] * 4, "embedding_size": 16, "hidden_sizes": [32, 64, 96, 128]}, 64),
    "hf:efficientnet": ("hf:efficientnet", {"image_size": 64}, 64),
    "hf:mobilenet_v1": ("hf:mobilenet_v1", {}, 64),
    "hf:mobilenet_v2": ("hf:mobilenet_v2", {}, 64),
    "hf:perceiver": ("hf:perceiver", {"image_size": 32, "d_model": 64, "num_latents": 16, "d_latents": 64}, 32),
    "hf:timm_wrapper": ("hf:timm_wrapper", {"architecture": "test_vit"}, 160),
}
QUICK = (
    "vit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3", "swin_tiny_patch4_window7_224", "cait_xxs24_224", "test_convnext", "resnet10t",
    "mobilenetv2_035", "efficientvit_m0", "hf:dinov2", "hf:swinv2", "hf:convnext", "hf:beit, own biases",
)  # fmt: skip
"""The fifteen families that the test suite covers."""


@dataclass
class Row:
    """Result for one family.

    Attributes:
        share: prunable fraction of all parameters.
        units: kind → number of units.
        verdict: kind → `equal`, or the difference.
        refused: why there is nothing to prune, or no model.
        wrong: an exception or a difference, which is a bug of this package.
    """

    family: str
    share: float = 0.0
    units: dict[str, int] = field(default_factory=dict)
    verdict: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    wrong: str = ""
    seconds: float = 0.0

    @property
    def is_cut(self) -> bool:
        return "equal" in self.verdict.values()


def families() -> list[str]:
    return [*TIMM, *TRANSFORMERS]


def made(family: str) -> tuple[nn.Module, int]:
    """A small variant and its image size in px: the first that returns logits."""
    if family in TRANSFORMERS:
        name, args, size = TRANSFORMERS[family]
        return built(name, args), size
    reasons: list[str] = []
    for args, given in SMALL:
        try:
            net = built(family, args)
            size = given or net.pretrained_cfg["input_size"][-1]
            with torch.no_grad():
                if net.eval()(images(size, torch.float32)).shape == (3, 10):
                    return net, size
        except Exception as error:  # some arguments do not fit this family
            reasons.append(str(error))
    raise RuntimeError(f"no small variant returns logits: {reasons[-1] if reasons else ''}")


def built(name: str, args: dict) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create(*zoo.describe(name, args, 10)).eval()


def images(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def unsettle_(net: nn.Module, size: int) -> nn.Module:
    """Perturbs statistics, vectors and zero tensors so that differences show; in float64."""
    torch.manual_seed(3)
    net.double().train()
    net(images(size, torch.float64))
    for name, parameter in net.named_parameters():
        if parameter.dim() <= 1 or not parameter.any() or "bias" in name:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return net.eval()


@torch.no_grad()
def difference(net: nn.Module, groups: list[UnitGroup], size: int) -> float:
    """Relative difference of logits between masking and removing half of the units; modifies the network."""
    generator = torch.Generator().manual_seed(2)
    kept = [torch.rand(group.units, generator=generator) > 0.5 for group in groups]
    kept[0][:] = False
    mask = expand(groups, kept, prunable_weights(net))
    for name in mask:
        net.get_parameter(name).mul_(mask[name])
    small = copy.deepcopy(net)
    slim.shrink_(small, slim.kept_units(net, mask))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    expected, found = (one(images(size, torch.float64)) for one in (net, small))
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def examined(family: str) -> Row:
    """All kinds of units of one family."""
    row, start = Row(family), time.perf_counter()
    try:
        net, size = made(family)
        row.share = sum(w.numel() for w in prunable_weights(net).values()) / sum(p.numel() for p in net.parameters())
        unsettle_(net, size)
        for kind in KINDS:
            if groups := unit_groups(net, UNIT_KINDS[kind]):
                row.units[kind] = sum(group.units for group in groups)
                found = difference(copy.deepcopy(net), groups, size)
                row.verdict[kind] = "equal" if found <= TOLERANCE else f"differs by {found:.1e}"
    except RunError as error:
        row.refused = str(error)
    except Exception as error:  # listed with the family
        row.wrong = f"{type(error).__name__}: {error}".splitlines()[0]
    unequal = [f"{kind} {verdict}" for kind, verdict in row.verdict.items() if verdict != "equal"]
    row.wrong = row.wrong or ", ".join(unequal)
    row.seconds = time.perf_counter() - start
    return row


def _child(family: str, sender: Connection) -> None:
    warnings.simplefilter("ignore")
    sender.send(examined(family))


def in_a_process(family: str) -> Row:
    """Examines a family in its own process, with a time limit."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(SECONDS) else Row(family, wrong=f"no answer within {SECONDS} s")
    except EOFError:
        return Row(family, wrong="its process died")
    finally:
        process.kill()
        process.join()


def missed(rows: list[Row], least: int) -> list[str]:
    """Violated bounds."""
    found = [f"{row.family}: {row.wrong}" for row in rows if row.wrong]
    if (cut := sum(row.is_cut for row in rows)) < least:
        found.append(f"{cut} families have removable units, bound {least}")
    return found


def main() -> int:
    args = parse_args(__doc__, names="FAMILY")
    torch.set_num_threads(1)
    chosen = args.names or (QUICK if args.quick else families())
    rows = []
    for number, family in enumerate(chosen, 1):
        rows.append(in_a_process(family))
        show_progress(f"{number}/{len(chosen)} {family}")
    least = LEAST_CUT if len(chosen) == len(families()) else 0
    cut = sum(row.is_cut for row in rows)
    result = {
        "environment": environment(torch.device("cpu")),
        "families": [vars(row) for row in rows],
        "cut": cut,
        "missed": missed(rows, least),
    }
    lines = [
        (
            row.family,
            f"{row.share:.1%}",
            *(f"{row.units[kind]:,} {row.verdict.get(kind, '')}" if kind in row.units else "" for kind in KINDS),
            (row.wrong or row.refused)[:60],
        )
        for row in rows
    ]
    lines.append((f"{cut} of {len(rows)} have removable units, bound {least}", "", "", "", "", ""))
    return report(args, result, ("family", "prunable", *(f"{kind}s" for kind in KINDS), ""), lines)


if __name__ == "__main__":
    sys.exit(main())

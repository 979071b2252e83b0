"""Pretrained weights: requested weights are loaded and reported, or the run fails; never a silent random start."""

import hashlib
import json
import math
import os
import time
from pathlib import Path
from unittest import mock

import huggingface_hub
import huggingface_hub.constants
import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from vit_rsst.assembly.model import of_our_classes
from vit_rsst.errors import Damaged, InputError, MissingRequirement
from vit_rsst.models import weights, zoo
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.models.catalog import CATALOG
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.tickets.ticket_file import Ticket

DEPTH = {"depth": 2}


def build(name: str, pretrained: bool | str, num_classes: int = 10, **args: object) -> nn.Module:
    return zoo.create(*zoo.describe(name, args, num_classes), pretrained=pretrained)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What timm saves of a vit_small_patch16_224 of two blocks and 1,000 classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "folder"
    timm.models.save_for_hf(timm.create_model("vit_small_patch16_224", **DEPTH), path, safe_serialization=True)
    (path / "pytorch_model.bin").unlink(missing_ok=True)
    return path


@pytest.fixture(scope="module")
def state(folder) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


# -- loading


@pytest.mark.parametrize("what", ["folder", "file"])
def test_blocks_are_loaded_bit_for_bit_and_embeddings_resampled_like_timm(what, folder, state):
    net = build("vit_small", str(folder if what == "folder" else folder / "model.safetensors"), **DEPTH)
    own = net.state_dict()
    blocks = [name for name in own if name.startswith(("blocks.", "norm.", "cls_token"))]
    assert len(blocks) == 2 * 12 + 3
    assert all(torch.equal(own[name], state[name]) for name in blocks)
    positions = resample_abs_pos_embed(state["pos_embed"], [8, 8], [14, 14], num_prefix_tokens=1)
    assert torch.equal(own["pos_embed"], positions)
    assert torch.equal(own["patch_embed.proj.weight"], resample_patch_embed(state["patch_embed.proj.weight"], [4, 4]))
    assert own["head.weight"].shape == (10, 384)


def test_what_was_loaded_resampled_and_left_out_is_named_with_the_hash_of_the_file(folder):
    net = build("vit_small", str(folder), **DEPTH)
    assert net.loaded.resampled == ("patch_embed.proj.weight", "pos_embed")
    assert net.loaded.new == net.loaded.left_out == ("head.bias", "head.weight")
    assert net.loaded.num_tensors == len(net.state_dict()) - 2
    assert net.loaded.sha256 == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert "resampled: patch_embed.proj, pos_embed; new and random: head; left out: head" in net.loaded.text()


def test_the_classifier_is_kept_if_the_number_of_classes_is_equal(folder, state):
    net = build("vit_small_patch16_224", str(folder), num_classes=1000, **DEPTH)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert (net.loaded.resampled, net.loaded.new, net.loaded.left_out) == ((), (), ())


TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    net = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    nn.init.normal_(net.head.weight)
    return net


def classes_folder(kind: str, folder: Path) -> tuple[str, dict, torch.Tensor]:
    """Weights that predict x, y and z: model name, arguments, rows of the classifier."""
    if kind == "timm":
        net = tiny_net()
        folder.mkdir()
        save_file(net.state_dict(), folder / "model.safetensors")
        config = {"architecture": "vit_tiny_patch16_224", "label_names": ["x", "y", "z"], "model_args": TINY}
        (folder / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {}}))
        return "vit_tiny_patch16_224", TINY, net.head.weight.detach()
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    names = {"id2label": {0: "x", 1: "y", 2: "z"}, "num_labels": 3}
    net = ViTForImageClassification(ViTConfig(**shape, intermediate_size=48, **names))
    net.save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").exists()
    return f"hf:{folder}", {}, net.classifier.weight.detach()


@pytest.mark.parametrize("kind", ["timm", "transformers, in shards"])
@pytest.mark.parametrize(
    ("classes", "rows", "text"),
    [
        (("x", "y", "z"), [0, 1, 2], "classifier kept: same classes"),
        (("z", "x", "y"), [2, 0, 1], "its rows reordered by class name"),
        (("a", "b", "c"), None, "new classifier: the file's classes are x, y, z"),
        ((), [0, 1, 2], ""),
    ],
)
def test_a_classifier_is_fitted_to_the_classes_by_name(kind, classes, rows, text, tmp_path):
    name, args, weight = classes_folder(kind, tmp_path / "folder")
    architecture, args = zoo.describe(name, args, 3)
    net = zoo.create(architecture, args, str(tmp_path / "folder"), classes=classes)
    head = net.head if kind == "timm" else net.classifier
    assert text in net.loaded.text()
    if rows is None:
        assert not torch.isin(head.weight, weight).any()
        assert len(net.loaded.new) == 2
    else:
        assert torch.equal(head.weight, weight[rows])


def test_a_ticket_to_start_from_is_fitted_to_the_classes_by_name():
    net = tiny_net()
    net.pretrained_cfg = {"classifier": "head"}
    mask = MaskSet({"head.weight": net.head.weight.detach() > 0})
    ticket = Ticket(net.state_dict(), mask, {"data": json.dumps({"classes": ["x", "y", "z"]})})
    place = Path("run of mine")
    assert of_our_classes(place, ticket, net, ("x", "y", "z")) is ticket
    assert of_our_classes(place, ticket, net, ()) is ticket
    found = of_our_classes(place, ticket, net, ("z", "x", "y"))
    assert torch.equal(found.state["head.weight"], net.head.weight[[2, 0, 1]])
    assert torch.equal(found.state["head.bias"], net.head.bias[[2, 0, 1]])
    assert torch.equal(found.mask["head.weight"], mask["head.weight"][[2, 0, 1]])
    assert torch.equal(found.state["norm.weight"], net.norm.weight)
    with pytest.raises(InputError, match=r"model\.start_from.*x, y, z.*a, b, c.*export 'run of mine' --to timm"):
        of_our_classes(place, ticket, net, ("a", "b", "c"))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_trainer_prefixes_are_stripped(prefix, tmp_path):
    net = tiny_net()
    save_file({prefix + name: tensor for name, tensor in net.state_dict().items()}, tmp_path / "w.safetensors")
    found = zoo.create("vit_tiny_patch16_224", TINY | {"num_classes": 3}, str(tmp_path / "w.safetensors"))
    assert all(torch.equal(tensor, net.state_dict()[name]) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "epoch": 3}, lambda s: {"state_dict": s}])
def test_the_conversion_suggested_by_the_error_works(wrap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(wrap(tiny_net().state_dict()), "it's.pth")
    args = TINY | {"num_classes": 3}
    with pytest.raises(Damaged, match="is a pickle") as caught:
        zoo.create("vit_tiny_patch16_224", args, "it's.pth")
    code = str(caught.value).partition("in Python: ")[2].partition(", and name ")[0]
    exec(code, {})
    assert zoo.create("vit_tiny_patch16_224", args, "it's.safetensors").loaded.num_tensors == 32


@pytest.mark.parametrize("fault", ["missing", "not an index"])
def test_missing_shards_are_rejected(fault, tmp_path):
    name, _, _ = classes_folder("transformers, in shards", tmp_path / "folder")
    if fault == "missing":
        next((tmp_path / "folder").glob("model-*.safetensors")).unlink()
    else:
        (tmp_path / "folder" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(Damaged, match=r"model\.pretrained: .*(shard .* is missing|not a readable index)"):
        zoo.create(*zoo.describe(name, {}, 3), pretrained=True)


@pytest.mark.parametrize("kind", ["DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_a_type_with_several_classifiers_keeps_the_one_that_its_folder_names(kind, tmp_path):
    import transformers

    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    theirs = getattr(transformers, kind)(transformers.DeiTConfig(**shape, intermediate_size=48, num_labels=10))
    theirs.save_pretrained(tmp_path / "deit")
    net = build(f"hf:{tmp_path / 'deit'}", True)
    assert type(net).__name__ == kind
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in net.state_dict().items())
    classifiers = {name for name in prunable_weights(net) if "classifier" in name}
    assert not classifiers
    other = build(f"hf:{tmp_path / 'deit'}", True, num_classes=4)
    assert {name.split(".")[0] for name in other.loaded.new} == set(net.pretrained_cfg["classifier"])


def test_a_dynamic_vit_starts_from_a_plain_vit_and_reports_what_is_random(tmp_path):
    args = {"depth": 3, "embed_dim": 24, "num_heads": 3}
    plain = build("vit_tiny", False, **args, mlp_ratio=4.0)
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    net = build("dynamic_vit", str(tmp_path / "plain.safetensors"), **args, stages=[1])
    assert {name.split(".")[0] for name in net.loaded.new} == {"predictors"}
    assert torch.equal(net.head.weight, plain.head.weight)
    save_file(net.state_dict(), tmp_path / "own.safetensors")
    again = build("dynamic_vit", str(tmp_path / "own.safetensors"), num_classes=7, **args, stages=[1])
    assert set(again.loaded.new) == {"head.weight", "head.bias"}
    assert torch.equal(again.predictors[0].decide[0].weight, net.predictors[0].decide[0].weight)


def test_a_folder_of_transformers_is_loaded_under_its_published_names(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    theirs = ViTForImageClassification(ViTConfig(**shape, intermediate_size=48, num_labels=7))
    theirs.save_pretrained(tmp_path / "vit")
    name = f"hf:{tmp_path / 'vit'}"
    for place in (True, str(tmp_path / "vit"), str(tmp_path / "vit" / "model.safetensors")):
        net = build(name, place)
        expected = theirs.state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in net.state_dict().items() if n.startswith("vit."))
        assert net.loaded.new == ("classifier.bias", "classifier.weight")
    with pytest.raises(Damaged, match=r"does not match this vit in 16 places \(no vit\.layers\.2"):
        build(name, str(tmp_path / "vit"), num_hidden_layers=3)


def test_published_weights_come_from_the_hub_by_the_models_name_or_a_tag(folder):
    with mock.patch("vit_rsst.models.weights.hf_hub_download", return_value=str(folder / "model.safetensors")) as fetch:
        for asked, tag in ((True, "augreg_in21k_ft_in1k"), ("dino", "dino"), ("vit_small_patch16_224.dino", "dino")):
            net = build("vit_small", asked, **DEPTH)
            assert fetch.call_args.args == (f"timm/vit_small_patch16_224.{tag}", "model.safetensors")
            assert len(net.loaded.resampled) == 2


@pytest.mark.parametrize("args", [{"embed_dim": 192}, {"mlp_ratio": 2.0}, {"depth": 3}, {"depth": 1}])
def test_published_weights_of_another_shape_are_refused_in_one_sentence(folder, args):
    with (
        mock.patch("vit_rsst.models.weights.hf_hub_download", return_value=str(folder / "model.safetensors")),
        pytest.raises(
            InputError, match=r"does not match.*leave its width, depth and heads out of model\.args"
        ) as caught,
    ):
        build("vit_small", True, **(DEPTH | args))
    assert "\n" not in str(caught.value)


# -- rejected


def broken(tmp_path: Path, folder: Path) -> dict[str, tuple[Path, type[Exception], str]]:
    """Kind of file → the path, what is raised, what it says."""
    original = (folder / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(original[: len(original) // 2])
    (tmp_path / "text.safetensors").write_text("these are no weights")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    save_file({}, tmp_path / "hollow.safetensors")
    tensors = load_file(folder / "model.safetensors")
    for name, value in (("nan", math.nan), ("inf", math.inf)):
        spoilt = tensors["blocks.1.mlp.fc2.weight"].clone()
        spoilt[3, 4] = value
        save_file(tensors | {"blocks.1.mlp.fc2.weight": spoilt}, tmp_path / f"{name}.safetensors")
    save_file({name: (10 * tensor).to(torch.int8) for name, tensor in tensors.items()}, tmp_path / "int8.safetensors")
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        save_file({"weight": torch.zeros(3)}, tmp_path / "two" / f"{name}.safetensors")
    for name in ("model.bin", "model.pth", "model.pkl", "model.pt"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "nothing").mkdir()
    unreadable, pickle = "not a readable safetensors file", "is a pickle.*safetensors.torch.save_file"
    return {
        "truncated": (tmp_path / "short.safetensors", Damaged, unreadable),
        "no safetensors": (tmp_path / "text.safetensors", Damaged, unreadable),
        "empty": (tmp_path / "empty.safetensors", Damaged, unreadable),
        "no tensors": (tmp_path / "hollow.safetensors", Damaged, "holds no tensors"),
        "not a number": (tmp_path / "nan.safetensors", Damaged, r"blocks\.1\.mlp\.fc2\.weight in .* is not finite"),
        "infinite": (tmp_path / "inf.safetensors", Damaged, r"blocks\.1\.mlp\.fc2\.weight in .* is not finite"),
        "whole numbers": (tmp_path / "int8.safetensors", Damaged, r"has dtype torch\.int8, not torch\.float32"),
        "several files": (tmp_path / "two", MissingRequirement, r"\(found a\.safetensors, b\.safetensors\)"),
        "foreign": (tmp_path / "foreign.safetensors", Damaged, "does not match this vit_small_patch16_224 in"),
        "missing": (tmp_path / "missing.safetensors", MissingRequirement, "does not exist"),
        "empty folder": (tmp_path / "nothing", MissingRequirement, "does not exist"),
        "folder of pickles": (tmp_path / "pickles", Damaged, pickle),
        **{name: (tmp_path / name, Damaged, pickle) for name in ("model.bin", "model.pth", "model.pkl", "model.pt")},
    }


def test_a_file_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, (path, error, message) in broken(tmp_path, folder).items():
        with pytest.raises(error, match=rf"model\.pretrained: .*{message}") as caught:
            build("vit_small", str(path), **DEPTH)
        assert "\n" not in str(caught.value), kind
        assert str(path) in str(caught.value), kind
    assert not (tmp_path / "unpickled").exists()


def test_counters_of_another_dtype_and_unused_tensors_are_tolerated(tmp_path):
    torch.manual_seed(0)
    whole = zoo.create(*zoo.describe("resnet20", {}, 10)).state_dict()
    save_file({name: tensor.half() for name, tensor in whole.items()}, tmp_path / "half.safetensors")
    net = build("resnet20", str(tmp_path / "half.safetensors"))
    assert torch.equal(net.conv1.weight, whole["conv1.weight"].half().float())
    unused = {"head.mask": torch.full((3, 3), -math.inf)}
    vit = timm.create_model("vit_small_patch16_224", **DEPTH, num_classes=0).state_dict()
    save_file(vit | unused, tmp_path / "unused.safetensors")
    assert build("vit_small", str(tmp_path / "unused.safetensors"), **DEPTH).loaded.left_out == ("head.mask",)


def test_a_transformers_folder_with_nan_weights_is_rejected(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=24
    )
    net = ViTForImageClassification(config)
    net.vit.layernorm.weight.data[3] = math.nan
    net.save_pretrained(tmp_path)
    with pytest.raises(Damaged, match=r"vit\.layernorm\.weight in .* is not finite"):
        build(f"hf:{tmp_path}", True)


@pytest.mark.parametrize("args", [{"embed_dim": 192}, {"depth": 3}, {"depth": 1}, {"num_heads": 12}])
def test_a_folder_of_another_shape_is_rejected_even_if_only_its_heads_differ(folder, args):
    with pytest.raises(Damaged, match=r"does not match this vit_small_patch16_224 in \d+ places \(") as caught:
        build("vit_small", str(folder), **(DEPTH | args))
    assert "\n" not in str(caught.value)


def test_a_ticket_in_pretrained_is_redirected_to_start_from(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "t.safetensors", metadata={"format": "vit_rsst.ticket/1"})
    with pytest.raises(Damaged, match=r"is a ticket; name it in model\.start_from"):
        build("vit_small", str(tmp_path / "t.safetensors"))


def test_folders_of_this_package_in_pretrained_are_redirected_to_start_from(tmp_path):
    (tmp_path / "run" / "tickets").mkdir(parents=True)
    (tmp_path / "slim").mkdir()
    (tmp_path / "slim" / "config.json").write_text('{"format": "vit_rsst.slim/1"}')
    for name in ("run", "slim"):
        with pytest.raises(InputError, match=rf"is a {name} folder; name it in model\.start_from"):
            build("vit_small", str(tmp_path / name))


def test_weights_neither_cached_nor_downloadable_are_an_error(offline):
    for asked in (True, "dino"):
        with pytest.raises(MissingRequirement, match=r"model\.pretrained.*not in the cache.*model\.pretrained=false"):
            build("vit_small", asked)
    with pytest.raises(MissingRequirement, match=r"model\.name: config\.json of 'google/vit-base-patch16-224'"):
        build("hf:google/vit-base-patch16-224", True)


def test_an_unreachable_hub_fails_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://localhost:1")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    start = time.monotonic()
    with pytest.raises(MissingRequirement, match="cannot be downloaded from the Hub"):
        build("vit_small", True)
    assert time.monotonic() - start < 5


def test_an_unknown_timm_tag_lists_the_known_ones():
    with pytest.raises(InputError, match=r"no weights for 'vit_small_patch16_224\.no_such'; its tags are.*dino"):
        build("vit_small", "no_such")
    with pytest.raises(InputError, match=r"only timm models have tags"):
        build("hf:vit", "dino")
    with pytest.raises(InputError, match=r"is a model type, which has no weights"):
        build("hf:vit", True)


def test_every_timm_model_without_weights_is_refused():
    without = [name for name in timm.list_models() if not timm.is_model_pretrained(name)]
    assert len(without) > 20
    for name in without:
        with (
            mock.patch.object(timm, "create_model", side_effect=AssertionError("built")),
            pytest.raises(InputError, match=r"model\.pretrained: timm has no weights"),
        ):
            zoo.create(name, {}, pretrained=True)


def test_the_catalogue_is_right_about_which_weights_exist():
    for name, model in CATALOG.items():
        assert not model.has_weights or timm.is_model_pretrained(model.architecture), name
        if not model.has_weights:
            with pytest.raises(ValueError, match="no published weights"):
                timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (True, False), (False, False), ("augreg_in21k", False), ("vit_small_patch16_224.dino", False),
        ("folder/x", True), ("./x", True), ("~/x", True), ("x.safetensors", True), ("x.pth", True),
    ],
)  # fmt: skip
def test_paths_are_distinguished_from_tags(source, expected):
    assert weights.is_path(source) == expected


# -- in a run


def recipe(tmp_path: Path, pretrained: object) -> Path:
    fields = {**tiny.MODEL_ARGS, "mlp_ratio": 2.0}
    text = tiny.RECIPE.replace(json.dumps(tiny.MODEL_ARGS), f"{json.dumps(fields)}, pretrained: {pretrained}")
    return tiny.write_recipe(tmp_path, text)


@pytest.fixture
def small(tmp_path) -> Path:
    """A file of weights for the tiny recipe's model, with other images, patches and classes."""
    args = {**tiny.MODEL_ARGS, "mlp_ratio": 2.0, "img_size": 64, "patch_size": 16}
    path = tmp_path / "small.safetensors"
    save_file(build("vit_tiny", False, 5, **args).state_dict(), path)
    return path


def test_a_run_reports_and_records_its_initial_weights(small, tmp_path, capsys):
    path = recipe(tmp_path, small)
    assert tiny.command("train", path, "--dry-run") == 0
    plan = capsys.readouterr().out
    assert tiny.command("train", path) == 0
    out = capsys.readouterr().out
    sha256 = hashlib.sha256(small.read_bytes()).hexdigest()
    for text in (plan, out):
        assert f"tensors of {small} (sha256 {sha256[:16]}); resampled: patch_embed.proj; new and random: head" in text
    run = tmp_path / "runs" / "tiny"
    recorded = json.loads((run / "environment.json").read_text())["weights"]
    assert (recorded["sha256"], recorded["new"]) == (sha256, ["head.bias", "head.weight"])
    from vit_rsst.tickets import ticket_file

    assert ticket_file.load(run / "tickets" / "round_00.safetensors").metadata["pretrained"] == sha256


@pytest.mark.parametrize(("kind", "code"), [("truncated", 5), ("foreign", 5), ("missing", 3), ("model.pth", 5)])
@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_the_command_ends_with_one_sentence_and_nothing_written(kind, code, flags, tmp_path, folder, capsys):
    path, _, _ = broken(tmp_path, folder)[kind]
    assert tiny.command("train", recipe(tmp_path, path), *flags) == code
    said = capsys.readouterr().err.strip()
    assert "model.pretrained" in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_the_command_ends_with_3_when_weights_cannot_be_fetched(offline, tmp_path, capsys):
    path = tiny.write_recipe(tmp_path, "name: tiny\nmodel: {name: vit_small, pretrained: true}\n")
    assert tiny.command("train", path) == 3
    assert "model.pretrained" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_loading_restores_what_it_patches(folder):
    before = nn.Module.load_state_dict
    for path in (folder, folder / "missing.safetensors"):
        try:
            build("vit_small", str(path), **DEPTH)
        except MissingRequirement:
            assert not os.path.exists(path)
    assert nn.Module.load_state_dict is before
    assert prunable_weights(build("vit_small", str(folder), **DEPTH))

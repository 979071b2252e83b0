"""Tickets: exact, small, loadable with timm alone, and rejected in one sentence if anything is wrong with them."""

import json
import os
import shutil
import stat
import struct
from pathlib import Path

import pytest
import timm
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vit_rsst.errors import Damaged
from vit_rsst.models import zoo
from vit_rsst.models.anatomy import prunable_weights
from vit_rsst.pruning.masks import MaskSet
from vit_rsst.tickets import ticket_file

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
HEADER = {"architecture": "vit_tiny_patch16_224", "model_args": json.dumps({**ARGS, "num_classes": 10})}


def network(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**ARGS, "num_classes": 10, **changes})


def masks(net: torch.nn.Module, density: float) -> MaskSet:
    """Of the weights drawn at random so that about `density` of each is alive, and exactly all at density 1."""
    generator = torch.Generator().manual_seed(1)
    weights = prunable_weights(net)
    return MaskSet({name: torch.rand(w.shape, generator=generator) < density for name, w in weights.items()})


@pytest.fixture
def saved(tmp_path) -> tuple[Path, torch.nn.Module, MaskSet]:
    net = network()
    mask = masks(net, 0.3)
    path = tmp_path / "round_01.safetensors"
    ticket_file.save(path, net.state_dict(), mask, HEADER)
    return path, net, mask


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


# -- exact


def test_weights_round_trip_bit_for_bit_with_zeros_where_masked(tmp_path):
    net = network()
    mask = masks(net, 0.3)
    name = "blocks.0.attn.qkv.weight"
    alive = mask[name].flatten().nonzero().flatten()
    with torch.no_grad():
        flat = net.state_dict()[name].view(-1)
        flat[alive[:5]] = torch.tensor([-0.0, 0.0, 1e-45, -1e-40, 3.4e38])  # signed zeros, denormals, the largest
    path = tmp_path / "t.safetensors"
    ticket_file.save(path, net.state_dict(), mask, HEADER)
    ticket = ticket_file.load(path)

    assert ticket.state.keys() == net.state_dict().keys()
    assert ticket.mask.masks.keys() == mask.masks.keys()
    for key, weight in net.state_dict().items():
        if key in mask.masks:
            assert torch.equal(ticket.mask[key], mask[key])
            expected = torch.where(mask[key], weight, 0.0)
            expected = torch.where(expected == 0, 0.0, expected)  # −0 is kept as +0
            assert torch.equal(bits(ticket.state[key]), bits(expected)), key
        else:
            assert torch.equal(bits(ticket.state[key]), bits(weight)), key
    assert ticket.state[name].view(-1)[alive[2]] == 1e-45
    assert ticket.metadata.items() >= HEADER.items()


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_an_all_dead_or_all_alive_weight_round_trips(tmp_path, density):
    net = network()
    mask = MaskSet({name: torch.full(w.shape, bool(density)) for name, w in prunable_weights(net).items()})
    ticket_file.save(tmp_path / "t.safetensors", net.state_dict(), mask, HEADER)
    ticket = ticket_file.load(tmp_path / "t.safetensors")
    assert ticket.mask.density == density
    for name in mask:
        assert torch.equal(ticket.state[name], net.state_dict()[name] * density)


def test_a_mask_whose_size_is_not_a_multiple_of_eight_round_trips(tmp_path):
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])
    weight = torch.arange(1.0, 10.0).reshape(3, 3)
    ticket_file.save(tmp_path / "t.safetensors", {"w": weight, "b": torch.ones(2)}, MaskSet({"w": mask}), {})
    ticket = ticket_file.load(tmp_path / "t.safetensors")
    assert ticket.state["w"].tolist() == [[1, 0, 3], [0, 0, 6], [7, 8, 0]]
    assert ticket.state["b"].tolist() == [1, 1]


def test_the_file_layout_is_as_documented(tmp_path):
    mask = torch.tensor([[True, False, True], [False, False, True], [True, True, False]])
    weight = torch.arange(1.0, 10.0).reshape(3, 3)
    path = tmp_path / "t.safetensors"
    num_bytes = ticket_file.save(path, {"w": weight, "b": torch.ones(2)}, MaskSet({"w": mask}), {"note": "ü"})
    tensors = load_file(path)
    assert tensors.keys() == {"w.values", "w.mask", "w.shape", "b"}
    assert tensors["w.values"].tolist() == [1, 3, 6, 7, 8]
    assert tensors["w.mask"].tolist() == [0b10100111, 0]
    assert tensors["w.shape"].tolist() == [3, 3]
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert header.keys() == {"format", "note", "sha256"}
    assert (header["format"], header["note"]) == ("vit_rsst.ticket/1", "ü")
    assert num_bytes == path.stat().st_size


def test_equal_tickets_are_equal_files(saved):
    path, net, mask = saved
    header = {**HEADER, "seed": "0", "classes": "Größe", "method": "imp"}
    contents = set()
    for number in range(4):
        copy = path.with_name(f"{number}.safetensors")
        ticket_file.save(copy, net.state_dict(), mask, header)
        contents.add(copy.read_bytes())
    assert len(contents) == 1
    assert ticket_file.load(copy).metadata == {"format": ticket_file.FORMAT, **header}


def test_a_ticket_fits_a_model_that_timm_builds_from_the_header_alone(saved):
    path, net, mask = saved
    ticket = ticket_file.load(path)
    plain = timm.create_model(ticket.metadata["architecture"], **json.loads(ticket.metadata["model_args"]))
    ticket_file.load_into_(plain, ticket, str(path))
    with torch.no_grad():
        for name, weight in prunable_weights(net).items():
            weight.mul_(mask[name])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.equal(plain.eval()(images), net.eval()(images))


WITHOUT_THE_PACKAGE = """
import json, sys
import numpy as np, timm, torch
from safetensors import safe_open

sys.modules["vit_rsst"] = None  # whoever imports it fails
with safe_open(sys.argv[1], "pt") as file:
    header = file.metadata()
    tensors = {name: file.get_tensor(name) for name in file.keys()}
net = timm.create_model(header["architecture"], **json.loads(header["model_args"]))
state = {}
for name, tensor in tensors.items():
    if name.endswith(".mask"):
        name = name.removesuffix(".mask")
        shape = tensors[f"{name}.shape"].tolist()
        alive = np.unpackbits(tensor.numpy(), count=int(np.prod(shape))).astype(bool)
        dense = np.zeros(alive.size, dtype=np.float32)
        dense[alive] = tensors[f"{name}.values"].numpy()
        state[name] = torch.from_numpy(dense.reshape(shape))
    elif not name.endswith((".values", ".shape")):
        state[name] = tensor
net.load_state_dict(state)
logits = net.eval()(torch.ones(1, 3, 32, 32))
print(json.dumps({"logits": logits.tolist(), "package": sys.modules["vit_rsst"] is not None}))
"""


def test_a_process_without_this_package_loads_a_ticket(saved, tmp_path):
    path, _, _ = saved
    script = tmp_path / "load.py"
    script.write_text(WITHOUT_THE_PACKAGE, encoding="utf-8")
    done = tiny.python(script, path, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ticket = ticket_file.load(path)
    net = network()
    ticket_file.load_into_(net, ticket, str(path))
    expected = net.eval()(torch.ones(1, 3, 32, 32))
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-5, atol=1e-5)
    assert found["package"] is False


# -- small


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
def test_a_ticket_is_no_larger_than_its_bound(tmp_path, density):
    net = timm.create_model("vit_tiny_patch16_224", **{**ARGS, "embed_dim": 192, "num_classes": 10})
    weights = prunable_weights(net)
    generator = torch.Generator().manual_seed(1)
    mask = {}
    for name, weight in weights.items():
        order = torch.randperm(weight.numel(), generator=generator)
        mask[name] = (order < round(density * weight.numel())).view(weight.shape)
    header = HEADER | {"data": json.dumps({"classes": [f"n{i:08d}" for i in range(1000)]})}
    num_bytes = ticket_file.save(tmp_path / "t.safetensors", net.state_dict(), MaskSet(mask), header)

    prunable = 4 * sum(w.numel() for w in weights.values())
    dense = 4 * sum(t.numel() for t in net.state_dict().values())
    achieved = MaskSet(mask).density
    assert abs(achieved - density) < 1e-3
    assert num_bytes <= (achieved + 1 / 32) * prunable + (dense - prunable) + 0.01 * dense + 16 * 1024
    assert num_bytes >= achieved * prunable + (dense - prunable), "the bound would not be one"


# -- refused


def evaluated(path: Path, capsys: pytest.CaptureFixture) -> str:
    """`vit-rsst evaluate` of a bad ticket: exit code 5 and one line."""
    capsys.readouterr()
    assert tiny.command("evaluate", path) == 5
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    [line] = told.err.splitlines()
    assert line.startswith("error: ")
    assert path.name in line
    return line


def refused(path: Path, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(Damaged) as caught:
        ticket_file.load(path)
    assert "\n" not in str(caught.value)
    line = evaluated(path, capsys)
    assert line == f"error: {caught.value}"
    return line


def test_a_missing_ticket_is_refused(tmp_path, capsys):
    assert "no such ticket" in refused(tmp_path / "none.safetensors", capsys)


@pytest.mark.parametrize("content", [b"", b"no tensors here", b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 100])
def test_a_file_that_is_not_safetensors_is_rejected(tmp_path, capsys, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    assert "not a readable safetensors file" in refused(path, capsys)


@pytest.mark.fault("F8")
def test_a_truncated_ticket_is_refused_wherever_it_was_cut(saved, capsys):
    path, _, _ = saved
    whole = path.read_bytes()
    [header_bytes] = struct.unpack("<Q", whole[:8])
    cuts = [0, 1, 7, 8, 9, 8 + header_bytes // 2, 8 + header_bytes, len(whole) // 2, len(whole) - 4, len(whole) - 1]
    for size in cuts:
        path.write_bytes(whole[:size])
        with pytest.raises(Damaged):
            ticket_file.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(Damaged):
        ticket_file.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, capsys)
    path.write_bytes(whole)
    ticket_file.load(path)


@pytest.mark.fault("F9")
def test_one_flipped_bit_in_the_data_is_refused(saved, capsys):
    path, _, _ = saved
    whole = path.read_bytes()
    [header_bytes] = struct.unpack("<Q", whole[:8])
    start = 8 + header_bytes
    places = [start, start + 1, *range(start + 2, len(whole), (len(whole) - start) // 25), len(whole) - 1]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match="hash"):
            ticket_file.load(path)
    assert len(places) > 25
    assert "hash" in refused(path, capsys)


def test_one_flipped_bit_in_the_header_is_refused(tmp_path):
    """The mean, classes and architecture are as protected against silent changes as weights are."""
    path = tmp_path / "t.safetensors"
    header = {**HEADER, "data": json.dumps({"mean": [0.305], "classes": ["a", "b"]})}
    ticket_file.save(path, {"w": torch.eye(3), "b": torch.ones(2)}, MaskSet({"w": torch.eye(3) > 0}), header)
    whole = path.read_bytes()
    [header_bytes] = struct.unpack("<Q", whole[:8])
    accepted = []
    for place in range(8 + header_bytes):
        flipped = bytearray(whole)
        flipped[place] ^= 0x01
        path.write_bytes(flipped)
        try:
            ticket_file.load(path)
        except Damaged:
            continue
        accepted.append(whole[max(place - 12, 0) : place + 12])
    assert not accepted, f"{len(accepted)} of {8 + header_bytes} flips went unseen, the first near {accepted[0]!r}"


def rewritten(path: Path, **header: str) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata = {k: v for k, v in (metadata | header).items() if v}
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize("name", ["vit_rsst.ticket/2", "pt", ""])
def test_an_unknown_format_is_refused_and_named(saved, capsys, name):
    path, _, _ = saved
    rewritten(path, format=name)
    line = refused(path, capsys)
    assert repr(name or "not given") in line
    assert "vit_rsst.ticket/1" in line


def test_a_plain_checkpoint_of_timm_is_refused(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    save_file(network().state_dict(), path)
    assert "format" in refused(path, capsys)


def test_a_ticket_of_another_shape_is_rejected_and_the_model_unchanged(saved):
    path, _, _ = saved
    other = network(embed_dim=96)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(Damaged) as caught:
        ticket_file.load_into_(other, ticket_file.load(path), "here")
    text = str(caught.value)
    assert text.startswith("here: ")
    assert "does not match this model in" in text
    assert "(10, 48)" in text or "(1, 1, 48)" in text or "(48,)" in text
    assert text.count(" in the model, ") == 5
    assert "\n" not in text
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


def test_a_ticket_with_other_names_is_rejected(saved):
    path, _, _ = saved
    ticket = ticket_file.load(path)
    with pytest.raises(Damaged, match=r"blocks\.2\..*missing in the file"):
        ticket_file.load_into_(network(depth=3), ticket, "here")
    with pytest.raises(Damaged, match=r"blocks\.1\..*missing in the model"):
        ticket_file.load_into_(network(depth=1), ticket, "here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The run folder of a tiny run."""
    folder = tmp_path_factory.mktemp("run")
    assert tiny.command("train", tiny.write_recipe(folder), "train.epochs=1", "train.round_epochs=1") == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def ticket(finished, tmp_path) -> Path:
    """A copy of its last ticket."""
    return Path(shutil.copy(finished / "tickets" / "round_02.safetensors", tmp_path / "round_02.safetensors"))


@pytest.mark.parametrize("change", [{"depth": 2}, {"embed_dim": 48}])
def test_a_ticket_whose_header_describes_another_model_is_refused(ticket, capsys, change):
    loaded = ticket_file.load(ticket)
    args = json.loads(loaded.metadata["model_args"])
    ticket_file.save(ticket, loaded.state, loaded.mask, _header(loaded) | {"model_args": json.dumps(args | change)})
    assert "does not match this model" in evaluated(ticket, capsys)


def test_a_ticket_of_other_classes_is_refused(ticket, capsys):
    loaded = ticket_file.load(ticket)
    data = json.loads(loaded.metadata["data"])
    data["classes"] = ["cat", "dog"]
    ticket_file.save(ticket, loaded.state, loaded.mask, _header(loaded) | {"data": json.dumps(data)})
    assert "trained on 2 classes" in evaluated(ticket, capsys)


@pytest.mark.parametrize("missing", ["data", "architecture", "model_args", "seed"])
def test_a_ticket_whose_header_lacks_an_entry_is_refused(ticket, capsys, missing):
    loaded = ticket_file.load(ticket)
    header = {k: v for k, v in _header(loaded).items() if k != missing}
    ticket_file.save(ticket, loaded.state, loaded.mask, header)
    assert missing in evaluated(ticket, capsys)


@pytest.mark.fault("F24")
@pytest.mark.parametrize("change", ["depth=2", "num_heads=4", "qkv_bias=false"])
def test_starting_from_a_ticket_of_another_model_is_refused_even_where_the_shapes_fit(ticket, tmp_path, capsys, change):
    recipe = tiny.write_recipe(tmp_path)
    assert tiny.command("train", recipe, f"model.start_from={ticket}", f"model.args.{change}") == 5
    assert f"belongs to another model: {change.split('=')[0]} is" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("missing", ["architecture", "model_args"])
def test_starting_from_a_ticket_without_a_model_in_its_header_is_rejected(ticket, tmp_path, capsys, missing):
    loaded = ticket_file.load(ticket)
    ticket_file.save(ticket, loaded.state, loaded.mask, {k: v for k, v in _header(loaded).items() if k != missing})
    assert tiny.command("train", tiny.write_recipe(tmp_path), f"model.start_from={ticket}") == 5
    assert f"the header has no {missing!r}" in capsys.readouterr().err


def _header(ticket: ticket_file.Ticket) -> dict[str, str]:
    return {k: v for k, v in ticket.metadata.items() if k not in ("format", "sha256")}


def test_the_header_of_a_run_holds_what_inference_needs(finished):
    for number in (0, 1, 2):
        header = ticket_file.load(finished / "tickets" / f"round_{number:02d}.safetensors").metadata
        assert header["model"] == "vit_tiny"
        assert header["architecture"] in timm.list_models()
        assert json.loads(header["model_args"]).items() >= {**tiny.MODEL_ARGS, "num_classes": 10}.items()
        data = json.loads(header["data"])
        assert data["classes"] == [str(i) for i in range(10)]
        assert data["image_size"] == 32
        assert len(data["mean"]) == len(data["std"]) == 3
        assert (header["round"], header["ema"], header["method"]) == (str(number), "false", "rsst")
        net = zoo.create(header["architecture"], json.loads(header["model_args"]))
        loaded = ticket_file.load(finished / "tickets" / f"round_{number:02d}.safetensors")
        ticket_file.load_into_(net, loaded, "")
        assert float(header["density"]) == loaded.mask.density


# -- the file


def test_the_mode_of_the_file_follows_the_umask(saved, tmp_path):
    path, _, _ = saved
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_saving_leaves_no_other_file_and_a_failed_save_leaves_the_old_ticket(saved, monkeypatch):
    path, net, mask = saved
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for target, name in ((ticket_file, "save_file"), (ticket_file.files, "settle"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(OSError, match="No space"):
                ticket_file.save(path, net.state_dict(), mask, {"other": "header"})
        assert path.read_bytes() == before


def test_no_ticket_is_ever_unpickled(saved, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    path, net, mask = saved
    for module, name in (("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("pickle", "dump"),
                         ("pickle", "dumps"), ("torch", "load"), ("torch", "save")):  # fmt: skip
        monkeypatch.setattr(f"{module}.{name}", forbidden)
    ticket_file.save(path, net.state_dict(), mask, HEADER)
    ticket_file.load_into_(net, ticket_file.load(path), "")

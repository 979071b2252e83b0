"""What several ranks must agree on: rank 0 looks and tells, weights stay the same, buckets are settled."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import faulty
import pytest
import tiny
import torch
from torch import distributed, nn

from vit_rsst import train
from vit_rsst.errors import InputError, MissingRequirement
from vit_rsst.pruning import agreement
from vit_rsst.run.environment import drift, environment, inexact_because
from vit_rsst.run.heartbeat import Heartbeat
from vit_rsst.run.ranks import Ranks, meeting_place
from vit_rsst.run.rehearsal import settle_buckets, unreached, without_trace
from vit_rsst.run.signals import next_agreement

PLUGIN = """\
import os
import torch
from vit_rsst import loop
from vit_rsst.assembly import build, parts
from vit_rsst.data import locate
from vit_rsst.run.folder import RunFolder

what, rank = os.environ.get("FAULT", ""), os.environ.get("RANK", "0")
if what == "stale" and rank == "1":  # what a file system that is shared may still show there
    RunFolder.status = lambda self: {"state": "finished", "exit_code": 0}
if what == "drift":
    train_step = loop.train_step

    def drifting(run, micro_batches):
        if rank == "1" and run.progress.global_step == 4:
            with torch.no_grad():
                run.net.get_parameter("blocks.0.attn.proj.weight")[3, 5] += 1e-6
        return train_step(run, micro_batches)

    loop.train_step = drifting
if what == "unused":
    build_model = parts.build_model

    def with_mask_token(*arguments):
        net, mask = build_model(*arguments)
        net.mask_token = torch.nn.Parameter(torch.zeros(1, 24))
        net.observed = type(net.observed)()  # as of a model whose forward pass depends on values
        return net, mask

    parts.build_model = with_mask_token
if "NOTES" in os.environ:
    open_data = build.open_data

    def noted(*arguments):
        cache = os.path.join(os.environ["HF_DATASETS_CACHE"], "vit_rsst")
        there = os.path.isdir(cache) and any(name.endswith(".arrow") for name in os.listdir(cache))
        found = open_data(*arguments)
        with open(os.path.join(os.environ["NOTES"], rank), "w") as file:
            file.write("found" if there else "prepared")
        return found

    build.open_data = noted
"""


def write_recipe(folder: Path, text: str = tiny.RECIPE) -> Path:
    (folder / "parts.py").write_text(PLUGIN, encoding="utf-8")
    return tiny.write_recipe(folder, f"{text.replace('epochs: 2, round_epochs: 2', 'epochs: 2')}plugins: [parts]\n")


SHORT = ("pruning.schedule={rounds: 1, final_sparsity: 0.5}", "train.rank_timeout=60")


@pytest.mark.distributed
def test_weights_that_part_are_found_at_the_end_of_the_epoch_and_the_first_layer_is_named(tmp_path):
    job = faulty.command("train", write_recipe(tmp_path), *SHORT, ranks=2, FAULT="drift")
    assert job.codes[0] == 1, job.log
    assert "the weights differ between ranks: " in job.log
    assert "on rank 1 (" in job.log
    assert tiny.status(tmp_path / "runs" / "tiny")["step"] == 6, "the end of the epoch of step 4"


@pytest.mark.distributed
def test_a_status_that_another_rank_still_sees_cannot_part_the_ranks(tmp_path):
    job = faulty.command("train", write_recipe(tmp_path), *SHORT, ranks=2, FAULT="stale")
    assert job.codes == [0, 0], job.log
    again = faulty.command("train", tmp_path / "tiny.yaml", *SHORT, ranks=2)
    assert again.codes == [0, 0], again.log
    assert again.log.count("is already finished") == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_a_parameter_without_gradient_is_frozen_and_two_processes_train(tmp_path):
    job = faulty.command("train", write_recipe(tmp_path), *SHORT, ranks=2, FAULT="unused")
    assert job.codes == [0, 0], job.log
    assert job.log.count("mask_token: no gradient reaches them; frozen") == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_caches_of_two_nodes_are_prepared_once_each(tmp_path):
    data, notes = tiny.write_images(tmp_path / "data", "cifar10"), tmp_path / "notes"
    notes.mkdir()
    text = tiny.RECIPE.replace("{source: digits}", f"{{source: cifar10, path: {data}, image_size: 16}}")
    recipe, log = (
        write_recipe(tmp_path, text.replace('"patch_size": 8', '"img_size": 16, "patch_size": 8')),
        tmp_path / "log",
    )

    def node(rank: int) -> dict[str, str]:
        home = tmp_path / f"node{rank // 2}"
        return {
            "LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2", "NOTES": str(notes), "TMPDIR": str(home),
            "HF_HOME": str(home), "HF_DATASETS_CACHE": str(home / "datasets"),
        }  # fmt: skip

    for number in range(2):
        (tmp_path / f"node{number}").mkdir()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(faulty.free_port()), "WORLD_SIZE": "4"}
    place |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join((str(tmp_path), str(tiny.REPOSITORY)))}
    command = [sys.executable, "-m", "vit_rsst.train", str(recipe), *SHORT]  # datasets reads the place at its import
    with open(log, "w") as told:
        started = [
            subprocess.Popen(
                command, env=tiny.environment(**place, RANK=str(rank), **node(rank)), stdout=told, stderr=told
            )
            for rank in range(4)
        ]
        assert [process.wait(200) for process in started] == [0] * 4, log.read_text()
    assert [(notes / str(rank)).read_text() for rank in range(4)] == ["prepared", "found", "prepared", "found"]
    assert json.loads((tmp_path / "runs" / "tiny" / "environment.json").read_text())["nodes"] == 2


# -- rank 0 looks and tells


class Store(dict):
    """The store of a launcher, as far as it is needed here."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def add(self, key: str, number: int) -> int:
        self[key] = self.get(key, 0) + number
        return self[key]


@pytest.fixture
def ranks(tmp_path) -> list[Ranks]:
    store = Store()
    beat = [Heartbeat(rank, 2, 60.0, tmp_path / "stacks", lambda: None, print) for rank in range(2)]
    return [Ranks(rank, 2, beat[rank], store) for rank in range(2)]


def test_every_rank_gets_what_rank_0_found(ranks):
    assert ranks[0].on_main("looking", lambda: {"step": 3}) == {"step": 3}
    assert ranks[1].on_main("looking", lambda: pytest.fail("rank 1 looked too")) == {"step": 3}


def test_an_error_of_rank_0_is_raised_on_every_rank(ranks):
    def fail() -> None:
        raise InputError("name: no such thing")

    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(ranks[number].on_main, "looking", fail) for number in range(2)]
    for number in range(2):
        with pytest.raises(InputError, match="name: no such thing"):
            both[number].result()
        assert ranks[number].heartbeat._may_take_long == 0


def test_calls_are_told_apart_by_their_order(ranks):
    assert [ranks[0].on_main("x", lambda n=n: n) for n in range(3)] == [0, 1, 2]
    assert [ranks[1].on_main("x", lambda: None) for _ in range(3)] == [0, 1, 2]


def test_an_attempt_does_not_meet_the_one_before(monkeypatch):
    served = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(served.port), "RANK": "1", "WORLD_SIZE": "3"}
    for name, value in place.items() | {("TORCHELASTIC_USE_AGENT_STORE", "True")}:
        monkeypatch.setenv(name, value)
    limit, stores = timedelta(seconds=10), []
    for attempt in "012":
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        found = meeting_place(limit)
        if attempt == "0":
            assert found == {}, "the first meets where torch does"
            continue
        assert (found["rank"], found["world_size"]) == (1, 3)
        assert not found["store"].check(["address"])
        found["store"].set("address", attempt)
        stores.append(found["store"])
    assert [store.get("address") for store in stores] == [b"1", b"2"]
    assert not served.check(["address"])
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert meeting_place(limit) == {}, "a launcher without a store of its own: rank 0 serves a new one"


# -- rehearsals leave no trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.mask_token = nn.Parameter(torch.zeros(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)


def test_a_rehearsal_changes_neither_weights_nor_statistics_nor_random_states():
    net = Net().eval()
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert unreached(net, 4) == ("mask_token",)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not net.training


def test_buffers_are_put_back_even_when_the_pass_fails():
    net = Net()
    images, wrong = torch.ones(2, 3, 4, 4), torch.ones(2, 5)
    with pytest.raises(RuntimeError), without_trace(net):  # noqa: PT012 - the first pass counts, the second fails
        net(images)
        net(wrong)
    assert net.body[2].num_batches_tracked == 0


def test_without_ddp_there_are_no_buckets_to_settle():
    net = Net()
    net.forward = lambda images: pytest.fail("a pass was made")
    settle_buckets(net, net, (2, 3, 4, 4))


# -- weights and buffers over ranks


def test_a_fingerprint_sees_a_flipped_bit_a_swap_and_a_sign():
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        tensor = torch.randn(5, 7, generator=draw).mul(10).to(dtype)
        found = agreement.bits_sum(tensor)
        assert agreement.bits_sum(tensor.clone()) == found
        other = tensor.clone()
        other[0, 0], other[4, 6] = tensor[4, 6], tensor[0, 0]
        if not torch.equal(other, tensor):
            assert agreement.bits_sum(other) != found
    assert agreement.bits_sum(torch.tensor([0.0])) != agreement.bits_sum(torch.tensor([-0.0]))
    assert agreement.bits_sum(torch.ones(3)) != agreement.bits_sum(torch.ones(3).nextafter(torch.tensor(2.0)))
    assert agreement.bits_sum(torch.empty(0)) == 0


def test_statistics_are_shared_in_one_broadcast_a_type(monkeypatch):
    net, calls = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(5)), nn.BatchNorm1d(2).double()), []

    def broadcast(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(tensor)
        return torch.arange(len(tensor), dtype=tensor.dtype)

    monkeypatch.setattr(agreement, "PartialState", lambda: type("Two", (), {"num_processes": 2}))
    monkeypatch.setattr(agreement, "broadcast", broadcast)
    agreement.share_buffers_(net)
    assert [(len(tensor), tensor.dtype) for tensor in calls] == [(30, torch.float32), (4, torch.float64)]
    assert net[1].running_mean.tolist() == [6, 7, 8]
    assert net[5].running_var.tolist() == [2, 3]


# -- whether it is exact


def test_a_run_says_bit_exact_only_where_that_is_true():
    then = environment(4, "cpu", {}, "24 = 6 × 4 × 1")
    assert inexact_because(then, drift(then, then)) == ""
    cases = {
        "processes 4 → 2": {"processes": 2},
        "layout 24 = 6 × 4 × 1 → 24 = 3 × 4 × 2": {"layout": "24 = 3 × 4 × 2"},
        "device cpu → mps": {"device": "mps"},
        "versions.torch": {"versions": then["versions"] | {"torch": "0.1"}},
    }
    for words, change in cases.items():
        now = then | change
        assert words in inexact_because(now, drift(then, now))
    elsewhere = then | {"host": "another", "commit": "abc"}
    assert inexact_because(elsewhere, drift(then, elsewhere)) == "", "neither changes a sum"


def test_on_a_gpu_a_run_is_exact_with_deterministic_kernels_alone():
    for exact in (True, False):
        found = environment(1, "cuda:0", {}, exact=exact)
        assert (inexact_because(found, {}) == "") == exact
    assert "train.deterministic" in inexact_because(found, {})


def test_a_resume_point_of_a_version_that_recorded_less_is_still_the_same_run():
    now = environment(1, "cpu", {})
    then = {key: value for key, value in now.items() if key not in ("layout", "nodes", "deterministic", "gpu")}
    assert drift(then, now) == {}


# -- stopping


@pytest.mark.parametrize(("seconds", "steps"), [(0.001, 10), (1.0, 10), (2.5, 4), (10.0, 1), (300.0, 1)])
def test_slow_steps_ask_more_often_whether_to_stop(seconds, steps):
    """Three minutes before its time is up SLURM asks: ten steps of a minute would be too many."""
    assert next_agreement(seconds) == steps


# -- launchers


def test_gpus_that_cannot_talk_to_each_other_are_one_sentence(monkeypatch):
    def refuse(**_: object) -> None:
        raise NotImplementedError("Using RTX 4000 series doesn't support faster communication broadband via P2P or IB.")

    monkeypatch.setattr("accelerate.PartialState", refuse)
    with pytest.raises(MissingRequirement, match="NCCL_P2P_DISABLE=1"):
        train.start_processes()


@pytest.mark.parametrize(
    ("status", "refused"),
    [
        ({"state": "running", "exit_code": None, "reason": ""}, None),
        ({"state": "failed", "exit_code": 3, "reason": "rank 1 is gone"}, None),
        ({"state": "failed", "exit_code": 1, "reason": "a bug"}, None),
        ({"state": "failed", "exit_code": 4, "reason": "not finite"}, 4),
        ({"state": "stopped", "exit_code": 75, "reason": "stopped by SIGTERM"}, 75),
    ],
)
def test_an_elastic_launcher_restarts_what_was_lost_and_nothing_that_ended_by_itself(tmp_path, status, refused):
    from vit_rsst.errors import RunError
    from vit_rsst.recipe.schema import Recipe
    from vit_rsst.run.folder import RunFolder

    folder = RunFolder(tmp_path)
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert not train.is_finished(folder, Recipe(name="r"), restart=False, attempt=0)
    if refused is None:
        assert not train.is_finished(folder, Recipe(name="r"), restart=False, attempt=1)
        return
    with pytest.raises(RunError, match=r"the launcher restarts the run.*not restarting") as error:
        train.is_finished(folder, Recipe(name="r"), restart=False, attempt=1)
    assert error.value.exit_code == refused


@pytest.mark.slow
@pytest.mark.distributed
def test_max_restarts_goes_on_from_the_last_point(tmp_path):
    dying = (
        "import os\nfrom vit_rsst import loop\ntrain_step = loop.train_step\n"
        "def once(run, batches):\n"
        "    place = run.progress.global_step, os.environ['RANK'], os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "    if place == (8, '1', '0'):\n        os._exit(9)\n"
        "    return train_step(run, batches)\nloop.train_step = once\n"
    )
    (tmp_path / "dies.py").write_text(dying)
    recipe = tiny.write_recipe(tmp_path, tiny.RECIPE + "plugins: [dies]\n")
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    options += ["--main_process_port=0", "--max_restarts=1"]
    path = os.pathsep.join((str(tmp_path), str(tiny.REPOSITORY)))
    done = tiny.python(
        "-m", "accelerate.commands.launch", *options, "-m", "vit_rsst.train", recipe, "--restart",
        timeout=200, PYTHONPATH=path, ACCELERATE_USE_CPU="true", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at round 0, epoch 2, step 6 of 18, bit-exact" in done.stdout
    assert tiny.status(tmp_path / "runs" / "tiny")["state"] == "finished"
    assert not (tmp_path / "runs" / "tiny.old-1").exists(), "--restart is for the first attempt"

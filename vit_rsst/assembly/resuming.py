"""Going on from a resume point, where that is the same run."""

from accelerate.utils import broadcast_object_list

from vit_rsst import results, resume, run_folder
from vit_rsst.checkpoint import ResumePoint
from vit_rsst.errors import Damaged, InputError
from vit_rsst.loop import Run


def resume_if_possible(s: Run, allow_world_size_change: bool = False, allow_data_change: bool = False) -> None:
    """Sets the run to its newest sound resume point, on every rank, and says so.

    Raises:
        InputError: the point is of another recipe, or of other data or, within an epoch, of another number of
            processes, and that is not allowed.
        Damaged: no point is sound, or the ranks read different ones.
    """
    point = s.checkpointer.load() if s.accelerator.is_main_process else None
    if s.accelerator.num_processes > 1:
        [step] = broadcast_object_list([None if point is None else point.step])
        if step is not None and point is None:  # the points lie on a file system that all ranks share
            point = s.checkpointer.load()
        if step != (None if point is None else point.step):
            raise Damaged(f"the ranks read different resume points from {s.folder.checkpoints}; is it shared by all?")
    if point is None:
        return
    drift = run_folder.drift(point.numbers.get("environment", s.environment), s.environment)
    check_same_run(s, point, drift, allow_world_size_change, allow_data_change)
    resume.restore_(s, point)
    p = s.progress
    if s.accelerator.is_main_process:
        results.forget_from(s.folder.path, p.round)
    processes = drift.get("processes")
    changed = f", with {processes[1]} processes instead of {processes[0]}: not bit-exact" if processes else ""
    s.tracker.log("resume", p.global_step, {"round": p.round, "epoch": p.epoch, "bit_exact": not processes})
    s.console.line(f"resumed at round {p.round}, epoch {p.epoch}, step {p.global_step} of {p.total_steps}{changed}")
    if told := [f"{key} {then} → {now}" for key, (then, now) in drift.items() if key != "processes"]:
        s.tracker.warning(p.global_step, f"the environment is not the one that the run began in: {'; '.join(told)}")


def check_same_run(
    s: Run, point: ResumePoint, drift: dict[str, tuple], allow_world_size_change: bool, allow_data_change: bool
) -> None:
    """Refuses a point that this run cannot go on from as the same run.

    Raises:
        InputError: see `resume_if_possible`.
    """
    if point.numbers["recipe"] != s.recipe_fingerprint:
        raise InputError(
            f"{s.folder.path}: its resume point {point.step} is of another recipe, whatever recipe.yaml says now; "
            "give this run another name (name=…), or begin anew with --restart."
        )
    then, now = drift.get("processes", (1, 1))
    if then != now and point.numbers["progress"]["step"] and not allow_world_size_change:
        raise InputError(
            f"{s.folder.path}: the run stopped within an epoch, at step {point.step}, with {then} processes, and now "
            f"has {now}. Start it with {then}, or pass --allow-world-size-change: every image still has its turn, but "
            "sums are rounded in another order, so that the result is no longer the same to the last bit."
        )
    other = [f"data.{key}" for key in run_folder.DATA_IDENTITY if f"data.{key}" in drift]
    if other and not allow_data_change:
        told = "; ".join(f"{key} {drift[key][0]} there, {drift[key][1]} now" for key in other)
        raise InputError(
            f"{s.folder.path}: the data are not those that the run began with ({told}). Bring them back, give this run "
            "another name (name=…), or pass --allow-data-change: then it is no longer one experiment."
        )

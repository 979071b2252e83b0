"""The shortest way through the product: plan, train, evaluate and export a tiny run."""

import json

import tiny

from vit_rsst.tickets import ticket_file


def test_a_tiny_run_is_planned_trained_evaluated_and_exported(tmp_path, capsys):
    recipe, run = tiny.write_recipe(tmp_path), tmp_path / "runs" / "tiny"
    assert tiny.command("train", recipe, "--dry-run") == 0
    assert not run.exists()
    assert tiny.command("train", recipe) == 0
    assert tiny.status(run)["state"] == "finished"
    ticket = ticket_file.load(run / "tickets" / "round_02.safetensors")
    assert ticket.mask.num_alive == round(0.1 * tiny.NUM_PRUNABLE)
    assert all(not (ticket.state[name] * ~kept).any() for name, kept in ticket.mask.masks.items())
    scores = tmp_path / "scores.json"
    assert tiny.command("evaluate", run, "--json", scores) == 0
    assert json.loads(scores.read_text(encoding="utf-8"))["samples"] == 360
    assert tiny.command("export", run, "--to", "slim", tmp_path / "slim") == 0
    assert (tmp_path / "slim" / "model.safetensors").is_file()

"""What `vit-rsst prune` prints: the plan of `--dry-run`, and the table of what was done."""

from vit_rsst.assembly.data import evaluation_batch
from vit_rsst.assembly.fitting import fit_needs
from vit_rsst.library.after_training import FIGURE, RESULT, TICKET, Prepared
from vit_rsst.models.footprint import evaluation_bytes
from vit_rsst.pruning.calibration import moments_bytes
from vit_rsst.pruning.criteria import OF_IMAGES
from vit_rsst.text import aligned, size


def plan_text(prepared: Prepared) -> str:
    """What would be done, and the memory that takes."""
    asked, trained, removals, section = prepared.asked, prepared.trained, prepared.removals, prepared.section
    net, weights, images = trained.net, removals.target.weights, prepared.num_calibration
    total, prunable = sum(p.numel() for p in net.parameters()), sum(w.numel() for w in weights.values())
    densities = [selector.mean_density(weights, density) for selector, density in removals.goals]
    data = prepared.calibration or prepared.scored
    lines = [
        f"plan of pruning {asked.what}; nothing is created",
        f"model      {trained.header.get('model', asked.what)}: {total:,} parameters, {prunable:,} prunable in "
        f"{len(weights)} weights, {removals.alive.num_alive:,} of them alive",
        *[f"data       {trained.data.where}", *(f"           {line}" for line in data.told)] * (data is not None),
        f"removes    {section.granularity} by {section.criterion}, to a density of the prunable weights of about "
        f"{', '.join(f'{density:.4f}' for density in densities)}",
    ]
    memory = {"weights": 4 * total * (1 + removals.compensates + (len(densities) > 1))}
    needs, num_fits = removals.goals[0][0].criterion.needs, len(densities) * removals.compensates
    if images:
        fits = f"{num_fits} fits by least squares" if num_fits > 1 else "a fit by least squares"
        uses = ["statistics"] * (needs in OF_IMAGES) + [fits] * bool(num_fits)
        lines.append(f"calibrates {images:,} training images, balanced over classes, for {' and '.join(uses)}")
        memory["images"] = images * 3 * trained.data.size**2
    if needs == "moments":
        memory["second moments"] = moments_bytes(net, weights, removals.target.groups)
    if removals.compensates:
        needed = fit_needs(net, weights, trained.data.size, images)
        lines.append(f"fits       {images:,} images at once, {needed.text()} each")
        memory |= {"inputs": needed.inputs, "activations": needed.activations, "Gram matrix": needed.matrix}
    held = ", ".join(f"{name} {size(number)}" for name, number in memory.items())
    lines.append(f"memory     about {size(sum(memory.values()))} beside the program: {held}")
    if asked.split:
        most = evaluation_batch(prepared.device)
        batch = min(most, prepared.scored.count(asked.split) or most)
        taken = size(evaluation_bytes(net, trained.data.size, batch))
        lines.append(f"scores     top-1 on {asked.split}, before and after; a batch of {batch} takes {taken}")
    kinds = [TICKET, *["slim/"] * prepared.has_units]
    places = [asked.folder / goal.name for goal in asked.goals] if asked.is_sweep else [asked.folder]
    lines += [f"writes     {place}: {', '.join(kinds)}" for place in places]
    drawn = [FIGURE] * bool(asked.is_sweep and asked.split)
    return "\n".join([*lines, f"           {asked.folder}: {', '.join([*drawn, RESULT])}"])


def result_text(prepared: Prepared, result: dict) -> str:
    """The table of all points, how long it took, and where the files are."""
    asked, dense, points, seconds = prepared.asked, result["dense"], result["points"], result["seconds"]
    names = ["dense", *(goal.name if asked.is_sweep else "pruned" for goal in asked.goals)]
    rows = [("", "density", "top-1", "MFLOPs", "parameters", "seconds")]
    for name, state in zip(names, [dense, *points], strict=True):
        rows.append(
            (
                name,
                f"{state['density']:.4f}",
                f"{state['top1']:.2f}" if asked.split else "–",
                f"{prepared.flops(state) / 1e6:,.1f}",
                f"{prepared.parameters(state):,}",
                f"{state['seconds']:.1f}" if "seconds" in state else "",
            )
        )
    how = ", ".join(filter(None, result["pruned"].values()))
    lines = [f"{asked.what}: {how}", aligned(rows, num_left=1), ""]
    lines.append(
        "MFLOPs and parameters of the slim model"
        if prepared.has_units
        else "MFLOPs and parameters without those of zeros, which take hardware that skips them"
    )
    if asked.split:
        changes = ", ".join(f"{dense['top1']:.2f} → {point['top1']:.2f}" for point in points)
        lines.append(f"top-1 on {dense['samples']:,} images of {asked.split}: {changes}")
    if result["calibration_images"]:
        lines.append(
            f"calibration on {result['calibration_images']:,} training images: {seconds['images']:.1f} s to decode "
            f"them, {seconds['calibration']:.1f} s for statistics; each removal and its fit as in the table"
        )
    lines += [point["compensation"] for point in points[-1:] if point["compensation"]]
    lines += [f"{kind}: {point[kind]}" for point in points for kind in ("ticket", "slim") if kind in point]
    lines += [f"figure: {result['figure']}"] if "figure" in result else []
    return "\n".join(lines)

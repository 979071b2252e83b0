"""timm: a folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads, without this package."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from vit_rsst import files
from vit_rsst.errors import InputError
from vit_rsst.export.work import Target, Work

USAGE = """\
import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()  # "." is this folder
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("image.png").convert("RGB")
with torch.no_grad():
    probabilities = model(transform(image)[None]).softmax(1)[0]
print(model.pretrained_cfg["label_names"][int(probabilities.argmax())], float(probabilities.max()))
"""


def check(work: Work) -> None:
    """Raises:
    InputError: timm alone cannot build this model.
    """
    if work.is_hub:
        raise InputError(f"--to timm: {work.architecture} is a model of transformers; use --to transformers.")
    if what := work.lacks_stock:
        raise InputError(f"--to timm: timm has no model of {what}; use --to slim, onnx or dense.")


def write(work: Work, folder: Path) -> None:
    """config.json and model.safetensors, zeros included."""
    args = {key: value for key, value in work.model_args.items() if key != "num_classes"}
    trained, classes = work.trained, work.trained.classes
    size = trained.data.size
    own = work.net.pretrained_cfg
    pretrained_cfg = {
        "input_size": [3, size, size],
        "fixed_input_size": own.get("fixed_input_size", False),
        # The run's preprocessing: shorter side resized, centre cropped.
        "interpolation": trained.data.resampling,
        "crop_pct": trained.data.crop_share,
        "crop_mode": "center",
        "mean": trained.mean,
        "std": trained.std,
        "num_classes": len(classes),
        "label_names": classes,
        "pool_size": own.get("pool_size"),
        "first_conv": own.get("first_conv"),
        "classifier": own.get("classifier"),
        "custom_load": False,
    }
    config = {
        "architecture": work.architecture.split(".")[0],
        "num_classes": len(classes),
        "label_names": classes,
        "model_args": args,
        "pretrained_cfg": pretrained_cfg,
    }
    state = {name: tensor.contiguous() for name, tensor in work.net.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    files.settle(folder / "model.safetensors")
    files.write_json(folder / "config.json", config)


@torch.no_grad()
def logits(folder: Path, images: Tensor) -> Tensor:
    """Logits of the folder, loaded as a user would."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)


TARGET = Target("timm", check, write, logits, lambda work: USAGE)

"""The public names stay: their list and their signatures are written down here a second time."""

import ast
import inspect
import re

import pytest
import timm
import tiny

import vit_rsst
from vit_rsst import errors

WORDS = """final_sparsity rounds rate sparsities budget schedule granularity criterion scope depth_ramp layer_sparsity
max_layer_sparsity min_neurons compensate rewind include protect"""
SIGNATURES = {
    "Event": "name round step density result",
    "Pruner": f"""model optimizer * total_steps dense_steps recovery_steps method {WORDS} calibration evaluate on_event
    seed""",
    "Pruner.apply_": "self module",
    "Pruner.detach": "self",
    "Pruner.finish": "self",
    "Pruner.load_state_dict": "self state",
    "Pruner.mask_forward_": "self",
    "Pruner.unmask_forward_": "self",
    "Pruner.metrics": "self",
    "Pruner.report": "self",
    "Pruner.save_ticket": "self path **description",
    "Pruner.state_dict": "self",
    "analyze": "model image_size",
    "load": "path model",
    "prune": """model sparsity * budget granularity criterion scope depth_ramp layer_sparsity max_layer_sparsity
    min_neurons include protect compensate calibration masks seed""",
    "register_models": "",
    "save": "model path * name args data masks seed",
    "slim": "model",
}
PROPERTIES = {"density", "is_over", "masks"}


def written(function: object) -> str:
    """Names of the parameters; `*` before those that are keywords alone."""
    words, before = [], None
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and before is not parameter.KEYWORD_ONLY:
            words.append("*")
        words.append(f"**{name}" if parameter.kind is parameter.VAR_KEYWORD else name)
        before = parameter.kind
    return " ".join(words)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_public_name_takes_what_it_took(name):
    owner, _, method = name.partition(".")
    found = getattr(vit_rsst, owner)
    assert written(getattr(found, method) if method else found) == " ".join(SIGNATURES[name].split())


def test_every_public_name_is_listed_documented_and_known_to_editors():
    assert sorted(vit_rsst.__all__) == sorted({name.partition(".")[0] for name in SIGNATURES})
    stub = ast.parse((tiny.PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    aliases = [alias for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(alias.asname for alias in aliases) == sorted(vit_rsst.__all__)
    methods = {f"Pruner.{name}" for name in vars(vit_rsst.Pruner) if not name.startswith("_")}
    assert methods == {name for name in SIGNATURES if "." in name} | {f"Pruner.{name}" for name in PROPERTIES}
    for name in vit_rsst.__all__:
        assert inspect.getdoc(getattr(vit_rsst, name)), name
        assert name in dir(vit_rsst)
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        _ = vit_rsst.prunes


def test_errors_of_the_library_are_those_of_the_command_line():
    with pytest.raises(errors.RunError):
        vit_rsst.prune(None, 0.5)


def test_the_models_of_the_package_are_known_to_timm():
    vit_rsst.register_models()
    assert timm.create_model("vit_p8_tiny", num_classes=3).num_classes == 3


def test_the_page_names_everything_that_is_public():
    page = (tiny.REPOSITORY / "docs" / "own_loop.md").read_text(encoding="utf-8")
    page = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    quoted = {word for text in re.findall(r"`([^`]+)`", page) for word in re.findall(r"\w+", text)}
    keywords = {word for words in SIGNATURES.values() for word in words.replace("*", " ").split()} - {"self"}
    names = {part for name in (*SIGNATURES, *PROPERTIES) for part in name.split(".")} | keywords
    assert names - quoted <= {"module", "description"}

"""YAML 1.2 as recipes are read: scalars by the core schema, every fault with its line, nothing executed."""

import math

import pytest

from vit_rsst.recipe.strict_yaml import parse, parse_scalar


def only_problem(text: str) -> tuple[tuple[str, ...], int, str]:
    [problem] = parse(text).problems
    return problem


@pytest.mark.parametrize(
    "text, value",
    [
        ("5e-4", 5e-4),
        ("1e3", 1000.0),
        ("-1.5E+2", -150.0),
        (".5", 0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("010", 10),
        ("-7", -7),
        ("+1", 1),
        ("0o10", 8),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_core_scalars_have_the_types_of_yaml_1_2(text, value):
    found = parse_scalar(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    ["no", "yes", "on", "off", "y", "NO", "2:4", "1:30:00", "1_000", "2024-01-01", "0b11", "1e", "nan", "=", "<<"],
)
def test_what_yaml_1_1_reads_as_something_else_is_a_string(text):
    assert parse_scalar(text) == text


def test_nan_is_read_as_a_float():
    assert math.isnan(parse_scalar(".nan"))


@pytest.mark.parametrize("text", ["5e-4", "010", "null", "true", ""])
def test_quoted_scalars_are_strings(text):
    assert parse_scalar(f"'{text}'") == text
    assert parse_scalar(f'"{text}"') == text


def test_a_command_line_value_may_be_a_list_or_a_mapping():
    assert parse_scalar("[0.5, 8e-1, no]") == [0.5, 0.8, "no"]
    assert parse_scalar("{patch_size: 8, act: null}") == {"patch_size": 8, "act": None}


@pytest.mark.parametrize("text", ["[1, 2", "{a: 1"])
def test_invalid_yaml_in_a_value_is_a_one_line_error(text):
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_scalar(text)


@pytest.mark.parametrize(
    "text", ["a: b: c", "*nowhere", "&a b", "!!int x", "'open", "a #2", "# a", "- a", "| a", " a "]
)
def test_a_value_that_is_no_number_word_or_list_is_the_text_as_it_was_typed(text):
    assert parse_scalar(text) == text


@pytest.mark.parametrize("text", ["2024", "1e5", "[a]", "{a}", "null", "no", ""])
def test_a_field_of_strings_takes_what_was_typed(text):
    assert parse_scalar(text, {str}) == text
    assert parse_scalar(f"'{text}'", {str}) == text


def test_a_field_of_strings_that_may_be_null_or_true_takes_these_words():
    assert parse_scalar("null", {str, type(None)}) is None
    assert parse_scalar("true", {str, bool}) is True
    assert parse_scalar("2024", {str, bool, type(None)}) == "2024"


def test_every_key_has_its_line_number():
    document = parse("a: 1\n\n# comment\nb:\n  c: 2\n  d: {e: 3}\nlist:\n  - f: 4\n  - f: 5\n")
    assert document.lines == {
        ("a",): 1,
        ("b",): 4,
        ("b", "c"): 5,
        ("b", "d"): 6,
        ("b", "d", "e"): 6,
        ("list",): 7,
        ("list", "0", "f"): 8,
        ("list", "1", "f"): 9,
    }
    assert not document.problems


def test_duplicate_keys_are_reported_with_both_lines_and_the_first_wins():
    text = "a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\na: 4\n"
    document = parse(text)
    assert document.tree == {"a": 1, "b": {"c": 1, "d": 2}}
    assert [(path, line) for path, line, _ in document.problems] == [(("b", "c"), 5), (("a",), 6)]
    assert "line 3" in document.problems[0][2]
    assert "line 1" in document.problems[1][2]


def test_keys_are_compared_as_text():
    assert only_problem("1: x\n'1': y\n")[:2] == (("1",), 2)


def test_the_same_key_in_two_list_items_is_not_a_duplicate():
    assert parse("a:\n  - {b: 1}\n  - {b: 2}\n").tree == {"a": [{"b": 1}, {"b": 2}]}
    assert only_problem("a:\n  - {b: 1}\n  - b: 1\n    b: 2\n")[:2] == (("a", "1", "b"), 4)


def test_an_anchor_is_resolved():
    document = parse("a: &x {b: 5e-4}\nc: *x\nd: &y no\ne: *y\n")
    assert document.tree == {"a": {"b": 5e-4}, "c": {"b": 5e-4}, "d": "no", "e": "no"}
    assert not document.problems


def test_an_undefined_alias_is_an_error_with_its_line():
    path, line, sentence = only_problem("a: 1\nb: *x\n")
    assert (path, line) == ((), 2)
    assert "alias 'x'" in sentence


def test_an_alias_inside_its_own_anchor_is_an_error():
    assert only_problem("a: 1\nb: &x [1, *x]\n")[1] == 2


def test_a_merge_key_is_a_plain_key_which_the_recipe_rejects():
    assert parse("a: &x {b: 1}\nc:\n  <<: *x\n").tree["c"] == {"<<": {"b": 1}}


@pytest.mark.parametrize(
    "value",
    [
        "!!binary aGk=",
        "!!timestamp 2024-01-01",
        "!mine 5",
        "!!python/name:os.system ''",
        "!!python/object/apply:os.system [true]",
        "!!python/object:builtins.dict {b: 1}",
        "!mine [1]",
        "!!set {b, c}",
        "!!omap [{b: 1}]",
    ],
)
def test_a_custom_tag_is_rejected_with_its_line(value):
    path, line, sentence = only_problem(f"first: 1\na: {value}\n")
    assert (path, line) == (("a",), 2)
    assert "tag" in sentence


@pytest.mark.parametrize("value", ["!!int x", "!!float x", "!!bool maybe", "!!int 0o9"])
def test_a_value_that_does_not_match_its_tag_is_an_error_with_its_line(value):
    path, line, _ = only_problem(f"first: 1\na: {value}\n")
    assert (path, line) == (("a",), 2)


def test_an_absurdly_long_number_is_an_error_with_its_line():
    path, line, sentence = only_problem(f"first: 1\nseed: {'9' * 5000}\n")
    assert (path, line) == (("seed",), 2)
    assert "number too long (5,000 digits)" in sentence


@pytest.mark.parametrize("text", ["", "# only a comment\n", "\n\n", "\ufeff"])
def test_an_empty_file_is_an_empty_tree(text):
    document = parse(text)
    assert document.tree == {}
    assert not document.problems


@pytest.mark.parametrize("text, line", [("- a\n- b\n", 1), ("\n\n[1, 2]\n", 3), ("--- 5\n", 1), ("text\n", 1)])
def test_a_top_level_that_is_not_a_mapping_is_an_error_with_its_line(text, line):
    found_path, found_line, sentence = only_problem(text)
    assert (found_path, found_line) == ((), line)
    assert "mapping" in sentence


@pytest.mark.parametrize(
    "text, line",
    [
        ("a: 1\nb: {c: 1\nd: 2\n", 3),
        ("a: 1\nb:\n\tc: 1\n", 3),
        ("a: 1\n b: 2\n", 2),
        ("a: 'open\nb: 1\n", 3),
        ("a: 1\n---\nb: 2\n", 2),
    ],
)
def test_a_syntax_error_names_its_line(text, line):
    path, found, sentence = only_problem(text)
    assert path == ()
    assert found == line
    assert sentence.startswith("not valid YAML")


def test_a_control_character_is_an_error_rather_than_a_crash():
    assert only_problem("a: 1\nb: \x01\n")[2].startswith("not valid YAML")

"""A word on the command line becomes the drafter that it names, or one clear line."""

import sys
import types
from dataclasses import dataclass

import pytest
import torch
import yaml

from draftsmith.infer.drafters.registry import (
    Spec,
    load_drafter,
    load_drafters,
    parse_spec,
    short_names,
    split_outside_brackets,
)


@dataclass
class Fixed:
    depth: int = 3


@dataclass
class Learned:
    model: str
    num_draft_tokens: int = 5
    threshold: float = 0.5
    exits: list[int] | None = None
    shape: str = "chain"


class Open:
    def __init__(self, depth: int = 1, **settings):
        self.depth, self.settings = depth, settings


def made_by_factory(model: str, depth: int = 2) -> Learned:
    return Learned(model, depth)


REGISTRY = {
    "fixed": {"class_path": "fake_drafters.Fixed"},
    "small": {"class_path": "fake_drafters.Learned", "argument": "model", "init_args": {"num_draft_tokens": 4}},
    "open": {"class_path": "fake_drafters.Open"},
    "factory": {"class_path": "fake_drafters.made_by_factory", "argument": "model"},
    "gone": {"class_path": "fake_drafters.Gone"},
    "gone_module": {"class_path": "fake_drafters_gone.Gone"},
}


@pytest.fixture(autouse=True)
def fake_drafters(monkeypatch):
    module = types.ModuleType("fake_drafters")
    module.Fixed, module.Learned, module.Open, module.made_by_factory = Fixed, Learned, Open, made_by_factory
    monkeypatch.setitem(sys.modules, "fake_drafters", module)


@pytest.fixture
def write(tmp_path):
    def write_yaml(content, name="more.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pld", Spec("pld")),
        ("small:org/name", Spec("small", "org/name")),
        ("small:C:/model", Spec("small", "C:/model")),
        ("mine=small:m", Spec("small", "m", label="mine")),
        ("small:m=1", Spec("small", "m=1")),
        ("small:m[n=8,shape=tree]", Spec("small", "m", {"n": 8, "shape": "tree"})),
        ("a=sd2:m[exits=[6,9], t=0.5, on=true]", Spec("sd2", "m", {"exits": [6, 9], "t": 0.5, "on": True}, "a")),
        ("pld[max-depth=2]", Spec("pld", "", {"max_depth": 2})),
    ],
)
def test_a_spec_is_label_name_argument_and_typed_init_args(text, expected):
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "label", "parts", "init_args"),
    [
        ("mix=pld+small:m", "mix", [Spec("pld"), Spec("small", "m")], {}),
        ("both=small:m[n=8]+pld[a=[1,2]]", "both", [Spec("small", "m", {"n": 8}), Spec("pld", "", {"a": [1, 2]})], {}),
        ("m=(pld+small:m)[nodes=14]", "m", [Spec("pld"), Spec("small", "m")], {"nodes": 14}),
        ("pld+small:/a/b", "", [Spec("pld"), Spec("small", "/a/b")], {}),
    ],
)
def test_a_mix_is_a_list_of_specs(text, label, parts, init_args):
    spec = parse_spec(text)
    assert (spec.label, list(spec.parts), spec.init_args) == (label, parts, init_args)


def test_a_plus_in_a_path_or_a_value_makes_no_mix():
    assert parse_spec("small:/a+b/c") == Spec("small", "/a+b/c")
    assert parse_spec("small[model=a+b]") == Spec("small", "", {"model": "a+b"})
    assert parse_spec("pld[x=1e+3]").parts == ()


def test_a_mix_is_built_of_its_drafters_on_one_device(monkeypatch):
    mix = load_drafter("both=(pld[nodes=3]+empty)[nodes=9]")
    assert [type(one).__name__ for one in mix.drafters] == ["PromptLookup", "Empty"]
    assert (mix.nodes, mix.drafters[0].nodes, mix.name) == (9, 3, "pld+empty")
    assert list(load_drafters("both=pld+empty,pld,pld+oracle", short_names())) == ["both", "pld", "pld+oracle"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mix=", "'mix=' names no drafter: write mix=pld"),
        ("mix=pld+", "a mix takes two drafters or more"),
        ("mix=(pld)", "is not a mix"),
        ("mix=pld+pld", "names one drafter twice"),
        ("mix=pld[nodes=3]+pld", "two drafters named 'pld'"),
        ("mix=pld+nope", "unknown drafter 'nope'"),
        ("mix=pld+(rest:a+empty)", "no labels and no mixes inside it"),
        ("mix=pld+mine=empty", "no labels and no mixes inside it"),
        ("mix=(pld+empty)[nodez=2]", "has no argument 'nodez'"),
        ("mix=(pld+small:m)[sample=drawn]", "drafter that it is for, small:m[sample=drawn]"),
        ("a=pld+empty,a=pld", "two drafters are called 'a'"),
        ("a=pld,a=pld+empty", "two drafters are called 'a'"),
    ],
)
def test_a_wrong_mix_is_reported_in_one_line(spec, message):
    with pytest.raises(ValueError) as raised:
        load_drafters(spec, short_names())
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_commas_inside_brackets_do_not_split():
    assert split_outside_brackets("pld, small:m[exits=[1,2],b={a: 1, c: 2}],,x") == [
        "pld",
        "small:m[exits=[1,2],b={a: 1, c: 2}]",
        "x",
    ]


def test_the_part_after_the_colon_fills_the_registrys_argument():
    assert load_drafter("small:dir", registry=REGISTRY) == Learned("dir", num_draft_tokens=4)
    assert load_drafter("small[model=dir]", registry=REGISTRY) == Learned("dir", num_draft_tokens=4)
    assert load_drafter("factory:dir[depth=7]", registry=REGISTRY) == Learned("dir", 7)


def test_brackets_override_the_registry_and_take_the_declared_types():
    loaded = load_drafter("small:dir[num_draft_tokens=8,threshold=1,exits=[6,9],shape=tree]", registry=REGISTRY)
    assert loaded == Learned("dir", 8, 1.0, [6, 9], "tree")
    assert isinstance(loaded.threshold, float)
    assert load_drafter("small:dir[threshold=1e-3]", registry=REGISTRY).threshold == 0.001


def test_a_class_that_takes_any_argument_gets_them_as_they_are():
    loaded = load_drafter("open[depth=2,colour=red]", registry=REGISTRY)
    assert (loaded.depth, loaded.settings) == (2, {"colour": "red"})


def test_names_are_made_unique_and_keep_their_order():
    found = load_drafters("small:a,fixed,small:b,two=small:c,small:d", REGISTRY)
    assert list(found) == ["small", "fixed", "small-2", "two", "small-3"]
    assert [found[name].model for name in ("small", "small-2", "small-3")] == ["a", "b", "d"]
    assert load_drafters("", REGISTRY) == {}


def test_a_file_of_several_adds_them_all_by_name(write):
    path = write(
        {
            "short": {"class_path": "fake_drafters.Fixed", "init_args": {"depth": 1}},
            "long": {"class_path": "fake_drafters.Fixed", "init_args": {"depth": 9}},
        }
    )
    assert load_drafters(f"fixed,{path}", REGISTRY) == {"fixed": Fixed(3), "short": Fixed(1), "long": Fixed(9)}
    with pytest.raises(ValueError, match="names 2 drafters where one is wanted"):
        load_drafter(path, registry=REGISTRY)
    with pytest.raises(ValueError, match="without a label"):
        load_drafters(f"mine={path}", REGISTRY)


def test_a_file_of_one_is_called_by_its_label_or_its_stem(write):
    path = write({"class_path": "fake_drafters.Fixed", "init_args": {"depth": 1}})
    assert load_drafters(path, REGISTRY) == {"more": Fixed(1)}
    assert load_drafters(f"mine={path}[depth=2]", REGISTRY) == {"mine": Fixed(2)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "unknown drafter 'nope'; known are fixed, small:MODEL, open, factory:MODEL, gone, gone_module, or"),
        ("small", "drafter 'small' needs its model: write small:MODEL"),
        ("fixed:x", "'fixed' takes nothing after the colon, and got 'x'"),
        (
            "small:m[depth=3]",
            "'small' has no argument 'depth'; it takes model, num_draft_tokens, threshold, exits, shape",
        ),
        ("small:m[threshold=high]", "drafter 'small': argument threshold: Expected a <class 'float'>. Got value: high"),
        ("small:m[tree]", "'tree' in 'small:m[tree]' is not of the form key=value"),
        ("small:m[a=[1]", "brackets do not match"),
        ("small:m]", "brackets do not match"),
        ("small:m[a='x]", "is not YAML"),
        ("gone", "drafter 'gone': there is no fake_drafters.Gone in this installation"),
        ("gone_module", "drafter 'gone_module': there is no fake_drafters_gone.Gone in this installation"),
        ("a=fixed,a=fixed", "two drafters are called 'a'"),
    ],
)
def test_what_is_wrong_is_reported_in_one_line(spec, message):
    with pytest.raises(ValueError) as raised:
        load_drafters(spec, REGISTRY)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold class_path"),
        ({"a": {"init_args": {}}}, "'a' has no class_path"),
        ({"class_path": "fake_drafters.Fixed", "args": {}}, "unknown key 'args'"),
        ({"class_path": "Fixed"}, "'Fixed' is not a dotted path"),
        ({"class_path": "fake_drafters.Learned"}, "needs its argument model"),
    ],
)
def test_a_wrong_file_is_reported_in_one_line(content, message, write):
    with pytest.raises(ValueError, match=message):
        load_drafters(write(content), REGISTRY)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_drafters("nowhere.yaml", REGISTRY)


def test_a_missing_package_behind_a_drafter_is_not_mistaken_for_a_missing_drafter(tmp_path, monkeypatch):
    (tmp_path / "needy_drafter.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load_drafter("x", registry={"x": {"class_path": "needy_drafter.Needy"}})


class Bound:
    def __init__(self, device: str = "auto"):
        self.device = device

    def bind(self, target):
        self.target = target


def test_a_loaded_drafter_is_bound_to_its_target_and_stands_on_its_device(monkeypatch):
    monkeypatch.setattr(sys.modules["fake_drafters"], "Bound", Bound, raising=False)
    registry = {"bound": {"class_path": "fake_drafters.Bound"}}
    target = types.SimpleNamespace(model=torch.nn.Linear(1, 1))
    loaded = load_drafter("bound", target, registry=registry)
    assert (loaded.target, loaded.device) == (target, "cpu")
    assert load_drafter("bound[device=meta]", target, registry=registry).device == "meta"
    recorded = types.SimpleNamespace(model=None)
    assert load_drafter("bound", recorded, registry=registry).device == "auto"
    assert not hasattr(load_drafter("bound", registry=registry), "target")


def test_the_short_names_are_read_where_no_registry_is_given():
    assert load_drafter("pld[num_draft_tokens=3]").num_draft_tokens == 3
    assert {"pld", "rest", "dresd", "small", "sd2"} <= short_names().keys()


def test_what_the_policy_reads_may_be_given_to_every_drafter(write):
    assert load_drafter("fixed[depth=2,costs=none,calibration=c.json]", registry=REGISTRY).__dict__ == {
        "depth": 2, "costs": "none", "calibration": "c.json"
    }  # fmt: skip
    mine = write({"class_path": "fake_drafters.Fixed", "init_args": {"depth": 5, "costs": "costs.json"}})
    found = load_drafter(mine, registry=REGISTRY)
    assert (found.depth, found.costs) == (5, "costs.json")
    assert load_drafter("open[costs=none]", registry=REGISTRY).settings == {"costs": "none"}, (
        "a class that takes them gets them"
    )
    with pytest.raises(ValueError, match="has no argument 'cost'"):
        load_drafter("fixed[cost=none]", registry=REGISTRY)

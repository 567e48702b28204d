"""Builds drafters from how they are written: `pld`, `small:MODEL[num_draft_tokens=8]`, `mine=more.yaml`, and several as
one: `mix=pld+small:MODEL`.

Short names, name -> {class_path, argument, optional, init_args}, are in drafters.yaml; classes are imported by their
dotted paths when needed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser

if TYPE_CHECKING:
    from draftsmith.infer.contract.protocols import Target

Registry = Mapping[str, Mapping[str, Any]]

_LABEL = re.compile(r"([A-Za-z0-9_.+-]+)=(.+)", re.DOTALL)
# How a drafter of a mix begins: with a name, a file, a label or another mix.
_HEAD = re.compile(r"[\w.-]+($|[:\[=])|\(|.+\.ya?ml($|\[)")
_OPEN, _CLOSE = "[{(", "]})"
MIXED = "draftsmith.infer.drafters.Mixed"
# What the policy reads of every drafter (Policy.of in infer/costs/policy.py); a class need not take them itself.
FOR_THE_POLICY = ("calibration", "costs")


@dataclass(frozen=True, slots=True)
class Spec:
    """One drafter as written: `label=name:argument[key=value, ...]`; `parts`: those that a mix is made of."""

    name: str
    argument: str = ""
    init_args: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    parts: tuple[Spec, ...] = ()

    @property
    def is_file(self) -> bool:
        return not self.argument and not self.parts and self.name.endswith((".yaml", ".yml"))


def short_names() -> dict[str, dict[str, Any]]:
    """Short name -> {class_path, argument, optional, init_args}."""
    text = files("draftsmith.infer.drafters").joinpath("drafters.yaml").read_text(encoding="utf-8")
    registry: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return registry


def load_drafters(specs: str, registry: Registry) -> dict[str, Any]:
    """Label -> drafter for a comma-separated list. A second `small` is called small-2. All are checked before any is
    built, which may load weights."""
    return {label: build() for label, build in _checked_all(specs, registry).items()}


def load_drafter(spec: str, target: Target | None = None, *, registry: Registry | None = None) -> Any:
    """The one drafter that `spec` names, as `--drafters` takes it.

    With a target it is bound to it, and a draft model is loaded onto the target's device unless `spec` names another.
    """
    build = check_drafter(spec, registry)
    if target is None:
        return build()
    if target.model is not None and "device" in inspect.signature(build).parameters.keys() - build.keywords.keys():
        build = functools.partial(build, device=str(next(target.model.parameters()).device))
    drafter = build()
    drafter.bind(target)
    return drafter


def check_drafter(spec: str, registry: Registry | None = None) -> functools.partial[Any]:
    """Check what `spec` says, without loading weights; the result builds the drafter."""
    found = _checked_all(spec, short_names() if registry is None else registry)
    if len(found) != 1:
        raise ValueError(f"{spec!r} names {len(found)} drafters where one is wanted")
    (build,) = found.values()
    return build


def _checked_all(specs: str, registry: Registry) -> dict[str, functools.partial[Any]]:
    found: dict[str, functools.partial[Any]] = {}
    for text in split_outside_brackets(specs):
        spec = parse_spec(text)
        if spec.parts:
            if spec.label and spec.label in found:
                raise ValueError(f"two drafters are called {spec.label!r}; give each its own label")
            found[_unused(spec.label or spec.name, found)] = _mixed(spec, registry)
            continue
        for label, class_path, init_args in _entries(spec, registry):
            own = spec.label or spec.is_file
            if own and label in found:
                raise ValueError(f"two drafters are called {label!r}; give each its own label: LABEL={text}")
            found[_unused(label, found)] = checked(label, class_path, init_args)
    return found


def _mixed(spec: Spec, registry: Registry) -> functools.partial[Any]:
    """Check a mix and its drafters; the result builds it, with its draft models on one device."""
    builds: list[functools.partial[Any]] = []
    for part in spec.parts:
        if part.label or part.parts:
            raise ValueError(f"{spec.name!r}: a mix is a plain list of drafters: no labels and no mixes inside it")
        found = [checked(*entry) for entry in _entries(part, registry)]
        if len(found) != 1:
            raise ValueError(f"{part.name!r} names {len(found)} drafters where a mix takes one")
        builds += found
    names = [(part.name, part.argument, str(part.init_args)) for part in spec.parts]
    if len(set(names)) < len(names):
        raise ValueError(f"{spec.name!r} names one drafter twice")
    _check_options(spec, builds)
    mix = checked(spec.label or spec.name, MIXED, {"drafters": [], **spec.init_args})
    return functools.partial(_build_mixed, mix, builds)


def _check_options(spec: Spec, builds: Sequence[functools.partial[Any]]) -> None:
    """ValueError for an option of a mix that belongs to one of its drafters."""
    own = inspect.signature(import_class(spec.name, MIXED)).parameters
    for option, value in spec.init_args.items():
        takes = [part for part, build in zip(spec.parts, builds) if option in inspect.signature(build).parameters]
        if option not in own and takes:
            written = [f"{part.name}{part.argument and f':{part.argument}'}[{option}={value}]" for part in takes]
            raise ValueError(
                f"{spec.name!r} is a mix and has no {option}: give it to the drafter that it is for, "
                + " or ".join(written)
            )


def _build_mixed(mix: Callable[..., Any], builds: Sequence[functools.partial[Any]], device: str | None = None) -> Any:
    given = [
        {"device": device}
        if device is not None and "device" in inspect.signature(build).parameters.keys() - build.keywords.keys()
        else {}
        for build in builds
    ]
    return mix(drafters=[build(**where) for build, where in zip(builds, given)])


def split_outside_brackets(text: str, at: str = ",") -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth < 0:
            break
        if character == at and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise ValueError(f"brackets do not match in {text!r}")
    return [part.strip() for part in parts if part.strip()]


def parse_spec(text: str) -> Spec:
    """Parse `label=name:argument[key=value, ...]`, the values as YAML; or a mix, `label=A+B` or `(A+B)[key=value]`."""
    label, rest = "", text.strip()
    matched = _LABEL.fullmatch(rest)
    if matched:
        label, rest = matched.groups()
    elif rest.endswith("="):
        raise ValueError(f"{text!r} names no drafter: write {rest}pld, or for a mix {rest}pld+small:MODEL")
    parts = _parts(rest)
    if parts:
        return _mix(parts, {}, label)
    if rest.startswith("("):
        inside, _, after = rest[1:].rpartition(")")
        parts = _parts(inside)
        if len(parts) < 2 or (after and not (after.startswith("[") and after.endswith("]"))):
            raise ValueError(f"{text!r} is not a mix: write two drafters or more, (A+B) or (A+B)[nodes=16]")
        init_args = _init_args(after[1:-1], text)
        return _mix(parts, init_args, label)
    init_args = {}
    if rest.endswith("]"):
        start = rest.find("[")
        init_args = _init_args(rest[start + 1 : -1], text)
        rest = rest[:start]
    name, _, argument = rest.partition(":")
    return Spec(name.strip(), argument.strip(), init_args, label)


def _mix(parts: Sequence[str], init_args: dict[str, Any], label: str) -> Spec:
    specs = tuple(map(parse_spec, parts))
    return Spec("+".join(spec.name for spec in specs), "", init_args, label, specs)


def _parts(text: str) -> list[str]:
    """The drafters of a mix; none if `text` is a single one. In brackets a plus is just a plus."""
    parts = split_outside_brackets(text, "+")
    if "+" not in text or not all(_HEAD.match(part) for part in parts):
        return []
    if len(parts) < 2 and text.strip() != text.strip("+ "):
        raise ValueError(f"{text!r} has nothing on one side of its plus: a mix takes two drafters or more, A+B")
    return parts if len(parts) > 1 else []


def _init_args(text: str, whole: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in split_outside_brackets(text):
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{pair!r} in {whole!r} is not of the form key=value")
        found[key.strip().replace("-", "_")] = _yaml(value, f"the value of {key.strip()} in {whole!r}")
    return found


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _entries(spec: Spec, registry: Registry) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(label, class path, arguments) of every drafter that `spec` names."""
    if spec.is_file:
        yield from _file_entries(spec)
        return
    if spec.name not in registry:
        names = ", ".join(name + _placeholder(entry) for name, entry in registry.items())
        raise ValueError(f"unknown drafter {spec.name!r}; known are {names}, or a .yaml file")
    entry = registry[spec.name]
    init_args = {**entry.get("init_args", {}), **spec.init_args}
    argument = entry.get("argument")
    if argument and spec.argument:
        init_args[argument] = spec.argument
    elif spec.argument:
        raise ValueError(f"drafter {spec.name!r} takes nothing after the colon, and got {spec.argument!r}")
    elif argument and argument not in init_args and not entry.get("optional"):
        raise ValueError(f"drafter {spec.name!r} needs its {argument}: write {spec.name}{_placeholder(entry)}")
    yield spec.label or spec.name, entry["class_path"], init_args


def _placeholder(entry: Mapping[str, Any]) -> str:
    if not entry.get("argument"):
        return ""
    written = f":{entry['argument'].upper()}"
    return f"[{written}]" if entry.get("optional") else written


def _file_entries(spec: Spec) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The drafters of a YAML file: one {class_path, init_args}, or several by name."""
    path = Path(spec.name)
    content = _yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must hold class_path and init_args, or several of them by name")
    single = "class_path" in content
    if not single and (spec.label or spec.init_args):
        raise ValueError(f"{path} holds several drafters by name: use it without a label and without [arguments]")
    named = {spec.label or path.stem: content} if single else content
    for label, entry in named.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("class_path"), str):
            raise ValueError(f"{path}: {label!r} has no class_path")
        unknown = set(entry) - {"class_path", "init_args"}
        if unknown:
            raise ValueError(
                f"{path}: {label!r} has the unknown key {min(unknown)!r}; class_path and init_args are known"
            )
        yield str(label), entry["class_path"], {**(entry.get("init_args") or {}), **spec.init_args}


def _unused(label: str, found: Mapping[str, Any]) -> str:
    """`label`, or `label-2`, `label-3`, ... if it is taken."""
    candidate, count = label, 1
    while candidate in found:
        count += 1
        candidate = f"{label}-{count}"
    return candidate


def checked(label: str, class_path: str, init_args: Mapping[str, Any]) -> functools.partial[Any]:
    """Import a class by its dotted path and convert its arguments to their declared types; the result builds it."""
    built = import_class(label, class_path)
    try:
        parameters = inspect.signature(built).parameters.values()
    except ValueError as error:
        raise ValueError(
            f"drafter {label!r}: {class_path} has no signature, so its arguments cannot be checked; name a class or a "
            "function that is written in Python"
        ) from error
    names = [entry.name for entry in parameters if entry.kind not in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD)]
    takes_any = any(entry.kind is entry.VAR_KEYWORD for entry in parameters)
    others = [] if takes_any else sorted(set(init_args) - set(names))
    left = {name: init_args[name] for name in others if name in FOR_THE_POLICY}
    init_args = {name: value for name, value in init_args.items() if name not in left}
    unknown = [name for name in others if name not in left]
    if unknown:
        raise ValueError(f"drafter {label!r} has no argument {unknown[0]!r}; it takes {', '.join(names) or 'none'}")
    for entry in parameters:
        if entry.name in names and entry.default is entry.empty and entry.name not in init_args:
            raise ValueError(f"drafter {label!r} needs its argument {entry.name}: write NAME[{entry.name}=...]")
    declared = {name: value for name, value in init_args.items() if name in names}
    build = functools.partial(built, **{**init_args, **_typed(label, built, declared)})
    return functools.partial(_with_attributes, build, left) if left else build


def _with_attributes(build: Callable[[], Any], attributes: Mapping[str, Any]) -> Any:
    drafter = build()
    for name, value in attributes.items():
        setattr(drafter, name, value)
    return drafter


def _typed(label: str, built: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given`, converted to the declared types; ValueError if a value does not fit."""
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    add = parser.add_class_arguments if inspect.isclass(built) else parser.add_function_arguments
    add(built, fail_untyped=False, as_group=False)
    try:
        converted = vars(parser.instantiate(parser.parse_object(given)))
    except ArgumentError as error:
        message = re.sub(r'Parser key "([^"]+)":', r"argument \1:", str(error))
        raise ValueError(f"drafter {label!r}: {' '.join(message.split())}") from error
    return {name: converted[name] for name in given}


def import_class(label: str, class_path: str) -> Callable[..., Any]:
    """The class, or factory, at a dotted path."""
    module_name, _, class_name = class_path.rpartition(".")
    absent = f"drafter {label!r}: there is no {class_path} in this installation"
    if not module_name:
        raise ValueError(f"drafter {label!r}: class_path {class_path!r} is not a dotted path")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, and one that it imports does not
        raise ValueError(absent) from error
    built = getattr(module, class_name, None)
    if not callable(built):
        raise ValueError(absent)
    return built

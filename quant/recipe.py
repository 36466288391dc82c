"""Recipes: YAML -> frozen Recipe. Unknown keys are errors that name the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from quant.kernels import activation as activations
from quant.kernels.format import Format, from_config
from quant.passes import base
from quant.train.pace import seconds_of

T = TypeVar("T", bound=BaseModel)
FOLDER = Path(__file__).parent / "recipes"


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(Frozen):
    """How much data: `tokens` in windows of `length` for text, `clips` for audio. source: as `--calib`.

    expert_tokens: an expert that sees fewer is quantized from its weights alone. On SmolLM2-135M, GPTQ at 4 bits with 32
    tokens loses on other text what it loses without data (down_proj of block 10, K = 1536) or 7 % less (gate_proj, K = 576).
    mask_token: of a masked-diffusion model; null: what its config.json says; none: plain text. visible_weight: of errors at
    positions that are not masked, where those that are weigh 1 (quant/masked.py). padding_weight: of errors at the frames that
    pad a clip, where speech weighs 1. Attention reads those frames too: GPTQ that never saw them makes 8-bit Whisper tiny.en
    worse than round-to-nearest (mean KL 0.0035; 0.0021 with weights of 0.1 to 1), and with 1 most of the data is silence.
    """

    tokens: int = Field(default=32768, ge=1)
    length: int = Field(default=512, ge=8)
    clips: int = Field(default=40, ge=1)
    expert_tokens: int = Field(default=32, ge=1)
    mask_token: int | Literal["none"] | None = None
    visible_weight: float = Field(default=1.0, gt=0, le=1)
    padding_weight: float = Field(default=0.1, ge=0, le=1)
    source: str | None = None


class Rule(Frozen):
    """Layers whose name matches `match`, a shell pattern or several. skip leaves them in float; format and activation override.

    Of several patterns one must match, so that a rule may name what layers are called in one model and in another.
    """

    match: str | tuple[str, ...]
    skip: bool = False
    format: dict[str, Any] = {}
    activation: str | dict[str, Any] | None = None


class Softmax(Frozen):
    """Attention probabilities are rounded to powers of sqrt(2) of so many bits when the model runs; see kernels/softmax.py."""

    bits: int = Field(default=4, ge=2, le=8)


class Recipe(Frozen):
    """passes: name -> options, in order. format, activation: as their `config`. rules: the first that matches decides.

    bits: the most stored bits per weight; layers without a rule then get formats by their sensitivity (quant/budget.py).
    head: the format of the output head, and of the input embedding where that is its table; null leaves it in float. A
    number of bits stands for int_group in groups of 64, symmetric with 8 bits. head_optional: a model whose head cannot be
    packed keeps it in float, and the plan says so; an override of `head` makes it an error. softmax: null leaves
    attention in float. budget: a time for the run, as 10m or 1h, which then decides how many steps are trained.
    """

    name: str
    description: str
    format: dict[str, Any]
    activation: str | dict[str, Any]
    passes: tuple[dict[str, dict[str, Any] | None], ...]
    rules: tuple[Rule, ...] = ()
    bits: float | None = Field(default=None, gt=0, le=16)
    head: dict[str, Any] | None = None
    head_optional: bool = False
    softmax: Softmax | None = None
    budget: str | None = None
    calibration: Calibration = Calibration()
    seed: int = 0

    @field_validator("head", mode="before")
    @classmethod
    def head_from_bits(cls, value: Any) -> Any:
        """A number of bits as a format."""
        if type(value) is not int:
            return value
        return {"name": "int_group", "bits": value, "group": 64, "symmetric": value == 8}

    def build_passes(self) -> list[base.BasePass]:
        """The passes with their options checked."""
        built = []
        for entry in self.passes:
            if len(entry) != 1:
                raise ValueError(f"recipe {self.name}: a pass is one entry `- name: options`, given {entry}")
            ((name, options),) = entry.items()
            if name not in base.names():
                raise ValueError(f"recipe {self.name} has no valid pass {name!r}; {nearest(name, base.names())}")
            built.append(checked(base.find(name), options or {}, f"pass {name}"))
        return built

    def quantizer(self) -> base.Quantizer:
        """The one pass that chooses codes. Raises ValueError for none or several, and for several that move its target."""
        passes = self.build_passes()
        found = [p for p in passes if isinstance(p, base.Quantizer)]
        if (movers := sum(isinstance(p, base.Corrector) for p in passes)) > 1:
            raise ValueError(f"recipe {self.name} has {movers} passes that move the target, each by all that is lost; keep one")
        if len(found) != 1:
            raise ValueError(f"recipe {self.name} has {len(found)} quantizers; exactly one pass must choose the codes")
        return found[0]

    def tuners(self) -> list[base.Tuner]:
        """The passes that train the packed model, in order."""
        return [p for p in self.build_passes() if isinstance(p, base.Tuner)]

    def trains(self) -> bool:
        """Whether a pass trains blocks or the packed model."""
        return any(isinstance(p, base.Tuner | base.BlockTuner) for p in self.build_passes())

    def seconds(self) -> float | None:
        """The time for the run, if one is given. Raises ValueError for a recipe that trains nothing."""
        if self.budget is None:
            return None
        if not self.trains():
            raise ValueError(f"recipe {self.name} trains nothing, so a budget of {self.budget} changes nothing; leave it out")
        return seconds_of(self.budget)

    def with_steps(self, steps: Mapping[str, int]) -> Recipe:
        """The same without a budget: pass name -> its steps."""
        passes = [{n: {**(o or {}), "steps": steps[n]} if n in steps else o} for entry in self.passes for n, o in entry.items()]
        return self.model_copy(update={"passes": tuple(passes), "budget": None})

    def base_format(self) -> Format:
        """The format that layers without a rule get."""
        return from_config(self.format)

    def activation_of(self, rule: Rule | None) -> activations.Activation:
        """The activation rule of layers that `rule` decides, None being those without a rule."""
        return activations.from_config(self.activation if rule is None or rule.activation is None else rule.activation)

    def head_format(self) -> Format | None:
        """The format of the output head; None leaves it in float."""
        return None if self.head is None else from_config(self.head)

    def dump(self) -> str:
        """YAML that `load_recipe` reads back to an equal recipe."""
        return str(yaml.safe_dump(self.model_dump(), sort_keys=False, width=120))


def nearest(given: str, allowed: Iterable[str]) -> str:
    """ "did you mean X?" or the list of what is allowed."""
    options = sorted(allowed)
    close = difflib.get_close_matches(given, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(options) or 'none'}"


def checked(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    """cls(**values), with the first thing that does not fit told in one line."""
    try:
        return cls(**values)
    except ValidationError as error:
        found = error.errors()
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])  # a misspelt key is missing, too
        path = [str(part) for part in first["loc"]]
        where = ".".join(path) or what
        if first["type"] == "extra_forbidden":
            scope: type[BaseModel] = cls
            for part in path[:-1]:
                inner = scope.model_fields[part].annotation if part in scope.model_fields else None
                models = (t for t in (inner, *get_args(inner)) if isinstance(t, type) and issubclass(t, BaseModel))
                scope = next(models, Rule)
            raise ValueError(f"{what} has no key {where!r}; {nearest(path[-1], scope.model_fields)}") from None
        given = f", given {first['input']!r}" if first["type"] != "missing" else ""
        raise ValueError(f"{what}: {where}: {first['msg'].lower()}{given}") from None


def available() -> dict[str, str]:
    """Recipe name -> description, for every recipe shipped."""
    return {path.stem: yaml.safe_load(path.read_text())["description"] for path in sorted(FOLDER.glob("*.yaml"))}


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """A shipped recipe by name, or a .yaml file, with `key.key=value` overrides (values are YAML).

    A key is a recipe key, a path into one (format.group, calibration.tokens), or pass.option (dgq.round). Raises
    ValueError for unknown names and keys.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ValueError(
                f"recipe file {name} does not exist; give a recipe name ({', '.join(available())}) or a .yaml file"
            )
    else:
        path = FOLDER / f"{name}.yaml"
        if name not in available():
            raise ValueError(f"unknown recipe {name!r}; {nearest(name, available())}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a recipe: expected keys such as name, format, passes")
    for override in overrides:
        apply_override(values, override)
    recipe = checked(Recipe, values, f"recipe {path.stem}")
    for rule in recipe.rules:
        recipe.activation_of(rule)
    recipe.activation_of(None), recipe.base_format(), recipe.head_format(), recipe.quantizer(), recipe.seconds()
    return recipe


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.key=value` in a recipe's raw values."""
    key, eq, text = override.partition("=")
    if not eq:
        raise ValueError(f"--set {override!r} has no '='; write key=value, for instance format.group=128")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {override!r}: {text!r} is not a YAML value; write a number, a word, or [a, b]") from None
    *path, leaf = key.strip().split(".")
    passes = {name: entry for entry in values.get("passes") or [] if isinstance(entry, dict) for name in entry}
    top = path[0] if path else leaf
    if top in passes:
        if len(path) != 1:
            raise ValueError(f"--set {override!r} does not name one option of pass {top}; write {top}.option=value")
        passes[top][top] = (passes[top][top] or {}) | {leaf: value}
        return
    if top == "head":
        values["head_optional"] = False  # who asks for a head gets it or an error
    if top not in Recipe.model_fields:
        raise ValueError(f"recipe {values.get('name')} has no key {top!r}; {nearest(top, [*Recipe.model_fields, *passes])}")
    scope: Any = values
    for part in path:
        if part == "activation" and isinstance(scope.get(part), str):  # a name alone stands for a rule with its defaults
            scope[part] = {"name": scope[part]}
        scope = scope.setdefault(part, {})
        if not isinstance(scope, dict):
            raise ValueError(f"--set {override!r}: {part} has no keys of its own; set {part} as a whole")
    scope[leaf] = value

"""Groupings: which of the scaled tensors share one scale.

A grouping is a partition of the scaled tensors; the tensors of one group share one scale. "additive" sets those
apart that are added to activations, "model" is one group of all tensors, "tensor" makes each tensor its own group, and
a mapping {group: regular expression} groups them by name.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from torch import nn

from nio_hf.errors import ConfigError, Problem, listed

Kind = Literal["input", "additive", "trunk", "transition", "head", "norm", "bias", "vector"]
_Pattern = tuple[type[nn.Module], tuple["_Pattern", ...]]

_LISTS = (nn.ModuleList, nn.Sequential)
_TABLES = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_MOST_NAMED = 2
_LEAST_MATRICES = 2
"""Number of weight matrices that make an element of a list a block, besides those of the blocks inside it."""


def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """Kind of every parameter, told by module type, shape and place in the model.

    A weight matrix is a parameter of two or more dimensions whose own name contains "weight", outside embeddings and
    normalisation layers. A parameter of three or more dimensions inside a block is a stack of weight matrices,
    whatever its name (the experts of a mixture). A block is an element of a `ModuleList` or `Sequential` that is
    repeated (another element in the model has its class, or its list has no other element) and holds two or more
    weight matrices besides those of blocks inside it. "Before" and "behind" refer to the order in which the model
    registers its modules.

    The kinds are our choice:

    - "input": the token table, and the weight matrices before the first block (patch convolution, stem). What
      `get_input_embeddings()` of the model or of a part of it gives is the input; in a model without that method, the
      first embedding table or weight matrix is. A token table that is tied to the output layer is "input".
    - "additive": what is added to activations or attention scores. These are the other embedding tables, and the
      other parameters of two or more dimensions: position embeddings, class and mask tokens, position bias tables.
    - "trunk": the weight matrices inside blocks, shortcut convolutions included. Without blocks, the weight matrices
      between the first and the last.
    - "transition": the weight matrices between blocks, such as those that lead from stage to stage.
    - "head": the weight matrices behind the last block (pooler, classifier). Without blocks, the last weight matrix.
    - "norm": the weights of normalisation layers.
    - "bias": the biases.
    - "vector": the other parameters that hold one number a channel or a head, such as layer scale and logit scale.

    Args:
        model: Any module.

    Returns:
        {parameter name: kind}, in the order of `model.named_parameters()`; tied parameters appear once.
    """
    parameters = dict(model.named_parameters())
    owners = _owners(model)
    kinds = {name: _kind(parameter, *owners[id(parameter)]) for name, parameter in parameters.items()}
    in_blocks = _parameters_of(blocks_of(model))
    for name, parameter in parameters.items():
        if kinds[name] == "trunk" and id(parameter) not in in_blocks and "weight" not in owners[id(parameter)][1]:
            kinds[name] = "additive"
    layers = {name: id(parameters[name]) in in_blocks for name, kind in kinds.items() if kind == "trunk"}
    kinds |= _kinds_by_place(layers)
    return kinds | dict.fromkeys(_input_names(model, kinds), "input")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost blocks of a model, see [`kinds_of`], in the order in which it registers them."""
    owners = _owners(model)
    matrices = {
        id(parameter) for parameter in model.parameters() if _kind(parameter, *owners[id(parameter)]) == "trunk"
    }
    return _blocks(model, _repeated_elements(model), matrices)


def entries_of(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of the first block of each list of blocks, in the order of the lists."""
    names = {module: name for name, module in model.named_modules()}
    blocks = set(blocks_of(model))
    lists = (module for module in model.modules() if isinstance(module, _LISTS))
    firsts = (next((child for child in module if child in blocks), None) for module in lists)
    return {names[block]: block for block in firsts if block is not None}


def group_tensors(
    model: nn.Module, scalable: Mapping[str, Kind], groups: str | Mapping[str, str]
) -> dict[str, list[str]]:
    """Tensors of each group.

    Args:
        model: Module that owns the tensors.
        scalable: {name of a tensor that may be scaled, as in `model.named_parameters()`: its kind}.
        groups: "additive" (see [`kinds_of`]), "model", "tensor", or a mapping {group: regular expression}. The
            expressions are searched in the parameter names.

    Returns:
        {group: names of its tensors}, in parameter order; the groups of a mapping keep its order. A tensor that no
        expression matches is in no group.

    Raises:
        ConfigError: Lists every problem: an unknown word, an empty mapping, an invalid expression, an expression that
            matches no parameter or only parameters that cannot be scaled, a tensor that two expressions claim.
    """
    ordered = [name for name, _ in model.named_parameters() if name in scalable]
    if isinstance(groups, Mapping):
        return _group_by_expression(model, ordered, groups)
    if groups == "model":
        return {"model": ordered}
    if groups == "tensor":
        return {name: [name] for name in ordered}
    if groups == "additive":
        apart = [name for name in ordered if scalable[name] == "additive"]
        others = [name for name in ordered if scalable[name] != "additive"]
        return {group: members for group, members in (("additive", apart), ("others", others)) if members}
    fix = "Choose one of additive, model, tensor, or give a mapping {group: regular expression}"
    raise ConfigError(Problem("NIOConfig.groups", f"{groups!r}", fix))


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """First owner of each parameter, and the name that the parameter has there."""
    owners: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), (module, name))
    return owners


def _kind(parameter: nn.Parameter, owner: nn.Module, name: str) -> Kind:
    """Kind by owner and shape; "trunk" stands for a weight matrix at any place."""
    shape = parameter.shape
    if isinstance(owner, _TABLES):
        return "additive"
    if name == "bias" or ("bias" in name and len(shape) < 2):
        return "bias"
    if _is_norm(owner):
        return "norm"
    if len(shape) < 2:
        return "vector"
    is_stack = shape[0] > 1 and sum(length > 1 for length in shape) >= 3 and "bias" not in name
    if "weight" in name or is_stack:
        return "trunk"
    is_per_channel = len(shape) > 2 and shape[-2:].numel() == 1
    return "vector" if is_per_channel else "additive"


def _is_norm(module: nn.Module) -> bool:
    """Whether a module normalises. Its type or name tells, or a weight in the shape of the bias, which no layer has."""
    own = dict(module.named_parameters(recurse=False))
    is_named = "norm" in type(module).__name__.lower() and all(parameter.ndim < 2 for parameter in own.values())
    is_elementwise = own.keys() >= {"weight", "bias"} and own["weight"].shape == own["bias"].shape
    return isinstance(module, _NORMS) or is_named or is_elementwise


def _repeated_elements(model: nn.Module) -> set[int]:
    """Identities of the elements of lists that are alone in their list or have an element like them in the model."""
    lists = [list(module.children()) for module in model.modules() if isinstance(module, _LISTS)]
    counts = collections.Counter(_pattern(element) for elements in lists for element in elements)
    return {
        id(element) for elements in lists for element in elements if len(elements) == 1 or counts[_pattern(element)] > 1
    }


def _pattern(module: nn.Module) -> _Pattern:
    """The pattern that repeated elements share: their class and, for lists of modules, the classes inside."""
    is_list = type(module) in _LISTS
    return type(module), tuple(_pattern(child) for child in module.children()) if is_list else ()


def _blocks(module: nn.Module, repeated: set[int], matrices: set[int]) -> list[nn.Module]:
    """Blocks inside a module. A stage, whose blocks hold all but at most one of its matrices, is none.

    Args:
        module: Module to search, itself no block.
        repeated: Identities of the elements that may be blocks.
        matrices: Identities of the weight matrices.
    """
    blocks = []
    for child in module.children():
        inner = _blocks(child, repeated, matrices)
        own = (_parameters_of([child]) & matrices) - _parameters_of(inner)
        blocks += [child] if id(child) in repeated and len(own) >= _LEAST_MATRICES else inner
    return blocks


def _parameters_of(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _kinds_by_place(layers: Mapping[str, bool]) -> dict[str, Kind]:
    """Kinds of the weight matrices.

    Args:
        layers: {name of a weight matrix: whether it is inside a block}, in order.
    """
    names = list(layers)
    body = [i for i, name in enumerate(names) if layers[name]] or list(range(len(names) - 1))
    kinds: dict[str, Kind] = dict.fromkeys(names, "head")
    if body:
        kinds |= dict.fromkeys(names[: body[0]], "input")
        kinds |= dict.fromkeys(names[body[0] : body[-1] + 1], "transition")
    return kinds | dict.fromkeys([names[i] for i in body], "trunk")


def _input_names(model: nn.Module, kinds: Mapping[str, Kind]) -> list[str]:
    """Names of the token tables or first weight matrices, besides the weight matrices before the first block."""
    given = [module for module in map(_input_embeddings, model.modules()) if module is not None]
    layers = _parameters_of(given)
    tokens = {id(module.weight) for module in given if isinstance(module, _TABLES)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, _TABLES)}
    names: list[str] = []
    candidates: list[str] = []
    for name, parameter in model.named_parameters():
        is_layer = kinds[name] in ("input", "trunk", "transition", "head")
        if is_layer or id(parameter) in tables:
            candidates.append(name)
        if (is_layer and id(parameter) in layers) or id(parameter) in tokens:
            names.append(name)
    return names or candidates[:1]


def _input_embeddings(module: nn.Module) -> nn.Module | None:
    """Module that `get_input_embeddings()` gives, where there is one."""
    method = getattr(module, "get_input_embeddings", None)
    try:
        given = method() if callable(method) else None
    except (NotImplementedError, AttributeError):
        return None
    return given if isinstance(given, nn.Module) else None


def _group_by_expression(
    model: nn.Module, scalable: Sequence[str], expressions: Mapping[str, str]
) -> dict[str, list[str]]:
    if not expressions:
        fix = "Give at least one {group: regular expression}"
        raise ConfigError(Problem("NIOConfig.groups", "an empty mapping", fix))
    problems = []
    grouping: dict[str, list[str]] = {}
    for group, expression in expressions.items():
        problem = _expression_problem(expression, group) or _match_problem(model, set(scalable), expression, group)
        if problem is not None:
            problems.append(problem)
        else:
            grouping[group] = [name for name in scalable if re.search(expression, name)]
    problems += _overlap_problems(grouping)
    if problems:
        raise ConfigError(*problems)
    return grouping


def _where(group: str) -> str:
    return f'NIOConfig.groups["{group}"]'


def _expression_problem(expression: object, group: str) -> Problem | None:
    fix = 'Give a regular expression, e.g. "attention"'
    if not isinstance(expression, str):
        return Problem(_where(group), f"{expression!r}", fix)
    try:
        re.compile(expression)
    except re.error as error:
        return Problem(_where(group), f"{expression!r} is no regular expression: {error}", fix)
    return None


def _match_problem(model: nn.Module, scalable: set[str], expression: str, group: str) -> Problem | None:
    """Problem of an expression that no scalable tensor matches."""
    parameters = dict(model.named_parameters())
    matches = [name for name in parameters if re.search(expression, name)]
    if not scalable.isdisjoint(matches):
        return None
    if matches:
        names = listed([f"{name} ({_reason(parameters[name])})" for name in matches], _MOST_NAMED)
        found = f"{expression!r} matches only tensors that cannot be scaled: {names}"
        return Problem(_where(group), found, "Match tensors that are trained, used and not all zero")
    return Problem(_where(group), f"{expression!r} matches no parameter", _name_to_match(model, expression))


def _name_to_match(model: nn.Module, expression: str) -> str:
    """Advice on an expression without a match. It may match a tied tensor by a name other than its first."""
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if re.search(expression, name):
            return f"Match {parameters[id(parameter)]} instead, which {name} is tied to"
    return f"Match names such as {next(iter(parameters.values()))}"


def _reason(parameter: nn.Parameter) -> str:
    if not parameter.requires_grad:
        return "frozen"
    return "left out or unused" if parameter.any() else "zero"


def _overlap_problems(grouping: Mapping[str, Sequence[str]]) -> list[Problem]:
    """One problem for each two groups that claim the same tensors."""
    fix = "Change one of the two expressions, so that each tensor is in one group"
    problems = []
    for (first, names), (second, others) in itertools.combinations(grouping.items(), 2):
        shared = sorted(set(names) & set(others), key=names.index)
        if shared:
            found = f'claims {listed(shared, _MOST_NAMED)}, as the group "{first}" does'
            problems.append(Problem(_where(second), found, fix))
    return problems

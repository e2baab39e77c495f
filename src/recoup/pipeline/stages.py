"""Which modules of a model form which stage of its pipeline.

A stage is a list of module names; a name covers its whole subtree.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recoup.errors import RecoupError
from recoup.models.cifar import CifarResNet
from recoup.models.digits import DigitsNet
from recoup.models.mobilenet import MobileNet
from recoup.models.vgg import VGG
from recoup.network.checks import is_module
from recoup.pipeline import norms

Stages = list[list[str]]
NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase, *norms.NORMS)
JOINING = (*NORMS, nn.PReLU)  # with parameters, but part of the layer before
POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)


def automatic(model: nn.Module) -> Stages:
    """The stages of a Sequential-like model, a ResNet for CIFAR or a VGG of `recoup.models`.

    A stage is a layer with the norm and the activation behind it; in a VGG convolution and activation are apart. Each
    residual sum, pooling and the loss is a stage of its own without parameters: an empty list, which only counts for
    the delays.

    Raises:
        RecoupError: another model: list the stages yourself.

    Source: one stage per layer group, as in the paper; its exact cut is not published, so the counts are ours.

    >>> automatic(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    [['0', '1'], ['2'], []]
    """
    is_module(model, "pipeline.automatic")
    if isinstance(model, nn.Sequential):
        return [*_sequence(model, "", []), []]
    if isinstance(model, CifarResNet):
        return _cifar_resnet(model)
    if isinstance(model, VGG):
        return _vgg(model)
    if isinstance(model, DigitsNet | MobileNet):
        return [*_sequence(model.features, "features.", []), [], ["classifier"], []]  # pooling, classifier, loss
    raise RecoupError(
        f"pipeline.automatic: no rule for a {type(model).__name__}; give the stages as lists of module names, such as "
        f"{[[name] for name, _ in list(model.named_children())[:3]]}"
    )


def _sequence(model: nn.Sequential, prefix: str, stages: Stages) -> Stages:
    """A layer starts a stage, and so does pooling; norms and what has no parameters join the one before."""
    for name, module in model._modules.items():  # named_children skips what comes twice, such as a shared pooling
        if module is None:
            continue
        path = f"{prefix}{name}"
        if isinstance(module, nn.Sequential):
            _sequence(module, f"{path}.", stages)
        elif stages and not isinstance(module, POOLS) and (isinstance(module, JOINING) or _plain(module)):
            stages[-1].append(path)
        else:
            stages.append([path])
    return stages


def _plain(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters())


def _cifar_resnet(model: CifarResNet) -> Stages:
    stages: Stages = [["conv1", "bn1"]]
    for group in ("layer1", "layer2", "layer3"):
        for index, block in enumerate(getattr(model, group)):
            path = f"{group}.{index}"
            shortcut = [] if _plain(block.shortcut) else [f"{path}.shortcut"]
            stages += [[f"{path}.conv1", f"{path}.bn1"], [f"{path}.conv2", f"{path}.bn2", *shortcut], []]
    return [*stages, [], ["linear"], []]  # pooling, classifier, loss


def _vgg(model: VGG) -> Stages:
    """Convolution with its norm, ReLU and pooling apart; then global pooling, classifier, loss."""
    stages: Stages = []
    for name, module in model.features.named_children():
        if isinstance(module, NORMS):
            stages[-1].append(f"features.{name}")
        else:
            stages.append([f"features.{name}"])
    return [*stages, [], ["classifier"], []]


def listed(stages: Any) -> Stages:
    """Stages as lists of names, or an error."""
    if not isinstance(stages, Iterable) or isinstance(stages, str | Tensor):
        raise RecoupError(f"pipeline: stages={stages!r} is no list; a stage is a list of module names")
    found: Stages = []
    for index, names in enumerate(stages):
        if isinstance(names, str) or not isinstance(names, Iterable):
            kind = "string" if isinstance(names, str) else type(names).__name__
            raise RecoupError(f"pipeline: stage {index} is the {kind} {names!r}; a stage is a list of module names")
        found.append(list(names))
    return found


def resolve(model: nn.Module, stages: Sequence[Iterable[str]]) -> list[list[str]]:
    """The names of the parameters of every stage, in the model's order.

    Raises:
        RecoupError: a stage that names no module, a module in two stages, a module with parameters in none, or a
            parameter that modules of two stages share; the message names them.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owner: dict[str, int] = {}
    for index, names in enumerate(listed(stages)):
        for name in names:
            if name not in modules:
                near = ", ".join(list(modules)[1:7])
                raise RecoupError(f"pipeline: stage {index} names {name!r}, which the model lacks; it has {near}, ...")
            for covered in modules:
                if covered == name or covered.startswith(f"{name}.") or name == "":
                    if covered in owner:
                        raise RecoupError(
                            f"pipeline: module {covered!r} is in stage {owner[covered]} and in stage {index}; a name "
                            "covers its whole subtree"
                        )
                    owner[covered] = index
    found: list[list[str]] = [[] for _ in stages]
    seen: dict[int, tuple[str, int]] = {}
    missed: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        module = name.rpartition(".")[0]
        if module not in owner:
            missed.append(module or name)
            continue
        stage = owner[module]
        if id(parameter) in seen:
            other, before = seen[id(parameter)]
            if before != stage:
                raise RecoupError(
                    f"pipeline: {other!r} (stage {before}) and {name!r} (stage {stage}) are one parameter; stages "
                    "cannot share parameters: put both in one stage or untie them"
                )
            continue
        seen[id(parameter)] = name, stage
        found[stage].append(name)
    if missed:
        shown = ", ".join(dict.fromkeys(missed))
        raise RecoupError(f"pipeline: no stage holds {shown}: every module with parameters must be in one")
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise RecoupError(f"pipeline: {name} is {parameter.dtype}; parameters must be float32 or float64")
    return found

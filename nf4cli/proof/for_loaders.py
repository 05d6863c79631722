"""Check that config.json and the class of models that it names fit the tensors of a checkpoint.

It takes names and shapes alone.  The rules are those by which an output is planned.
"""

from __future__ import annotations

from dataclasses import replace

from ..checkpoint import bnb_format
from ..checkpoint.packed import PackedWeight
from ..checkpoint.types import Checkpoint, is_diffusers_config
from ..errors import InputError
from ..output.report import Report
from ..planning import adapters, selection, skip_list, tensor_names, ties
from ..planning.families import names_of


def check_config(checkpoint: Checkpoint, weights: dict[str, PackedWeight], report: Report) -> None:
    """Check that config.json describes the packed weights, and lists those that are not packed."""
    if not checkpoint.config:
        report.unchecked.append("config.json: there is none")
        return
    for problem in bnb_format.config_problems(
        checkpoint.config,
        (weight.state for weight in weights.values()),
        {bnb_format.storage_of(weight.packed[1]) or "" for weight in weights.values()},
    ):
        report.add("config", "config.json", problem)
    if not bnb_format.has_skip_list(checkpoint.config):
        report.unchecked.append(
            "which modules are not packed: config.json has no llm_int8_skip_modules, so each "
            "version of transformers derives its own list"
        )
    else:
        _check_skip_list(checkpoint, weights, report)
        _check_tied(checkpoint, report)
    _check_names(checkpoint, report)
    report.check("config", "config.json says what the tensors need")


def _check_skip_list(
    checkpoint: Checkpoint, weights: dict[str, PackedWeight], report: Report
) -> None:
    """Check that llm_int8_skip_modules means each linear layer that is not packed, and no other."""
    keys = bnb_format.skip_list(checkpoint.config)
    context = selection.Context.of(checkpoint)
    hits = skip_list.hits_v4 if context.diffusers else skip_list.hits
    packed = {selection.module_path(name) for name in weights}
    for module, key in skip_list.mistaken(keys, sorted(packed), hits):
        report.add(
            "config",
            "config.json",
            f"llm_int8_skip_modules has {key!r}, which some loader takes to mean {module}, "
            "whose weight is packed",
        )
    names, entries = names_of(checkpoint.config), set(keys)
    for name, (_, tensor) in checkpoint.tensors.items():
        if name in weights or bnb_format.companion_owner(name) in weights:
            continue
        rule = selection.rule_of(context, tensor)
        module = selection.module_path(name)
        # A bare model holds no head, so the name of a head has no form without the base prefix.
        own_names = replace(names, base_prefix="") if rule.name == "head" else names
        if rule.name not in ("linear", "head") or entries.intersection(own_names.forms(module)):
            continue
        if not any(skip_list.means(key, module, own_names) for key in keys):
            report.add(
                "config",
                name,
                f"{name} is full precision but no entry of llm_int8_skip_modules means it: loaders "
                "expect it in 4 bit and fail at the first forward",
            )


def _check_tied(checkpoint: Checkpoint, report: Report) -> None:
    """Check that llm_int8_skip_modules means each layer that is tied to a weight of another module
    and has none in the files."""
    names = names_of(checkpoint.config)
    tied = ties.absent_tied(checkpoint.config, None, checkpoint.tensors, names)
    for module in skip_list.unmatched(tied, bnb_format.skip_list(checkpoint.config)):
        report.add(
            "config",
            module,
            f"{module} has no weight of its own, as the model ties it to another one, and no entry "
            "of llm_int8_skip_modules means it: loaders expect it in 4 bit and fail at the first "
            "forward",
        )


def _check_names(checkpoint: Checkpoint, report: Report) -> None:
    """Check that the tensors are called as the model's class calls them."""
    try:
        adapters.refuse_adapter(checkpoint)
        wrapped = tensor_names.names_in_model(checkpoint)
        tensor_names.check_layers(checkpoint)
    except InputError as error:
        report.add("config", "config.json", str(error))
        return
    if not tensor_names.knows(checkpoint.config) and not is_diffusers_config(checkpoint.config):
        report.unchecked.append(
            "whether the model's class takes tensors of these names: nf4 knows none of model_type "
            f"{checkpoint.config.get('model_type')!r}"
        )
    if wrapped:
        stored, name = next(iter(wrapped.items()))
        report.add(
            "config",
            stored,
            f"{stored}: the model's class calls it {name}, without what a wrapper around the model "
            f"(torch.compile, DDP, PEFT) put into the names of {len(wrapped):,} tensors: loaders "
            "find no weight under these names. Convert the source again",
        )

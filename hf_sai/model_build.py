"""
Any model of transformers as [`hf_sai.model_shapes.ModelShapes`]: built on the meta device, where tensors have shapes
and no bytes, from its configuration alone.

Nothing of a repository runs here unless it is asked for: the configuration is read as JSON and handed to the class of
transformers that its `model_type` names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .activations import forward_bytes, sequence_of
from .model_shapes import DTYPE_BYTES, ModelShapes, Tensors, Training, merged
from .optim import route_parameters
from .quantization import quantization_of


_LARGEST_CONFIG = 16 * 2**20


def shapes_of_source(
    source: str, training: Training | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> ModelShapes:
    """
    A folder's, file's or repository's model, of which the configuration alone is read.

    Args:
        source (`str`): A folder with `config.json`, that file, or a repository of the Hub.
        training (`Training`, *optional*): How it is trained.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether Python files of the repository may run.

    Raises:
        `OSError`: There is no such folder or repository.
        `ValueError`: The configuration can't be read or built, an option does not fit it, or PEFT is not installed.
    """
    training = training or Training()
    fields = read_config(source, revision)
    with _quiet():
        config, model_class = _classes(fields, source, revision, trust_remote_code)
        dtype, note = _dtype(fields, training.dtype)
        model = _built(model_class, config, dtype)
        packed = _packed(model, fields, training)
        if training.lora_rank is not None:
            model = _with_adapter(model, training.lora_rank, training.lora_targets)
        return shapes_of(model, training, dtype, packed, note)


def shapes_of(
    model: nn.Module,
    training: Training | None = None,
    dtype: str | None = None,
    packed: dict[Tensor, int] | None = None,
    note: str = "",
) -> ModelShapes:
    """
    A model that is on the meta device, in the dtype and with the adapter that are trained.

    Args:
        model (`torch.nn.Module`): The model.
        training (`Training`, *optional*): Batch, sequence and gradient checkpointing are taken from it.
        dtype (`str`, *optional*): Its name in the result; defaults to that of the first floating-point parameter.
        packed (`dict`, *optional*): Bytes of the weights that are stored in another way than they are here.
        note (`str`, *optional*): What a reader has to know.
    """
    training = training or Training()
    places = sorted({param.device.type for param in model.parameters()} - {"meta"})
    if places:
        raise ValueError(
            f"computing memory needs the model on the meta device, but it has parameters on {', '.join(places)}; "
            "build it under torch.device('meta')"
        )
    params, packed = list(model.parameters()), packed or {}
    weights = sum(packed.get(each, each.numel() * each.element_size()) for each in [*params, *model.buffers()])
    routes, without_matrix = _routes(model)
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = merged(
        [
            Tensors(tuple(param.shape), _name(param.dtype), 1, routes[param], param in tables)
            for param in params
            if param.requires_grad
        ]
    )
    activations, reason = forward_bytes(model, training.batch, training.sequence, training.gradient_checkpointing)
    notes = [note, without_matrix, f"Activations are not counted: {reason}." if activations is None else ""]
    dtype = dtype or next((_name(each.dtype) for each in params if each.is_floating_point()), "float32")
    parameters = sum(param.numel() for param in params)
    sequence = sequence_of(model, training.sequence)
    return ModelShapes(trained, parameters, weights, dtype, activations, sequence, " ".join(filter(None, notes)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _routes(model: nn.Module) -> tuple[dict[Tensor, str], str]:
    """SWAN's route of each trained parameter, and a note where it has nothing to whiten."""
    try:
        return {row.param: row.route for row in route_parameters(model)}, ""
    except ValueError:
        rest: dict[Tensor, str] = dict.fromkeys(model.parameters(), "adam")
        return rest, "SWAN has no matrix to whiten here: Adam takes all."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What transformers and PEFT say while a model is built is about running it."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ---- the configuration ----


def read_config(source: str, revision: str | None = None) -> dict[str, Any]:
    """The fields of a `config.json`."""
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(f"a model's folder must hold config.json, but {source} does not; {_base_of(path)}")
    if not file.is_file():
        file = _downloaded(source, revision)
    if file.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"a config.json must be below {_LARGEST_CONFIG:,} bytes, but that of {source} is larger")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config.json of {source} must be JSON but: {error}; download it again") from None
    if not isinstance(fields, dict):
        raise ValueError(f"config.json of {source} must be an object but is a {type(fields).__name__}")
    return fields


def _base_of(folder: Path) -> str:
    """What to do with a folder without a configuration: an adapter names its base model."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        return f"it holds an adapter: give its base model, {base}, and --lora"
    return "give the folder that a model was saved into"


def _downloaded(source: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(source, "config.json", revision=revision))
    except HFValidationError:
        raise ValueError(
            f"a model must be a built-in name, a folder, a config.json or a repository of the Hub, but {source!r} is "
            "none of them; check the path"
        ) from None


def _classes(fields: dict[str, Any], source: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """The configuration and the class of its model."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own_code = fields.get("auto_map") or {}
    if trust_remote_code:
        return _classes_of_repository(own_code, source, revision)
    kind = fields.get("model_type")
    if kind not in CONFIG_MAPPING:
        if own_code:
            raise ValueError(
                f"{source} has its own code ({', '.join(map(str, own_code.values()))}) for model_type {kind!r}, which "
                "transformers does not know, and none of it was run; read it, and add --trust-remote-code to run it"
            )
        raise ValueError(
            f"model_type of {source} must be one that transformers {transformers.__version__} knows but is {kind!r}; "
            "give another model, or a newer transformers"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:
        raise ValueError(f"config.json of {source} does not fit model_type {kind!r}: {_line(error)}") from None
    return config, _model_class(config, fields.get("architectures"), source)


def _model_class(config: Any, architectures: Any, source: str) -> Any:
    """The class that 'architectures' names, and without it the headless model of the configuration."""
    import transformers

    names = architectures if isinstance(architectures, list) else [architectures] if architectures else []
    if not names:
        return _usual_class(config, source)
    found = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ValueError(
            f"'architectures' of {source} must name a model class of transformers but names {names[0]!r}; write the "
            f"class, such as LlamaForCausalLM, or take the field out of config.json"
        )
    return found


def _usual_class(config: Any, source: str) -> Any:
    """The headless model of a configuration, or what transformers has for it instead."""
    from transformers.models.auto import modeling_auto

    others = sorted(name for name in vars(modeling_auto) if name.startswith("MODEL_FOR") and name.endswith("_MAPPING"))
    for name in ("MODEL_MAPPING", *others):
        mapping = getattr(modeling_auto, name)
        try:
            found = mapping[type(config)]
        except (KeyError, ValueError):  # the second where the table names a class that is not there
            continue
        return found[0] if isinstance(found, tuple) else found
    raise ValueError(
        f"'architectures' of {source} must name a model of transformers but names none, and transformers has none for "
        f"model_type {config.model_type!r} alone; add the name of the class to config.json"
    )


def _classes_of_repository(own_code: dict[str, Any], source: str, revision: str | None) -> tuple[Any, Any]:
    """With the repository's code, which runs here: the person asked for it."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    model_names = [name for name in own_code if name.startswith("AutoModel")]
    if not own_code:
        raise ValueError(
            f"--trust-remote-code would change nothing: config.json of {source} names no code of its own (auto_map); "
            "leave it out"
        )
    if not model_names:
        raise ValueError(
            f"--trust-remote-code would not help: the code of {source} has a configuration ({', '.join(own_code)}) "
            "and no model; nothing of it was run"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=True)
        chosen = next((name for name in model_names if name != "AutoModel"), model_names[0])
        return config, get_class_from_dynamic_module(own_code[chosen], source, revision=revision)
    except Exception as error:  # code of others may raise anything
        raise ValueError(f"the code of {source} did not load: {_line(error)}") from None


def _line(error: BaseException) -> str:
    """Kind and text of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---- dtype, weights, adapters ----


def _dtype(fields: dict[str, Any], asked: str | None) -> tuple[str, str]:
    """As `from_pretrained` takes it from the configuration, and a note where that says nothing."""
    if asked is not None:
        return asked, ""
    inner = [fields.get(name) for name in ("text_config", "thinker_config")]
    places = [fields, *(each for each in inner if isinstance(each, dict))]
    for place in places:
        named = str(place.get("dtype") or place.get("torch_dtype") or "").removeprefix("torch.")
        if named in DTYPE_BYTES:
            return named, ""
    return "float32", "config.json names no dtype, and from_pretrained takes that of the weights: float32 is assumed."


def _built(model_class: Any, config: Any, dtype: str) -> Any:
    """The model on the meta device; parameters in the dtype, but for those that transformers keeps in float32."""
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # transformers raises whatever a configuration leads to
        name = model_class.__name__
        raise ValueError(f"transformers can't build {name} of this configuration: {_line(error)}") from None
    if any(param.device.type != "meta" for param in model.parameters()):  # made by torch.FloatTensor and its like
        model.to("meta")
        model.tie_weights()
    wide = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == "float16":
        wide |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept = re.compile("|".join(rf"((^|\.){re.escape(name)}($|\.))" for name in wide)) if wide else None
    for name, param in model.named_parameters():
        if param.is_floating_point():
            stays = kept is not None and dtype in ("float16", "bfloat16") and kept.search(name)
            param.data = param.data.to(torch.float32 if stays else getattr(torch, dtype))
    return model


def _with_adapter(model: nn.Module, rank: int, targets: str) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ValueError("adapters need peft but it is not installed; pip install peft") from None
    names = [name.strip() for name in targets.split(",") if name.strip()]
    target_modules: Any = "all-linear" if names == ["all-linear"] else names
    try:
        with torch.device("meta"):
            return get_peft_model(model, LoraConfig(r=rank, target_modules=target_modules))
    except Exception as error:  # PEFT's own sentence, such as the targets that it does not find
        raise ValueError(f"PEFT can't add adapters to {targets}: {_line(error)}") from None


# ---- quantised weights ----


def _packed(model: Any, fields: dict[str, Any], training: Training) -> dict[Tensor, int]:
    """Bytes of the weights that are stored quantised, by parameter; empty where none are."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    bytes_of, skipped = quantization_of(fields.get("quantization_config"), training.quantization)
    if bytes_of is None:
        return {}
    if training.lora_rank is None:
        raise ValueError("quantised weights can't be trained themselves; add adapters: --lora 16")
    skip = get_keys_to_not_convert(model) if skipped is None else list(skipped)
    packed = {}
    for name, module in model.named_modules():
        linear = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
        if linear and should_convert_module(name, skip):
            rows, columns = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            packed[module.weight] = bytes_of(rows, columns)
    return packed

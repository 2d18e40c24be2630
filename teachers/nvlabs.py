"""Teachers from the ``.pkl`` files of NVlabs/edm and edm2 (arXiv 2206.00364, 2312.02696), without running what they carry.

Such a file is a plain pickle with the source code of its network inside, which the official loader executes. Here it is
read as data (:mod:`teachers.inert_pickle`): the class name and the constructor arguments say which of our own networks to
build, and only tensors are taken over. Format: ``torch_utils/persistence.py`` of those repositories.
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teachers.checkpoints import check_pickle
from teachers.inert_pickle import Record, read
from teachers.parameterization import EDM

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
STORAGE = "torch.storage._load_from_bytes"
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
# Every global of the released files; numpy has renamed its module, and both names occur.
GLOBALS = {
    PERSISTENT, STORAGE, TENSOR, PARAMETER, "collections.OrderedDict", "dnnlib.util.EasyDict",
    "torch.nn.modules.container.ModuleDict", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
}  # fmt: skip
MAX_DEPTH = 20  # of modules inside modules; real networks have 4
# Constructor of each preconditioning, in its order (``None``: no default); the network's own arguments follow by name.
PRECONDITIONING = {
    "EDMPrecond": {
        "img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False, "sigma_min": 0,
        "sigma_max": math.inf, "sigma_data": 0.5, "model_type": "DhariwalUNet",
    },
    "VPPrecond": {
        "img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False, "beta_d": 19.9, "beta_min": 0.1,
        "M": 1000, "epsilon_t": 1e-5, "model_type": "SongUNet",
    },
    "VEPrecond": {
        "img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False, "sigma_min": 0.02,
        "sigma_max": 100, "model_type": "SongUNet",
    },
    "iDDPMPrecond": {
        "img_resolution": None, "img_channels": None, "label_dim": 0, "use_fp16": False, "C_1": 0.001, "C_2": 0.008,
        "M": 1000, "model_type": "DhariwalUNet",
    },
    "Precond": {  # EDM2
        "img_resolution": None, "img_channels": None, "label_dim": None, "use_fp16": True, "sigma_data": 0.5,
        "logvar_channels": 128,
    },
}  # fmt: skip
SIGMA_DATA = 0.5  # of the data sets of EDM, for the preconditionings that do not name it


def is_nvlabs_pickle(path: Path) -> bool:
    """Whether this is a bare pickle of protocol 4 or later, by content. (Old ``torch.save`` files are of protocol 2.)"""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(2)
    return len(head) == 2 and head[0] == 0x80 and 4 <= head[1] <= pickle.HIGHEST_PROTOCOL


def read_nvlabs(path: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """``config.json`` as a value, and the tensors, of the averaged network (``ema``) in an NVlabs ``.pkl``.

    EDM's DDPM++, NCSN++ and ADM networks can be read, under its own preconditioning (``edm-*.pkl``) and under those of
    the VP- and VE-SDE and of improved DDPM (``baseline-*.pkl``, EDM's Table 1), and EDM2's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a pickle, one that asks for anything else, or a network of another kind.
    """
    snapshot = as_dict(read(path, GLOBALS))
    if "ema" not in snapshot:
        raise ValueError(f"{path} holds no network 'ema': it is not a snapshot of NVlabs/edm")
    name, state = persistent_object(snapshot["ema"], path)
    if name not in PRECONDITIONING:
        raise ValueError(f"{path} holds a network of class {name}; can be read: {', '.join(PRECONDITIONING)}")
    arguments = constructor_arguments(name, state, path)
    size = arguments["img_resolution"]
    config = {
        "role": "teacher",
        "network": arguments.get("model_type", "EDM2UNet"),
        "network_config": network_config(name, arguments),
        "parameterization": parameterization(name, arguments),
        "sigma_data": arguments.get("sigma_data", SIGMA_DATA),
        "sample_shape": [arguments["img_channels"], size, size],
        "num_classes": arguments["label_dim"] or None,
        "label_format": "one_hot",
    }
    tensors = {}
    collect_tensors(snapshot["ema"], "", tensors, set(), path)
    # EDM calls its network model and EDM2 unet, beside which there is the loss weighting of its training.
    ours = {key.split(".", 1)[1]: value.float() for key, value in tensors.items() if key.startswith(("model.", "unet."))}
    if name == "iDDPMPrecond":
        drop_variances(ours)
    return config, ours


def as_dict(value: Any) -> dict:
    """The items of a dictionary, whatever class it had in the pickle; empty for anything else."""
    value = value.items if isinstance(value, Record) else value
    return value if isinstance(value, dict) else {}


def persistent_object(value: Any, path) -> tuple[str, dict]:
    """Class name and state of an object pickled by ``torch_utils.persistence``."""
    match value:
        case Record(name=name, args=(meta,)) if name == PERSISTENT:
            meta = as_dict(meta)
            if isinstance(meta.get("class_name"), str) and isinstance(meta.get("state"), dict):
                return meta["class_name"], meta["state"]
    raise ValueError(f"{path}: its network is not in the form that torch_utils.persistence writes")


def constructor_arguments(name: str, state: dict, path) -> dict:
    """The call that made the preconditioned network, with its defaults filled in."""
    defaults, positional = PRECONDITIONING[name], state.get("_init_args", ())
    if not isinstance(positional, tuple | list) or len(positional) > len(defaults):
        raise ValueError(f"{path}: the positional arguments of its {name} are not those that the class takes")
    arguments = {**defaults, **dict(zip(defaults, positional, strict=False)), **as_dict(state.get("_init_kwargs"))}
    missing = [key for key in defaults if arguments[key] is None]
    if missing:
        raise ValueError(f"{path}: its network was made without {', '.join(missing)}")
    return arguments


def network_config(name: str, arguments: dict) -> dict:
    """What the preconditioning passes on to the network that it makes."""
    own = {key: value for key, value in arguments.items() if key not in PRECONDITIONING[name]}
    channels = arguments["img_channels"]
    sides = {"img_channels": channels} if name == "Precond" else {"in_channels": channels, "out_channels": channels}
    return {"img_resolution": arguments["img_resolution"], **sides, "label_dim": arguments["label_dim"], **own}


def parameterization(name: str, arguments: dict) -> dict:
    """What the preconditioning says about its network (EDM, Table 1), as the keys of a ``Parameterization``."""
    constants = lambda *names: {"schedule": {key: arguments[key] for key in names}}  # noqa: E731
    match name:
        case "VPPrecond":
            return {"family": "vp", "prediction": "eps", "time": "linear_beta", **constants("beta_d", "beta_min", "M")}
        case "VEPrecond":
            return {"family": "edm", "prediction": "-eps", "time": "log(sigma/2)"}
        case "iDDPMPrecond":  # C_1 clips the noisiest step alone, far above the noise that TrigFlow starts from
            return {"family": "vp", "prediction": "eps", "time": "cosine", **constants("C_2", "M")}
    return EDM.to_dict()


def drop_variances(tensors: dict[str, Tensor]) -> None:
    """Cut the second half of improved DDPM's outputs, the variances of its sampler, off ADM's last layer."""
    for key in ("out_conv.weight", "out_conv.bias"):
        if key in tensors and tensors[key].ndim:
            tensors[key] = tensors[key].chunk(2)[0].clone()


def collect_tensors(module: Any, prefix: str, tensors: dict, seen: set, path) -> None:
    """The state dict of a pickled module, into ``tensors``."""
    if not isinstance(module, Record) or id(module) in seen or prefix.count(".") > MAX_DEPTH:
        name = prefix[:80] or "the network"
        raise ValueError(f"{path}: {name} is not a module, is there twice, or lies more than {MAX_DEPTH} modules deep")
    seen.add(id(module))
    state = persistent_object(module, path)[1] if module.name == PERSISTENT else as_dict(module.state)
    for key, value in {**as_dict(state.get("_parameters")), **as_dict(state.get("_buffers"))}.items():
        if value is not None:
            tensors[f"{prefix}{key}"] = rebuild_tensor(value, f"{path}: {prefix}{key}")
    for key, child in as_dict(state.get("_modules")).items():
        if child is not None:
            collect_tensors(child, f"{prefix}{key}.", tensors, seen, path)


def rebuild_tensor(value: Any, where: str) -> Tensor:
    """A tensor from its storage, whose bytes are a ``torch.save`` file of their own, read with ``weights_only``."""
    if isinstance(value, Record) and value.name == PARAMETER and value.args:
        value = value.args[0]
    match value:
        case Record(name=name, args=(Record(args=(bytes(data),)) as storage, offset, size, stride, *_)) if (
            name == TENSOR and storage.name == STORAGE
        ):
            try:
                check_pickle(data)
                stored = torch.load(io.BytesIO(data), weights_only=True)
                flat = torch.empty(0, dtype=stored.dtype).set_(stored)
                if math.prod(size) > len(flat):
                    raise ValueError(f"its storage has {len(flat)} elements")
                return flat.as_strided(size, stride, offset).clone()
            except Exception as error:  # torch.load has no error of its own for damaged bytes
                raise ValueError(f"{where} is damaged or not a tensor: {' '.join(str(error).split())[:200]}") from None
    raise ValueError(f"{where} is not a tensor")

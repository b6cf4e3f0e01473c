"""Pretrained encoder weights: from a hub by name, a file or a URL, checked key by key when they are loaded.

Files are read as plain tensors only; nothing in them is ever executed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import Tensor, nn

from ecocseg.errors import InputError
from ecocseg.libraries import smp, timm

if TYPE_CHECKING:
    from ecocseg.storage import Storage

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_WHOLE_PREFIXES = ("module.", "model.", "net.")  # taken off when every key has them
_ENCODER_PREFIXES = ("backbone.", "encoder.")  # keys without are other parts of a segmenter, left out and reported
_CLASSIFIERS = ("fc.*", "head.*", "classifier.*")
# Deep stems of mmsegmentation's ResNets (V1c) -> the names of timm, UniMatch and most others.
_DEEP_STEM = {**{f"stem.{i}": f"conv1.{i}" for i in range(7)}, "stem.7": "bn1"}
_REMEDY = ("without network, fetch the file elsewhere and give its path: model.pretrained=/path/to/weights.safetensors "
           "(or .pth), or train from scratch with model.pretrained=null")

State = dict[str, Tensor]


def load_encoder_weights(net: nn.Module, encoder: str, pretrained: str, allow_missing: Sequence[str] = (),
                         storage: Storage | None = None) -> str:
    """Load weights into an encoder's network; return one line that says from where, and what was left out.

    `pretrained`: `default` (the encoder's own of its hub); a timm tag (`a1_in1k` or `resnet50.a1_in1k`) or
    `hf-hub:owner/name`; a path, http(s):// or s3:// URL of a .safetensors, .pth or .pt file. Wrappers (`state_dict`,
    `model`) and prefixes (`backbone.`, `encoder.`, `module.`) are taken off. The donor's classifier is left out; any
    other key that is missing, left over or of another shape is an `InputError`, unless a pattern of `allow_missing`
    (fnmatch, on the name in the encoder or in the file) names it.
    """
    donor = _unwrapped(_fetch(net, encoder, pretrained, storage), pretrained)
    wanted = net.state_dict()
    donor, other_parts = _encoder_part(donor, wanted)
    found, spare = _matched(donor, wanted)
    _adapt_first_conv(net, found, wanted)

    def allowed(key: str) -> bool:
        return any(fnmatch(key, pattern) for pattern in allow_missing)
    missing = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    shapes = [k for k, v in found.items() if v.shape != wanted[k].shape]
    unexpected = _beyond_encoder(spare, encoder)
    problems = {
        "missing in the file": [k for k in missing if not allowed(k)],
        "unknown to the encoder": [k for k in unexpected if not allowed(k)],
        "of another shape": [f"{k} {tuple(found[k].shape)} instead of {tuple(wanted[k].shape)}"
                             for k in shapes if not allowed(k)],
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(keys)} {what} ({_first(keys)})" for what, keys in problems.items() if keys)
        raise InputError(f"model.pretrained: '{pretrained}' does not fit encoder '{encoder}': {listed}; give the "
                         "weights of this encoder, or name the keys that may be left out in model.allow_missing "
                         "(patterns like 'norm.*')")
    kept = {k: v for k, v in found.items() if k not in shapes}
    if not kept:
        raise InputError(f"model.pretrained: '{pretrained}' gives encoder '{encoder}' no weights at all; allow less in "
                         "model.allow_missing")
    # nn.Module's own, because some encoders of smp override it with another signature.
    nn.Module.load_state_dict(net, kept, strict=False)
    left = [*missing, *shapes, *spare, *other_parts]
    note = f"from {pretrained} ({len(kept)} tensors{f'; left out: {_first(left)}' if left else ''})"
    log.info("encoder %s %s", encoder, note)
    return note


def _first(keys: Sequence[str], count: int = 5) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


# Where weights come from


def _fetch(net: nn.Module, encoder: str, pretrained: str, storage: Storage | None) -> Any:
    if pretrained == "default":
        return _from_hub(pretrained, lambda: _default_weights(net, encoder))
    if pretrained.startswith(("hf-hub:", "hf_hub:")):
        return _from_hub(pretrained, lambda: timm.create_model(pretrained, pretrained=True).state_dict())
    if pretrained.startswith(("http://", "https://")):
        return _from_url(pretrained)
    if pretrained.startswith("s3://"):
        from ecocseg.storage import Storage
        try:
            return _read(io.BytesIO((storage or Storage()).read_bytes(pretrained)), pretrained)
        except OSError as error:
            raise InputError(f"model.pretrained: '{pretrained}' could not be read ({error}); check the URL, storage.* "
                             "and the credentials") from error
    path = Path(pretrained).expanduser()
    if path.is_file():
        return _read(path, pretrained)
    if pretrained.endswith(SUFFIXES) or os.sep in pretrained:
        raise InputError(f"model.pretrained: there is no file '{pretrained}'; check the path, every node must "
                         "be able to read it")
    name = _timm_tag(encoder, pretrained)
    return _from_hub(pretrained, lambda: timm.create_model(name, pretrained=True).state_dict())


def _default_weights(net: nn.Module, encoder: str) -> State:
    if encoder in smp.encoders.encoders and hasattr(net, "out_channels"):  # an encoder of smp, not of timm
        settings = smp.encoders.encoders[encoder]["pretrained_settings"]
        return smp.encoders.get_encoder(encoder, weights=next(iter(settings))).state_dict()
    return timm.create_model(encoder.removeprefix("tu-"), pretrained=True).state_dict()


def _timm_tag(encoder: str, pretrained: str) -> str:
    base = encoder.removeprefix("tu-").split(".")[0]
    known = timm.list_pretrained(f"{base}.*") if timm.is_model(base) else []
    for name in (pretrained, f"{base}.{pretrained}"):
        if name in known:
            return name
    has = f"known for '{encoder}' are {', '.join(known)}" if known else f"the hub has none for '{encoder}'"
    raise InputError(f"model.pretrained: '{pretrained}' is neither a file nor a name of weights; {has}; "
                     "or give 'default', a path or a URL")


def _from_hub(pretrained: str, fetch: Callable[[], State]) -> State:
    try:
        with _without_retries_if_offline():
            return fetch()
    except Exception as error:  # hub clients raise what their HTTP library raises, of which there are several
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise InputError(f"model.pretrained: '{pretrained}' could not be had from the hub ({reason}); "
                         f"{_REMEDY}") from error


@contextmanager
def _without_retries_if_offline() -> Iterator[None]:
    """Keep the hub's client from half a minute of retries where its host has no address; its cache still serves."""
    before = constants.HF_HUB_OFFLINE
    if not any(urllib.request.getproxies().get(scheme) for scheme in ("https", "all")):
        try:
            socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _from_url(url: str) -> Any:
    """Download once into torch's hub folder, under a name of the whole URL, and read it."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    name = PurePosixPath(url.split("?")[0]).name
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except OSError as error:  # URLError is one
            raise InputError(f"model.pretrained: '{url}' could not be downloaded to {folder} ({error}); "
                             f"{_REMEDY}") from error
    return _read(path, url)


def _read(source: Path | io.BytesIO, name: str) -> Any:
    try:
        if name.split("?")[0].endswith(".safetensors"):
            data = source.read_bytes() if isinstance(source, Path) else source.getvalue()
            return safetensors.torch.load(data)
        return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"model.pretrained: '{name}' is damaged or holds more than tensors, which is refused because "
                         "reading such a file can run any code; convert it to .safetensors where it is trusted"
                         ) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(f"model.pretrained: '{name}' cannot be read as weights ({error}); is the file whole?"
                         ) from error


# Whose key is which


def _unwrapped(content: Any, name: str) -> State:
    """The named tensors of a checkpoint, without wrapping dictionaries."""
    while isinstance(content, Mapping):
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise InputError(f"model.pretrained: '{name}' holds no named tensors; give a state dict")
    return tensors


def _encoder_part(donor: State, wanted: State) -> tuple[State, list[str]]:
    """The donor's encoder without the prefixes it was saved under, and the names of the donor's other parts."""
    own = {k.split(".")[0] + "." for k in wanted}
    other_parts: list[str] = []
    while True:
        whole = next((p for p in _WHOLE_PREFIXES if p not in own and all(k.startswith(p) for k in donor)), None)
        part = next((p for p in _ENCODER_PREFIXES if p not in own and any(k.startswith(p) for k in donor)), None)
        prefix = whole or part
        if prefix is None:
            return donor, other_parts
        other_parts += [k for k in donor if not k.startswith(prefix)]
        donor = {k.removeprefix(prefix): v for k, v in donor.items() if k.startswith(prefix)}


def _matched(donor: State, wanted: State) -> tuple[State, list[str]]:
    """Donor tensors under the encoder's names, and the donor's names that fit nowhere."""
    spare: list[str] = []
    found: State = {}
    for key, value in donor.items():
        target = next((name for name in _names(key) if name in wanted), None)
        if target is None:
            spare.append(key)
        else:
            found[target] = value
    return found, spare


def _names(key: str) -> Iterable[str]:
    """Names a donor's key may have in the encoder: its own, or as timm's and smp's feature wrappers rename it."""
    stem = next((new + key.removeprefix(old) for old, new in _DEEP_STEM.items() if key.startswith(old + ".")), None)
    for name in filter(None, (key, stem)):
        flat = name.replace(".", "_", 1)  # FeatureListNet: stages.0.x -> stages_0.x
        yield from (name, flat, f"model.{name}", f"model.{flat}", f"body.{name}")


def _beyond_encoder(spare: Sequence[str], encoder: str) -> list[str]:
    """Keys that belong neither to a classifier nor to what timm itself cuts off the model for feature maps."""
    spare = [k for k in spare if not any(fnmatch(k, pattern) for pattern in _CLASSIFIERS)]
    name = encoder.removeprefix("tu-")
    if spare and timm.is_model(name):
        whole = set(timm.create_model(name, pretrained=False).state_dict())
        spare = [k for k in spare if k not in whole]
    return spare


def _adapt_first_conv(net: nn.Module, found: State, wanted: State) -> None:
    """Give three-channel weights of the first convolution the encoder's number of channels, summed or repeated."""
    first = next((f"{name}.weight" for name, m in net.named_modules() if isinstance(m, nn.Conv2d)), None)
    if first in found and found[first].shape[1] == 3 != wanted[first].shape[1]:
        found[first] = timm.models.adapt_input_conv(wanted[first].shape[1], found[first])

"""Finds the CLIP architecture and weights that the settings name, and loads them completely or not at all.

Only this module resolves model names, pretrained tags, checkpoint files and folders. Nothing is unpickled: checkpoints
are safetensors, or PyTorch files read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import pickle
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import open_clip
import torch
from safetensors import SafetensorError

from clip2scene.config import TeacherSettings
from clip2scene.errors import ConfigError
from clip2scene.paths import CHECKPOINTS, LOCAL_DIR

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
"""Names that the weights in a ``local-dir:`` folder may have, preferred first."""
STREETWORLD_FOLDER = Path(__file__).resolve().parents[1] / "streetworld" / "clip"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A CLIP model with its weights, and what the weights alone do not tell."""

    model: torch.nn.Module
    """open_clip's ``CLIP`` (or ``CustomTextCLIP``), float32, at the image size that it was built for."""
    tokenizer: str
    """Name of the model's tokenizer for ``open_clip.get_tokenizer``."""
    architecture: dict[str, Any]
    """Vision tower's configuration without its image size; ready for JSON, for digests."""
    text_architecture: dict[str, Any]
    """Likewise of the text tower, with the tokenizer's name."""


def load_model(settings: TeacherSettings) -> Loaded:
    """Build the architecture of the settings and load its weights (random ones for ``pretrained=random``).

    Raises:
        ConfigError: the model or tag is unknown, the weights cannot be loaded, or they are of another architecture.
    """
    name, folder = _model_name(settings.model)
    configuration = _configuration(settings.model, name, folder)
    preprocessing: dict[str, Any] = {}
    checkpoint: Path | None = None
    # The weights do not tell the activation: the tag that they were published under decides, else the model's name.
    quick_gelu = bool(configuration.get("quick_gelu", False))
    if folder is not None:
        checkpoint = _weights_in(folder, settings.model)
        preprocessing = _read_config(folder / CONFIG_FILE, settings.model).get("preprocess_cfg", {})
    elif settings.pretrained == "random" or name.startswith("hf-hub:"):
        pass
    elif tag := open_clip.get_pretrained_cfg(name, settings.pretrained):
        checkpoint = _download(tag, settings)
        preprocessing = tag
        quick_gelu = bool(tag.get("quick_gelu", quick_gelu))
    else:
        checkpoint = _local_file(name, settings.pretrained)
        preprocessing, quick_gelu = _published_settings(checkpoint, name, quick_gelu)
    from_hub = name.startswith("hf-hub:") and settings.pretrained != "random"
    model = _build(name, settings, preprocessing, quick_gelu, from_hub=from_hub)
    if checkpoint is not None:
        _load(model, checkpoint, settings)
    vision = dict(configuration["vision_cfg"])
    vision.pop("image_size", None)
    architecture = {**asdict(open_clip.CLIPVisionCfg(**vision)), "quick_gelu": quick_gelu}
    architecture.pop("image_size")
    text = {key: value for key, value in configuration["text_cfg"].items() if key != "hf_model_pretrained"}
    text |= {"quick_gelu": quick_gelu, "custom_text": bool(configuration.get("custom_text", False))}
    if folder is None:  # a folder's tokenizer is its own, and the folder may be moved
        text["tokenizer"] = name
    return Loaded(model, name, architecture, text)


def _model_name(model: str) -> tuple[str, Path | None]:
    """The model's name for open_clip, and its folder if it is a local one."""
    if model == "streetworld":
        return f"{LOCAL_DIR}{STREETWORLD_FOLDER}", STREETWORLD_FOLDER
    if model.startswith(LOCAL_DIR):
        return model, Path(model.removeprefix(LOCAL_DIR))
    return model if model.startswith("hf-hub:") else model.replace("/", "-"), None


def _configuration(model: str, name: str, folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        return _read_config(folder / CONFIG_FILE, model)["model_cfg"]
    try:
        with _quiet(), _offline_without_network():
            configuration = open_clip.get_model_config(name)
    except Exception as error:  # the hub's client raises errors of many kinds
        raise ConfigError(
            f"teacher.model={model!r}: its configuration cannot be fetched ({_first_line(error)}); without a network "
            f"give {LOCAL_DIR}FOLDER with {CONFIG_FILE} and {WEIGHT_FILES[0]}"
        ) from error
    if configuration is None:
        known = {known.lower(): known for known in open_clip.list_models()}
        close = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.5)]
        hint = f"close to it: {', '.join(close)}; " if close else ""
        raise ConfigError(
            f"teacher.model={model!r}: no such open_clip model; {hint}"
            f"allowed: a name of open_clip.list_models(), {LOCAL_DIR}FOLDER, or streetworld"
        )
    return dict(configuration)


def _read_config(path: Path, model: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"teacher.model={model!r}: cannot read {path} ({error.strerror}); the folder must hold {CONFIG_FILE} "
            f"and {WEIGHT_FILES[0]}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"teacher.model={model!r}: {path} is not valid JSON ({_first_line(error)})") from error
    towers = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(towers, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(towers):
        raise ConfigError(
            f"teacher.model={model!r}: {path} is not an open_clip configuration (it needs model_cfg with embed_dim, "
            "vision_cfg and text_cfg)"
        )
    return config


def _weights_in(folder: Path, model: str) -> Path:
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return folder / file
    raise ConfigError(f"teacher.model={model!r}: no weights in {folder}; allowed: {', '.join(WEIGHT_FILES)}")


def _download(tag: dict[str, Any], settings: TeacherSettings) -> Path:
    try:
        with _quiet(), _offline_without_network():
            return Path(open_clip.download_pretrained(tag))
    except Exception as error:  # URL, hub and checksum errors of many kinds
        raise ConfigError(
            f"teacher.pretrained={settings.pretrained!r}: the weights of {settings.model} cannot be downloaded "
            f"({_first_line(error)}); without a network give a local checkpoint: teacher.pretrained=FILE.safetensors, "
            f"teacher.model={LOCAL_DIR}FOLDER, or teacher.pretrained=random for a dry run"
        ) from error


def _local_file(name: str, pretrained: str) -> Path:
    path = Path(pretrained)
    if path.suffix in CHECKPOINTS and path.is_file():
        return path
    if path.suffix in CHECKPOINTS or len(path.parts) > 1:
        reason = "this file does not exist" if not path.is_file() else "not the name of a checkpoint"
        raise ConfigError(f"teacher.pretrained={pretrained!r}: {reason}; allowed: a {', '.join(CHECKPOINTS)} file")
    tags = open_clip.list_pretrained_tags_by_model(name)
    listed = f"{', '.join(tags)}, " if tags else ""
    raise ConfigError(
        f"teacher.pretrained={pretrained!r}: unknown for {name}; allowed: {listed}random, or a local "
        f"{', '.join(CHECKPOINTS)} file"
    )


def _published_settings(checkpoint: Path, name: str, quick_gelu: bool) -> tuple[dict[str, Any], bool]:
    """Preprocessing and activation of a single checkpoint file, which itself tells neither.

    A configuration beside the file decides; without one, all published weights of the model must agree on mean and std.
    """
    config = checkpoint.with_name(CONFIG_FILE)
    if config.is_file():
        about = _read_config(config, name)
        return about.get("preprocess_cfg", {}), bool(about["model_cfg"].get("quick_gelu", False))
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    if len({(tuple(tag.get("mean", ())), tuple(tag.get("std", ()))) for tag in tags}) > 1:
        raise ConfigError(
            f"teacher.pretrained={str(checkpoint)!r}: checkpoints of {name} are published with different mean and std "
            f"and the file does not say its own; put its {CONFIG_FILE} (with preprocess_cfg) beside it"
        )
    if any(bool(tag.get("quick_gelu", False)) != quick_gelu for tag in tags):
        _log.warning(
            "%s: some checkpoints of %s use QuickGELU (OpenAI's do), the file does not say; reading it %s QuickGELU, "
            "as the model's name says (%s-quickgelu is the other)",
            checkpoint,
            name,
            "with" if quick_gelu else "without",
            name.removesuffix("-quickgelu"),
        )
    return (tags[0] if tags else {}), quick_gelu


def _build(
    name: str, settings: TeacherSettings, preprocessing: dict[str, Any], quick_gelu: bool, *, from_hub: bool
) -> torch.nn.Module:
    overrides = {key: preprocessing[key] for key in ("mean", "std") if key in preprocessing}
    try:
        # The seed is for random weights; the caller's generator is left untouched in any case.
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            return open_clip.create_model(
                name,
                load_weights=from_hub,
                require_pretrained=from_hub,
                pretrained_text=False,
                force_preprocess_cfg=overrides,
                quick_gelu=quick_gelu,
            )
    except Exception as error:  # wrong keys, sizes that do not fit, a text tower that needs a network
        raise ConfigError(
            f"teacher.model={settings.model!r}: open_clip cannot build it ({_first_line(error)})"
        ) from error


def _load(model: torch.nn.Module, checkpoint: Path, settings: TeacherSettings) -> None:
    try:
        with _quiet():
            open_clip.load_checkpoint(model, str(checkpoint), strict=True, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, EOFError, struct.error) as error:
        raise ConfigError(
            f"{checkpoint}: not a readable checkpoint ({_first_line(error)}); allowed: safetensors, or a PyTorch "
            "file of tensors only (weights_only=True)"
        ) from error
    except Exception as error:  # errors of many kinds, for a state dict of other names, shapes or types
        raise ConfigError(
            f"{checkpoint}: not a checkpoint of the architecture {settings.model!r} ({_mismatch(error)})"
        ) from error


def _mismatch(error: Exception) -> str:
    """The first named difference in PyTorch's long message about a state dict."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[1] if len(lines) > 1 else (lines or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:200]}..."


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = line.partition(" Last error:")[0].rstrip(".;:")
    return line if len(line) <= 200 else f"{line[:200]}..."


@contextlib.contextmanager
def _offline_without_network() -> Iterator[None]:
    """Use only the local cache if the hub's name does not resolve, as its client would retry for 20 s."""
    hub = huggingface_hub.constants
    before = hub.HF_HUB_OFFLINE
    if not before and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(urllib.parse.urlsplit(hub.ENDPOINT).hostname, 443)
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence open_clip, which logs through the root logger and may install a handler on it."""
    root, null = logging.getLogger(), logging.NullHandler()
    before = root.manager.disable
    root.addHandler(null)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        root.removeHandler(null)

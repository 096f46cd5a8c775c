"""The frozen teacher: any open_clip ViT or ResNet, read densely as in MaskCLIP (Zhou et al., ECCV 2022).

The last attention is replaced by its value path, so that every patch gets a vector in CLIP's image-text space.

Legend: B images, H x W pixels, h x w patches (L = h * w), S sentences, W channels inside the tower, D size of the joint
embedding.
"""

from __future__ import annotations

import functools
import hashlib
import json
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from clip2scene.config import TeacherSettings
from clip2scene.errors import ConfigError, one_line
from clip2scene.paths import absolute_teacher
from clip2scene.teacher.weights import Loaded, load_model

FORMAT = "clip2scene-teacher-1"
_RESNET_STRIDE = 32


def load_teacher(settings: TeacherSettings) -> DenseClip:
    """Load the teacher of the settings on the CPU, ready to encode.

    Raises:
        ConfigError: the model is unknown, its weights cannot be loaded or do not fit, the image size is not a multiple
            of the patch size, or the vision tower has no value path to read.
    """
    settings = absolute_teacher(settings)  # so that workers, which start in other folders, load the same
    return DenseClip(load_model(settings), settings)


class DenseClip(nn.Module):
    """A CLIP with one embedding per patch of an image. Frozen: no gradients, evaluation mode only.

    Attributes:
        dim: D.
        grid: (h, w).
        digest: hash of the vision tower's weights, the preprocessing and how the tower is read; not of prompts.
    """

    def __init__(self, loaded: Loaded, settings: TeacherSettings) -> None:
        super().__init__()
        self.settings = settings
        self.clip = loaded.model
        self._tokenizer_name = loaded.tokenizer
        self._text_architecture = loaded.text_architecture
        visual: Any = loaded.model.visual
        patch = _patch_size(visual, settings.model)
        size = (settings.image_height_px, settings.image_width_px)
        for key, pixels, step in zip(("image_height_px", "image_width_px"), size, patch, strict=True):
            if pixels % step:
                raise ConfigError(
                    f"teacher.{key}={pixels} must be a multiple of {step}, the patch size of {settings.model} "
                    f"(nearest: {max(round(pixels / step), 1) * step})"
                )
        self.grid: tuple[int, int] = (size[0] // patch[0], size[1] // patch[1])
        self.dim: int = int(visual.output_dim)
        preprocessing = open_clip.get_model_preprocess_cfg(loaded.model)
        mean, std = (
            (preprocessing["mean"], preprocessing["std"]) if settings.clip_normalisation else ((0,) * 3, (1,) * 3)
        )
        self._mean, self._std = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
        self.digest: str = _digest(
            visual.state_dict(),
            {
                "format": FORMAT,
                "architecture": loaded.architecture,
                "mean": self._mean.tolist(),
                "std": self._std.tolist(),
                "size": size,
                "keep_last_residual": settings.keep_last_residual,
                "keep_last_mlp": settings.keep_last_mlp,
                "precision": settings.precision,
            },
        )
        # After the digest of the published weights, as other machines may round the interpolation differently.
        if isinstance(visual, open_clip.transformer.VisionTransformer):
            _resize_positions(visual, self.grid)
            visual.image_size = size
        if settings.precision == "bf16":
            visual.to(torch.bfloat16)
        self.clip.requires_grad_(False)
        super().train(False)

    @functools.cached_property
    def text_digest(self) -> str:
        """Hash of everything except the vision tower, which :meth:`encode_text` depends on."""
        weights = {k: v for k, v in self.clip.state_dict().items() if not k.startswith("visual.")}
        return _digest(weights, self._text_architecture)

    def train(self, mode: bool = True) -> DenseClip:
        """Refuse training mode.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError("the teacher is frozen: DenseClip has no training mode (train(True) was called)")
        return super().train(False)

    def preprocess(self, image: np.ndarray) -> Tensor:
        """Resize the whole image (bicubic, antialiased, not cropped) to the input size, scale to [0, 1] and normalise.

        Args:
            image: (H, W, 3) uint8 RGB of any size.

        Returns:
            (3, image_height_px, image_width_px) float32.
        """
        assert image.dtype == np.uint8, image.dtype
        assert image.ndim == 3, image.shape
        size = (self.settings.image_width_px, self.settings.image_height_px)
        resized_HW3 = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
        normal_HW3 = (resized_HW3 / np.float32(255) - self._mean) / self._std
        return torch.from_numpy(np.ascontiguousarray(normal_HW3.transpose(2, 0, 1)))

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Dense features of preprocessed images.

        Args:
            images: (B, 3, image_height_px, image_width_px).

        Returns:
            (B, h, w, D) float32, not normalised.
        """
        visual: Any = self.clip.visual
        images = images.to(next(visual.parameters()))
        embed = self._vit if isinstance(visual, open_clip.transformer.VisionTransformer) else self._resnet
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # fp32 as on a CPU, also in convolutions
            features_BLD = embed(visual, images)
        return features_BLD.reshape(len(images), *self.grid, self.dim).float()

    @torch.inference_mode()
    def encode_text(self, sentences: list[str]) -> Tensor:
        """Embed sentences with the model's own tokenizer and text tower.

        Returns:
            (S, D) float32, not normalised, on the model's device.

        Raises:
            ConfigError: the tokenizer cannot be loaded (some must be downloaded).
        """
        try:
            tokenize = open_clip.get_tokenizer(self._tokenizer_name)
        except Exception as error:  # the hub's client raises errors of many kinds
            raise ConfigError(
                f"teacher.model={self.settings.model!r}: its tokenizer cannot be loaded ({one_line(error, 200)})"
            ) from error
        model: Any = self.clip
        tokens_SL = tokenize(sentences).to(model.logit_scale.device)
        causal = isinstance(model, open_clip.CLIP) and model.attn_mask is not None and model.text_pool_type == "argmax"
        return (_encode_short(model, tokens_SL) if causal else model.encode_text(tokens_SL)).float()

    def _vit(self, visual: Any, images: Tensor) -> Tensor:
        """Value path of the last block: ln_1, value and output projection, final norm, visual projection."""
        blocks = visual.transformer.resblocks
        intermediates = visual.forward_intermediates(
            images, indices=[len(blocks) - 2], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )
        x_BLW, block = intermediates["image_intermediates"][0], blocks[-1]
        y_BLW = block.ls_1(value_path(block.attn, block.ln_1(x_BLW)))
        if self.settings.keep_last_residual:
            y_BLW = x_BLW + y_BLW
        if self.settings.keep_last_mlp:
            y_BLW = y_BLW + block.ls_2(block.mlp(block.ln_2(y_BLW)))
        # For a single patch, a final norm before the pooling equals one after it.
        return visual.ln_post(y_BLW) @ visual.proj

    def _resnet(self, visual: Any, images: Tensor) -> Tensor:
        """Value and output projection of the attention pooling, at every position of the last feature map."""
        intermediates = visual.forward_intermediates(images, indices=[4], intermediates_only=True)
        x_BLW = intermediates["image_intermediates"][0].flatten(2).transpose(1, 2)
        return visual.attnpool.c_proj(visual.attnpool.v_proj(x_BLW))


def _encode_short(model: open_clip.CLIP, tokens_SL: Tensor) -> Tensor:
    """``model.encode_text`` without the padding after the longest sentence: five times faster for prompts.

    The result is the same: attention is causal, and the embedding is read at the end-of-text token (the largest id).
    """
    length = int(tokens_SL.argmax(dim=1).max()) + 1
    tokens_SL = tokens_SL[:, :length]
    x_SLW = model.token_embedding(tokens_SL) + model.positional_embedding[:length]
    x_SLW = model.ln_final(model.transformer(x_SLW, attn_mask=model.attn_mask[:length, :length]))
    x_SW = x_SLW[torch.arange(len(x_SLW), device=x_SLW.device), tokens_SL.argmax(dim=1)]
    projection = model.text_projection
    return projection(x_SW) if isinstance(projection, nn.Linear) else x_SW @ projection


def value_path(attention: nn.MultiheadAttention, x_BLW: Tensor) -> Tensor:
    """Value and output projection of (B, L, W) inputs, each for itself: attention of every patch to itself alone."""
    width = attention.embed_dim
    assert attention.in_proj_weight is not None
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[2 * width :]
    values_BLW = functional.linear(x_BLW, attention.in_proj_weight[2 * width :], bias)
    return attention.out_proj(values_BLW)


def _patch_size(visual: Any, model: str) -> tuple[int, int]:
    """Pixels per patch (height, width); refuses towers that cannot be read densely."""
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return _RESNET_STRIDE, _RESNET_STRIDE
    if isinstance(visual, open_clip.transformer.VisionTransformer) and visual.attn_pool is None:
        blocks = visual.transformer.resblocks
        if len(blocks) > 1 and isinstance(getattr(blocks[-1], "attn", None), nn.MultiheadAttention):
            height, width = visual.patch_size
            return int(height), int(width)
    raise ConfigError(
        f"teacher.model={model!r}: its vision tower ({type(visual).__name__}) has no value path to read densely; "
        "allowed: open_clip's own ViT (two blocks or more, no attentional pooling) and ResNets (ViT-B-16, RN50, ...)"
    )


def _resize_positions(visual: Any, grid: tuple[int, int]) -> None:
    """Interpolate the position embeddings of a ViT to another grid (bicubic, antialiased, as open_clip does).

    open_clip's own ``force_image_size`` takes every old grid for a square one, and leaves the embeddings as they are if
    old and new grid differ in shape but not in the number of patches.
    """
    old = visual.grid_size
    if tuple(old) == grid:
        return
    embedding = visual.positional_embedding.detach()
    class_1W, patches_LW = embedding[:1], embedding[1:]
    patches_1Whw = patches_LW.reshape(1, *old, -1).permute(0, 3, 1, 2)
    resized_1Whw = functional.interpolate(patches_1Whw, size=grid, mode="bicubic", antialias=True, align_corners=False)
    resized_LW = resized_1Whw.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)
    visual.positional_embedding = nn.Parameter(torch.cat([class_1W, resized_LW]))
    visual.grid_size = grid


def _digest(tensors: dict[str, Tensor], how: dict[str, Any]) -> str:
    """Hash of the bytes of named tensors, and of how they are read (16 hex characters)."""
    sha = hashlib.sha256(json.dumps(how, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in sorted(tensors.items()):
        array = tensor.detach().cpu().contiguous().numpy()
        sha.update(f"{name}:{array.dtype.str}:{array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]

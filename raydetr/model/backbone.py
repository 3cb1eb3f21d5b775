"""Convolutional backbones: ResNet-50 and ResNet-101 as DETR trains them, and the small network of ``detr_tiny``.

The frozen batch normalization of the ResNets is folded into the convolution before it: ``bn(conv(x, w)) == conv(x, w * scale) + shift``.
The fold happens in the forward pass and is differentiated exactly. It saves the element-wise passes over the feature maps, which cost as
much as the convolutions themselves. State dicts keep torchvision's names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raydetr.model.caching import Cached
from raydetr.model.cpu import products_are_faster, weight_gradient

RESNET_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
Geometry = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # stride, padding, dilation


class FrozenBatchNorm(nn.Module):
    """Batch normalization with fixed statistics and affine parameters, which are four buffers [channels].

    It has no ``num_batches_tracked``; when a state dict (torchvision's) has that entry, it is ignored. The module is never called on
    a feature map: :func:`folded_conv` uses its ``scale_and_shift``.

    Args:
        channels: Channels of the feature map.
    """

    EPS = 1e-5
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._folded = Cached()

    def scale_and_shift(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the affine map that is equivalent to the normalization.

        Args:
            dtype: Dtype of the shift, so that autocast does not convert it in every forward pass.

        Returns:
            The scale, float [channels, 1, 1, 1] with the dtype of the buffers, and the shift, ``dtype`` [channels].
        """
        buffers = self.weight, self.bias, self.running_mean, self.running_var
        return self._folded.get(lambda: self._scale_and_shift(dtype), *buffers, key=dtype)

    def _scale_and_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.EPS).rsqrt()
        return scale[:, None, None, None], (self.bias - self.running_mean * scale).to(dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FoldedConvolution(torch.autograd.Function):
    """A convolution with ``weight * scale`` that saves ``weight``, not a scaled copy of it, for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, geometry: Geometry) -> Tensor:
        """Convolve a feature map with ``weight * scale``, and add ``shift``.

        Args:
            ctx: Autograd's context, which keeps tensors for the backward pass.
            x: Feature map, float [B, inputs, H, W].
            weight: Unscaled weight, float [outputs, inputs, k, k].
            scale: Float [outputs, 1, 1, 1].
            shift: Float [outputs].
            geometry: Stride, padding, and dilation.

        Returns:
            Float [B, outputs, h, w].
        """
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = geometry
        return F.conv2d(x, weight * scale, shift, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        """Compute the gradients of ``x`` and ``weight``.

        Under autocast they are computed in the convolution's dtype, which is that of ``grad``.

        Args:
            ctx: Autograd's context from the forward pass.
            grad: Gradient of the output, float [B, outputs, h, w].

        Returns:
            The gradient of each argument of :meth:`forward`: that of ``x`` (None if it is not needed), that of ``weight`` in its dtype, and
            None for the others, which are constants.
        """
        x, weight, scale = ctx.saved_tensors
        by_products = products_are_faster(grad, weight, ctx.geometry[0])
        wanted = [ctx.needs_input_grad[0], not by_products, False]
        folded = (weight * scale).to(grad.dtype)
        backward = torch.ops.aten.convolution_backward
        grad_x, grad_weight, _ = backward(grad, x.to(grad.dtype), folded, None, *ctx.geometry, False, [0, 0], 1, wanted)
        if by_products:
            grad_weight = weight_gradient(grad, x, weight.shape[-1], *ctx.geometry)
        return grad_x, grad_weight.to(weight.dtype).mul_(scale), None, None, None


class Convolution(nn.Conv2d):
    """A convolution without a bias that divides height and width by ``stride`` and caches its folded weight while it is frozen.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        size: Height and width of the kernel, odd.
        stride: Stride.
        dilation: Dilation.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1):
        padding = dilation * (size // 2)
        super().__init__(inputs, outputs, size, stride, padding, dilation, bias=False)
        self.geometry: Geometry = ((stride, stride), (padding, padding), (dilation, dilation))
        self.folded = Cached()


def folded_conv(x: Tensor, conv: Convolution, norm: FrozenBatchNorm) -> Tensor:
    """Compute ``norm(conv(x))`` as one convolution.

    Args:
        x: Feature map, float [B, inputs, H, W].
        conv: The convolution.
        norm: The normalization of its output.

    Returns:
        Float [B, outputs, h, w].
    """
    # The convolution's dtype: that of autocast, if it is enabled.
    dtype = torch.get_autocast_dtype(x.device.type) if _is_autocast(x.device.type) else conv.weight.dtype
    scale, shift = norm.scale_and_shift(dtype)
    # The compiler decides by itself what is worth keeping for the backward pass.
    if torch.is_grad_enabled() and conv.weight.requires_grad and not torch.compiler.is_compiling():
        return FoldedConvolution.apply(x, conv.weight, scale, shift, conv.geometry)
    if x.is_cpu or conv.weight.requires_grad:
        return F.conv2d(x, conv.weight * scale, shift, *conv.geometry)
    # On other devices, launching small kernels costs time, so the folded weight of a frozen layer is cached.
    weight = conv.folded.get(lambda: (conv.weight * scale).to(dtype), conv.weight, scale, key=dtype)
    return F.conv2d(x, weight, shift, *conv.geometry)


def _is_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3, and 1x1 convolutions (He et al. 2015); the 3x3 convolution has the stride ("ResNet v1.5").

    Args:
        inputs: Channels of the input.
        width: Channels between the convolutions; the output has four times as many.
        stride: Stride of the block.
        dilation: Dilation of the 3x3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int, dilation: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = Convolution(inputs, width, 1), FrozenBatchNorm(width)
        self.conv2, self.bn2 = Convolution(width, width, 3, stride, dilation), FrozenBatchNorm(width)
        self.conv3, self.bn3 = Convolution(width, outputs, 1), FrozenBatchNorm(outputs)
        changes_shape = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(Convolution(inputs, outputs, 1, stride), FrozenBatchNorm(outputs)) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to a feature map.

        Args:
            x: Float [B, inputs, H, W].

        Returns:
            Float [B, 4 * width, H / stride, W / stride], height and width rounded up.
        """
        y = folded_conv(x, self.conv1, self.bn1).relu_()
        y = folded_conv(y, self.conv2, self.bn2).relu_()
        y = folded_conv(y, self.conv3, self.bn3)
        shortcut = x if self.downsample is None else folded_conv(x, *self.downsample)  # pyright: ignore[reportArgumentType]
        return y.add_(shortcut).relu_()


class ResNet(nn.Module):
    """ResNet-50 or ResNet-101 without its classifier.

    The stem and ``layer1`` are frozen as in the official DETR (``models/backbone.py``); ``layer2`` to ``layer4`` train.

    Args:
        name: ``"resnet50"`` or ``"resnet101"``.
        dilation: Dilate the last stage (DC5): stride 16 instead of 32.
    """

    num_channels = 2048
    fpn_channels = (1024, 512, 256)  # of the feature maps before the last, from the coarsest to the finest

    def __init__(self, name: str, dilation: bool):
        super().__init__()
        blocks = RESNET_BLOCKS[name]
        self.conv1 = Convolution(3, 64, 7, 2)
        self.bn1 = FrozenBatchNorm(64)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(256, 128, blocks[1], stride=2)
        self.layer3 = _stage(512, 256, blocks[2], stride=2)
        self.layer4 = _stage(1024, 512, blocks[3], stride=1 if dilation else 2, dilation=2 if dilation else 1)
        _initialize_convolutions(self)
        self.to(memory_format=torch.channels_last)
        self.conv1.requires_grad_(False)
        self.layer1.requires_grad_(False)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the last feature map of a batch.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Ignored, since the features do not depend on the padding mask.

        Returns:
            Float [B, 2048, H / 32, W / 32], height and width rounded up; with ``dilation``, the stride is 16.
        """
        return self.layer4(self.layer3(self.layer2(self.layer1(self._stem(images)))))

    def pyramid(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Return the feature maps of the four stages, from the finest to the last.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Ignored, since the features do not depend on the padding mask.

        Returns:
            Four maps, float [B, 256 / 512 / 1024 / 2048, h, w], with the strides 4, 8, 16 and 32 (16 with ``dilation``).
        """
        maps = [self.layer1(self._stem(images))]
        for stage in (self.layer2, self.layer3, self.layer4):
            maps.append(stage(maps[-1]))
        return maps

    def _stem(self, images: Tensor) -> Tensor:
        # Convolutions run fastest in channels-last memory, on CPUs and GPUs alike.
        x = folded_conv(images.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1).relu_()
        return F.max_pool2d(x, 3, 2, 1)


def _stage(inputs: int, width: int, blocks: int, stride: int, dilation: int = 1) -> nn.Sequential:
    # The first block still sees the undilated map, so only the following ones are dilated.
    first = Bottleneck(inputs, width, stride, dilation=1)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)))


class TinyBlock(nn.Module):
    """Shrink the feature map by ``stride``, then refine it by a residual pair of 3x3 convolutions.

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        size: Kernel size of the shrinking convolution.
        stride: Its stride.
    """

    def __init__(self, inputs: int, outputs: int, size: int, stride: int):
        super().__init__()
        shrink = nn.Conv2d(inputs, outputs, size, stride, padding=(size - stride + 1) // 2, bias=False)
        self.conv1, self.norm1 = shrink, nn.GroupNorm(8, outputs)
        self.conv2, self.norm2 = Convolution(outputs, outputs, 3), nn.GroupNorm(8, outputs)
        self.conv3, self.norm3 = Convolution(outputs, outputs, 3), nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to a feature map.

        Args:
            x: Float [B, inputs, H, W].

        Returns:
            Float [B, outputs, H / stride, W / stride].
        """
        x = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(x)))
        return F.relu(x + self.norm3(self.conv3(y)))


class TinyNet(nn.Module):
    """A backbone of about half a million parameters and stride 16 whose output for an image does not depend on the rest of the batch.

    Its features encode their position in the image (CoordConv, Liu et al. 2018): attention passes on values without their positions,
    and the receptive field of a network this small is too narrow to infer them from the image's borders, as a ResNet does.
    """

    num_channels = 128
    fpn_channels = (128, 64, 32)  # of the feature maps before the last, from the coarsest to the finest
    SMALLEST = 4  # pixels, a cell of the first block
    FREQUENCIES = (0.5, 1, 2, 4)  # of the waves that encode a position, in half-waves across the image

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(TinyBlock(3, 32, 6, 4), TinyBlock(32, 64, 3, 2), TinyBlock(64, self.num_channels, 3, 2))
        self.place = nn.Conv2d(4 * len(self.FREQUENCIES), self.num_channels, 1, bias=False)
        _initialize_convolutions(self)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the features of a batch.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded; None if nothing is padded.

        Returns:
            Float [B, 128, H / 16, W / 16].
        """
        return self._with_position(self.layers(self._input(images)), mask)

    def pyramid(self, images: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """Return the feature maps of the three blocks, and the last of them once more with the encoding of its position added.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded; None if nothing is padded.

        Returns:
            Four maps, float [B, 32 / 64 / 128 / 128, h, w], with the strides 4, 8, 16 and 16.
        """
        maps = [self._input(images)]
        for block in self.layers:
            maps.append(block(maps[-1]))
        return [*maps[1:], self._with_position(maps[-1], mask)]

    def _input(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if min(height, width) < self.SMALLEST:  # a narrow strip: the first kernel needs more pixels
            images = F.pad(images, (0, max(0, self.SMALLEST - width), 0, max(0, self.SMALLEST - height)))
        return images.contiguous()

    def _with_position(self, features: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            inside = features.new_ones(1, *features.shape[-2:], dtype=torch.float32)
        else:
            inside = 1 - F.interpolate(mask[:, None].float(), size=features.shape[-2:])[:, 0]
        return features + self.place(self._waves(inside))

    def _waves(self, inside: Tensor) -> Tensor:
        # Sines and cosines [B, 16, h, w] of row and column, counted over what is not padded (inside: float [B, h, w], 1 inside).
        rows = (inside.cumsum(1) - 0.5) / inside.sum(1, keepdim=True).clamp(min=1)
        columns = (inside.cumsum(2) - 0.5) / inside.sum(2, keepdim=True).clamp(min=1)
        angles = torch.cat([torch.pi * frequency * torch.stack((rows, columns), 1) for frequency in self.FREQUENCIES], 1)
        return torch.cat((angles.sin(), angles.cos()), 1)


def _initialize_convolutions(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Backbone(nn.Module):
    """A backbone network (``body``) that also resizes the padding mask to the size of its feature map.

    After ``requires_grad_(False)``, the whole backbone is frozen and saves nothing for the backward pass.

    Args:
        name: ``"resnet50"``, ``"resnet101"``, or ``"tiny"``.
        dilation: Whether to dilate the last stage of a ResNet (DC5).
    """

    def __init__(self, name: str, dilation: bool):
        super().__init__()
        self.body = TinyNet() if name == "tiny" else ResNet(name, dilation)
        self.num_channels, self.fpn_channels = self.body.num_channels, self.body.fpn_channels

    def forward(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the feature map of a batch and its padding mask.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded; None if nothing is padded.

        Returns:
            Features, float [B, C, h, w], and their padding mask, bool [B, h, w] or None.
        """
        features = self.body(images, mask)
        return features, _shrink_mask(mask, features)

    def pyramid(self, images: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Return the feature maps of all stages of a batch, and the padding mask of the last.

        Args:
            images: Normalized images, float [B, 3, H, W].
            mask: Padding mask, bool [B, H, W], True where padded; None if nothing is padded.

        Returns:
            The maps from the finest to the last, whose channels are ``fpn_channels`` in reverse order and then ``num_channels``; and the
            padding mask of the last map, bool [B, h, w] or None.
        """
        maps = self.body.pyramid(images, mask)
        return maps, _shrink_mask(mask, maps[-1])


def _shrink_mask(mask: Tensor | None, features: Tensor) -> Tensor | None:
    return None if mask is None else F.interpolate(mask[:, None].float(), size=features.shape[-2:])[:, 0].bool()

"""Convolutional backbones: ResNet-50/101 as DETR trains them, and a small network of our own for `detr_tiny`.

The frozen batch normalization of the ResNets is folded into the convolution before it, in the forward pass and exactly
differentiable: ``bn(conv(x, w)) == conv(x, w * scale) + shift``. That saves the element-wise passes over the feature maps,
which cost as much as the convolutions themselves. What is stored keeps torchvision's names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RESNET_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class FrozenBatchNorm(nn.Module):
    """Batch normalization with fixed statistics and affine parameters, all four of them buffers [channels].

    It has no ``num_batches_tracked``; a state dict that has it (torchvision's) loads, the entry is ignored.
    Never called on a feature map: :func:`folded_conv` takes its ``scale_and_shift``.
    """

    EPS = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map [channels], [channels] that the normalization amounts to."""
        scale = self.weight * (self.running_var + self.EPS).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FoldedConvolution(torch.autograd.Function):
    """A convolution with ``weight * scale`` that keeps ``weight``, not a scaled copy of it, for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, geometry: tuple) -> Tensor:
        """x [B, inputs, H, W], weight [outputs, inputs, k, k], scale and shift [outputs]; geometry: stride, padding, dilation."""
        ctx.save_for_backward(x, weight, scale)
        ctx.geometry = geometry
        return F.conv2d(x, weight * scale, shift, *geometry)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        """Gradients of x and weight; under autocast the convolution was in ``grad``'s type, and so are its derivatives."""
        x, weight, scale = ctx.saved_tensors
        by_products = products_are_faster(grad, weight, *ctx.geometry)
        wanted = [ctx.needs_input_grad[0], not by_products, False]
        folded = (weight * scale).to(grad.dtype)
        backward = torch.ops.aten.convolution_backward
        grad_x, grad_weight, _ = backward(grad, x.to(grad.dtype), folded, None, *ctx.geometry, False, [0, 0], 1, wanted)
        if by_products:
            grad_weight = weight_gradient(grad, x, weight.shape[-1], *ctx.geometry)
        return grad_x, grad_weight.to(weight.dtype).mul_(scale), None, None, None


def products_are_faster(grad: Tensor, weight: Tensor, stride: tuple[int, int], *_) -> bool:
    """Whether :func:`weight_gradient` takes less time than oneDNN, whose kernel for it is slow with AVX2 and with strides."""
    if not grad.is_cpu or grad.dtype != weight.dtype:
        return False
    return stride[0] > 1 or torch.backends.cpu.get_cpu_capability() != "AVX512"


def weight_gradient(
    grad: Tensor, x: Tensor, size: int, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """The gradient of a convolution's weight [outputs, inputs, size, size], a matrix product for each of its places.

    grad [B, outputs, h, w] of the result, x [B, inputs, H, W]; both and the gradient lie in channels-last memory.
    """
    (batch, outputs, height, width), inputs = grad.shape, x.shape[1]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    by_pixel = grad.permute(0, 2, 3, 1).reshape(batch * height * width, outputs)
    gradient = grad.new_empty(outputs, size, size, inputs)
    for i in range(size):
        rows = slice(i * dilation[0], i * dilation[0] + stride[0] * (height - 1) + 1, stride[0])
        for j in range(size):
            columns = slice(j * dilation[1], j * dilation[1] + stride[1] * (width - 1) + 1, stride[1])
            seen = x[:, :, rows, columns].permute(0, 2, 3, 1).reshape(len(by_pixel), inputs)
            torch.mm(by_pixel.T, seen, out=gradient[:, i, j])
    return gradient.permute(0, 3, 1, 2)


def folded_conv(x: Tensor, conv: nn.Conv2d, norm: FrozenBatchNorm) -> Tensor:
    """``norm(conv(x))`` as one convolution."""
    scale, shift = norm.scale_and_shift()
    scale, geometry = scale[:, None, None, None], (conv.stride, conv.padding, conv.dilation)
    if torch.is_grad_enabled() and conv.weight.requires_grad and not torch.compiler.is_compiling():  # the compiler keeps what is worth it
        return FoldedConvolution.apply(x, conv.weight, scale, shift, geometry)
    return F.conv2d(x, conv.weight * scale, shift, *geometry)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=dilation * (size // 2), dilation=dilation, bias=False)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions around a shortcut (He et al. 2015, with the stride of "v1.5")."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = _conv(inputs, width, 1), FrozenBatchNorm(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride, dilation), FrozenBatchNorm(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), FrozenBatchNorm(outputs)
        changes_shape = stride != 1 or inputs != outputs
        self.downsample = nn.Sequential(_conv(inputs, outputs, 1, stride), FrozenBatchNorm(outputs)) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, 4 * width, H / stride, W / stride]."""
        y = folded_conv(x, self.conv1, self.bn1).relu_()
        y = folded_conv(y, self.conv2, self.bn2).relu_()
        y = folded_conv(y, self.conv3, self.bn3)
        shortcut = x if self.downsample is None else folded_conv(x, *self.downsample)
        return y.add_(shortcut).relu_()


class ResNet(nn.Module):
    """ResNet-50 or ResNet-101 without its head. Stride 32, with ``dilation`` (DC5) 16.

    The stem and layer1 do not train (as in the official DETR), layer2 to layer4 do.
    """

    num_channels = 2048

    def __init__(self, name: str, dilation: bool):
        super().__init__()
        blocks = RESNET_BLOCKS[name]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
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
        """[B, 3, H, W] to [B, 2048, H / stride, W / stride]; the mask plays no part."""
        # Channels last is the layout that convolutions run fastest in, on CPU as on GPU.
        x = folded_conv(images.contiguous(memory_format=torch.channels_last), self.conv1, self.bn1).relu_()
        x = F.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _stage(inputs: int, width: int, blocks: int, stride: int, dilation: int = 1) -> nn.Sequential:
    # Only the blocks after the first are dilated: the first one still sees the undilated map.
    first = Bottleneck(inputs, width, stride, dilation=1)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)))


class TinyBlock(nn.Module):
    """Shrinks the map by ``stride``, then refines it by a residual pair of 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int):
        super().__init__()
        shrink = nn.Conv2d(inputs, outputs, size, stride, padding=(size - stride + 1) // 2, bias=False)
        self.conv1, self.norm1 = shrink, nn.GroupNorm(8, outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 3), nn.GroupNorm(8, outputs)
        self.conv3, self.norm3 = _conv(outputs, outputs, 3), nn.GroupNorm(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        x = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(x)))
        return F.relu(x + self.norm3(self.conv3(y)))


class TinyNet(nn.Module):
    """About half a million parameters, stride 16; every layer trains and none depends on the other images of the batch.

    Its features say where in the picture they are (CoordConv, Liu et al. 2018): attention passes values on without their
    positions, and a network this small does not see far enough to read them off the picture's edges, as a ResNet does.
    """

    num_channels = 128
    FREQUENCIES = (0.5, 1, 2, 4)  # of the waves that encode a place, in half-waves across the picture

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(TinyBlock(3, 32, 6, 4), TinyBlock(32, 64, 3, 2), TinyBlock(64, self.num_channels, 3, 2))
        self.place = nn.Conv2d(4 * len(self.FREQUENCIES), self.num_channels, 1, bias=False)
        _initialize_convolutions(self)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images [B, 3, H, W] and mask [B, H, W] (True where padded, None: nothing is) to [B, 128, H / 16, W / 16]."""
        features = self.layers(images.contiguous())
        if mask is None:
            inside = features.new_ones(1, *features.shape[-2:], dtype=torch.float32)
        else:
            inside = 1 - F.interpolate(mask[:, None].float(), size=features.shape[-2:])[:, 0]
        return features + self.place(self._waves(inside))

    def _waves(self, inside: Tensor) -> Tensor:
        """Sines and cosines of row and column, [B, 16, h, w], counted over what is not padded ([B, h, w], 1 inside)."""
        rows = (inside.cumsum(1) - 0.5) / inside.sum(1, keepdim=True).clamp(min=1)
        columns = (inside.cumsum(2) - 0.5) / inside.sum(2, keepdim=True).clamp(min=1)
        angles = torch.cat([torch.pi * frequency * torch.stack((rows, columns), 1) for frequency in self.FREQUENCIES], 1)
        return torch.cat((angles.sin(), angles.cos()), 1)


def _initialize_convolutions(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class Backbone(nn.Module):
    """``body`` (the network) and what is common to all of them: the mask of the feature map.

    ``requires_grad_(False)`` freezes the whole of it; nothing is then recorded for the backward pass.
    """

    def __init__(self, name: str, dilation: bool):
        super().__init__()
        self.body = TinyNet() if name == "tiny" else ResNet(name, dilation)
        self.num_channels = self.body.num_channels

    def forward(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Images [B, 3, H, W] and mask [B, H, W] (True where padded; None: nothing is) to features [B, C, h, w], mask [B, h, w]."""
        features = self.body(images, mask)
        if mask is not None:
            mask = F.interpolate(mask[:, None].float(), size=features.shape[-2:])[:, 0].bool()
        return features, mask
